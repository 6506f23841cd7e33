"""Tasks over processes: any number of workers, results as they come, and an end that leaves nobody behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import TypeVar

__all__ = ["WorkerLost", "each", "workers_for"]

T = TypeVar("T")
R = TypeVar("R")


class WorkerLost(ValueError):
    """A worker process was killed from outside, mostly for want of memory."""


def workers_for(wanted: int) -> int:
    """`wanted`, or for 0 the cores this process may use."""
    if wanted:
        return wanted
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def each(
    function: Callable[[T], R], tasks: Sequence[T], workers: int, name: Callable[[T], str]
) -> Iterator[tuple[T, R]]:
    """(task, its result) as tasks end, in any order. One worker, or one task, is done right here.

    The first error ends the rest and is raised as it was. A killed worker raises WorkerLost with the tasks in question.
    """
    if workers == 1 or len(tasks) == 1:
        yield from ((task, function(task)) for task in tasks)
        return
    waiting, running = iter(tasks), dict[Future[R], T]()
    context = multiprocessing.get_context("spawn")  # a fork would copy ITK's threads in an unknown state
    pool = ProcessPoolExecutor(min(workers, max(len(tasks), 1)), context, _begin)
    try:
        while True:
            for task in islice(waiting, 2 * workers - len(running)):
                running[pool.submit(function, task)] = task
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                result = future.result()
                yield running.pop(future), result
    except BrokenProcessPool:
        names = ", ".join(name(task) for task in running.values())
        raise WorkerLost(
            f"a worker process was killed, most likely because memory ran out, while these were in work: {names}. "
            f"What was finished is kept: run the same command again with fewer workers (workers={max(workers // 2, 1)})"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _begin() -> None:
    """One thread a worker, Ctrl-C left to the parent, and an end as soon as the parent has ended, however it did."""
    import SimpleITK as sitk

    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
