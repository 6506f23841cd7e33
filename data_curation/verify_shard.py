"""One shard against the index: every byte of the tar is looked at, and every row must be met exactly once."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from data_curation.index import INDEX, SCHEMA, CorpusError, read_part
from data_curation.shards import BLOCK, facts_of
from data_curation.slices import SliceError, checksum, decode, sha256
from data_curation.spans import Span, rows_of
from data_curation.tarwalk import Broken, Member, blocks, walk

__all__ = ["AGAIN", "Fault", "check_shard"]

AGAIN = "run the same `axial curate` again"
_COPY = f"copy the shard again, or delete it and {AGAIN}"


@dataclass(frozen=True, order=True)
class Fault:
    """What is wrong with a file or sample of a corpus, and what helps. `sample` is "" where it is about the file."""

    file: str
    sample: str
    what: str
    remedy: str

    def __str__(self) -> str:
        sample = f", sample {self.sample}" if self.sample else ""
        return f"{self.file}{sample}: {self.what}; {self.remedy}"


def check_shard(folder: Path, pixels: bool, span: Span) -> tuple[Fault, ...]:
    """Everything that is wrong with one shard, its rows in rows/ and its rows in the index.

    `pixels` also decodes every slice whose stored bytes have the right checksum, and hashes it.
    """
    try:
        table = rows_of(folder, span)
    except CorpusError as error:
        return (Fault(INDEX, "", str(error), AGAIN),)
    found = list(_part_faults(folder, span.shard, table))
    rows = {row["key"]: row for row in _written(folder, span.shard, table)}
    if len(rows) != len(table):
        what = f"{len(table) - len(rows)} rows of {span.shard} have the key of another row"
        found.append(Fault(INDEX, "", what, AGAIN))
    found += [Fault(INDEX, key, what, AGAIN) for key, row in rows.items() for what in _row_faults(row)]
    path = folder / "shards" / span.shard
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        return (*found, Fault(f"shards/{span.shard}", "", f"cannot be read ({error.strerror})", _COPY))
    tar = _Tar(f"shards/{span.shard}", rows, pixels)
    try:
        tar.check(descriptor)
    except OSError as error:
        tar.say("", f"cannot be read ({error.strerror})")
    finally:
        os.close(descriptor)
    return (*found, *tar.faults)


def _row_faults(row: Mapping[str, Any]) -> Iterator[str]:
    """What a row of the index says that cannot be."""
    if row["key"] != f"{row['volume']}_{row['z']:05d}":
        yield f"is not named after its volume {row['volume']} and slice {row['z']}"
    if (row["split"] == "excluded") != bool(row["excluded"]):
        yield f"has the split {row['split']!r} and the reason for exclusion {row['excluded']!r}"
    group = row["shard"].rpartition("-")[0]
    if row["duplicate"] != (group == "duplicates") or (group in ("train", "val") and row["written"] not in (group, "")):
        kind = f"of the split {row['written']!r} and {'' if row['duplicate'] else 'no '}duplicate"
        yield f"is {kind}, and lies in {group}"


def _written(folder: Path, shard: str, table: pa.Table) -> list[dict[str, Any]]:
    """The rows, with `written`: the split when the shard was written, "" where nobody knows it any more."""
    rows: list[dict[str, Any]] = table.to_pylist()
    splits: dict[str, str] = {}
    if any(row["excluded"] for row in rows):
        try:
            part = read_part(_part(folder, shard), ["key", "split"])
            splits = dict(zip(part["key"].to_pylist(), part["split"].to_pylist(), strict=True))
        except CorpusError:
            pass  # told by _part_faults
    for row in rows:
        row["written"] = splits.get(row["key"], "") if row["excluded"] else row["split"]
    return rows


def _part(folder: Path, shard: str) -> Path:
    return folder / "rows" / f"{Path(shard).stem}.parquet"


def _part_faults(folder: Path, shard: str, rows: pa.Table) -> Iterator[Fault]:
    """Where rows/ and the index differ. Exclusion is the index's alone: it came after the shard was finished."""
    path = _part(folder, shard)
    name = f"rows/{path.name}"
    try:
        stored = read_part(path)
        part = stored.replace_schema_metadata(None).cast(SCHEMA)
    except (CorpusError, ValueError) as error:  # pyarrow's errors about a schema are ValueErrors
        what = "is missing" if not path.exists() else f"cannot be read ({' '.join(str(error).split())})"
        yield Fault(name, "", what, f"copy it again, or delete it and {AGAIN}")
        return
    shards = folder / "shards" / shard
    size = (stored.schema.metadata or {}).get(b"tar_bytes", b"").decode()
    if shards.exists() and size != str(shards.stat().st_size):
        yield Fault(
            f"shards/{shard}", "", f"has {shards.stat().st_size:,} bytes, its rows say {size or 'nothing'}", _COPY
        )
    remedy = f"{AGAIN}, or copy both again"
    if part["key"].to_pylist() != rows["key"].to_pylist():
        here, there = set(part["key"].to_pylist()), set(rows["key"].to_pylist())
        for key in sorted(here ^ there):
            where = "the index has no such row" if key in here else f"{name} has no such row, the index has"
            yield Fault(INDEX, key, where, remedy)
        if here == there:
            yield Fault(INDEX, "", f"has the rows of {name} in another order or number", remedy)
        return
    stays = pc.equal(rows["excluded"], "")
    for column in SCHEMA.names:
        mine, its = part[column], rows[column]
        if column in ("split", "excluded"):
            mine, its = mine.filter(stays), its.filter(stays)
        if not mine.equals(its):
            differ = pc.not_equal(mine, its)
            keys = (rows["key"].filter(stays) if column in ("split", "excluded") else rows["key"]).filter(differ)
            for key in keys.to_pylist():
                yield Fault(INDEX, key, f"{column} is another one than in {name}", remedy)


