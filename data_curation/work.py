"""The two kinds of tasks that curation shares out: scan a volume, write a shard; and what is left over from before."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from data_curation.finished import FINISHED
from data_curation.index import INDEX
from data_curation.listing import CurateError
from data_curation.plan import Plan
from data_curation.scan import SCAN, Scan, ScanTask, has_spool, read_scan, scan, spool_path
from data_curation.shards import is_written, write_shard
from launch.crew import Each, Lost
from launch.progress import Progress

__all__ = ["known", "named", "scan_all", "write_all"]

AGAIN = "What was finished is kept: run the same command again"
OURS = re.compile(r"(train|val|duplicates)-\d+\.(tar|parquet)")  # names of shards and their rows


def named(task: ScanTask) -> str:
    """A volume as it may be told in a log: its hashed name, which private/sources.csv explains."""
    return f"{task.dataset}: volume {task.volume}"


def known(folder: Path, tasks: Sequence[ScanTask]) -> dict[str, Scan]:
    """The verdicts of earlier runs that stand, since neither files nor rules have changed.

    Those of volumes that are gone are removed; the rest are made again.
    """
    volumes = {task.volume for task in tasks}
    for path in (folder / SCAN).iterdir():
        if path.name.partition(".")[0] not in volumes:
            path.unlink()
    scans = {}
    for task in tasks:
        earlier = read_scan(folder, task.volume)
        if earlier is not None and earlier.stamp == task.stamp and not earlier.again:
            scans[task.volume] = earlier
    return scans


def scan_all(folder: Path, tasks: Sequence[ScanTask], each: Each) -> dict[str, Scan]:
    """The verdicts on these volumes. A volume that takes its worker with it is refused, and tried by the next run."""
    scans: dict[str, Scan] = {}
    if not tasks:
        return scans
    with Progress(len(tasks), "scan", "volumes") as bar:
        for task, verdict in each(partial(scan, folder), tasks, named):
            if isinstance(verdict, Lost):
                if verdict.reason == "node":
                    raise CurateError(f"{named(task)}: {verdict.detail}. {AGAIN}")
                verdict = Scan(task.stamp, False, verdict.reason, f"reading it {verdict.detail}", again=True)
            scans[task.volume] = verdict
            bar.advance()
    return scans


def write_all(
    folder: Path, planned: Plan, tasks: Sequence[ScanTask], scans: dict[str, Scan], each: Each, extending: bool
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
    again = _restore(folder, [task for task in tasks if uses[task.volume]], scans, each)
    if missing:
        with Progress(sum(shard.slices for shard in missing), "write", "slices") as bar:
            for shard, done in each(partial(write_shard, folder), missing, lambda shard: shard.name):
                if isinstance(done, Lost):
                    raise CurateError(f"{shard.name}: {done.detail}. {AGAIN}")
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
    second = scan_all(folder, gone, each)
    for task in gone:
        if second[task.volume] != scans[task.volume]:
            text = second[task.volume].reason or "other slices"
            raise CurateError(f"{named(task)} changed while it was in work ({text}): run the same command again")
    return sum(verdict.slices for verdict in second.values())
