"""One volume is read, judged, measured and encoded once; the proof is its Parquet file below private/scan/.

Next to the proof lies the spool: the encoded slices end to end, until the shards that hold them are written. So a
volume is decompressed once, and the plan of the shards can still wait until every volume is known.
"""

from __future__ import annotations

import hashlib
import json
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
from data_curation.index import read_part, unreadable
from data_curation.likeness import SIDE, shown, sign
from data_curation.settings import Terms
from data_curation.slices import Slice, SliceRule, checksum, content, cut, encode, sha256
from data_curation.volumes import Volume, VolumeError, read

__all__ = [
    "SCAN",
    "Scan",
    "ScanTask",
    "has_spool",
    "marks",
    "read_constants",
    "read_contents",
    "read_rows",
    "read_scan",
    "scan",
    "spool_path",
    "stamp",
    "thumbs",
]

FORMAT = 2  # another number makes every earlier scan invalid
SCAN = Path("private", "scan")
_COLUMNS = pa.schema(
    [
        ("z", pa.int32()), ("box_y", pa.int32()), ("box_x", pa.int32()), ("height", pa.int32()), ("width", pa.int32()),
        ("outside_max", pa.int16()), ("outside_body", pa.float32()), ("hu_min", pa.int16()), ("hu_max", pa.int16()),
        ("hu_mean", pa.float32()), ("hu_std", pa.float32()), ("body_fraction", pa.float32()), ("sha256", pa.string()),
        ("content", pa.string()), ("code", pa.uint64()), ("doubt", pa.uint64()), ("thumb", pa.binary(SIDE * SIDE)),
        ("at", pa.int64()), ("size", pa.int32()), ("crc32", pa.uint32()),
    ]
)  # fmt: skip


@dataclass(frozen=True)
class ScanTask:
    """One volume to be scanned, under its hashed names, and the rules for it."""

    case: Case
    dataset: str
    terms: Terms
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
        left_out: dict[int, str] = {}
        rows, spooled = _encode(folder, task, volume, left_out)
        constants = {**_constants(task, volume), "left_out": list(left_out.items())}
        if not rows:
            verdict = Verdict(False, "air", f"none of {len(volume.hu)} slices shows a body")
    result = Scan(task.stamp, verdict.kept, verdict.reason, verdict.detail, len(rows), spooled, again)
    columns = {name: [row[name] for row in rows] for name in _COLUMNS.names}
    proof = {"scan": json.dumps(asdict(result)), "volume": json.dumps(constants)}
    write_parquet(
        _proof_path(folder, task.volume), pa.table(columns, _COLUMNS).replace_schema_metadata(proof), lasting=False
    )
    return result


def _judged(task: ScanTask) -> tuple[Volume | None, Verdict, bool]:
    """The volume if it is kept, the verdict, and whether a refusal is worth another look in the next run."""
    try:
        volume = repair(read(task.case.image, task.limits), task.limits)
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
        "dataset": task.dataset, "licence": task.terms.licence, "commercial": task.terms.commercial,
        "held_out": task.case.held_out,
        "volume": task.volume, "patient": task.patient, "study": task.study,
        "n_slices": depth, "frame_height": height, "frame_width": width, "box": task.rule.stored,
        "spacing_z": volume.spacing[0], "spacing_y": volume.spacing[1], "spacing_x": volume.spacing[2],
        "rounding": volume.rounding, "notes": "; ".join(volume.notes), "codec": task.codec,
    }  # fmt: skip


def _encode(folder: Path, task: ScanTask, volume: Volume, left_out: dict[int, str]) -> tuple[list[dict[str, Any]], int]:
    """The rows, and the bytes of the spool that now holds the encoded slices."""
    kept = cut(volume.hu, volume.spacing, task.rule, left_out)
    if not task.spool:
        return [_row(one, b"", 0) for one in kept], 0
    rows, at = list[dict[str, Any]](), 0
    with aside(spool_path(folder, task.volume), lasting=False) as file:
        for one in kept:
            data = encode(one.hu, task.codec)
            rows.append(_row(one, data, at))
            at += file.write(data)
    return rows, at


def _row(one: Slice, data: bytes, at: int) -> dict[str, Any]:
    likeness = sign(shown(one.body))
    return {
        "z": one.z, "box_y": one.box.y, "box_x": one.box.x, "height": one.box.height, "width": one.box.width,
        "outside_max": one.outside_max, "outside_body": one.outside_body, "body_fraction": one.body_fraction,
        **one.statistics(), "sha256": sha256(one.hu), "content": content(one.hu),
        "code": likeness.code, "doubt": likeness.doubt, "thumb": likeness.thumb.tobytes(),
        "at": at, "size": len(data), "crc32": checksum(data),
    }  # fmt: skip


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
    table = read_part(
        _proof_path(folder, volume), [name for name in _COLUMNS.names if name not in ("code", "doubt", "thumb")]
    )
    constants = read_constants(folder, volume)
    del constants["left_out"]
    rows = []
    for row in table.to_pylist():
        key, position = f"{volume}_{row['z']:05d}", row["z"] * constants["spacing_z"]
        rows.append({**constants, **row, "key": key, "position_mm": position})
    return rows


def read_constants(folder: Path, volume: str) -> dict[str, Any]:
    """What all slices of a kept volume have in common, and `left_out`: (z, reason) of the slices that are not kept."""
    path = _proof_path(folder, volume)
    try:
        constants: dict[str, Any] = json.loads(pq.read_schema(path).metadata[b"volume"])
    except (OSError, pa.ArrowInvalid) as error:
        raise unreadable(path, error) from None
    return constants


def marks(folder: Path, volume: str) -> tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint64]]:
    """Per kept slice the first 64 bits of its content, 0 for a uniform one; its code and doubts, see likeness.py."""
    table = read_part(_proof_path(folder, volume), ["content", "code", "doubt"])
    contents = [int(name[:16] or "0", 16) for name in table["content"].to_pylist()]
    return np.array(contents, np.uint64), table["code"].to_numpy(), table["doubt"].to_numpy()


def read_contents(folder: Path, volume: str) -> list[str]:
    """Per measured slice its content, see slices.py."""
    contents: list[str] = read_part(_proof_path(folder, volume), ["content"])["content"].to_pylist()
    return contents


def thumbs(folder: Path, volume: str) -> NDArray[np.uint8]:
    """The thumbnails [S, SIDE, SIDE] of the kept slices."""
    stored = read_part(_proof_path(folder, volume), ["thumb"])["thumb"].to_pylist()
    return np.frombuffer(b"".join(stored), np.uint8).reshape(-1, SIDE, SIDE)
