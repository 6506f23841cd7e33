"""`axial curate corpus.yaml`: public CT sets -> shards, index, and a list of what was refused and why.

Scan every volume, plan the shards, write the missing ones, merge the index. Each step leaves whole files only, so the
command may be killed at any moment; run again, it goes on and ends with the same bytes, for any number of workers.
"""

from __future__ import annotations

import errno
import fcntl
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from data_curation.accounts import (
    REFUSALS,
    Listed,
    Refused,
    Tally,
    count,
    summary,
    write_corpus,
    write_held_out,
    write_left_out,
    write_refused,
    write_sources,
    write_throughput,
)
from data_curation.aside import sweep
from data_curation.finished import changed, read_finished, write_finished
from data_curation.index import fingerprint, link, merge
from data_curation.listing import EVALUATION, CurateError, gather
from data_curation.plan import Candidate, Plan, PlanRules, plan
from data_curation.relatives import relatives
from data_curation.scan import SCAN, Scan, ScanTask, marks, read_constants, read_contents
from data_curation.settings import Settings, Source, Splits
from data_curation.shards import Shard
from data_curation.work import known, scan_all, write_all
from launch.crew import Crew, Workers, workers_for
from launch.run import Outcome, command

__all__ = ["CurateError", "Settings", "Source", "Splits", "dry_run", "main"]


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


def main(settings: Settings, crew: Crew | None = None) -> Outcome:
    """Makes, completes or extends the corpus in `settings.folder`; without a crew by `workers` processes."""
    start = time.monotonic()
    folder = settings.folder
    crew = (crew or Workers(workers_for(settings.workers))).limited(settings.timeout_s, settings.memory_gib)
    _refuse_foreign(folder)
    for part in (Path("shards"), Path("rows"), SCAN):
        (folder / part).mkdir(parents=True, exist_ok=True)
    (folder / "private").chmod(0o700)
    with _alone(folder), crew.open() as each:
        for part in (Path(), Path("shards"), Path("rows"), SCAN, Path("private")):
            sweep(folder / part)
        tasks, refused = gather(settings)
        finished = _finished(settings, tasks)
        scans = known(folder, tasks)
        new = [task for task in tasks if task.volume not in scans]
        scans |= scan_all(folder, new, each)
        planned = _plan(settings, tasks, scans, refused, finished)
        again = write_all(folder, planned, tasks, scans, each, bool(finished))
        read, took = sum(scans[task.volume].slices for task in new) + again, time.monotonic() - start
        write_throughput(folder, read, took, workers_for(settings.workers))
        outcome = _finish(settings, tasks, planned, refused, (read, took))
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
        raise CurateError(
            f"{len(lost)} volume(s) of the finished shards are gone or were changed, such as {lost[0]} "
            "(private/sources.csv names its file): an extended corpus needs all its earlier data, unchanged; "
            "restore them, or curate into another folder="
        )
    if not extended:
        write_finished(settings.folder, shards, extended=True)  # from here on a run without extend= must not replan
    return shards


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
            remedy = "" if task.case.dataset == EVALUATION else ": include_held_out=true would take it"
            reason, detail = "held_out", f"{task.case.held_out}{remedy}"
        elif task.volume in planned.refused:
            reason, detail = planned.refused[task.volume]
        else:
            reason, detail = verdict.reason, verdict.detail
        if not verdict.kept or not task.spool or task.volume in planned.refused:
            refused.append(Refused(task.dataset, task.case.source, reason, detail, task.volume))
    return planned


def _candidate(folder: Path, task: ScanTask) -> Candidate:
    contents, codes, doubts = marks(folder, task.volume)
    names = (task.patient, *task.case.same_as)
    name = f"{task.dataset}: {task.case.source}"
    return Candidate(task.volume, task.patient, names, task.stamp, name, not task.spool, contents, codes, doubts)


def _finish(
    settings: Settings,
    tasks: Sequence[ScanTask],
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
    apart = [task for task in tasks if not task.spool]
    write_held_out(folder, ((t.dataset, t.volume, t.patient, read_contents(folder, t.volume)) for t in apart))
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
    return Outcome(
        (made,), (command("report", f"folder={folder}"), command("pretrain", "CONFIG.yaml", f"data.corpus={folder}"))
    )
