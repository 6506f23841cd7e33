"""`axial curate corpus.yaml`: public CT sets -> shards, index, and a list of what was refused and why.

Scan every volume, plan the shards, write the missing ones, merge the index. Each step leaves whole files only, so the
command may be killed at any moment; run again, it goes on and ends with the same bytes, for any number of workers.
"""

from __future__ import annotations

import csv
import errno
import fcntl
import hashlib
import io
import json
import platform
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, Self

import pyarrow as pa
from pydantic import Field, field_validator, model_validator

from data_curation.aside import aside, sweep, write_parquet
from data_curation.catalogue import CATALOGUE, Case, cases
from data_curation.checks import Limits
from data_curation.index import INDEX, fingerprint, merge
from data_curation.plan import Candidate, Plan, PlanRules, plan
from data_curation.pool import each, workers_for
from data_curation.scan import SCAN, Scan, ScanTask, contents, read_scan, scan, spool_path, stamp
from data_curation.shards import is_written, write_shard
from data_curation.slices import CODECS, DEFAULT_CODEC, SliceRule
from launch.progress import Progress, duration, rate
from launch.run import Outcome
from launch.settings import Settings as Base

__all__ = ["CurateError", "Settings", "Source", "Splits", "dry_run", "main"]

REFUSED = pa.schema([(name, pa.string()) for name in ("dataset", "source", "reason", "detail")])


class CurateError(ValueError):
    """The curation cannot start: what stands against it and what to do."""


class Source(Base):
    """One data set on this machine."""

    name: str = Field(description="name in the catalogue; `folder` takes any tree of images")
    root: Path = Field(description="folder of the data set")
    id: str = Field("", description="its name in the corpus, needed to use a catalogue name twice; default: the name")
    licence: str = Field("", description="its licence, where the catalogue does not know it")

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in CATALOGUE:
            raise ValueError(f"no data set is called {name!r}; there are: {', '.join(CATALOGUE)}")
        return name


class Splits(Base):
    """Shares of the patients; they add up to 1. Which patient goes where is a hash, so small corpora deviate."""

    train: float = Field(0.95, ge=0, le=1, description="share of the patients to train on")
    val: float = Field(0.05, ge=0, le=1, description="share of the patients to validate on")

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if abs(self.train + self.val - 1) > 1e-9:
            raise ValueError(f"train + val must be 1, got {self.train} + {self.val}")
        return self


class Settings(Base):
    """What goes into the corpus, and how it is cut up."""

    folder: Path = Field(description="the corpus: shards/, rows/, index.parquet and what is private")
    datasets: tuple[Source, ...] = Field(min_length=1, description="data sets, the preferred copy of a scan first")
    limits: Limits = Field(Limits(), description="what a volume must satisfy")
    slices: SliceRule = Field(SliceRule(), description="which slices of a volume are kept")
    duplicates: Literal["mark", "drop"] = Field(
        "mark", description="slices seen before: keep them marked, or not at all"
    )
    include_held_out: bool = Field(False, description="also take cases that are kept for testing")
    shard_slices: int = Field(2000, ge=1, description="slices after which a shard is full; a volume is never divided")
    codec: str = Field(DEFAULT_CODEC, description=f"how slices are stored: {', '.join(CODECS)}")
    split: Splits = Field(Splits(), description="shares of train and val")
    seed: int = Field(0, description="draws the split and the order of slices")
    salt: str = Field(
        "", description="secret mixed into all hashed names; without one the seed is, which anyone may guess"
    )
    workers: int = Field(0, ge=0, description="processes; 0: one for each core")

    @field_validator("codec")
    @classmethod
    def _codec(cls, codec: str) -> str:
        if codec not in CODECS:
            raise ValueError(f"no codec {codec!r}; there are: {', '.join(CODECS)}")
        return codec

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        names = Counter(source.id or source.name for source in self.datasets)
        twice = [name for name, count in names.items() if count > 1]
        if twice:
            raise ValueError(f"two data sets are called {', '.join(twice)}: give each its own `id:`")
        return self


