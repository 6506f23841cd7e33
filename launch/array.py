"""Tasks over a cluster: one array of jobs a call, whose results come back through files all machines see.

A job is an `Element`. Which of them still wait or run is asked of squeue, so no accounting is needed. A job that is
gone without having ended (its node died, it was cancelled, pre-empted or out of time) loses what was in work in it;
its other tasks go into a new array.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import uuid4

from launch.crew import Each, Lost, Workers, workers_for
from launch.element import Element, Record, read_records
from launch.jobs import queue
from launch.run import RunError
from launch.slurm import Slurm, as_outside_a_job
from launch.tally import Tally

if TYPE_CHECKING:
    import submitit

__all__ = ["Array", "array_jobs"]

T = TypeVar("T")
R = TypeVar("R")

PREFIX = "array-"  # of the folders below Array.folder
JOBS = "jobs"  # file in such a folder: ids of its jobs, one a line
ASK_S = 10.0  # between two questions to the queue
END_S = 10.0  # a local job gets this long to end


@dataclass(frozen=True)
class Array:
    """Jobs as ``slurm`` says, each with ``cpus_per_process`` worker processes that obey the limits of `Workers`.

    ``folder`` must be visible on all machines; it holds tasks and results, private as they may be, while they are
    needed. What an earlier command left there is cancelled and removed. Results are looked for every ``poll_s``; a job
    that is gone from the queue has ``settle_s`` for its last results to cross the file system.
    """

    slurm: Slurm
    folder: Path
    timeout_s: float | None = None
    memory_gib: float | None = None
    poll_s: float = 1.0
    settle_s: float = 15.0

    @contextmanager
    def open(self) -> Iterator[Each]:
        """Raises RunError where jobs cannot be submitted. Jobs that still run when the block ends are cancelled."""
        self.slurm.check()
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(f"{PREFIX}*"):
            self._cancel(_ids(left))
            shutil.rmtree(left, ignore_errors=True)
        Tally().over(self.folder)
        yield self._each
        with suppress(OSError):
            self.folder.rmdir()

    def limited(self, timeout_s: float | None, memory_gib: float | None) -> Array:
        """The same with these limits for each task."""
        return replace(self, timeout_s=timeout_s, memory_gib=memory_gib)

    def _each(
        self, function: Callable[[T], R], tasks: Sequence[T], name: Callable[[T], str]
    ) -> Iterator[tuple[T, R | Lost]]:
        if not tasks:
            return
        folder = self.folder / f"{PREFIX}{uuid4().hex[:12]}"
        folder.mkdir(mode=0o700)
        run = _Run(self, folder, function, tasks, [name(task) for task in tasks])
        told = Tally(_called(function), len(tasks))
        try:
            run.submit(range(len(tasks)))
            while run.out:
                found = run.look()
                lost = told.lost + sum(isinstance(result, Lost) for _, result in found)
                told = told.now(self.folder, len(tasks) - len(run.left), lost, len(run.out))
                yield from ((tasks[number], result) for number, result in found)
                if not found and run.out:
                    time.sleep(self.poll_s)
        finally:
            told.over(self.folder)
            self._end([element.job for element in run.out])
        if not run.lost:  # else the output of the jobs is there to be read
            shutil.rmtree(folder, ignore_errors=True)

    def _end(self, jobs: Sequence[submitit.Job[None]]) -> None:
        if self.slurm.cluster == "slurm":
            self._cancel([job.job_id for job in jobs])
            return
        for job in jobs:
            job.cancel(check=False)
        deadline = time.monotonic() + END_S
        while not all(job.done() for job in jobs) and time.monotonic() < deadline:
            time.sleep(0.05)

    def _cancel(self, jobs: Sequence[str]) -> None:
        """Those of the ids that bear our name: after a restart of the cluster an id may be somebody else's."""
        if jobs and self.slurm.cluster == "slurm":
            subprocess.run(["scancel", f"--name={self.name}", *jobs], capture_output=True, check=False)

    @property
    def name(self) -> str:
        """What the jobs are called in the queue."""
        return _named(self.folder.parent)

    def parameters(self) -> dict[str, Any]:
        """Of submitit's update_parameters."""
        asked = self.slurm.parameters("")
        # SLURM must not start a lost element again, since that would do the task that killed it for ever.
        extra: dict[str, Any] = {"no_requeue": True, **asked.get("slurm_additional_parameters", {})}
        given = {"name": self.name, "slurm_array_parallelism": self.parallel(), "slurm_additional_parameters": extra}
        return asked | given

    def script(self) -> str:
        """What sbatch would be given for a step of as many jobs as there may be. Needs no cluster."""
        folder = (self.folder / f"{PREFIX}ID").resolve()
        return self.slurm.written(self.parameters(), folder, self.slurm.array.elements)

    def parallel(self) -> int:
        """How many jobs may run at a time."""
        local = max(1, workers_for(0) // self.slurm.cpus_per_process) if self.slurm.cluster == "local" else None
        return self.slurm.array.parallel or local or self.slurm.array.elements


def array_jobs(folder: Path) -> tuple[str, list[str]]:
    """What the arrays are called in the queue that a command left, or has at work, for a run folder; and their ids."""
    ids = [job for left in sorted((folder / "jobs").glob(f"{PREFIX}*")) for job in _ids(left)]
    return _named(folder.resolve()), ids


def _named(run: Path) -> str:
    return f"axial-{run.name}"


def _ids(folder: Path) -> list[str]:
    try:
        return (folder / JOBS).read_text().split()
    except OSError:
        return []


def _called(function: Callable[..., Any]) -> str:
    """What the tasks do: ``write shard``."""
    function = getattr(function, "func", function)
    return str(getattr(function, "__name__", type(function).__name__)).strip("_").replace("_", " ")


@dataclass(eq=False)
class _Sent:
    """An element in the queue or at work, and what is known of it."""

    job: submitit.Job[None]
    numbers: list[int]
    file: Path
    read: int = 0
    host: str = ""
    ended: bool = False
    gone: float = float("inf")  # since when the queue no longer holds it

    def new(self) -> list[Record]:
        """The records that have come since."""
        found = []
        for record, offset in read_records(self.file, self.read):
            self.read = offset
            if record[0] == "begun":
                self.host = record[1]
            self.ended |= record[0] == "ended"
            found.append(record)
        return found


@dataclass
class _Run:
    """One call of `each`: which tasks have no result yet, and which elements are out for them."""

    array: Array
    folder: Path
    function: Callable[[Any], Any]
    tasks: Sequence[Any]
    names: Sequence[str]
    out: list[_Sent] = field(default_factory=list)
    tries: Counter[int] = field(default_factory=Counter)
    lost: bool = False
    asked: float = 0.0
    arrays: int = 0

    def __post_init__(self) -> None:
        self.left = set(range(len(self.tasks)))

    def submit(self, numbers: Sequence[int]) -> None:
        """One more array. Neighbours are alike in size, so each element takes every n-th task."""
        import submitit

        slurm, rules = self.array.slurm, self.array.slurm.array
        parallel = self.array.parallel()
        most = parallel if slurm.cluster == "local" else rules.elements  # local jobs all start at once
        count = min(most, len(numbers))
        shares = [list(numbers[start::count]) for start in range(count)]
        workers = Workers(slurm.cpus_per_process, self.array.timeout_s, self.array.memory_gib)
        files = [self.folder / f"{self.arrays}-{index}.results" for index in range(count)]
        elements = [
            Element(self.function, tuple((n, self.names[n], self.tasks[n]) for n in share), workers, file)
            for share, file in zip(shares, files, strict=True)
        ]
        executor = slurm.executor(self.folder)
        executor.update_parameters(**self.array.parameters())
        try:
            with as_outside_a_job():
                jobs = executor.submit_array(elements)
        except submitit.core.utils.FailedJobError as error:
            raise RunError(f"sbatch refused the array: {' '.join(str(error).split())}") from None
        self.arrays += 1
        with (self.folder / JOBS).open("a") as file:
            file.writelines(f"{job}\n" for job in sorted({job.job_id.partition("_")[0] for job in jobs}))
        self.out += [_Sent(*one) for one in zip(jobs, shares, files, strict=True)]
        if slurm.cluster == "slurm":
            what = f"{count} jobs for {len(numbers)} tasks"
            print(f"job {jobs[0].job_id.partition('_')[0]}: {what}", file=sys.stderr, flush=True)

    def look(self) -> list[tuple[int, Any]]:
        """Tasks that have ended since, and their results; what was in work in lost elements goes out again."""
        found: list[tuple[int, Any]] = []
        for element in self.out:
            for kind, value in element.new():
                if kind == "raised":
                    raise value
                if kind == "result" and value[0] in self.left:
                    self.left.remove(value[0])
                    found.append(value)
        self._ask()
        over = time.monotonic() - self.array.settle_s
        again: list[int] = []
        for element in [element for element in self.out if element.ended or element.gone <= over]:
            if element.ended and self.array.slurm.cluster == "local" and not element.job.done():
                continue
            self.out.remove(element)
            found += self._give_up(element, again)
        if again:
            self.submit(again)
        return found

    def _ask(self) -> None:
        """Note which elements the queue no longer holds."""
        now = time.monotonic()
        if now - self.asked < min(ASK_S, 5 * self.array.poll_s):
            return
        self.asked = now
        held = {element.job.job_id for element in self.out}
        if self.array.slurm.cluster == "local":
            held = {element.job.job_id for element in self.out if not element.job.done()}
        elif (jobs := queue()) is not None:
            held = {number for number, _ in jobs}
        for element in self.out:
            element.gone = float("inf") if element.job.job_id in held else min(element.gone, now)

    def _give_up(self, element: _Sent, again: list[int]) -> list[tuple[int, Lost]]:
        """Tasks of an element that has ended go to ``again``; those that have had their tries are lost."""
        left = [number for number in element.numbers if number in self.left]
        # Tasks are handed out in order. One that has not even begun tells of a broken environment: that is tried as
        # often as a task, not as often as there are tasks.
        in_work = left[: self.array.slurm.cpus_per_process] if element.host else left
        self.tries.update(in_work)
        lost = []
        for number in left:
            if self.tries[number] <= self.array.slurm.array.retries:
                again.append(number)
                continue
            self.left.remove(number)
            self.lost = True
            where = f"job {element.job.job_id} {f'on {element.host}' if element.host else 'before it began'}"
            text = f"in work in {self.tries[number]} jobs that were lost; last {where}: {element.job.paths.stderr}"
            lost.append((number, Lost("node", text)))
        return lost
