"""How a run stands: by the files it leaves and, where it is a job, by the cluster's queue.

The files alone would lie: an outcome "failed" may be that of a job which waits to start again, and a job that was
killed in the queue, or with its machine, leaves no word at all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from launch.jobs import Job, Queued, held, last_job
from launch.run import RunError, alive, read_json

__all__ = ["RunState", "State", "attempts", "state_of"]

State = Literal["queued", "running", "stopped", "done", "failed"]


@dataclass(frozen=True)
class RunState:
    """The state of the last start of a run; ``start`` is its entry in run.json, ``outcome`` what outcome.json says.

    ``job`` is the one it was submitted as and ``queued`` that job in the queue. ``why`` says what a user needs to know
    of the state beyond its name, ``attempts`` how earlier tries of the same job ended.
    """

    state: State
    start: dict[str, Any]
    outcome: dict[str, Any]
    job: Job | None = None
    queued: Queued | None = None
    why: str = ""
    attempts: tuple[dict[str, Any], ...] = ()

    @property
    def begun(self) -> bool:
        """Has a process of it ever been there?"""
        return bool(self.start.get("pid") or self.attempts)


def state_of(folder: Path, jobs: Mapping[tuple[str, str], Queued] | None) -> RunState:
    """How the run in ``folder`` stands; ``jobs`` is `launch.jobs.queue()`. Raises RunError where it has no record.

    A run whose process or job has gone without a word was stopped; its command goes on.
    """
    record, outcome = read_json(folder / "run.json"), read_json(folder / "outcome.json") or {}
    if record is None or not record.get("starts"):
        raise RunError(f"{folder / 'run.json'} holds no start")
    start: dict[str, Any] = record["starts"][-1]
    job = last_job(folder)
    queued = held(job, jobs)
    if job is not None and queued is None and not job.since(start["at"]):
        job = None
    state, why = _state(folder, start, outcome, job, queued, jobs is not None)
    return RunState(state, start, outcome, job, queued, why, attempts(folder, start["at"]))


def _state(
    folder: Path, start: dict[str, Any], outcome: dict[str, Any], job: Job | None, queued: Queued | None, asked: bool
) -> tuple[State, str]:
    ended = outcome.get("state")
    if queued is not None and ended != "done":  # done: the job is only being put away
        return ("queued" if queued.waits else "running"), queued.why
    if ended:
        return ended, str(outcome.get("error", "")).strip()
    gone = asked and job is not None and job.cluster == "slurm"
    number = job.id if job is not None else ""
    if start.get("pid"):
        # None: another machine's process. Its files are the only sign; how old the last is, is told.
        living = alive(start)
        if living or (living is None and not gone):
            return "running", ""
        how = "ended without a word (killed, cancelled, or its machine was lost)"
        return "stopped", f"job {number} {how}; the same command goes on" if gone else ""
    if gone:
        return "stopped", (
            f"job {number} left the queue before it began (an earlier job failed, it was cancelled, or its machine "
            f"does not see {folder}); the same command submits it again"
        )
    return "queued", ""


def attempts(folder: Path, since: str) -> tuple[dict[str, Any], ...]:
    """How tries of the job of the start at ``since`` ended, oldest first: of each how, at which step and why."""
    try:
        lines = (folder / "attempts.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return ()
    found = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue  # torn by a full disk
        if isinstance(row, dict) and not _before(str(row.get("at", "")), since):
            found.append(row)
    return tuple(found)


def _before(at: str, since: str) -> bool:
    try:
        return datetime.fromisoformat(at) < datetime.fromisoformat(since)
    except ValueError:
        return True
