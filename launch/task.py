"""What every process of a submitted job does: a verb on a run folder, with its end noted there."""

from __future__ import annotations

import os
import signal
import socket
from dataclasses import dataclass
from types import FrameType

from launch.attempts import Attempt, against_another, newest_checkpoint, note_attempt, read_attempts, step_of
from launch.call import Call
from launch.head import head
from launch.run import Outcome, Stopped, close_run, may_pass, note_start, read_json, say

__all__ = ["Task", "restarted"]


@dataclass(frozen=True)
class Task:
    """What submitit pickles and calls in every process of a job; only the first notes how it ended."""

    call: Call
    restarts: int = 3

    def __call__(self) -> Outcome | None:
        import submitit

        job = submitit.JobEnvironment()
        first = job.global_rank == 0
        _tell_ranks()
        if job.cluster != "debug":
            _listen()
        folder = self.call.folder
        if first and job.cluster == "slurm" and (no := _lost(self, job.job_id)):
            close_run(folder, "failed", error=no)
            raise SystemExit(1)  # not 0: srun is to end the other ranks, who would wait for this one
        try:
            if first:
                note_start(folder, job=job.job_id)
                print(head(folder), flush=True)
            outcome = self.call.execute()
        except Stopped as stop:  # every rank has saved; what now is for the job's aftermath to say
            # Where another rank has failed that is the cause: srun ends the others by SIGTERM.
            if first and not (stop.signal == "SIGTERM" and (folder / "outcome.json").exists()):
                close_run(folder, "stopped", error=str(stop))
            return Outcome(next=(str(stop),)) if first else None
        except BaseException as error:
            # The first to fail is the one to be told: the others mostly fail because it went away.
            if not (folder / "outcome.json").exists():
                who = "" if first else f"rank {job.global_rank} on {socket.gethostname()}: "
                close_run(folder, "failed", error=f"{who}{say(error)}", again=may_pass(error))
            raise
        if first:
            close_run(folder, "done" if outcome.ok else "failed", outcome)
        return outcome if first else None


def restarted() -> int:
    """How often SLURM has begun this job again."""
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0)


def _lost(task: Task, job: str) -> str:
    """Note the start before this one where its script could not; what speaks against going on, else ""."""
    folder, before = task.call.folder, restarted() - 1
    known = read_attempts(folder, job)
    if before < 0 or any(attempt.restart == before for attempt in known):
        return ""
    ended = read_json(folder / "outcome.json") or {}
    if ended.get("state") == "stopped":  # by the SIGTERM that comes when a job is sent back, which ends its script too
        kept = newest_checkpoint(folder)
        note_attempt(folder, Attempt(job, before, "warned", kept, kept, str(ended["error"])))
        return ""
    reason = "its machine went away, or somebody sent the job back to the queue"
    lost = Attempt(job, before, "lost", step_of(folder), newest_checkpoint(folder), reason)
    note_attempt(folder, lost)
    no = against_another([*known, lost], task.restarts)
    return f"job {job} is not tried again: {no}; last: {reason}" if no else ""


def _listen() -> None:
    """A signal is an exception until the verb listens itself. submitit's own handler acts on the first rank alone."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(f"stopped by {signal.Signals(number).name}; the same command goes on")

    for number in (signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, stop)


def _tell_ranks() -> None:
    """Put the place of this process in its job where torchrun would put it."""
    from submitit import JobEnvironment
    from submitit.helpers import TorchDistributedEnvironment

    found = TorchDistributedEnvironment()
    # The host name of a node need not resolve on itself; between nodes it must.
    address = _address(found.master_addr) if JobEnvironment().num_nodes > 1 else "127.0.0.1"
    os.environ |= {
        "RANK": str(found.rank),
        "WORLD_SIZE": str(found.world_size),
        "LOCAL_RANK": str(found.local_rank),
        "LOCAL_WORLD_SIZE": str(found.local_world_size),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(found.master_port),
    }
    if cores := os.environ.get("SLURM_CPUS_PER_TASK"):  # else each of several would take those of all, where it can
        os.environ.setdefault("OMP_NUM_THREADS", cores)


def _address(name: str) -> str:
    """The first node's name, or where names of nodes mean nothing the address from which SLURM started the ranks."""
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        return os.environ.get("SLURM_LAUNCH_NODE_IPADDR", name)
    return name
