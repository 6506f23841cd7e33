"""The cluster's jobs of a run: a record that only who submits writes, and what the queue says of them.

The queue is asked by squeue, not by sacct: it needs no accounting, and a cluster without it would leave us waiting for
ever. After a restart of the cluster a number may be somebody else's, so a job is known by its number and its name.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path

__all__ = ["Job", "Queued", "held", "last_job", "note_job", "queue"]

RECORD = "jobs/submitted.jsonl"  # in the run folder, a line a submission
ASK_S = 60.0  # a busy controller may take long
# What SLURM's shorter words mean for who waits: the first that the reason begins with.
_REASONS = {
    "None": "",
    "DependencyNeverSatisfied": "for an earlier job that has failed, so for ever; cancel it",
    "Dependency": "for an earlier job to be done",
    "Resources": "for machines to become free",
    "Priority": "behind jobs of higher priority",
    "BeginTime": "a moment, then starts again",
    "JobArrayTaskLimit": "for others of its array, of which only so many may run at a time",
    "JobHeldUser": "because it is held; scontrol release lets it go",
    "JobHeldAdmin": "because an administrator of the cluster holds it",
    "QOS": "for a limit of its quality of service",
    "Assoc": "for a limit of its account",
    "MaxJobsPerAccount": "for a limit of its account",
    "PartitionTimeLimit": "for ever: its hours are more than the partition allows; cancel it",
    "PartitionNodeLimit": "for ever: its nodes are more than the partition allows; cancel it",
    "PartitionDown": "for its partition, which is down",
    "ReqNodeNotAvail": "for machines that are down or reserved",
    "launch failed requeued held": "because its start failed on the machine; scontrol release tries again",
    "JobHoldMaxRequeue": "because it went back too often; scontrol release tries again",
}
_STATES = {
    "COMPLETING": "its job is ending",
    "CONFIGURING": "its machines are being made ready",
    "SUSPENDED": "suspended by the cluster",
}
_PENDING = frozenset({"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"})


@dataclass(frozen=True)
class Job:
    """One submission: ``id`` ("17", "17_3" in an array) at the cluster, ``name`` in its queue, where its output goes.

    ``cluster`` is slurm, local or debug; only jobs of slurm are in a queue. ``at`` is the time of submission, ``user``
    the number of who submitted it.
    """

    id: str
    name: str
    cluster: str
    output: str
    at: str
    user: int = field(default_factory=os.getuid)

    def log(self, rank: int = 0, kind: str = "out") -> Path:
        """What rank ``rank`` printed (``out``), or wrote to standard error (``err``), over all starts of the job."""
        return Path(self.output) / f"{self.id}_{rank}_log.{kind}"

    @property
    def told(self) -> bool:
        """Would `queue`, which tells of this user's jobs alone, tell of it while the cluster has it?"""
        return self.cluster == "slurm" and self.user == os.getuid()

    @property
    def order(self) -> tuple[int, ...]:
        """Sorts jobs as they were submitted, the elements of an array as they stand in it."""
        return tuple(int(part) for part in self.id.split("_") if part.isdecimal())

    def since(self, at: str) -> bool:
        """Was it submitted at the time ``at`` or later? Else it is of an earlier start than the one begun then."""
        return datetime.fromisoformat(self.at) >= datetime.fromisoformat(at)


@dataclass(frozen=True)
class Queued:
    """A job that the queue holds: SLURM's word for its state, and why it waits where it does."""

    state: str
    reason: str

    @property
    def waits(self) -> bool:
        """Is it yet to start, or to start again?"""
        return self.state in _PENDING

    @property
    def why(self) -> str:
        """For what it waits, or what else it does than run, as a user would say it; empty where there is no more."""
        if not self.waits:
            return _STATES.get(self.state, "")
        said = next((words for word, words in _REASONS.items() if self.reason.startswith(word)), None)
        if said is None:
            return f"waits ({self.reason})" if self.reason else ""
        return f"waits {said} ({self.reason})" if said else ""


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
    """The user's jobs that wait or run, by (id, name), elements of arrays one by one; None where no queue answers.

    Those in hidden partitions, too, and whatever the user's own variables for squeue leave out.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SQUEUE_")}
    command = ["squeue", "-h", "-a", "-r", "-u", str(os.getuid()), "-o", "%i|%T|%r|%j"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=ASK_S, check=True, env=environment)
    except (OSError, subprocess.SubprocessError):
        return None
    rows = (line.split("|", 3) for line in asked.stdout.splitlines() if line.count("|") >= 3)
    return {(number, name): Queued(state, reason) for number, state, reason, name in rows}


def held(job: Job | None, jobs: Mapping[tuple[str, str], Queued] | None) -> Queued | None:
    """What the queue says of ``job``; None where it no longer holds it, or nobody can tell."""
    return None if job is None or jobs is None else jobs.get((job.id, job.name))