@dataclass(frozen=True)
class Refused:
    """One line of refused.csv."""

    dataset: str
    source: str
    reason: str
    detail: str


def dry_run(settings: Settings) -> str:
    """What would be read, from headers alone."""
    tasks, refused = _gather(settings)
    lines = []
    for source in settings.datasets:
        name = source.id or source.name
        mine = [task for task in tasks if task.dataset == name]
        out = sum(1 for task in mine if not task.spool)
        lines.append(
            f"{name}: {len(mine)} volumes to read{f', {out} of them held out' if out else ''}, "
            f"{sum(1 for one in refused if one.dataset == name)} files refused by their place or header"
        )
    return "\n".join(lines)


def main(settings: Settings) -> Outcome:
    """Makes or completes the corpus in `settings.folder`."""
    start = time.monotonic()
    folder, workers = settings.folder, workers_for(settings.workers)
    for part in (Path("shards"), Path("rows"), SCAN):
        (folder / part).mkdir(parents=True, exist_ok=True)
    (folder / "private").chmod(0o700)
    with _alone(folder):
        for part in (Path(), Path("shards"), Path("rows"), SCAN, Path("private")):
            sweep(folder / part)
        tasks, refused = _gather(settings)
        scans = _scan_all(folder, tasks, workers)
        planned = _plan(settings, folder, tasks, scans, refused)
        _write_all(folder, planned, tasks, scans, workers)
        return _finish(settings, tasks, scans, planned, refused, time.monotonic() - start)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Nobody else curates into this folder meanwhile. The lock ends with the process, however that ends."""
    with open(folder / "private" / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise CurateError(f"another `axial curate` is at work in {folder}: wait for it, or end it") from None
        yield  # a file system without locks cannot tell; go on


def _gather(settings: Settings) -> tuple[list[ScanTask], list[Refused]]:
    """What is there, data set by data set. All folders are looked at before anything is read."""
    tasks: list[ScanTask] = []
    refused: list[Refused] = []
    taken: dict[str, str] = {}
    for source in settings.datasets:
        root = source.root.expanduser()
        if not root.is_dir():
            raise CurateError(f"data set {source.id or source.name}: {root} is not a folder on this machine")
    for source in settings.datasets:
        name = source.id or source.name
        found, ruled_out = cases(source.name, source.root.expanduser())
        refused += [Refused(name, *one) for one in ruled_out]
        for case in found:
            task = _task(settings, source, case)
            if task.volume in taken:
                text = f"the same data set, patient, study and series as {taken[task.volume]}"
                refused.append(Refused(name, case.source, "same_identity", text))
                continue
            taken[task.volume] = case.source
            tasks.append(task)
    return tasks, refused


def _task(settings: Settings, source: Source, case: Case) -> ScanTask:
    name = source.id or source.name
    spool = settings.include_held_out or not case.held_out
    licence = source.licence or CATALOGUE[source.name].licence
    identity = (case.patient, case.study, case.series)
    patient, study, volume = (_hashed(settings, name, *identity[:depth]) for depth in (1, 2, 3))
    rules = (licence, case.held_out, spool, settings.limits, settings.slices, settings.codec, volume)
    return ScanTask(
        case,
        name,
        licence,
        volume,
        patient,
        study,
        stamp(case, *rules),
        spool,
        settings.limits,
        settings.slices,
        settings.codec,
    )


def _hashed(settings: Settings, *names: str) -> str:
    """64 bits of a salted hash: enough to tell 100,000 volumes apart (chance of a clash 3 in 10^10)."""
    salt = settings.salt or f"seed {settings.seed}"
    return hashlib.sha256(json.dumps([salt, *names]).encode()).hexdigest()[:16]


def _named(task: ScanTask) -> str:
    return f"{task.dataset}: {task.case.source}"


def _scan_all(folder: Path, tasks: Sequence[ScanTask], workers: int) -> dict[str, Scan]:
    """A verdict on every volume; those of earlier runs stand where neither files nor rules have changed."""
    volumes = {task.volume for task in tasks}
    for path in (folder / SCAN).iterdir():
        if path.name.partition(".")[0] not in volumes:
            path.unlink()
    scans = {}
    for task in tasks:
        known = read_scan(folder, task.volume)
        if known is not None and known.stamp == task.stamp and not known.again:
            scans[task.volume] = known
    _scan(folder, [task for task in tasks if task.volume not in scans], scans, workers)
    return scans


def _scan(folder: Path, tasks: Sequence[ScanTask], scans: dict[str, Scan], workers: int) -> None:
    if not tasks:
        return
    with Progress(len(tasks), "scan", "volumes") as bar:
        for task, verdict in each(partial(scan, folder), tasks, workers, _named):
            scans[task.volume] = verdict
            bar.advance()


def _plan(
    settings: Settings, folder: Path, tasks: Sequence[ScanTask], scans: dict[str, Scan], refused: list[Refused]
) -> Plan:
    """The shards; `refused` grows by what scans and plan speak against."""
    kept = [task for task in tasks if scans[task.volume].kept]
    candidates = [
        Candidate(task.volume, task.patient, task.stamp, _named(task), not task.spool, values)
        for task, values in zip(kept, contents(folder, [task.volume for task in kept]), strict=True)
    ]
    rules = PlanRules(settings.seed, settings.shard_slices, settings.split.model_dump(), settings.duplicates == "drop")
    planned = plan(candidates, rules)
    for task in tasks:
        verdict = scans[task.volume]
        if not task.spool:
            reason, detail = "held_out", f"{task.case.held_out}: include_held_out=true would take it"
        elif task.volume in planned.refused:
            reason, detail = planned.refused[task.volume]
        else:
            reason, detail = verdict.reason, verdict.detail
        if not verdict.kept or not task.spool or task.volume in planned.refused:
            refused.append(Refused(task.dataset, task.case.source, reason, detail))
    return planned


def _write_all(folder: Path, planned: Plan, tasks: Sequence[ScanTask], scans: dict[str, Scan], workers: int) -> None:
    """Writes the missing shards, removes those of other plans, and drops each spool when its last shard is there."""
    names = {shard.name for shard in planned.shards}
    missing = [shard for shard in planned.shards if not is_written(folder, shard)]
    stale = [path for part in ("shards", "rows") for path in (folder / part).iterdir() if path.stem not in names]
    if missing or stale:  # the old index must not point into new shards
        for name in (INDEX, "corpus.json"):
            (folder / name).unlink(missing_ok=True)
    for path in stale:
        path.unlink()
    uses = Counter(part.volume for shard in missing for part in shard.parts)
    again = [task for task in tasks if uses[task.volume] and not _has_spool(folder, scans[task.volume], task.volume)]
    _scan(folder, again, scans, workers)  # the spools of earlier shards are gone; the scan gives the same bytes again
    if missing:
        with Progress(sum(shard.slices for shard in missing), "write", "slices") as bar:
            for shard, _ in each(partial(write_shard, folder), missing, workers, lambda shard: shard.name):
                bar.advance(shard.slices)
                for part in shard.parts:
                    uses[part.volume] -= 1
                    if not uses[part.volume]:
                        spool_path(folder, part.volume).unlink()
    for path in (folder / SCAN).glob("*.slices"):
        path.unlink()


def _has_spool(folder: Path, verdict: Scan, volume: str) -> bool:
    try:
        return spool_path(folder, volume).stat().st_size == verdict.spool_bytes
    except FileNotFoundError:
        return False


def _finish(
    settings: Settings,
    tasks: Sequence[ScanTask],
    scans: dict[str, Scan],
    planned: Plan,
    refused: list[Refused],
    took: float,
) -> Outcome:
    """Index, lists and the summary."""
    folder = settings.folder
    order = {source.id or source.name: position for position, source in enumerate(settings.datasets)}
    refused.sort(key=lambda one: (order[one.dataset], one.source, one.reason))
    table = [vars(one) for one in refused]
    write_parquet(folder / "refused.parquet", pa.Table.from_pylist(table, REFUSED))
    _write_csv(folder / "refused.csv", REFUSED.names, [list(one.values()) for one in table])
    identities = [
        [task.volume, task.dataset, task.case.source, task.case.patient, task.case.study, task.case.series]
        for task in tasks
    ]
    _write_csv(
        folder / "private" / "sources.csv", ["volume", "dataset", "source", "patient", "study", "series"], identities
    )
    index = merge(folder, [shard.name for shard in planned.shards])
    facts = _facts(settings, index, refused)
    with aside(folder / "corpus.json") as file:
        file.write(json.dumps(facts, indent=1).encode() + b"\n")
    print(_summary(facts, took), flush=True)
    if not len(index):
        return Outcome((), (f"every file was refused: read {folder / 'refused.csv'}",), ok=False)
    slices, size = facts["slices"], facts["bytes"] / 1e6
    made = (
        f"{folder}: {slices:,} slices of {facts['volumes']:,} volumes in {len(planned.shards)} shards, {size:,.1f} MB"
    )
    return Outcome((made,), (f"axial report folder={folder}", f"axial pretrain CONFIG.yaml data.corpus={folder}"))


def _write_csv(path: Path, names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([names, *rows])
    with aside(path) as file:
        file.write(text.getvalue().encode())


def _facts(settings: Settings, index: pa.Table, refused: Sequence[Refused]) -> dict[str, Any]:
    """corpus.json: what one may publish beside the shards. No path, no salt, no time."""
    volumes = dict(zip(index["volume"].to_pylist(), index["dataset"].to_pylist(), strict=True))
    slices, kept = Counter(index["dataset"].to_pylist()), Counter(volumes.values())
    packages = ("axial-ct", "SimpleITK", "imagecodecs", "numpy", "pyarrow", "webdataset")
    return {
        "fingerprint": fingerprint(index),
        "slices": len(index),
        "volumes": len(volumes),
        "patients": len(set(index["patient"].to_pylist())),
        "bytes": sum(index["size"].to_pylist()),
        "duplicate_slices": sum(index["duplicate"].to_pylist()),
        "splits": dict(sorted(Counter(index["split"].to_pylist()).items())),
        "datasets": {
            name: {
                "catalogue": source.name,
                "licence": source.licence or CATALOGUE[source.name].licence,
                "volumes": kept[name],
                "slices": slices[name],
                "refused": dict(sorted(Counter(one.reason for one in refused if one.dataset == name).items())),
            }
            for source in settings.datasets
            for name in [source.id or source.name]
        },
        "rules": settings.model_dump(
            mode="json", include={"limits", "slices", "duplicates", "include_held_out", "codec"}
        ),
        "seed": settings.seed,
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in packages}},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _summary(facts: dict[str, Any], took: float) -> str:
    lines = [f"{'data set':24}{'kept':>8}{'slices':>12}  refused"]
    for name, one in facts["datasets"].items():
        reasons = ", ".join(f"{count} {reason}" for reason, count in one["refused"].items()) or "none"
        lines.append(f"{name:24}{one['volumes']:>8,}{one['slices']:>12,}  {reasons}")
    splits = ", ".join(f"{name} {count:,}" for name, count in facts["splits"].items())
    lines.append(
        f"slices: {splits}; {facts['duplicate_slices']:,} seen before; fingerprint {facts['fingerprint'][:16]}"
    )
    lines.append(f"{duration(took)}, {rate(facts['slices'] / max(took, 1e-9))} slices/s")
    return "\n".join(lines)
