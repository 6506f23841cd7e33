"""Verb ``cancel``: end the jobs and processes of the run in a folder, or of every run beneath it; they save first."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import Field

from launch.array import array_jobs
from launch.jobs import Queued, queue
from launch.run import Outcome, RunError, alive, close_run
from launch.settings import Settings as Base
from launch.state import RunState, state_of
from launch.status import runs_beneath

__all__ = ["Settings", "main"]

ASK_S = 60.0
UNKNOWN = "is not in the queue that answers here, if one does: try again in a moment, or on a machine of its cluster"


class Settings(Base):
    """What to end."""

    folder: Path = Field(description="a run folder, or a folder with runs somewhere beneath it")
    depth: int = Field(4, ge=0, description="how many folders deep runs are looked for")


def main(settings: Settings) -> Outcome:
    """Say what is ended, a line each. Raises RunError where there is no run, and where the cluster refuses."""
    if not settings.folder.is_dir():
        raise RunError(f"there is no folder {settings.folder}")
    jobs = queue()
    runs = []
    for folder in runs_beneath(settings.folder, settings.depth):
        try:
            runs.append((folder, state_of(folder, jobs)))
        except RunError as error:
            print(f"{folder}  unreadable: {error}")
    if not runs:
        raise RunError(
            f"no run in {settings.folder} or {settings.depth} folders beneath it (a run folder holds run.json)"
        )
    # Who waits goes first: else the end of one job would let the next begin for a moment.
    waiting = [run for run in runs if run[1].state == "queued"]
    working = [run for run in runs if run[1].state == "running"]
    done = [*_cancel(waiting), *_cancel(working), *(line for folder, _ in runs for line in _tasks(folder, jobs))]
    print("\n".join(done) if done else f"nothing in {settings.folder} waits or runs")
    return Outcome()


def _cancel(runs: Sequence[tuple[Path, RunState]]) -> list[str]:
    """End these runs; what was done."""
    ids: dict[str, list[str]] = {}
    for _, run in runs:
        if run.queued is not None and run.job is not None:
            ids.setdefault(run.job.name, []).append(run.job.id)
    for name, numbers in ids.items():
        _scancel(name, numbers)
    done = []
    for folder, run in runs:
        if run.queued is None or run.job is None:
            done.append(_end(folder, run) if run.state == "running" else f"{folder}  {UNKNOWN}")
        elif run.queued.waits:
            when, then = ("before it began", "submits it again") if not run.begun else ("while it waited", "goes on")
            close_run(folder, "stopped", error=f"cancelled {when}; the same command {then}")
            done.append(f"{folder}  job {run.job.id} cancelled {when}")
        else:
            done.append(f"{folder}  job {run.job.id} is told to end; it saves first")
    return done


def _tasks(folder: Path, jobs: Mapping[tuple[str, str], Queued] | None) -> list[str]:
    """End the arrays that do a run's tasks: behind the process that collects them, which would submit others."""
    name, ids = array_jobs(folder)
    shared = sorted({number.partition("_")[0] for number, called in jobs or () if called == name} & set(ids))
    if not shared:
        return []
    _scancel(name, shared)
    return [f"{folder}  jobs {', '.join(shared)} of its tasks cancelled"]


def _end(folder: Path, run: RunState) -> str:
    """Tell the process of a run on this machine to end; what was done."""
    pid, host = run.start["pid"], run.start["host"]
    if not alive(run.start):
        return f"{folder}  is process {pid} on {host}, by its files: end it there (axial cancel, or kill {pid})"
    try:
        os.kill(pid, signal.SIGTERM)
    except ProcessLookupError:
        return f"{folder}  process {pid} has just ended"
    except PermissionError:
        raise RunError(f"{folder} is worked in by process {pid} of another user, who alone can end it") from None
    return f"{folder}  process {pid} is told to end; it saves first"


def _scancel(name: str, ids: Sequence[str]) -> None:
    """The jobs of these ids that bear the name: after a restart of the cluster an id may be somebody else's."""
    try:
        done = subprocess.run(
            ["scancel", f"--name={name}", *ids], capture_output=True, text=True, timeout=ASK_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RunError(f"cannot cancel job {', '.join(ids)}: scancel does not answer ({error})") from None
    if done.returncode:
        raise RunError(f"cannot cancel job {', '.join(ids)}: {' '.join(done.stderr.split()) or 'scancel refuses'}")
