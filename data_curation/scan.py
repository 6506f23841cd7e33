"""One volume is read, judged, measured and encoded once; the proof is its Parquet file below private/scan/.

Next to the proof lies the spool: the encoded slices end to end, until the shards that hold them are written. So a
volume is decompressed once, and the plan of the shards can still wait until every volume is known.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_curation.aside import aside, write_parquet
from data_curation.catalogue import Case
from data_curation.checks import Limits, Verdict, check, repair
from data_curation.index import read_part
from data_curation.slices import SliceRule, checksum, cut, encode
from data_curation.volumes import Volume, VolumeError, read

__all__ = ["Scan", "ScanTask", "contents", "has_spool", "read_rows", "read_scan", "scan", "spool_path", "stamp"]

FORMAT = 1  # another number makes every earlier scan invalid
SCAN = Path("private", "scan")
_COLUMNS = pa.schema(
    [
        ("z", pa.int32()), ("hu_min", pa.int16()), ("hu_max", pa.int16()), ("hu_mean", pa.float32()),
        ("hu_std", pa.float32()), ("body_fraction", pa.float32()), ("sha256", pa.string()), ("content", pa.string()),
        ("at", pa.int64()), ("size", pa.int32()), ("crc32", pa.uint32()),
    ]
)  # fmt: skip


@dataclass(frozen=True)
class ScanTask:
    """One volume to be scanned, under its hashed names, and the rules for it."""

    case: Case
    dataset: str
    licence: str
    volume: str
    patient: str
    study: str
    stamp: str
    spool: bool  # False: only judged and measured, as for a case that is held out
    limits: Limits
    rule: SliceRule
    codec: str


@dataclass(frozen=True)
class Scan:
    """The verdict on one volume. `again`: the refusal may have had a passing cause, so the next run looks again."""

    stamp: str
    kept: bool
    reason: str
    detail: str
    slices: int = 0
    spool_bytes: int = 0
    again: bool = False


def stamp(case: Case, *rules: object) -> str:
    """Changes when a source file (by name, size or time of change) or a rule does."""
    files = []
    for path in case.image.files:
        try:
            status = path.stat()
            files.append((path.name, status.st_size, status.st_mtime_ns))
        except OSError:
            files.append((path.name, -1, 0))
    return hashlib.sha256(repr((FORMAT, case.source, files, *rules)).encode()).hexdigest()[:32]


def scan(folder: Path, task: ScanTask) -> Scan:
    """Reads, judges, encodes; writes the spool, then the proof. Bad input is a verdict, a full disk an OSError."""
    volume, verdict, again = _judged(task)
    rows: list[dict[str, Any]] = []
    constants: dict[str, Any] = {}
    spooled = 0
    if volume is not None:
        constants = _constants(task, volume)
        rows, spooled = _encode(folder, task, volume)
        if not rows:
            verdict = Verdict(False, "air", f"none of {len(volume.hu)} slices shows a body")
    result = Scan(task.stamp, verdict.kept, verdict.reason, verdict.detail, len(rows), spooled, again)
    columns = {name: [row[name] for row in rows] for name in _COLUMNS.names}
    proof = {"scan": json.dumps(asdict(result)), "volume": json.dumps(constants)}
    write_parquet(_proof_path(folder, task.volume), pa.table(columns, _COLUMNS).replace_schema_metadata(proof))
    return result


def _judged(task: ScanTask) -> tuple[Volume | None, Verdict, bool]:
    """The volume if it is kept, the verdict, and whether a refusal is worth another look in the next run."""
    try:
        volume = repair(read(task.case.image), task.limits)
        verdict = check(volume, task.limits)
    except VolumeError as error:
        return None, Verdict(False, error.reason, str(error)), error.reason == "unreadable"
    except MemoryError:
        return None, Verdict(False, "memory", "more memory needed than there is; use fewer workers"), True
    except Exception as error:  # one bad file must not stop the other thousands; it is listed with what went wrong
        text = " ".join(str(error).split())
        return None, Verdict(False, "unreadable", f"{type(error).__name__}: {text}"[:500]), True
    return (volume if verdict.kept else None), verdict, False


def _constants(task: ScanTask, volume: Volume) -> dict[str, Any]:
    depth, height, width = volume.hu.shape
    return {
        "dataset": task.dataset, "licence": task.licence, "held_out": task.case.held_out,
        "volume": task.volume, "patient": task.patient, "study": task.study,
        "n_slices": depth, "height": height, "width": width,
        "spacing_z": volume.spacing[0], "spacing_y": volume.spacing[1], "spacing_x": volume.spacing[2],
        "rounding": volume.rounding, "notes": "; ".join(volume.notes), "codec": task.codec,
    }  # fmt: skip


def _encode(folder: Path, task: ScanTask, volume: Volume) -> tuple[list[dict[str, Any]], int]:
    """The rows, and the bytes of the spool that now holds the encoded slices."""
    at = 0
    rows: list[dict[str, Any]] = []

    def measured() -> Iterator[bytes]:
        nonlocal at
        for cut_slice in cut(volume.hu, volume.spacing[0], task.rule):
            data = encode(cut_slice.hu, task.codec) if task.spool else b""
            own = {"z": cut_slice.z, "body_fraction": cut_slice.body_fraction, **cut_slice.statistics()}
            hashes = {"sha256": cut_slice.sha256, "content": cut_slice.content, "crc32": checksum(data)}
            rows.append({**own, **hashes, "at": at, "size": len(data)})
            at += len(data)
            yield data

    if task.spool:
        with aside(spool_path(folder, task.volume)) as file:
            for data in measured():
                file.write(data)
    else:
        list(measured())
    return rows, at


def _proof_path(folder: Path, volume: str) -> Path:
    return folder / SCAN / f"{volume}.parquet"


def spool_path(folder: Path, volume: str) -> Path:
    """The encoded slices of a volume, end to end."""
    return folder / SCAN / f"{volume}.slices"


def has_spool(folder: Path, volume: str, scanned: Scan) -> bool:
    """Is the volume's spool there, with the bytes its proof says?"""
    try:
        return spool_path(folder, volume).stat().st_size == scanned.spool_bytes
    except FileNotFoundError:
        return False


def read_scan(folder: Path, volume: str) -> Scan | None:
    """The proof of an earlier scan; None where there is none, or a damaged one."""
    try:
        return Scan(**json.loads(pq.read_schema(_proof_path(folder, volume)).metadata[b"scan"]))
    except (OSError, pa.ArrowInvalid, KeyError, TypeError, ValueError):
        return None


def read_rows(folder: Path, volume: str) -> list[dict[str, Any]]:
    """One row per kept slice, with the columns of the index that do not depend on the plan, and `at` in the spool."""
    table = read_part(_proof_path(folder, volume))
    constants = json.loads(table.schema.metadata[b"volume"])
    rows = []
    for row in table.to_pylist():
        key, position = f"{volume}_{row['z']:05d}", row["z"] * constants["spacing_z"]
        rows.append({**constants, **row, "key": key, "position_mm": position})
    return rows


def contents(folder: Path, volumes: Sequence[str]) -> list[NDArray[np.uint64]]:
    """Per volume and slice the first 64 bits of its content, 0 for a uniform slice."""
    found = []
    for volume in volumes:
        names = read_part(_proof_path(folder, volume), ["content"])["content"].to_pylist()
        found.append(np.array([int(name[:16] or "0", 16) for name in names], np.uint64))
    return found
