"""The cluster's jobs of a run: a record that only who submits writes, and what the queue says of them.

The queue is asked by squeue, not by sacct: it needs no accounting, and a cluster without it would leave us waiting for
ever. After a restart of the cluster a number may be somebody else's, so a job is known by its number and its name.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["Job", "Queued", "held", "last_job", "note_job", "queue"]

RECORD = "jobs/submitted.jsonl"  # in the run folder, a line a submission
ASK_S = 60.0  # a busy controller may take long
_PENDING = frozenset({"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"})


@dataclass(frozen=True)
class Job:
    """One submission: ``id`` ("17", "17_3" in an array) at the cluster, ``name`` in its queue, where its output goes.

    ``cluster`` is slurm, local or debug; only jobs of slurm are in a queue. ``at`` is the time of submission.
    """

    id: str
    name: str
    cluster: str
    output: str
    at: str

    def log(self, rank: int = 0, kind: str = "out") -> Path:
        """What rank ``rank`` printed (``out``), or wrote to standard error (``err``), over all starts of the job."""
        return Path(self.output) / f"{self.id}_{rank}_log.{kind}"


@dataclass(frozen=True)
class Queued:
    """A job that the queue holds: SLURM's word for its state, and why it waits where it does."""

    state: str
    reason: str

    @property
    def waits(self) -> bool:
        """Is it yet to start, or to start again?"""
        return self.state in _PENDING


def note_job(folder: Path, job: Job) -> None:
    """Add a submission to the record of the run folder ``folder``."""
    path = folder / RECORD
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(job)) + "\n")


def last_job(folder: Path) -> Job | None:
    """The newest submission of the run in ``folder``; None where there was none."""
    try:
        lines = (folder / RECORD).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return None
    for line in reversed(lines):
        try:
            return Job(**json.loads(line))
        except (ValueError, TypeError):
            continue  # torn by a full disk
    return None


def queue() -> Mapping[tuple[str, str], Queued] | None:
    """The user's jobs that wait or run, by (id, name), elements of arrays one by one; None where no queue answers."""
    command = ["squeue", "-h", "-r", "-u", str(os.getuid()), "-o", "%i|%T|%r|%j"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=ASK_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    rows = (line.split("|", 3) for line in asked.stdout.splitlines() if line.count("|") >= 3)
    return {(number, name): Queued(state, reason) for number, state, reason, name in rows}


def held(job: Job | None, jobs: Mapping[tuple[str, str], Queued] | None) -> Queued | None:
    """What the queue says of ``job``; None where it no longer holds it, or nobody can tell."""
    return None if job is None or jobs is None else jobs.get((job.id, job.name))
