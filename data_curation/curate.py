"""`axial curate corpus.yaml`: public CT sets -> shards, index, and a list of what was refused and why.

Scan every volume, plan the shards, write the missing ones, merge the index. Each step leaves whole files only, so the
command may be killed at any moment; run again, it goes on and ends with the same bytes, for any number of workers.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from data_curation.accounts import Listed, Refused, count, summary, write_corpus, write_refused, write_sources
from data_curation.aside import sweep
from data_curation.catalogue import CATALOGUE, Case, cases
from data_curation.checks import Limits
from data_curation.index import INDEX, merge
from data_curation.plan import Candidate, Plan, PlanRules, plan
from data_curation.scan import SCAN, Scan, ScanTask, contents, has_spool, read_scan, scan, spool_path, stamp
from data_curation.shards import is_written, write_shard
from data_curation.slices import CODECS, DEFAULT_CODEC, SliceRule
from launch.crew import Crew, Each, Lost, Workers, here, workers_for
from launch.progress import Progress
from launch.run import Outcome
from launch.settings import Settings as Base

__all__ = ["CurateError", "Settings", "Source", "Splits", "dry_run", "main"]

OURS = re.compile(r"(train|val|duplicates)-\d+\.(tar|parquet)")  # names of shards and their rows

FEW_SHARDS = 8  # written here: a process that writes imports webdataset, hence torch: seconds, where a shard takes one


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
        names = Counter(_id(source) for source in self.datasets)
        twice = [name for name, count in names.items() if count > 1]
        if twice:
            raise ValueError(f"two data sets are called {', '.join(twice)}: give each its own `id:`")
        return self


def dry_run(settings: Settings) -> str:
    """What would be read, from headers alone."""
    tasks, refused = _gather(settings)
    lines = []
    for source in settings.datasets:
        name = _id(source)
        mine = [task for task in tasks if task.dataset == name]
        out = sum(1 for task in mine if not task.spool)
        lines.append(
            f"{name}: {len(mine)} volumes to read{f', {out} of them held out' if out else ''}, "
            f"{sum(1 for one in refused if one.dataset == name)} files refused by their place or header"
        )
    return "\n".join(lines)


def main(settings: Settings, crew: Crew | None = None) -> Outcome:
    """Makes or completes the corpus in `settings.folder`; without a crew by `workers` processes."""
    start = time.monotonic()
    folder, workers = settings.folder, workers_for(settings.workers)
    _refuse_foreign(folder)
    for part in (Path("shards"), Path("rows"), SCAN):
        (folder / part).mkdir(parents=True, exist_ok=True)
    (folder / "private").chmod(0o700)
    with _alone(folder), (crew or Workers(workers * (workers > 1))).open() as each:
        for part in (Path(), Path("shards"), Path("rows"), SCAN, Path("private")):
            sweep(folder / part)
        tasks, refused = _gather(settings)
        scans = _known(folder, tasks)
        new = [task for task in tasks if task.volume not in scans]
        _scan(folder, new, scans, each)
        planned = _plan(settings, folder, tasks, scans, refused)
        again = _write_all(folder, planned, tasks, scans, each)
        read = sum(scans[task.volume].slices for task in new) + again
        return _finish(settings, tasks, planned, refused, (read, time.monotonic() - start))


def _refuse_foreign(folder: Path) -> None:
    """Shards that nobody here made would be taken for an earlier plan's and be overwritten."""
    held = [part for part in ("shards", "rows") if (folder / part).is_dir() and any((folder / part).iterdir())]
    if held and not (folder / "private").is_dir():
        raise CurateError(f"{folder / held[0]} holds files that no `axial curate` made: choose another folder=")


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
        if not source.root.is_dir():
            raise CurateError(f"data set {_id(source)}: {source.root} is not a folder on this machine")
    for source in settings.datasets:
        name = _id(source)
        found, ruled_out = cases(source.name, source.root)
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
    name = _id(source)
    spool = settings.include_held_out or not case.held_out
    licence = _licence(source)
    identity = (case.patient, case.study, case.series)
    patient, study, volume = (_hashed(settings, name, *identity[:depth]) for depth in (1, 2, 3))
    made = (settings.limits, settings.slices, settings.codec)
    stamped = stamp(case, licence, case.held_out, spool, *made, volume)
    return ScanTask(case, name, licence, volume, patient, study, stamped, spool, *made)


def _hashed(settings: Settings, *names: str) -> str:
    """64 bits of a salted hash: enough to tell 100,000 volumes apart (chance of a clash 3 in 10^10)."""
    salt = settings.salt or f"seed {settings.seed}"
    return hashlib.sha256(json.dumps([salt, *names]).encode()).hexdigest()[:16]


def _named(task: ScanTask) -> str:
    return f"{task.dataset}: {task.case.source}"


