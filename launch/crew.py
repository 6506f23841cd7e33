"""Thousands of tasks over processes that may crash, hang or run out of memory: the other tasks go on.

``with crew.open() as each: for task, result in each(function, tasks, name): ...`` gives every task with its result as
it ends, in any order. A crew is a plain value, `Workers` here or `launch.array.Array` for a cluster; ``open`` owns the
processes, which live on from one ``each`` to the next, so that imports are paid once.

Function, tasks and results must be picklable. The function must be idempotent and leave whole files only: a task may
be done twice, and what is in work when another one fails is ended at once.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import selectors
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any, Literal, Protocol, TypeVar

from launch.worker import SIGNALS, work

__all__ = ["Crew", "CrewError", "Each", "Lost", "Workers", "here", "workers_for"]

T = TypeVar("T")
R = TypeVar("R")

END_S = 5.0  # idle workers get this long to end by themselves
STARTS = 3  # workers in a row that die before their first task

# Read by the libraries when they load, so it must be there before. One process a core is all the parallelism there is.
ONE_THREAD = dict.fromkeys(
    (
        "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS",
        "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS",
    ),
    "1",
)  # fmt: skip


class CrewError(ValueError):
    """The processes cannot be started: what stands against it and what to do."""


@dataclass(frozen=True)
class Lost:
    """In place of a result: the task took its process with it, or was ended."""

    reason: Literal["crashed", "timeout", "memory", "node"]
    detail: str


class Each(Protocol):
    """``each(function, tasks, name)``: every task with ``function(task)``, or with Lost, as it ends, in any order.

    An exception of the function ends the others and is raised as it was, with ``name(task)`` and its traceback in its
    notes; MemoryError is Lost("memory") where the crew sets a limit.
    """

    def __call__(
        self, function: Callable[[T], R], tasks: Sequence[T], name: Callable[[T], str]
    ) -> Iterator[tuple[T, R | Lost]]: ...


class Crew(Protocol):
    """Who does the tasks. ``limited`` sets seconds and GiB that a task may take; None: no limit."""

    def open(self) -> AbstractContextManager[Each]: ...

    def limited(self, timeout_s: float | None, memory_gib: float | None) -> Crew: ...


def workers_for(wanted: int) -> int:
    """`wanted`, or for 0 the cores this process may use."""
    if wanted:
        return wanted
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Workers:
    """Processes on this machine, one task at a time each; 0: in this process, without limits, for tests and tiny work.

    A task whose worker dies is tried once more in a fresh one, then it is Lost("crashed"). One that takes longer than
    ``timeout_s`` is ended. ``memory_gib`` is what a worker may allocate, libraries included (0.25 GiB with SimpleITK,
    pyarrow and torch for CPUs); beyond it there is MemoryError, where otherwise the machine would swap.
    """

    count: int
    timeout_s: float | None = None
    memory_gib: float | None = None

    @contextmanager
    def open(self) -> Iterator[Each]:
        """The processes, started when they are first needed, ended with the block."""
        if self.count == 0:
            yield here
            return
        pool = _Pool(self)
        try:
            yield pool
        finally:
            pool.close()

    def limited(self, timeout_s: float | None, memory_gib: float | None) -> Workers:
        """The same with these limits."""
        return replace(self, timeout_s=timeout_s, memory_gib=memory_gib)


def here(function: Callable[[T], R], tasks: Sequence[T], name: Callable[[T], str]) -> Iterator[tuple[T, R | Lost]]:
    """`Each` in this process, in order, without limits."""
    yield from ((task, function(task)) for task in tasks)


@dataclass(eq=False)
class _Worker:
    process: SpawnProcess
    pipe: Connection[Any, Any]
    call: int = 0  # the call whose function it was sent
    ready: bool = False
    used: bool = False  # it has had a task
    task: int | None = None
    deadline: float = float("inf")


@dataclass
class _Call:
    """What is known of one ``each``: tasks by number, those not handed out yet or again, how their workers ended."""

    tasks: Sequence[Any]
    name: Callable[[Any], str]
    function: bytes
    waiting: deque[int]
    again: deque[int] = field(default_factory=deque)  # each waits for a fresh worker
    ends: dict[int, list[str]] = field(default_factory=dict)

    def told(self, number: int) -> str:
        return self.name(self.tasks[number])


class _Pool:
    """The worker processes, and who of them is at what."""

    def __init__(self, rules: Workers) -> None:
        self._rules = rules
        self._context = multiprocessing.get_context("spawn")  # a fork would copy threads in an unknown state
        self._workers: list[_Worker] = []
        self._selector = selectors.DefaultSelector()
        self._calls = 0
        self._died_at_start = 0

    def __call__(
        self, function: Callable[[T], R], tasks: Sequence[T], name: Callable[[T], str]
    ) -> Iterator[tuple[T, R | Lost]]:
        assert not any(worker.task is not None for worker in self._workers), "one `each` at a time"
        self._calls += 1
        call = _Call(tasks, name, self._message("function", function), deque(range(len(tasks))))
        left = len(tasks)
        try:
            while left:
                self._hand_out(call)
                ended = [end for worker in self._heard() for end in self._attend(worker, call)]
                left -= len(ended)
                # The next tasks are handed out when the caller has taken these, so that it can note what is done first.
                yield from ((tasks[number], result) for number, result in ended)
        finally:
            for worker in [worker for worker in self._workers if worker.task is not None]:
                self._discard(worker)

    def close(self) -> None:
        """End all workers: kindly, then not."""
        deadline = time.monotonic() + END_S
        for worker in self._workers:
            worker.pipe.close()
        for worker in self._workers:
            worker.process.join(max(deadline - time.monotonic(), 0))
            worker.process.kill()
            worker.process.join()
            worker.process.close()
        self._workers.clear()
        self._selector.close()

    def _hand_out(self, call: _Call) -> None:
        """A task to each idle worker; new workers where there is work for more."""
        busy = sum(worker.task is not None for worker in self._workers)
        used = sum(worker.used for worker in self._workers)
        wanted = max(busy + len(call.waiting) + len(call.again), used + len(call.again))
        while len(self._workers) < min(self._rules.count, wanted):
            self._workers.append(self._start())
        for worker in list(self._workers):
            queue = call.again if call.again and not worker.used else call.waiting
            try:
                if worker.call != self._calls:
                    worker.call, worker.ready = self._calls, False
                    worker.pipe.send_bytes(call.function)
                elif worker.ready and worker.task is None and queue:
                    worker.pipe.send_bytes(self._message("task", call.tasks[queue[0]]))
                    worker.task, worker.used = queue.popleft(), True
                    worker.deadline = time.monotonic() + (self._rules.timeout_s or float("inf"))
            except ConnectionError:
                pass  # it has died while idle: its pipe says so next

    def _message(self, kind: str, value: Any) -> bytes:
        # Packed twice, so that a worker that cannot unpack the value can still say of which call it was.
        return pickle.dumps((kind, self._calls, pickle.dumps(value)))

    def _start(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=work, args=(theirs, self._rules.memory_gib), daemon=True)
        old = {name: os.environ.get(name) for name in ONE_THREAD}
        # Else Ctrl-C would find the worker before it ignores it. The tracker would lift the mask, had it to be started.
        resource_tracker.ensure_running()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        os.environ |= ONE_THREAD
        try:
            process.start()
        finally:
            for name, value in old.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            theirs.close()
        worker = _Worker(process, ours)
        self._selector.register(ours, selectors.EVENT_READ, worker)
        return worker

    def _heard(self) -> list[_Worker]:
        """Those who have something to say, or have ended; else those whose time is over. Waits for one of them."""
        next_s = min(worker.deadline for worker in self._workers) - time.monotonic()
        found = self._selector.select(None if next_s == float("inf") else max(next_s, 0))
        now = time.monotonic()
        return [key.data for key, _ in found] or [worker for worker in self._workers if worker.deadline <= now]

    def _attend(self, worker: _Worker, call: _Call) -> list[tuple[int, Any]]:
        """Take what a worker says; the task that has ended thereby and its result, if one has."""
        number = worker.task
        if not worker.pipe.poll():
            assert number is not None
            self._discard(worker)
            return [(number, Lost("timeout", f"took longer than {self._rules.timeout_s:g} s and was ended"))]
        try:
            kind, of, value = pickle.loads(worker.pipe.recv_bytes())
        except (EOFError, ConnectionError):
            return self._died(worker, self._discard(worker, ended=True), call)
        if of != self._calls:
            return []
        if kind == "error":
            return self._failed(worker, call, *value)
        self._died_at_start = 0
        worker.ready, worker.task, worker.deadline = True, None, float("inf")
        if kind == "ready":
            return []
        assert number is not None
        return [(number, value)]

    def _died(self, worker: _Worker, how: str, call: _Call) -> list[tuple[int, Any]]:
        if worker.task is None:
            self._died_at_start += not worker.ready
            if self._died_at_start >= STARTS:
                raise CrewError(f"{STARTS} worker processes {how} before they could begin{self._hint()}")
            return []
        ends = call.ends.setdefault(worker.task, [])
        ends.append(how)
        if len(ends) == 1:
            print(f"{call.told(worker.task)}: {how}; it is tried once more", file=sys.stderr, flush=True)
            call.again.append(worker.task)
            return []
        detail = f"{how} twice" if ends[0] == how else f"{ends[0]}, then {how}"
        hint = " (most likely memory ran out)" if "SIGKILL" in detail else ""
        return [(worker.task, Lost("crashed", detail + hint))]

    def _failed(self, worker: _Worker, call: _Call, error: BaseException, trace: str) -> list[tuple[int, Any]]:
        limit = self._rules.memory_gib
        if isinstance(error, MemoryError) and limit is not None:
            if worker.task is None:
                raise CrewError(f"the function cannot even be loaded{self._hint()}")
            self._discard(worker)  # what the task has left behind may be most of the limit
            return [(worker.task, Lost("memory", f"needs more than memory_gib={limit:g}"))]
        error.add_note(trace.rstrip())
        if worker.task is not None:
            error.add_note(f"at {call.told(worker.task)}")
        raise error

    def _hint(self) -> str:
        limit = self._rules.memory_gib
        return f": memory_gib={limit:g} may be too little for the libraries alone" if limit is not None else ""

    def _discard(self, worker: _Worker, ended: bool = False) -> str:
        """End it if it has not; how it ended."""
        self._workers.remove(worker)
        self._selector.unregister(worker.pipe)
        if ended:
            worker.process.join(1.0)  # the pipe closes a moment before the process has its exit code
        worker.process.kill()
        worker.process.join()
        code = worker.process.exitcode or 0
        worker.pipe.close()
        worker.process.close()
        return f"ended by signal {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
