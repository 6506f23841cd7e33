"""Verb ``status``: how the run in a folder, or every run beneath it, is doing, read from the files the runs leave."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from launch.beats import Beat, read_beats, standing
from launch.progress import duration, rate
from launch.run import Outcome, RunError, alive, read_json, submitted
from launch.settings import Settings as Base

__all__ = ["Settings", "Status", "main", "runs_beneath", "status_of"]

QUIET_S = 120.0  # a process gives a sign every 15 s; few steps take longer than this
SKEW_S = 60.0  # by which the clocks of two machines may differ

State = Literal["queued", "running", "stopped", "done", "failed"]


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
    error: str
    checkpoint: tuple[int, datetime] | None = None  # step of the newest and when it was written
    beats: tuple[Beat, ...] = ()  # signs of life of its processes, while it runs


def main(settings: Settings) -> Outcome:
    """Print one paragraph a run, the one that changed last at the end. Raises RunError where there is no run."""
    if not settings.folder.is_dir():
        raise RunError(f"there is no folder {settings.folder}")
    found = []
    for folder in runs_beneath(settings.folder, settings.depth):
        try:
            found.append(status_of(folder))
        except RunError as error:
            print(f"{folder}  unreadable\n  {error}")
    if not found:
        raise RunError(
            f"no run in {settings.folder} or {settings.depth} folders beneath it (a run folder holds run.json)"
        )
    for status in sorted(found, key=lambda status: status.when):
        print(told(status))
    return Outcome()


def runs_beneath(folder: Path, depth: int) -> Iterator[Path]:
    """Every folder with a run.json, at most ``depth`` below ``folder``; what lies inside a run is not looked at."""
    if (folder / "run.json").exists():
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


def status_of(folder: Path) -> Status:
    """The state of one run folder. A run whose process has gone without a word was stopped; its command goes on."""
    record, outcome = read_json(folder / "run.json"), read_json(folder / "outcome.json")
    if record is None or not record.get("starts"):
        raise RunError(f"{folder / 'run.json'} holds no start")
    start = record["starts"][-1]
    number = start.get("job") or submitted(folder)
    job = f"job {number}" if number else ""
    process = f"process {start['pid']} on {start['host']}" if start.get("pid") else ""
    state: State
    if outcome is not None:
        state = outcome["state"]
    elif start.get("pid"):
        # None: another machine's process. Its files are the only sign; how old the last is, is told.
        state = "stopped" if alive(start) is False else "running"
    else:
        state = "queued"
    metrics = _last_row(folder / "metrics.jsonl")
    times = [outcome["at"]] if outcome is not None else [start["at"], *([metrics["at"]] if "at" in metrics else [])]
    command = start.get("command") or []
    return Status(
        folder=folder,
        state=state,
        verb=command[1] if len(command) > 1 else "",
        where=" ".join(part for part in (job, process) if part) if state in ("queued", "running") else "",
        when=max(datetime.fromisoformat(time) for time in times),
        metrics=metrics,
        error=str((outcome or {}).get("error", "")).strip(),
        checkpoint=_last_checkpoint(folder),
        beats=_beats(folder, start["at"]) if state == "running" else (),
    )


def told(status: Status) -> str:
    """``runs/a  pretrain  running  40s ago``, then the last step and the last error, each on a line of its own."""
    lines = [
        "  ".join(
            filter(None, [str(status.folder), status.verb, status.state, f"{_ago(status.when)} ago", status.where])
        )
    ]
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
    if status.checkpoint is not None:
        step, written = status.checkpoint
        lines.append(f"  last checkpoint: step {step}, {_ago(written)} ago")
    if still := _still(status.beats):
        lines.append(f"  {still}")
    if status.error:
        lines += [f"  {line}" for line in status.error.splitlines()[:4]]
    return "\n".join(lines)


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