def _known(folder: Path, tasks: Sequence[ScanTask]) -> dict[str, Scan]:
    """The verdicts of earlier runs that stand, since neither files nor rules have changed.

    Those of volumes that are gone are removed; the rest are made again.
    """
    volumes = {task.volume for task in tasks}
    for path in (folder / SCAN).iterdir():
        if path.name.partition(".")[0] not in volumes:
            path.unlink()
    scans = {}
    for task in tasks:
        known = read_scan(folder, task.volume)
        if known is not None and known.stamp == task.stamp and not known.again:
            scans[task.volume] = known
    return scans


def _scan(folder: Path, tasks: Sequence[ScanTask], scans: dict[str, Scan], each: Each) -> None:
    if not tasks:
        return
    with Progress(len(tasks), "scan", "volumes") as bar:
        for task, verdict in each(partial(scan, folder), tasks, _named):
            if isinstance(verdict, Lost):
                raise _lost(_named(task), verdict)
            scans[task.volume] = verdict
            bar.advance()


def _lost(name: str, lost: Lost) -> CurateError:
    return CurateError(f"{name}: {lost.detail}. What was finished is kept: run the same command again")


def _plan(
    settings: Settings, folder: Path, tasks: Sequence[ScanTask], scans: dict[str, Scan], refused: list[Refused]
) -> Plan:
    """The shards; `refused` grows by what scans and plan speak against."""
    # A held-out case counts even if its scan was refused: what is tied to its patient must not be trained on.
    kept = [task for task in tasks if scans[task.volume].kept or not task.spool]
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


def _write_all(folder: Path, planned: Plan, tasks: Sequence[ScanTask], scans: dict[str, Scan], each: Each) -> int:
    """Writes the missing shards, removes those of other plans, and drops each spool when its last shard is there.

    Returns the number of slices that had to be read again.
    """
    names = {shard.name for shard in planned.shards}
    missing = [shard for shard in planned.shards if not is_written(folder, shard)]
    there = [path for part in ("shards", "rows") for path in (folder / part).iterdir()]
    stale = [path for path in there if OURS.fullmatch(path.name) and path.stem not in names]
    if missing or stale:  # the old index must not point into new shards
        for name in (INDEX, "corpus.json"):
            (folder / name).unlink(missing_ok=True)
    for path in stale:
        path.unlink()
    uses = Counter(part.volume for shard in missing for part in shard.parts)
    again = _restore(folder, [task for task in tasks if uses[task.volume]], scans, each)
    if missing:
        write = each if len(missing) >= FEW_SHARDS else here
        with Progress(sum(shard.slices for shard in missing), "write", "slices") as bar:
            for shard, done in write(partial(write_shard, folder), missing, lambda shard: shard.name):
                if isinstance(done, Lost):
                    raise _lost(shard.name, done)
                bar.advance(shard.slices)
                for part in shard.parts:
                    uses[part.volume] -= 1
                    if not uses[part.volume]:
                        spool_path(folder, part.volume).unlink()
    for path in (folder / SCAN).glob("*.slices"):
        path.unlink()
    return again


def _restore(folder: Path, tasks: Sequence[ScanTask], scans: dict[str, Scan], each: Each) -> int:
    """Scans once more what a missing shard needs and whose spool went when its earlier shard was there; the slices."""
    gone = [task for task in tasks if not has_spool(folder, task.volume, scans[task.volume])]
    second: dict[str, Scan] = {}
    _scan(folder, gone, second, each)
    for task in gone:
        if second[task.volume] != scans[task.volume]:
            text = second[task.volume].detail or "other slices"
            raise CurateError(f"{_named(task)} changed while it was in work ({text}): run the same command again")
    return sum(verdict.slices for verdict in second.values())


def _finish(
    settings: Settings, tasks: Sequence[ScanTask], planned: Plan, refused: list[Refused], speed: tuple[int, float]
) -> Outcome:
    """Index, lists and the summary."""
    folder = settings.folder
    order = [_id(source) for source in settings.datasets]
    refused.sort(key=lambda one: (order.index(one.dataset), one.source, one.reason))
    write_refused(folder, refused)
    named = [(task, task.case) for task in tasks]
    write_sources(folder, [(t.volume, t.dataset, c.source, c.patient, c.study, c.series) for t, c in named])
    index = merge(folder, [shard.name for shard in planned.shards])
    datasets = [Listed(_id(source), source.name, _licence(source)) for source in settings.datasets]
    facts = count(index, datasets, refused)
    rules = settings.model_dump(mode="json", include={"limits", "slices", "duplicates", "include_held_out", "codec"})
    write_corpus(folder, {**facts, "rules": rules, "seed": settings.seed})
    print(summary(facts, *speed), flush=True)
    if not len(index):
        return Outcome((), (f"every file was refused: read {folder / 'refused.csv'}",), ok=False)
    what = f"{facts['slices']:,} slices of {facts['volumes']:,} volumes in {len(planned.shards)} shards"
    made = f"{folder}: {what}, {facts['bytes'] / 1e6:,.1f} MB"
    return Outcome((made,), (f"axial report folder={folder}", f"axial pretrain CONFIG.yaml data.corpus={folder}"))


def _id(source: Source) -> str:
    return source.id or source.name


def _licence(source: Source) -> str:
    return source.licence or CATALOGUE[source.name].licence
