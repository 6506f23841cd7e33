"""Jobs of a SLURM cluster through submitit."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from launch.call import Call
from launch.ranks import RankFailed
from launch.run import Outcome, RunError, Stopped, close_run, command, note_start, read_json, say
from launch.settings import Settings

__all__ = ["ArrayRules", "Slurm", "Task"]


class ArrayRules(Settings):
    """How the tasks of a verb that shares them out become one array of jobs."""

    elements: int = Field(200, ge=1, description="jobs that the tasks of one step are cut into at most")
    parallel: int | None = Field(None, ge=1, description="how many of them run at a time, by default all that can")
    retries: int = Field(2, ge=0, description="how often a task that was in work in a lost job is given to another")


class Slurm(Settings):
    """A job of a SLURM cluster through submitit; or the same job on this machine (local) or in this process (debug)."""

    kind: Literal["slurm"] = "slurm"
    cluster: Literal["slurm", "local", "debug"] = Field(
        "slurm", description="local: on this machine; debug: in this process"
    )
    partition: str | None = Field(None, description="partition, by default the cluster's own")
    account: str | None = Field(None, description="account that is charged")
    qos: str | None = Field(None, description="quality of service")
    constraint: str | None = Field(None, description="features the nodes must have")
    nodes: int = Field(1, ge=1, description="machines")
    gpus_per_node: int = Field(0, ge=0, description="GPUs, and processes, on each machine; 0: one process, no GPU")
    processes_per_node: int | None = Field(None, ge=1, description="where it is not one a GPU")
    cpus_per_process: int = Field(1, ge=1, description="cores for each process, its data workers included")
    memory_gib: float | None = Field(None, gt=0, description="memory on each machine, by default the cluster's own")
    hours: float = Field(
        24.0, gt=0, description="time limit; the job goes back to the queue and goes on from what it saved"
    )
    signal_delay_s: int = Field(
        300, ge=1, description="seconds between the warning and the end: more than a step and a save"
    )
    requeues: int = Field(1000, ge=0, description="how often it may go back to the queue")
    setup: tuple[str, ...] = Field((), description="shell lines before the start, such as `module load`")
    extra: dict[str, str | int | bool] = Field({}, description="other options of sbatch")
    wait: bool = Field(False, description="stay until the job has ended")
    array: ArrayRules = Field(ArrayRules(), description="for verbs that share out tasks")

    @property
    def ranks(self) -> int:
        """Processes of the run."""
        return self.nodes * self._each

    @property
    def _each(self) -> int:
        return self.processes_per_node or self.gpus_per_node or 1

    @property
    def detached(self) -> bool:
        """A job outlives the command, unless one waits for it."""
        return not self.wait and self.cluster != "debug"

    def run(self, call: Call) -> Outcome:
        import submitit

        self.check()
        log = call.folder / "jobs"
        executor = submitit.AutoExecutor(log, cluster=self.cluster, slurm_max_num_timeout=self.requeues)
        executor.update_parameters(**self.parameters(call.folder.resolve().name))
        if self.detached:
            note_start(call.folder, waiting=True)  # before: afterwards the job may have begun to write there itself
        try:
            job = executor.submit(Task(call, self.requeues))
        except submitit.core.utils.FailedJobError as error:
            raise RunError(f"sbatch refused the job: {' '.join(str(error).split())}") from None
        if self.detached:
            made = f"job {job.job_id}, its output in {log}/{job.job_id}_0_log.out"
            return Outcome(made=(made,), next=(command("status", f"folder={call.folder}"),))
        try:
            outcomes = job.results()
        except submitit.core.utils.UncompletedJobError as error:
            raise RankFailed(0, self.nodes, f"job {job.job_id} failed", str(error)) from None
        ended = read_json(call.folder / "outcome.json") or {}
        if ended.get("state") == "stopped":
            raise Stopped(str(ended["error"]))
        return outcomes[0] or Outcome()

    def check(self) -> None:
        """Raises RunError where jobs cannot be submitted."""
        if self.cluster == "slurm" and shutil.which("sbatch") is None:
            raise RunError(
                "there is no sbatch on this machine; submit from a login node of the cluster, or use cluster: local"
            )

    def parameters(self, name: str) -> dict[str, Any]:
        """Of submitit's update_parameters; what is None is left to the cluster."""
        given = {
            "name": f"axial-{name}",
            "nodes": self.nodes,
            "gpus_per_node": self.gpus_per_node or None,
            "tasks_per_node": self._each,
            "cpus_per_task": self.cpus_per_process,
            "mem_gb": self.memory_gib,
            "timeout_min": max(1, round(self.hours * 60)),
            "slurm_signal_delay_s": self.signal_delay_s,
            "slurm_partition": self.partition,
            "slurm_account": self.account,
            "slurm_qos": self.qos,
            "slurm_constraint": self.constraint,
            "slurm_setup": list(self.setup) or None,
            "local_setup": list(self.setup) or None,
            "slurm_additional_parameters": dict(self.extra) or None,
            # A rank that has died leaves the others in a collective: the job ends at once.
            "slurm_srun_args": ["--kill-on-bad-exit=1"],
        }
        return {key: value for key, value in given.items() if value is not None}


@dataclass(frozen=True)
class Task:
    """What submitit pickles and calls in every process of a job."""

    call: Call
    requeues: int = 1000

    def __call__(self) -> Outcome | None:
        import submitit

        job = submitit.JobEnvironment()
        first = job.global_rank == 0
        _tell_ranks()
        if first:
            note_start(self.call.folder, job=job.job_id)
        try:
            outcome = self.call.execute()
        except Stopped as stop:
            # Every rank has saved. A job that was cancelled stays so; one that was warned goes back to the queue.
            if first:
                close_run(self.call.folder, "stopped", error=str(stop))
                again = int(os.environ.get("SLURM_RESTART_COUNT", "0")) < self.requeues
                if stop.signal == "SIGUSR2" and job.cluster == "slurm" and again:
                    subprocess.run(["scontrol", "requeue", job.job_id], check=True)
            return Outcome(next=(str(stop),)) if first else None
        except BaseException as error:
            # The first to fail is the one to be told: the others mostly fail because it went away.
            if not (self.call.folder / "outcome.json").exists():
                who = "" if first else f"rank {job.global_rank}: "
                close_run(self.call.folder, "failed", error=f"{who}{say(error)}")
            raise
        if first:
            close_run(self.call.folder, "done" if outcome.ok else "failed", outcome)
        return outcome if first else None

    def checkpoint(self) -> Any:
        """For submitit, when a verb without its own handler is warned: queue it again; it goes on by its files."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def _tell_ranks() -> None:
    """Put the place of this process in its job where torchrun would put it."""
    from submitit import JobEnvironment
    from submitit.helpers import TorchDistributedEnvironment

    found = TorchDistributedEnvironment()
    # The host name of a node need not resolve on itself; between nodes it must.
    address = found.master_addr if JobEnvironment().num_nodes > 1 else "127.0.0.1"
    os.environ |= {
        "RANK": str(found.rank),
        "WORLD_SIZE": str(found.world_size),
        "LOCAL_RANK": str(found.local_rank),
        "LOCAL_WORLD_SIZE": str(found.local_world_size),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(found.master_port),
    }
