"""`axial curate corpus.yaml`: public CT sets -> shards, index, and a list of what was refused and why.

Scan every volume, plan the shards, write the missing ones, merge the index. Each step leaves whole files only, so the
command may be killed at any moment; run again, it goes on and ends with the same bytes, for any number of workers.
"""

from __future__ import annotations

import errno
import fcntl
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from data_curation.accounts import (
    REFUSALS,
    Listed,
    Refused,
    Tally,
    count,
    summary,
    write_corpus,
    write_left_out,
    write_refused,
    write_sources,
)
from data_curation.aside import sweep
from data_curation.finished import FINISHED, changed, read_finished, write_finished
from data_curation.index import INDEX, fingerprint, link, merge
from data_curation.listing import CurateError, gather
from data_curation.plan import Candidate, Plan, PlanRules, plan
from data_curation.pool import each, workers_for
from data_curation.relatives import relatives
from data_curation.scan import SCAN, Scan, ScanTask, has_spool, marks, read_constants, read_scan, scan, spool_path
from data_curation.settings import Settings, Source, Splits
from data_curation.shards import Shard, is_written, write_shard
from launch.progress import Progress
from launch.run import Outcome

__all__ = ["CurateError", "Settings", "Source", "Splits", "dry_run", "main"]

OURS = re.compile(r"(train|val|duplicates)-\d+\.(tar|parquet)")  # names of shards and their rows

SHARDS_A_WORKER = 8  # a process that writes imports webdataset, hence torch: seconds, where a shard takes one


def dry_run(settings: Settings) -> str:
    """What would be read, from headers alone."""
    tasks, refused = gather(settings)
    lines = []
    for name in dict.fromkeys([*(source.called for source in settings.datasets), *(task.dataset for task in tasks)]):
        mine = [task for task in tasks if task.dataset == name]
        out = sum(1 for task in mine if not task.spool)
        lines.append(
            f"{name}: {len(mine)} volumes to read{f', {out} of them held out' if out else ''}, "
            f"{sum(1 for one in refused if one.dataset == name)} files refused by their place or header"
        )
    return "\n".join(lines)


def main(settings: Settings) -> Outcome:
    """Makes, completes or extends the corpus in `settings.folder`."""
    start = time.monotonic()
    folder, workers = settings.folder, workers_for(settings.workers)
    _refuse_foreign(folder)
    for part in (Path("shards"), Path("rows"), SCAN):
        (folder / part).mkdir(parents=True, exist_ok=True)
    (folder / "private").chmod(0o700)
    with _alone(folder):
        for part in (Path(), Path("shards"), Path("rows"), SCAN, Path("private")):
            sweep(folder / part)
        tasks, refused = gather(settings)
        finished = _finished(settings, tasks)
        scans = _known(folder, tasks)
        new = [task for task in tasks if task.volume not in scans]
        _scan(folder, new, scans, workers)
        planned = _plan(settings, tasks, scans, refused, finished)
        again = _write_all(folder, planned, tasks, scans, workers, bool(finished))
        read = sum(scans[task.volume].slices for task in new) + again
        outcome = _finish(settings, tasks, scans, planned, refused, (read, time.monotonic() - start))
        write_finished(folder, planned.shards, extended=bool(finished))
        return outcome


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


def _finished(settings: Settings, tasks: Sequence[ScanTask]) -> tuple[Shard, ...]:
    """The shards that must stay as they are: all of a finished corpus that is extended now or was before."""
    shards, extended = read_finished(settings.folder)
    if not shards or not (extended or settings.extend):
        return ()
    lost = changed(shards, {task.volume: task.stamp for task in tasks})
    if lost:
        names = {task.volume: _named(task) for task in tasks}
        example = names.get(lost[0], f"volume {lost[0]}, see {settings.folder / 'private' / 'sources.csv'}")
        raise CurateError(
            f"{len(lost)} volume(s) of the finished shards are gone or were changed, such as {example}: an extended "
            "corpus needs all its earlier data sets, files and rules; restore them, or curate into another folder="
        )
    if not extended:
        write_finished(settings.folder, shards, extended=True)  # from here on a run without extend= must not replan
    return shards


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


def _scan(folder: Path, tasks: Sequence[ScanTask], scans: dict[str, Scan], workers: int) -> None:
    if not tasks:
        return
    with Progress(len(tasks), "scan", "volumes") as bar:
        for task, verdict in each(partial(scan, folder), tasks, workers, _named):
            scans[task.volume] = verdict
            bar.advance()


