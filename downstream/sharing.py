"""Cases shared out over processes; one whose process dies costs that case alone, and says so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from launch.crew import Lost, Workers, workers_for
from launch.progress import progress

__all__ = ["shared"]

T = TypeVar("T")
R = TypeVar("R")


def shared(
    function: Callable[[T], R], tasks: Sequence[T], names: Sequence[str], workers: int, what: str, active: bool = True
) -> list[R | str]:
    """The result of each task, by `workers` processes (0: one for each core); one that is lost gives its reason.

    `function` is one of a module, `names` what the tasks are called. Progress is shown where `active`.
    """
    count = min(workers_for(workers), len(tasks))
    place = {id(task): number for number, task in enumerate(tasks)}
    found: dict[int, R | str] = {}
    if not tasks:
        return []
    with Workers(count if count > 1 else 0).open() as each:
        done = each(function, tasks, lambda task: names[place[id(task)]])
        for task, result in progress(done, len(tasks), what, "cases", active):
            number = place[id(task)]
            found[number] = f"{names[number]}: {result.detail}" if isinstance(result, Lost) else result
    return [found[number] for number in range(len(tasks))]
