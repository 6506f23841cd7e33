"""One shard = one task = one proof.

A shard is a plain WebDataset tar of `<key>.<codec>` and `<key>.json`, with fixed owner and time, so that its bytes
depend on its content only. It counts as written when its Parquet rows are there, name the same plan, and give the
tar's size: the rows are renamed into place after the tar. The members' headers come from Python's tarfile: webdataset's
TarWriter takes three times as long, and would bring torch into every worker (2 s and 600 MB).
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_curation.aside import aside, write_parquet
from data_curation.index import SCHEMA, CorpusError
from data_curation.scan import read_rows, spool_path
from data_curation.slices import checksum

__all__ = ["BLOCK", "OWNER", "Part", "Shard", "facts_of", "is_written", "write_shard"]

BLOCK = tarfile.BLOCKSIZE
OWNER = "axial"


@dataclass(frozen=True)
class Part:
    """The slices of one volume that go into one shard: positions in its scan, and what only the plan knows."""

    volume: str
    stamp: str  # of the scan, see scan.py: another stamp is another content
    rows: tuple[int, ...]
    split: str
    duplicate_group: str
    duplicate: bool


@dataclass(frozen=True)
class Shard:
    """A tar to be written: its name without ending, its parts, and the seed that orders its slices."""

    name: str
    parts: tuple[Part, ...]
    seed: int

    @property
    def plan(self) -> str:
        """Names everything the bytes depend on."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    @property
    def slices(self) -> int:
        return sum(len(part.rows) for part in self.parts)


def is_written(folder: Path, shard: Shard) -> bool:
    """Are the tar and its rows there, by this plan and whole?"""
    try:
        proof = pq.read_schema(folder / "rows" / f"{shard.name}.parquet").metadata
        size = (folder / "shards" / f"{shard.name}.tar").stat().st_size
    except (OSError, pa.ArrowInvalid):
        return False
    return bool(proof.get(b"plan") == shard.plan.encode() and proof.get(b"tar_bytes") == str(size).encode())


def write_shard(folder: Path, shard: Shard) -> int:
    """Writes the tar from the spools of its volumes, then its rows; returns the tar's bytes.

    The slices are in an order drawn from the seed, so that someone who streams the tar meets its patients mixed.
    """
    rows = sorted(_rows(folder, shard), key=lambda row: hashlib.sha256(f"{shard.seed} {row['key']}".encode()).digest())
    with ExitStack() as stack:
        spools = {part.volume: stack.enter_context(_open_spool(folder, part.volume)) for part in shard.parts}
        proof = folder / "rows" / f"{shard.name}.parquet"
        proof.unlink(missing_ok=True)  # of another plan; it must not vouch for the new tar
        with aside(folder / "shards" / f"{shard.name}.tar") as file:
            _fill(file, rows, spools)
            size = file.tell()
    table = pa.Table.from_pylist([{name: row[name] for name in SCHEMA.names} for row in rows], SCHEMA)
    vouched = {"plan": shard.plan, "tar_bytes": str(size), "slices": str(len(rows))}
    write_parquet(proof, table.replace_schema_metadata(vouched))
    return size


def _fill(file: IO[bytes], rows: list[dict[str, Any]], spools: Mapping[str, IO[bytes]]) -> None:
    """Writes the tar into `file` and each slice's offset into its row."""
    at = 0
    for row in rows:
        spool = spools[row["volume"]]
        data = os.pread(spool.fileno(), row["size"], row["at"])
        if checksum(data) != row["crc32"]:
            Path(spool.name).unlink()
            raise CorpusError(
                f"{spool.name} was damaged and is removed now; run the same command again to read its scan"
            )
        facts = json.dumps(facts_of(row), separators=(",", ":")).encode()
        row["offset"] = at + BLOCK
        for ending, content in ((row["codec"], data), ("json", facts)):
            at += file.write(_header(f"{row['key']}.{ending}", len(content)))
            at += file.write(content)
            at += file.write(bytes(-len(content) % BLOCK))
    at += file.write(bytes(2 * BLOCK))
    file.write(bytes(-at % tarfile.RECORDSIZE))


def _header(name: str, size: int) -> bytes:
    """A tar member's header; owner and time are the same for all, so that bytes depend on the content only."""
    member = tarfile.TarInfo(name)
    member.size, member.uname, member.gname = size, OWNER, OWNER
    return member.tobuf(tarfile.USTAR_FORMAT)


def _rows(folder: Path, shard: Shard) -> Iterator[dict[str, Any]]:
    for part in shard.parts:
        planned = {
            "split": part.split, "duplicate_group": part.duplicate_group, "duplicate": part.duplicate, "excluded": ""
        }  # fmt: skip
        rows = read_rows(folder, part.volume)
        for position in part.rows:
            yield {**rows[position], **planned, "shard": f"{shard.name}.tar"}


def _open_spool(folder: Path, volume: str) -> IO[bytes]:
    try:
        return open(spool_path(folder, volume), "rb")
    except OSError as error:
        raise CorpusError(f"{error.filename}: {error.strerror}; run the same command again to read its scan") from None


def facts_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a reader of the stream gets beside the pixels; nothing that names a patient."""
    same = (
        "dataset",
        "volume",
        "z",
        "n_slices",
        "hu_min",
        "hu_max",
        "body_fraction",
        "split",
        "licence",
        "sha256",
        "crc32",
    )
    spacing = [row["spacing_z"], row["spacing_y"], row["spacing_x"]]
    pairs = {"shape_yx": ("height", "width"), "frame_yx": ("frame_height", "frame_width"), "box_yx": ("box_y", "box_x")}
    places = {name: [row[y], row[x]] for name, (y, x) in pairs.items()}
    return {**{name: row[name] for name in same}, "spacing_zyx_mm": spacing, **places}
