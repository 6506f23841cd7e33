"""What became of every file and slice: private/refused.csv for the user; refused.parquet, left_out.parquet and
corpus.json for whoever gets the shards; the summary."""

from __future__ import annotations

import csv
import io
import json
import platform
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_curation.aside import aside, write_parquet
from launch.progress import duration, rate

__all__ = [
    "HELD_OUT",
    "REFUSALS",
    "Listed",
    "Refused",
    "Tally",
    "count",
    "summary",
    "write_corpus",
    "write_held_out",
    "write_left_out",
    "write_refused",
    "write_sources",
    "write_throughput",
]

REFUSED = pa.schema([(name, pa.string()) for name in ("dataset", "volume", "reason")])
LEFT_OUT = pa.schema([("dataset", pa.string()), ("volume", pa.string()), ("z", pa.int32()), ("reason", pa.string())])
HELD_OUT = pa.schema([(name, pa.string()) for name in ("dataset", "volume", "patient", "content")])
REFUSALS = Path("private", "refused.csv")  # file names of the user's, hence private
PACKAGES = ("axial-ct", "SimpleITK", "imagecodecs", "numpy", "pyarrow", "webdataset")


@dataclass(frozen=True)
class Listed:
    """A data set as corpus.json names it: its name in the corpus, in the catalogue, and its licence."""

    name: str
    catalogue: str
    licence: str


@dataclass(frozen=True)
class Refused:
    """One line of private/refused.csv; `volume` is the hashed name, "" for what never was a volume."""

    dataset: str
    source: str
    reason: str
    detail: str
    volume: str = ""


def write_refused(folder: Path, refused: Sequence[Refused]) -> None:
    """private/refused.csv with file names and details, refused.parquet without; in the order given."""
    table = [{name: getattr(one, name) for name in REFUSED.names} for one in refused]
    write_parquet(folder / "refused.parquet", pa.Table.from_pylist(table, REFUSED))
    names = ["dataset", "source", "reason", "detail", "volume"]
    _write_csv(folder / REFUSALS, names, [[getattr(one, name) for name in names] for one in refused])


def write_left_out(
    folder: Path, volumes: Iterable[tuple[str, str, Sequence[tuple[int, str]]]]
) -> Counter[tuple[str, str]]:
    """left_out.parquet: the slices of kept volumes (data set, volume, [(z, reason)]) that the slice rule left out.

    Returns how many there are by data set and reason.
    """
    counts: Counter[tuple[str, str]] = Counter()
    with aside(folder / "left_out.parquet") as file, pq.ParquetWriter(file, LEFT_OUT, compression="zstd") as writer:
        waiting: list[dict[str, Any]] = []
        for dataset, volume, slices in volumes:
            waiting += [{"dataset": dataset, "volume": volume, "z": z, "reason": reason} for z, reason in slices]
            counts.update((dataset, reason) for _, reason in slices)
            if len(waiting) >= 100_000:
                writer.write_table(pa.Table.from_pylist(waiting, LEFT_OUT))
                waiting = []
        writer.write_table(pa.Table.from_pylist(waiting, LEFT_OUT))
    return counts


def write_held_out(folder: Path, volumes: Iterable[tuple[str, str, str, Sequence[str]]]) -> None:
    """held_out.parquet: (data set, volume, patient, contents of its slices) of the scans that are kept for testing, so
    that anyone can prove that they are not in the corpus."""
    with aside(folder / "held_out.parquet") as file, pq.ParquetWriter(file, HELD_OUT, compression="zstd") as writer:
        for *names, contents in volumes:
            columns = [pa.repeat(pa.scalar(name, pa.string()), len(contents)) for name in names]
            writer.write_table(pa.table([*columns, pa.array(contents, pa.string())], schema=HELD_OUT))


def write_sources(folder: Path, identities: Sequence[Sequence[str]]) -> None:
    """private/sources.csv: the only place where hashed names stand beside what they hide."""
    names = ["volume", "dataset", "source", "patient", "study", "series"]
    _write_csv(folder / "private" / "sources.csv", names, identities)


