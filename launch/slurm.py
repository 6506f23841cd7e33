"""Jobs of a SLURM cluster through submitit."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from uuid import uuid4

from pydantic import Field, model_validator

from launch.call import Call
from launch.jobs import Job, held, note_job, queue
from launch.ranks import RankFailed
from launch.run import Outcome, RunError, Stopped, close_run, note_start, now, read_json
from launch.settings import Settings
from launch.task import Task

if TYPE_CHECKING:
    import submitit

__all__ = ["ArrayRules", "Slurm", "as_outside_a_job"]

ASK_S = 5.0  # between two questions to the queue by who waits for a job
AGAIN = 75  # EX_TEMPFAIL of sysexits.h: what the aftermath says where the job is to go back to the queue


class ArrayRules(Settings):
    """How tasks, folds or points of a sweep become one array of jobs."""

    elements: int = Field(200, ge=1, description="jobs that the tasks of one step are cut into at most")
    parallel: int | None = Field(None, ge=1, description="how many of them run at a time, by default all that can")
    retries: int = Field(2, ge=0, description="how often a task that was in work in a lost job is given to another")
    parts: int = Field(
        1,
        ge=1,
        description="runs that the images of `predict` are cut into at most; folds always are runs",
    )


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
    requeues: int = Field(1000, ge=0, description="how often it may go back to the queue when its time is over")
    restarts: int = Field(
        3, ge=0, description="how often in a row, without a new checkpoint, it goes back after a failure"
    )
    setup: tuple[str, ...] = Field((), description="shell lines before the start, such as `module load`")
    environment: dict[str, str] = Field({}, description="variables of the job")
    python: str | None = Field(
        None, description="what starts Python on the nodes, such as `apptainer exec --nv axial.sif python`"
    )
    srun: tuple[str, ...] = Field((), description="more words for srun, such as --container-image=axial.sqsh (pyxis)")
    extra: dict[str, str | int | bool] = Field({}, description="other options of sbatch")
    wait: bool = Field(False, description="stay until the job has ended")
    array: ArrayRules = Field(ArrayRules(), description="for verbs that share out tasks, folds, parts and sweeps")

    @model_validator(mode="after")
    def _warned_in_time(self) -> Slurm:
        if self.signal_delay_s >= self.hours * 3600:  # else it is warned as it begins, goes back, and so on for ever
            raise ValueError(
                f"signal_delay_s ({self.signal_delay_s}) must be less than the {self.hours * 3600:g} s of hours"
            )
        return self

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

    def submit(self, calls: Sequence[Call], folder: Path, name: str, after: Sequence[str] = ()) -> list[Job]:
        """One job for one call, one array for several; noted in the run folder of each, whose start waits from now on.

        ``folder`` takes script, pickles and output. With ``after`` the job begins when these jobs have ended well, and
        leaves the queue when they no longer can. Raises RunError where it is refused.
        """
        import submitit

        self.check()
        folder = folder.resolve()
        folder.mkdir(parents=True, exist_ok=True)
        plan = folder / f"{uuid4().hex[:12]}.json"
        executor = self.executor(folder)
        executor.update_parameters(**self.parameters(name, plan, len(calls), after))
        if self.cluster == "slurm":
            listed = [[call.main, call.model, str(call.folder.resolve())] for call in calls]
            plan.write_text(json.dumps({"calls": listed, "restarts": self.restarts, "requeues": self.requeues}))
        for call in calls:  # before: afterwards the job may have begun to write there itself
            note_start(call.folder, waiting=True)
        tasks = [Task(call, self.restarts) for call in calls]
        try:
            with as_outside_a_job():
                sent = executor.submit_array(tasks) if len(tasks) > 1 else [executor.submit(tasks[0])]
        except submitit.core.utils.FailedJobError as error:
            plan.unlink(missing_ok=True)
            text = f"sbatch refused the job: {' '.join(str(error).split())}"
            for call in calls:
                close_run(call.folder, "failed", error=text)
            raise RunError(text) from None
        title = f"axial-{name}"
        jobs = [Job(str(job.job_id), title, self.cluster, str(folder), now()) for job in sent]
        for call, job in zip(calls, jobs, strict=True):
            note_job(call.folder, job)
        if self.cluster == "debug":
            for one in sent:
                with suppress(Exception):  # it stands in the outcome
                    one.result()
        return jobs

    @property
    def python_words(self) -> str:
        """What starts Python in a job. -P keeps the folder that one submits from off the import path."""
        return f"{self.python or shlex.quote(sys.executable)} -P"

    def executor(self, folder: Path) -> submitit.AutoExecutor:
        """submitit's, which leaves script, tasks and output in ``folder``."""
        import submitit

        return submitit.AutoExecutor(folder, cluster=self.cluster, slurm_python=self.python_words)

    def wait_for(self, folder: Path, job: Job) -> Outcome:
        """What became of the job of a run folder, once it has left the queue for good.

        Raises Stopped where it was stopped, RankFailed where it failed, both as its outcome says.
        """
        while self._goes_on(job, folder):
            time.sleep(ASK_S if self.cluster == "slurm" else 0.2)
        ended = read_json(folder / "outcome.json")
        if ended is None:
            errors = job.log(kind="err")
            seen = f"see {errors}." if errors.exists() else f"is {folder} seen by its machine?"
            raise RunError(f"job {job.id} left the queue without a word; {seen} The same command submits it again")
        if ended["state"] == "stopped":
            raise Stopped(str(ended["error"]))
        if ended["error"]:
            errors = job.log(kind="err")
            trace = errors.read_text(errors="replace")[-4000:] if errors.exists() else ""
            raise RankFailed(0, self.ranks, f"job {job.id} failed: {ended['error']}", trace)
        return Outcome(tuple(ended["made"]), tuple(ended["next"]), ended["state"] == "done")

    def _goes_on(self, job: Job, folder: Path) -> bool:
        if self.cluster == "slurm":
            jobs = queue()
            return jobs is None or held(job, jobs) is not None
        if self.cluster == "local":
            with suppress(ChildProcessError):
                return os.waitpid(int(job.id), os.WNOHANG)[0] == 0
        return False

    def check(self) -> None:
        """Raises RunError where jobs cannot be submitted."""
        if self.cluster == "slurm" and shutil.which("sbatch") is None:
            raise RunError(
                "there is no sbatch on this machine; submit from a login node of the cluster, or use cluster: local"
            )

    def script(self, name: str, count: int, folder: Path, after: Sequence[str] = ()) -> str:
        """What sbatch would be given for ``count`` runs. Needs no cluster."""
        folder = folder.resolve()
        return self.written(self.parameters(name, folder / "PLAN.json", count, after), folder, count)

    def written(self, given: Mapping[str, Any], folder: Path, count: int) -> str:
        """The script that submitit makes of ``given`` parameters, for an array where ``count`` is more than 1."""
        from submitit.slurm.slurm import SlurmExecutor, _make_sbatch_string

        named = {key.removeprefix("slurm_"): value for key, value in given.items() if not key.startswith("local_")}
        equal: dict[str, str] = dict(SlurmExecutor._equivalence_dict())  # type: ignore[arg-type]
        told: dict[str, Any] = {equal.get(key, key): value for key, value in named.items()}
        if self.memory_gib is not None:
            told["mem"] = f"{self.memory_gib:g}GB"
        told |= {"map_count": count} if count > 1 else {}
        command = f"{self.python_words} -u -m submitit.core._submit {shlex.quote(str(folder))}"
        return str(_make_sbatch_string(command, folder, **told))

    def parameters(
        self, name: str, plan: Path | None = None, count: int = 1, after: Sequence[str] = ()
    ) -> dict[str, Any]:
        """Of submitit's update_parameters; what is None is left to the cluster. ``plan``: see launch.aftermath."""
        before, behind = self._around(plan) if plan is not None else (list(self._lines), None)
        extra = {key.replace("-", "_"): value for key, value in self.extra.items()}
        if plan is not None and "no_requeue" not in extra:  # where its machine dies, and by the aftermath
            extra = {"requeue": True, **extra}
        if after:
            extra = {"kill_on_invalid_dep": "yes", **extra}
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
            "slurm_dependency": f"afterok:{':'.join(after)}" if after else None,
            "slurm_array_parallelism": (self.array.parallel or count) if count > 1 else None,
            "slurm_setup": before or None,
            "slurm_teardown": behind,
            "local_setup": list(self._lines) or None,
            "slurm_additional_parameters": extra or None,
            # A rank that has died leaves the others in a collective: the job ends at once. Since SLURM 22.05 srun
            # does not take the cores over from sbatch, and data workers would share a single one.
            "slurm_srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={self.cpus_per_process}", *self.srun],
        }
        return {key: value for key, value in given.items() if value is not None}

    @property
    def _lines(self) -> tuple[str, ...]:
        variables = (f"export {name}={shlex.quote(value)}" for name, value in self.environment.items())
        return (*variables, *self.setup)

    def _around(self, plan: Path) -> tuple[list[str], list[str]]:
        """Shell lines before and after the work: whatever becomes of it, somebody is there to note it and go on."""
        file = shlex.quote(str(plan))
        lines = [
            'echo "axial: start ${SLURM_RESTART_COUNT:-0} of job $SLURM_JOB_ID on $SLURM_JOB_NODELIST" >&2',
            *self._lines,
            "set +eu",  # such a line of the user's would end the script where it is to see to the end of the work
            "axial_ended() {",
            # An element by both its numbers: the job number of the last is also that of the whole array.
            '  local code try job="$SLURM_JOB_ID"',
            '  if [ -n "$SLURM_ARRAY_JOB_ID" ]; then job="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"; fi',
            '  export AXIAL_JOB="$(scontrol show job -o "$job")"',  # here, as a container has no scontrol
            f'  {self.python_words} -m launch.aftermath {file} "$@"',
            "  code=$?",
            f'  if [ "$code" = {AGAIN} ]; then',
            '    for try in 1 2 3; do scontrol requeue "$job" && sleep 120; sleep 10; done',
            "  fi",
            '  exit "$code"',
            "}",
        ]
        if self.nodes > 1:
            # Asked before the start: a rank that cannot read its task would let the others wait for it. The cluster's
            # own prologue may print, too.
            look = shlex.quote(f'test -e {file} || echo "axial_blind $SLURMD_NODENAME"')
            asked = f"srun --ntasks={self.nodes} --ntasks-per-node=1 sh -c {look} | sed -n 's/^axial_blind //p'"
            lines += [f"axial_blind=$({asked})", '[ -z "$axial_blind" ] || axial_ended 1 $axial_blind']
        return lines, ["axial_ended $?"]


@contextmanager
def as_outside_a_job() -> Iterator[None]:
    """This process may be a job itself, whose size sbatch would take for that of the new ones.

    submitit prints what sbatch said of a mistake; its error tells that as well, and once is enough.
    """
    from submitit.helpers import clean_env

    with redirect_stderr(StringIO()):
        if "SLURM_JOB_ID" not in os.environ:
            yield
            return
        configuration = {name: os.environ[name] for name in ("SLURM_CONF",) if name in os.environ}
        with clean_env():
            os.environ |= configuration
            yield