def _plan(
    settings: Settings,
    tasks: Sequence[ScanTask],
    scans: dict[str, Scan],
    refused: list[Refused],
    finished: Sequence[Shard],
) -> Plan:
    """The shards; `refused` grows by what scans and plan speak against."""
    # A held-out case counts even if its scan was refused: what is tied to its patient must not be trained on.
    kept = [task for task in tasks if scans[task.volume].kept or not task.spool]
    order = {volume: i for i, volume in enumerate(dict.fromkeys(p.volume for shard in finished for p in shard.parts))}
    kept.sort(key=lambda task: order.get(task.volume, len(order)))
    candidates = [_candidate(settings.folder, task) for task in kept]
    alike = relatives(settings.folder, candidates) if settings.likeness else ()
    links = link([one.names for one in candidates], [one.contents for one in candidates], alike)
    rules = PlanRules(settings.seed, settings.shard_slices, settings.split.model_dump(), settings.duplicates == "drop")
    planned = plan(candidates, links, rules, finished)
    for task in tasks:
        verdict = scans[task.volume]
        if not task.spool:
            remedy = "" if task.dataset.startswith("evaluation ") else ": include_held_out=true would take it"
            reason, detail = "held_out", f"{task.case.held_out}{remedy}"
        elif task.volume in planned.refused:
            reason, detail = planned.refused[task.volume]
        else:
            reason, detail = verdict.reason, verdict.detail
        if not verdict.kept or not task.spool or task.volume in planned.refused:
            refused.append(Refused(task.dataset, task.case.source, reason, detail, task.volume))
    return planned


def _candidate(folder: Path, task: ScanTask) -> Candidate:
    contents, codes = marks(folder, task.volume)
    names = (task.patient, *task.case.same_as)
    return Candidate(task.volume, task.patient, names, task.stamp, _named(task), not task.spool, contents, codes)


def _write_all(
    folder: Path, planned: Plan, tasks: Sequence[ScanTask], scans: dict[str, Scan], workers: int, extending: bool
) -> int:
    """Writes the missing shards, removes those of other plans, and drops each spool when its last shard is there.

    Returns the number of slices that had to be read again.
    """
    names = {shard.name for shard in planned.shards}
    missing = [shard for shard in planned.shards if not is_written(folder, shard)]
    there = [path for part in ("shards", "rows") for path in (folder / part).iterdir()]
    stale = [path for path in there if OURS.fullmatch(path.name) and path.stem not in names]
    if (missing or stale) and not extending:  # the old index must not point into new shards
        for name in (INDEX, "corpus.json", FINISHED):
            (folder / name).unlink(missing_ok=True)
    for path in stale:
        path.unlink()
    uses = Counter(part.volume for shard in missing for part in shard.parts)
    again = _restore(folder, [task for task in tasks if uses[task.volume]], scans, workers)
    if missing:
        writers = min(workers, 1 + len(missing) // SHARDS_A_WORKER)
        with Progress(sum(shard.slices for shard in missing), "write", "slices") as bar:
            for shard, _ in each(partial(write_shard, folder), missing, writers, lambda shard: shard.name):
                bar.advance(shard.slices)
                for part in shard.parts:
                    uses[part.volume] -= 1
                    if not uses[part.volume]:
                        spool_path(folder, part.volume).unlink()
    for path in (folder / SCAN).glob("*.slices"):
        path.unlink()
    return again


def _restore(folder: Path, tasks: Sequence[ScanTask], scans: dict[str, Scan], workers: int) -> int:
    """Scans once more what a missing shard needs and whose spool went when its earlier shard was there; the slices."""
    gone = [task for task in tasks if not has_spool(folder, task.volume, scans[task.volume])]
    second: dict[str, Scan] = {}
    _scan(folder, gone, second, workers)
    for task in gone:
        if second[task.volume] != scans[task.volume]:
            text = second[task.volume].detail or "other slices"
            raise CurateError(f"{_named(task)} changed while it was in work ({text}): run the same command again")
    return sum(verdict.slices for verdict in second.values())


def _finish(
    settings: Settings,
    tasks: Sequence[ScanTask],
    scans: dict[str, Scan],
    planned: Plan,
    refused: list[Refused],
    speed: tuple[int, float],
) -> Outcome:
    """Index, lists and the summary."""
    folder = settings.folder
    order = list(dict.fromkeys([*(one.called for one in settings.datasets), *(task.dataset for task in tasks)]))
    refused.sort(key=lambda one: (order.index(one.dataset), one.source, one.reason))
    write_refused(folder, refused)
    named = [(task, task.case) for task in tasks]
    write_sources(folder, [(t.volume, t.dataset, c.source, c.patient, c.study, c.series) for t, c in named])
    tally = Tally()
    whole = fingerprint(tally.watch(merge(folder, [shard.name for shard in planned.shards], planned.withdrawn)))
    kept = [task for task in tasks if task.volume in tally.volumes]
    thinned = ((task.dataset, task.volume, read_constants(folder, task.volume)["left_out"]) for task in kept)
    listed = {one.called: Listed(one.called, one.name, one.terms.licence) for one in settings.datasets}
    datasets = [listed.get(name, Listed(name, "evaluation", "")) for name in order]
    facts = count(tally, whole, datasets, refused, write_left_out(folder, thinned))
    rules = settings.model_dump(
        mode="json", include={"limits", "slices", "duplicates", "likeness", "include_held_out", "codec"}
    )
    write_corpus(folder, {**facts, "rules": rules, "seed": settings.seed})
    print(summary(facts, *speed), flush=True)
    if not facts["slices"]:
        return Outcome((), (f"every file was refused: read {folder / REFUSALS}",), ok=False)
    what = f"{facts['slices']:,} slices of {facts['volumes']:,} volumes in {len(planned.shards)} shards"
    made = f"{folder}: {what}, {facts['bytes'] / 1e6:,.1f} MB"
    return Outcome((made,), (f"axial report folder={folder}", f"axial pretrain CONFIG.yaml data.corpus={folder}"))