def _write_csv(path: Path, names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([names, *rows])
    with aside(path, lasting=False) as file:
        file.write(text.getvalue().encode())


class Tally:
    """What is counted while the index is written piece by piece; memory grows with the volumes, not with the slices."""

    def __init__(self) -> None:
        self.slices: Counter[str] = Counter()
        self.splits: Counter[str] = Counter()
        self.volumes: dict[str, str] = {}  # volume: data set
        self.patients: set[str] = set()
        self.duplicates = self.bytes = 0

    def watch(self, tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
        """The same tables, counted as they pass."""
        for table in tables:
            self.slices.update(_counts(table["dataset"]))
            self.splits.update(_counts(table["split"]))
            pairs = table.group_by(["volume", "dataset", "patient"]).aggregate([]).to_pylist()
            self.volumes.update((pair["volume"], pair["dataset"]) for pair in pairs)
            self.patients.update(pair["patient"] for pair in pairs)
            self.duplicates += pc.sum(table["duplicate"]).as_py() or 0
            self.bytes += pc.sum(table["size"]).as_py() or 0
            yield table


def _counts(column: pa.ChunkedArray) -> dict[str, int]:
    return {row["values"]: row["counts"] for row in column.value_counts().to_pylist()}


def count(
    tally: Tally, name: str, datasets: Sequence[Listed], refused: Sequence[Refused], left_out: Counter[tuple[str, str]]
) -> dict[str, Any]:
    """The facts of corpus.json that are counted; `name` is the fingerprint."""
    kept = Counter(tally.volumes.values())
    return {
        "fingerprint": name,
        "slices": tally.slices.total(),
        "volumes": len(tally.volumes),
        "patients": len(tally.patients),
        "bytes": tally.bytes,
        "duplicate_slices": tally.duplicates,
        "splits": dict(sorted(tally.splits.items())),
        "datasets": {
            one.name: {
                "catalogue": one.catalogue,
                "licence": one.licence,
                "volumes": kept[one.name],
                "slices": tally.slices[one.name],
                "refused": dict(sorted(Counter(r.reason for r in refused if r.dataset == one.name).items())),
                "left_out": {why: n for (dataset, why), n in sorted(left_out.items()) if dataset == one.name},
            }
            for one in datasets
        },
    }


def write_throughput(folder: Path, slices: int, took: float, workers: int) -> None:
    """private/throughput.json: how fast this run was, for the report; nothing is noted where nothing was read."""
    if slices:
        with aside(folder / "private" / "throughput.json", lasting=False) as file:
            file.write(json.dumps({"slices_read": slices, "seconds": took, "workers": workers}).encode())


def write_corpus(folder: Path, facts: Mapping[str, Any]) -> None:
    """corpus.json: `facts` and the versions that made the corpus. It may be published: no path, no salt, no time."""
    versions = {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}
    with aside(folder / "corpus.json") as file:
        file.write(json.dumps({**facts, "versions": versions}, indent=1).encode() + b"\n")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def summary(facts: Mapping[str, Any], read: int, took: float) -> str:
    """What a user reads at the end: each data set, why files were refused, splits, speed; `read` slices in `took` s."""
    lines = [f"{'data set':24}{'kept':>8}{'slices':>12}  refused"]
    for name, one in facts["datasets"].items():
        reasons = ", ".join(f"{count} {reason}" for reason, count in one["refused"].items()) or "none"
        lines.append(f"{name:24}{one['volumes']:>8,}{one['slices']:>12,}  {reasons}")
    splits = ", ".join(f"{name} {count:,}" for name, count in facts["splits"].items())
    lines.append(
        f"slices: {splits}; {facts['duplicate_slices']:,} seen before; fingerprint {facts['fingerprint'][:16]}"
    )
    speed = f", {read:,} slices read, {rate(read / max(took, 1e-9))} slices/s" if read else ", all scans were known"
    lines.append(duration(took) + speed)
    return "\n".join(lines)
