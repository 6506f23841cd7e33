"""Verb ``status``: how the run in a folder, or every run beneath it, is doing: by its files and the cluster's queue."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, get_args

from pydantic import Field

from launch.attempts import Attempt
from launch.beats import Beat, read_beats, standing
from launch.jobs import Queued, queue
from launch.progress import duration, rate
from launch.run import Outcome, RunError
from launch.settings import Settings as Base
from launch.state import State, state_of
from launch.tally import Tally, read_tally

__all__ = ["Settings", "Status", "main", "runs_beneath", "status_of", "told"]

QUIET_S = 120.0  # a process gives a sign every 15 s; few steps take longer than this
SKEW_S = 60.0  # by which the clocks of two machines may differ
ERROR_LINES = 4


class Settings(Base):
    """What to look at."""

    folder: Path = Field(Path(), description="a run folder, or a folder with runs somewhere beneath it")
    depth: int = Field(4, ge=0, description="how many folders deep runs are looked for")


@dataclass(frozen=True)
class Status:
    """One run: its state, what it does where, its last metrics and its last error, empty where there are none."""

    folder: Path
    state: State
    verb: str
    where: str
    when: datetime
    metrics: dict[str, Any]
    error: str  # or whatever else there is to say of the state
    attempts: tuple[Attempt, ...] = ()  # earlier tries of the same job, while it waits or runs
    tasks: Tally | None = None  # of a verb that shares them out, while it runs
    checkpoint: tuple[int, datetime] | None = None  # step of the newest and when it was written
    beats: tuple[Beat, ...] = ()  # signs of life of its processes, while it runs
    order: tuple[Any, ...] = ()  # in which runs were started


def main(settings: Settings) -> Outcome:
    """Print one paragraph a run, as they were started. Raises RunError where there is no run."""
    if not settings.folder.is_dir():
        raise RunError(f"there is no folder {settings.folder}")
    found, unreadable, jobs = [], 0, queue()
    for folder in runs_beneath(settings.folder, settings.depth):
        try:
            found.append(status_of(folder, jobs))
        except RunError as error:
            unreadable += 1
            print(f"{folder}  unreadable\n  {error}")
    if not found and not unreadable:
        raise RunError(
            f"no run in {settings.folder} or {settings.depth} folders beneath it (a run folder holds run.json)"
        )
    if len(found) > 1:
        counts = Counter(status.state for status in found)
        print(f"{len(found)} runs: " + ", ".join(f"{counts[one]} {one}" for one in get_args(State) if counts[one]))
    for status in sorted(found, key=lambda status: status.order):
        print(told(status))
    return Outcome()


def runs_beneath(folder: Path, depth: int) -> Iterator[Path]:
    """Every folder with a run.json, at most ``depth`` below ``folder``; of what lies inside a run only its parts."""
    if (folder / "run.json").exists():
        parts = [*folder.glob("*/run.json"), *folder.glob("parts/*/run.json")]
        yield from sorted(part.parent for part in parts)
        yield folder
        return
    if depth == 0:
        return
    try:
        with os.scandir(folder) as entries:
            inner = sorted(one.name for one in entries if one.is_dir(follow_symlinks=False) and one.name[0] != ".")
    except PermissionError:  # somebody else's; the other runs are told all the same
        return
    for name in inner:
        yield from runs_beneath(folder / name, depth - 1)


def status_of(folder: Path, jobs: Mapping[tuple[str, str], Queued] | None = None) -> Status:
    """How one run folder is doing; ``jobs`` is `launch.jobs.queue()`."""
    now = state_of(folder, jobs)
    start, job = now.start, now.job
    number = job.id if job is not None else start.get("job")
    process = f"process {start['pid']} on {start['host']}" if start.get("pid") and now.state != "queued" else ""
    metrics = _last_row(folder / "metrics.jsonl")
    ended = now.outcome.get("at") if now.state in ("done", "failed", "stopped") else None
    times = [ended] if ended else [start["at"], *([metrics["at"]] if "at" in metrics else [])]
    command = start.get("command") or []
    at_work = now.state in ("queued", "running")
    return Status(
        folder=folder,
        state=now.state,
        verb=command[1] if len(command) > 1 else "",
        where=" ".join(filter(None, [f"job {number}" if number else "", process])) if at_work else "",
        when=max(datetime.fromisoformat(time) for time in times),
        metrics=metrics,
        error=now.why,
        # What a job that ended well, or with an error that is told, went through is history.
        attempts=now.attempts if at_work or (now.state == "stopped" and not now.outcome) else (),
        tasks=read_tally(folder) if now.state == "running" else None,
        checkpoint=_last_checkpoint(folder),
        beats=_beats(folder, start["at"]) if now.state == "running" else (),
        order=(datetime.fromisoformat(start["at"]), job.order if job is not None else (), str(folder)),
    )


def told(status: Status) -> str:
    """``runs/a  pretrain  running  40s ago``, then the last step and the last error, each on a line of its own."""
    again = f"{_ordinal(len(status.attempts) + 1)} start" if status.attempts and status.where else ""
    ago = f"{_ago(status.when)} ago"
    lines = ["  ".join(filter(None, [str(status.folder), status.verb, status.state, ago, status.where, again]))]
    row = status.metrics
    if "step" in row:
        parts = [f"step {row['step']}/{row.get('total', '?')}"]
        parts += [f"loss {row['loss']:.3f}"] if row.get("loss") is not None else []
        parts += [f"{rate(row['slices_per_s'])} slices/s"] if row.get("slices_per_s") else []
        parts += (
            [f"{duration(row['seconds_left'])} left"] if row.get("seconds_left") and status.state == "running" else []
        )
        parts += [f"{row['skipped']:.0f} steps skipped"] if row.get("skipped") else []
        lines.append("  " + "  ".join(parts))
    if status.tasks is not None:
        lines.append(f"  {status.tasks}")
    if status.checkpoint is not None:
        step, written = status.checkpoint
        lines.append(f"  last checkpoint: step {step}, {_ago(written)} ago")
    if still := _still(status.beats):
        lines.append(f"  {still}")
    if status.error:
        lines += [f"  {line}" for line in status.error.splitlines()[:ERROR_LINES]]
    if status.attempts:
        lines.append(f"  last time: {_attempt(status.attempts[-1])}")
    return "\n".join(lines)


def _attempt(last: Attempt) -> str:
    """``failed in step 120: out of memory``."""
    where = f" in step {last.step}" if last.step is not None else ""
    reason = next(iter(last.reason.splitlines()), "")
    return f"{last.how}{where}{f': {reason}' if reason else ''}"


def _ordinal(number: int) -> str:
    """``2nd``, ``13th``."""
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def _ago(when: datetime) -> str:
    return duration(max((datetime.now().astimezone() - when).total_seconds(), 0))


def _beats(folder: Path, since: str) -> tuple[Beat, ...]:
    """Signs of life of the last start; a killed one before it has left some, which this one writes over later."""
    begun = datetime.fromisoformat(since).timestamp() - SKEW_S
    return tuple(beat for beat in read_beats(folder) if beat.at >= begun)


def _still(beats: tuple[Beat, ...]) -> str:
    """Which process stands where when none has got on for a while, else ""; by the machines' clocks."""
    now = time.time()
    silent = {beat.rank for beat in beats if now - beat.at > QUIET_S}
    quiet = min((beat.idle_s + max(now - beat.at, 0) for beat in beats), default=0.0)
    return f"nothing has moved for {duration(quiet)}: {standing(beats, silent)}" if quiet > QUIET_S else ""


def _last_checkpoint(folder: Path) -> tuple[int, datetime] | None:
    """A checkpoint gets its name when it is whole; its progress.json is the last thing written into it."""
    for path in sorted((folder / "checkpoints").glob("step_*/progress.json"), reverse=True):
        number = path.parent.name.removeprefix("step_")
        with suppress(FileNotFoundError):  # just being deleted
            if number.isdecimal():
                return int(number), datetime.fromtimestamp(path.stat().st_mtime).astimezone()
    return None


def _last_row(path: Path) -> dict[str, Any]:
    """The last whole line, over that of the last step, whose loss others lack; a run may just have begun another."""
    if not path.exists():
        return {}
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 65536))
        lines = file.read().decode(errors="replace").splitlines()
    found: dict[str, Any] = {}
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict):
            found = row | found
            if "loss" in row:
                break
    return found
