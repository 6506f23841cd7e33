"""How far a piece of work is: a bar on a terminal, a plain line now and then elsewhere. Written to standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar

if TYPE_CHECKING:
    import rich.progress

__all__ = ["Progress", "duration", "progress", "rate"]

T = TypeVar("T")

FIRST_S, EVERY_S = 2.0, 10.0


def duration(seconds: float) -> str:
    """``40s``, ``12m``, ``14h`` or ``3d``: one unit, rounded to nearest."""
    for size, unit, limit in ((1, "s", 90), (60, "m", 90), (3600, "h", 72)):
        if seconds < limit * size:
            return f"{seconds / size:.0f}{unit}"
    return f"{seconds / 86400:.0f}d"


def rate(per_second: float) -> str:
    """``1,840`` or ``3.2`` or ``0.021``: about three digits."""
    return f"{per_second:,.0f}" if per_second >= 100 else f"{per_second:.3g}"


class Progress:
    """``with Progress(400, "curate", "shards") as bar: ... bar.advance()``. The total may be unknown (None)."""

    def __init__(self, total: int | None, what: str, unit: str, active: bool = True) -> None:
        self.total, self.what, self.unit, self.active = total, what, unit, active
        self.done = 0
        self._start = time.monotonic()
        self._due = self._start + FIRST_S
        self._bar: rich.progress.Progress | None = None

    def __enter__(self) -> Self:
        if self.active and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(self.unit))
            self._bar = Bar(
                *columns, TextColumn("{task.fields[rate]}"), TimeRemainingColumn(), console=Console(stderr=True)
            )
            self._bar.start()
            self._task = self._bar.add_task(self.what, total=self.total, rate="")
        return self

    def advance(self, count: int = 1) -> None:
        """``count`` more are done."""
        self.done += count
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, rate=self._rate(now))
        elif self.active and now >= self._due:
            self._due = now + EVERY_S
            self._say(self._line(now))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        now = time.monotonic()
        if self._bar is not None:
            self._bar.stop()
        elif self.active:
            took = f"{self.what}: {self.done:,} {self.unit} in {duration(now - self._start)}  {self._rate(now)}"
            self._say(took.rstrip() if kind is None else f"{self._line(now)}  stopped")

    def _say(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def _rate(self, now: float) -> str:
        took = now - self._start
        return f"{rate(self.done / took)} {self.unit}/s" if self.done and took > 0 else ""

    def _line(self, now: float) -> str:
        of = f"/{self.total:,}" if self.total is not None else ""
        parts = [f"{self.what}: {self.done:,}{of} {self.unit}", self._rate(now)]
        if self.total and self.done:
            parts.insert(1, f"{self.done / self.total:.0%}")
            parts.append(f"{duration((now - self._start) / self.done * max(self.total - self.done, 0))} left")
        return "  ".join(part for part in parts if part)


def progress(
    iterable: Iterable[T], total: int | None = None, what: str = "", unit: str = "items", active: bool = True
) -> Iterator[T]:
    """The items of ``iterable``, with the progress shown; an item counts once the loop comes back for the next one."""
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    with Progress(total, what, unit, active) as bar:
        for item in iterable:
            yield item
            bar.advance()