@dataclass
class _Tar:
    """The check of one tar: what was met so far, and the faults."""

    file: str
    rows: Mapping[str, dict[str, Any]]
    pixels: bool
    faults: list[Fault] = field(default_factory=list)
    met: Counter[str] = field(default_factory=Counter)  # names of members
    told: set[str] = field(default_factory=set)  # names of members that are known to be broken
    unknown: list[str] = field(default_factory=list)
    moved: list[tuple[str, int, int]] = field(default_factory=list)

    def say(self, sample: str, what: str) -> None:
        """Notes a fault that a new copy of the shard mends."""
        self.faults.append(Fault(self.file, sample, what, _COPY))

    def check(self, descriptor: int) -> None:
        """Walks the tar from its first byte to its last."""
        starts: dict[int, str] = {}
        for row in self.rows.values():
            starts[row["offset"] - BLOCK] = f"{row['key']}.{row['codec']}"
            starts[row["offset"] + blocks(row["size"])] = f"{row['key']}.json"
        for one in walk(descriptor, os.fstat(descriptor).st_size, sorted(starts)):
            if isinstance(one, Broken):
                name = starts.get(one.at, "")
                self.told.add(name)
                self.say(name.partition(".")[0], f"{one.what} (byte {one.at:,}{f', {name}' if name else ''})")
            else:
                self._member(one)
        self._sum_up()

    def _member(self, one: Member) -> None:
        key, _, ending = one.name.partition(".")
        self.met[one.name] += 1
        row = self.rows.get(key)
        if row is None:
            self.unknown.append(one.name)
            return
        if self.met[one.name] > 1:
            self.say(key, f"{one.name} is there more than once")
            return
        if ending not in (row["codec"], "json"):
            self.say(key, f"{one.name} is no part of a sample")
            return
        if not one.plain:
            self.say(key, f"{one.name} has another owner, time, mode or kind than a member of a shard")
        if not one.padded:
            self.say(key, f"{one.name} is not followed by zeros")
        for what in self._json(row, one.data) if ending == "json" else self._slice(row, one):
            self.say(key, what)

    def _slice(self, row: Mapping[str, Any], one: Member) -> Iterator[str]:
        if one.at + BLOCK != row["offset"]:
            self.moved.append((row["key"], one.at + BLOCK, row["offset"]))
        if len(one.data) != row["size"]:
            yield f"has {len(one.data)} stored bytes, the index says {row['size']}"
        elif checksum(one.data) != row["crc32"]:
            yield "the stored bytes are damaged (checksum differs)"
        elif self.pixels:  # only now: damaged HTJ2K may decode to noise, or never end
            try:
                hu = decode(one.data, row["codec"])
            except SliceError as error:
                yield f"{error}"
                return
            if hu.shape != (row["height"], row["width"]):
                yield f"is {hu.shape[0]} x {hu.shape[1]} pixels, the index says {row['height']} x {row['width']}"
            elif sha256(hu) != row["sha256"]:
                yield "the decoded pixels are not those that were curated (SHA-256 differs)"

    def _json(self, row: Mapping[str, Any], data: bytes) -> Iterator[str]:
        try:
            facts = json.loads(data)
        except ValueError as error:
            yield f"its JSON cannot be read ({error})"
            return
        if not isinstance(facts, dict):
            yield "its JSON is no object"
            return
        wanted = facts_of(row) | ({"split": row["written"]} if row["written"] else {"split": facts.get("split")})
        wrong = [name for name in sorted(wanted | facts) if not _same(facts.get(name), wanted.get(name))]
        if wrong:
            yield f"its JSON says something else than the index about {', '.join(wrong)}"
        elif json.dumps(facts, separators=(",", ":")).encode() != data:
            yield "its JSON is not written as a shard's is"

    def _sum_up(self) -> None:
        """What can be said only when the whole tar was read."""
        if self.unknown and not any(name.partition(".")[0] in self.rows for name in self.met):
            self.say("", f"is another shard: it holds {len(self.unknown)} members that its rows do not know")
            return
        for name in self.unknown:
            self.say(name.partition(".")[0], f"the shard holds {name}, which the index does not know")
        if self.moved:
            key, there, wanted = self.moved[0]
            others = f", and {len(self.moved) - 1} later samples too" if len(self.moved) > 1 else ""
            self.say(key, f"begins at byte {there:,}, the index says {wanted:,}{others}")
        for row in self.rows.values():
            names = [f"{row['key']}.{ending}" for ending in (row["codec"], "json")]
            lost = [name for name in names if not self.met[name] and name not in self.told]
            if lost:
                self.say(row["key"], f"{' and '.join(lost)} cannot be found in the shard")


def _same(stored: object, wanted: object) -> bool:
    return type(stored) is type(wanted) and stored == wanted
