"""What became of every file: refused.csv for the user, corpus.json for whoever gets the shards, the summary."""

from __future__ import annotations

import csv
import io
import json
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa

from data_curation.aside import aside, write_parquet
from data_curation.index import fingerprint
from launch.progress import duration, rate

__all__ = ["Listed", "Refused", "count", "summary", "write_corpus", "write_refused", "write_sources"]

REFUSED = pa.schema([(name, pa.string()) for name in ("dataset", "source", "reason", "detail")])
PACKAGES = ("axial-ct", "SimpleITK", "imagecodecs", "numpy", "pyarrow", "webdataset")


@dataclass(frozen=True)
class Listed:
    """A data set as corpus.json names it: its name in the corpus, in the catalogue, and its licence."""

    name: str
    catalogue: str
    licence: str


@dataclass(frozen=True)
class Refused:
    """One line of refused.csv."""

    dataset: str
    source: str
    reason: str
    detail: str


def write_refused(folder: Path, refused: Sequence[Refused]) -> None:
    """refused.parquet and refused.csv, in the order given."""
    table = [vars(one) for one in refused]
    write_parquet(folder / "refused.parquet", pa.Table.from_pylist(table, REFUSED))
    _write_csv(folder / "refused.csv", REFUSED.names, [list(one.values()) for one in table])


def write_sources(folder: Path, identities: Sequence[Sequence[str]]) -> None:
    """private/sources.csv: the only place where hashed names stand beside what they hide."""
    names = ["volume", "dataset", "source", "patient", "study", "series"]
    _write_csv(folder / "private" / "sources.csv", names, identities)


def _write_csv(path: Path, names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([names, *rows])
    with aside(path) as file:
        file.write(text.getvalue().encode())


def count(index: pa.Table, datasets: Sequence[Listed], refused: Sequence[Refused]) -> dict[str, Any]:
    """The facts of corpus.json that are counted; `index` needs the columns that `merge` returns."""
    volumes = dict(zip(index["volume"].to_pylist(), index["dataset"].to_pylist(), strict=True))
    slices, kept = Counter(index["dataset"].to_pylist()), Counter(volumes.values())
    return {
        "fingerprint": fingerprint(index),
        "slices": len(index),
        "volumes": len(volumes),
        "patients": len(set(index["patient"].to_pylist())),
        "bytes": sum(index["size"].to_pylist()),
        "duplicate_slices": sum(index["duplicate"].to_pylist()),
        "splits": dict(sorted(Counter(index["split"].to_pylist()).items())),
        "datasets": {
            one.name: {
                "catalogue": one.catalogue,
                "licence": one.licence,
                "volumes": kept[one.name],
                "slices": slices[one.name],
                "refused": dict(sorted(Counter(r.reason for r in refused if r.dataset == one.name).items())),
            }
            for one in datasets
        },
    }


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
