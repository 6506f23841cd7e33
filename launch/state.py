"""How a run stands: by the files it leaves and, where it is a job, by the cluster's queue.

The files alone would lie: an outcome "failed" may be that of a job which waits to start again, and a job that was
killed in the queue, or with its machine, leaves no word at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from launch.attempts import Attempt, read_attempts
from launch.jobs import Job, Queued, held, last_job
from launch.run import RunError, alive, read_json

__all__ = ["RunState", "state_of"]

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
    attempts: tuple[Attempt, ...] = ()

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
    tries = read_attempts(folder, job.id) if job is not None else []
    return RunState(state, start, outcome, job, queued, why, tuple(tries))


def _state(
    folder: Path, start: dict[str, Any], outcome: dict[str, Any], job: Job | None, queued: Queued | None, asked: bool
) -> tuple[State, str]:
    ended = outcome.get("state")
    if queued is not None and ended != "done":  # done: the job is only being put away
        return ("queued" if queued.waits else "running"), queued.why
    gone = asked and job is not None and job.told
    number = job.id if job is not None else ""
    if ended:
        error = str(outcome.get("error", "")).strip()
        if gone and outcome.get("again"):  # it says that the job goes back to the queue
            error += f"\nthen job {number} left the queue (cancelled, or not taken back); the same command goes on"
        return ended, error
    if start.get("pid"):
        # None: another machine's process. Its files are the only sign; how old the last is, is told.
        living = alive(start)
        if living or (living is None and not gone):
            return "running", ""
        how = "ended without a word (out of time before it had saved, killed, cancelled, or its machine was lost)"
        return "stopped", f"job {number} {how}; the same command goes on" if gone else ""
    if gone and job is not None and (errors := job.log(kind="err")).exists():
        return "stopped", f"job {number} ended before its work began; see {errors}. The same command submits it again"
    if gone:
        return "stopped", (
            f"job {number} left the queue before it began (an earlier job failed, it was cancelled, or its machine "
            f"does not see {folder}); the same command submits it again"
        )
    if job is None:
        return "queued", f"no job is noted; if the queue has none for it (squeue), remove {folder / 'run.json'}"
    return "queued", ""
