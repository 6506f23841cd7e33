"""`axial verify folder=CORPUS`: is every byte of a corpus what it was, and does the corpus keep its own promises?

Needs nothing but the corpus itself: neither the source data nor private/. Nothing is changed.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from data_curation.accounts import Tally
from data_curation.index import INDEX, SCHEMA, CorpusError, fingerprint, read_index, read_part
from data_curation.proofs import proofs
from data_curation.spans import spans
from data_curation.verify_shard import AGAIN, Fault, check_shard
from launch.crew import Crew, Lost, Workers, workers_for
from launch.progress import Progress
from launch.run import Outcome
from launch.settings import Settings as Base

__all__ = ["Fault", "Settings", "main", "verify"]

RECORD = "corpus.json"
LEFT_OUT = "left_out.parquet"


class Settings(Base):
    """Which corpus, and how closely it is looked at."""

    folder: Path = Field(description="corpus folder, as made by `axial curate`")
    pixels: bool = Field(True, description="also decode every slice and compare the SHA-256 of its pixels")
    workers: int = Field(0, ge=0, description="processes; 0: one for each core")


def main(settings: Settings) -> Outcome:
    """Prints every fault on a line of its own. Not ok if there is one."""
    faults = verify(settings.folder, settings.pixels, Workers(workers_for(settings.workers)))
    for fault in faults:
        print(fault, flush=True)
    if faults:
        files = Counter(fault.file for fault in faults)
        told = ", ".join(f"{count} in {file}" for file, count in sorted(files.items())[:10])
        more = f" and {len(files) - 10} other files" if len(files) > 10 else ""
        return Outcome((), (f"{len(faults)} faults, see above: {told}{more}",), ok=False)
    looked = "every byte and every pixel" if settings.pixels else "every byte"
    return Outcome((f"{settings.folder} is sound: {looked} is what it was",))


def verify(folder: Path, pixels: bool = True, crew: Crew | None = None) -> tuple[Fault, ...]:
    """All faults of a corpus, sorted; none for a sound one. Without a crew the shards are checked in this process.

    Raises CorpusError where there is no index to go by.
    """
    parts = spans(folder)
    missing = [name for name in SCHEMA.names if name not in pq.read_schema(folder / INDEX).names]
    if missing:
        raise CorpusError(f"{folder / INDEX} has no column {', '.join(missing)}: {AGAIN}")
    found: list[Fault] = []
    crew = crew or Workers(0)
    with crew.open() as each, Progress(sum(part.count for part in parts), "verify", "slices") as bar:
        for part, faults in each(partial(check_shard, folder, pixels), parts, lambda part: part.shard):
            if isinstance(faults, Lost):
                found.append(Fault(f"shards/{part.shard}", "", f"checking it {faults.detail}", "run the check again"))
            else:
                found += faults
            bar.advance(part.count)
    for check in (_files, _counts, _complete, _apart):
        try:
            found += check(folder)
        except CorpusError as error:
            found.append(Fault("corpus", "", str(error), AGAIN))
    return tuple(sorted(set(found)))


def _files(folder: Path) -> Iterator[Fault]:
    """Files beside the shards that the index does not know."""
    known = {part.shard for part in spans(folder)}
    rows = {f"{Path(name).stem}.parquet" for name in known}
    for part, names in (("shards", known), ("rows", rows)):
        there = {path.name for path in (folder / part).glob("*") if not path.name.startswith(".")}
        for name in sorted(there - names):
            yield Fault(f"{part}/{name}", "", "the index does not know this file", f"remove it, or {AGAIN}")


def _counts(folder: Path) -> Iterator[Fault]:
    """The index against corpus.json."""
    recorded = _record(folder)
    tally = Tally()
    with pq.ParquetFile(folder / INDEX, memory_map=True) as file:
        columns = ["key", "sha256", "dataset", "split", "volume", "patient", "duplicate", "size"]
        batches = file.iter_batches(columns=columns)
        whole = fingerprint(tally.watch(pa.Table.from_batches([batch]) for batch in batches))
    counted = {
        "fingerprint": whole, "slices": tally.slices.total(), "volumes": len(tally.volumes),
        "patients": len(tally.patients), "bytes": tally.bytes, "duplicate_slices": tally.duplicates,
        "splits": dict(tally.splits),
    }  # fmt: skip
    for name, value in counted.items():
        if recorded.get(name) != value:
            what = f"{name} is {recorded.get(name)!r}, the index has {value!r}"
            yield Fault(RECORD, "", what, f"{AGAIN}, or copy {RECORD} and {INDEX} again")
    volumes = Counter(tally.volumes.values())
    refused = _by_dataset(folder / "refused.parquet")
    left_out = _by_dataset(folder / LEFT_OUT)
    sets = recorded.get("datasets")
    sets = sets if isinstance(sets, dict) else {}
    for name in sorted({*sets, *volumes, *refused, *left_out}):
        mine = {
            "volumes": volumes[name], "slices": tally.slices[name],
            "refused": refused.get(name, {}), "left_out": left_out.get(name, {}),
        }  # fmt: skip
        its = sets.get(name, {})
        for what, number in mine.items():
            if its.get(what) != number:
                text = f"data set {name}: {what} is {its.get(what)!r}, the tables have {number!r}"
                yield Fault(RECORD, "", text, f"{AGAIN}, or copy all files beside {RECORD} again")


def _record(folder: Path) -> Mapping[str, Any]:
    try:
        recorded = json.loads((folder / RECORD).read_text())
    except (OSError, ValueError) as error:
        raise CorpusError(f"{RECORD} cannot be read ({' '.join(str(error).split())})") from None
    if not isinstance(recorded, dict):
        raise CorpusError(f"{RECORD} is damaged (not a JSON object)")
    return recorded


def _by_dataset(path: Path) -> dict[str, dict[str, int]]:
    """How often each reason occurs in each data set."""
    counted = read_part(path, ["dataset", "reason"]).group_by(["dataset", "reason"]).aggregate([([], "count_all")])
    found: dict[str, dict[str, int]] = {}
    for row in counted.to_pylist():
        found.setdefault(row["dataset"], {})[row["reason"]] = row["count_all"]
    return found


def _complete(folder: Path) -> Iterator[Fault]:
    """No row twice, and every slice of a kept volume stored or listed as left out."""
    keys = read_index(folder, ["key"])["key"]
    again = len(keys) - pc.count_distinct(keys).as_py()
    if again:
        yield Fault(INDEX, "", f"{again} rows have the key of another row", AGAIN)
    index = read_index(folder, ["volume", "n_slices"])
    kept = index.group_by("volume").aggregate([([], "count_all"), ("n_slices", "min"), ("n_slices", "max")])
    left_out = read_part(folder / LEFT_OUT, ["volume", "z"])
    both = pc.is_in(
        pc.binary_join_element_wise(left_out["volume"], _five(left_out["z"]), "_"), value_set=pc.unique(keys)
    )
    if pc.any(both).as_py():
        yield Fault(LEFT_OUT, "", f"{pc.sum(both).as_py()} slices are listed as left out and lie in a shard", AGAIN)
    thinned = left_out.group_by("volume").aggregate([([], "count_all")])
    out = dict(zip(thinned["volume"].to_pylist(), thinned["count_all"].to_pylist(), strict=True))
    drops = _record(folder).get("rules", {}).get("duplicates") == "drop"
    for row in kept.to_pylist():
        known = row["count_all"] + out.pop(row["volume"], 0)
        whole = row["n_slices_max"]
        if row["n_slices_min"] != whole or known > whole or (known < whole and not drops):
            what = f"volume {row['volume']} has {whole} slices, {known} are stored or listed as left out"
            yield Fault(INDEX, "", what, AGAIN)
    for volume in sorted(out):
        yield Fault(LEFT_OUT, "", f"the index has no volume {volume}", AGAIN)


def _five(numbers: pa.ChunkedArray) -> pa.Array:
    return pa.array(np.char.zfill(numbers.to_numpy().astype(str), 5)) if len(numbers) else pa.array([], pa.string())


def _apart(folder: Path) -> Iterator[Fault]:
    """The proofs that the report shows."""
    for proof in proofs(folder, _record(folder).get("rules", {})):
        if proof.shared:
            left, right = proof.sides
            what = f"{proof.shared} {proof.what} are both {left} and {right}, such as {', '.join(proof.examples)}"
            yield Fault(INDEX, "", what, f"do not train on this corpus; {AGAIN}")
