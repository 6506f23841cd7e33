"""The watchdog: names the rank that stands still before the process group's own time limit hides which one it was.

Every rank has a daemon thread that writes what its main thread does into the run folder and reads what the others do.
Ranks that train together stand still together, so the alarm is for a run in which no rank at all gets on. Clocks of
machines are not compared: each rank goes by its own, from when it saw another one's numbers change.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, TypeVar

from pydantic import Field

from launch.beats import Beat, open_beat, put_beat, read_beats, standing, write_beat
from launch.distributed import World
from launch.progress import duration
from launch.run import close_run
from launch.settings import Settings

__all__ = ["EXIT_CODE", "Watchdog", "WatchdogSettings"]

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: the same command may well succeed
_PLACES = ("data", "forward and backward", "optimizer", "validation", "agreement", "log", "checkpoint")
_PATIENT = "validation"  # as long as its data set is large, without a word in between
_LOOK_S = 15.0

B = TypeVar("B")


@dataclass(frozen=True)
class _Seen:
    """Another rank's last sign of life; when, by this rank's clock, it got on and when it gave the sign."""

    beat: Beat
    moved: float
    heard: float


class WatchdogSettings(Settings):
    """When a run that stands still is noticed, and what then."""

    quiet_s: float = Field(
        600.0, ge=0, description="seconds without progress until it is said which rank stands where; 0: no watchdog"
    )
    first_s: float = Field(1500.0, gt=0, description="the same until the first step has ended, which compiles")
    end: bool = Field(True, description="after twice the time end with an error, so that the run can be started again")


class Watchdog:
    """Notices that a run stands still. `begin(step)` and `at(place)` cost two assignments.

    `folder` is the run folder; `say` is how the rank that reports speaks. Ranks that are waited for 1800 s are ended by
    the process group, so twice `quiet_s` should be less.
    """

    def __init__(self, folder: Path, world: World, settings: WatchdogSettings, say: Callable[[str], None]) -> None:
        self._folder, self._world, self._settings, self._say = folder, world, settings, say
        self._step, self._place, self._moves = 0, _PLACES[0], 0
        self._steps = 0  # begun by this process
        self._main = threading.get_ident()
        self._over = threading.Event()
        self._told = False
        self._interval = min(settings.quiet_s / 20, _LOOK_S)
        self._looked = self._moved = time.monotonic()
        self._last = (0, 0)
        self._others: dict[int, _Seen] = {}
        self._file: BinaryIO | None = None
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self._settings.quiet_s:
            self._main = threading.get_ident()
            with suppress(OSError):
                self._file = open_beat(self._folder, self._world.rank)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(5.0)  # longer only when the disk is away
        if self._file is not None:
            self._file.close()
        if error is None:  # else the last sign tells in which step it came
            for path in self._folder.glob(f"beats/{self._world.rank:05d}.json"):
                path.unlink(missing_ok=True)

    def begin(self, step: int) -> None:
        """This rank begins step `step` (the first is 1)."""
        self._step = step
        self._steps += 1
        self._moves += 1
        if self._file is not None:
            # Kept open: no round trip to a file server, and yet there when this process is killed.
            with suppress(OSError):
                put_beat(self._file, self._beat(time.monotonic()))

    def at(self, place: str) -> None:
        """This rank now does `place`: data, forward and backward, optimizer, validation, agreement, log, checkpoint."""
        self._place = place
        self._moves += 1

    def tick(self) -> None:
        """This rank gets on with what it does."""
        self._moves += 1

    def over(self, batches: Iterator[B]) -> Iterator[B]:
        """Yield from `batches`; the time in there is that of data."""
        while True:
            self.at("data")
            batch = next(batches, None)
            if batch is None:
                return
            self.at("forward and backward")
            yield batch

    def _watch(self) -> None:
        while True:
            self._look()
            if self._over.wait(self._interval):
                return

    def _look(self) -> None:
        now = time.monotonic()
        numbers = (self._step, self._moves)
        slept = now - self._looked > 5 * self._interval + 1  # this process was itself stopped, and so knows nothing
        if slept or numbers != self._last or self._place == _PATIENT:
            self._last, self._moved = numbers, now
        self._looked = now
        mine = self._beat(now)
        with suppress(OSError):  # a disk that is full or away is not this thread's to report
            write_beat(self._folder, mine)
        limit = self._settings.quiet_s if self._steps > 1 else self._settings.first_s
        if now - self._moved < limit / 2:  # only a rank that waits looks who is waited for
            self._others, self._told = {}, False
            return
        self._look_around(now)
        heard = {rank: one for rank, one in self._others.items() if now - one.heard < limit / 4}
        quiet = now - max([self._moved, *(one.moved for one in heard.values())])
        if quiet >= limit:
            beats = [mine, *(one.beat for one in self._others.values())]
            lead = mine.rank == min([mine.rank, *heard])
            self._tell(quiet, limit, standing(beats, self._others.keys() - heard.keys()), lead)

    def _look_around(self, now: float) -> None:
        """Note which of the other ranks got on, and which gave a sign of life at all, since the last look."""
        try:
            beats = read_beats(self._folder)
        except OSError:
            return
        for beat in beats:
            if beat.rank == self._world.rank or beat.rank >= self._world.size:
                continue
            last = self._others.get(beat.rank)
            if last is None:
                self._others[beat.rank] = _Seen(beat, now - beat.idle_s, now)
            elif last.beat.at != beat.at:
                still = (last.beat.step, last.beat.moves) == (beat.step, beat.moves) and beat.doing != _PATIENT
                self._others[beat.rank] = _Seen(beat, last.moved if still else now, now)

    def _beat(self, now: float) -> Beat:
        place = self._place
        return Beat(
            self._world.rank, self._world.size, socket.gethostname(), os.getpid(),
            self._step, _PLACES.index(place), place, self._moves, round(now - self._moved, 1), time.time(),
        )  # fmt: skip

    def _tell(self, quiet: float, limit: float, who: str, lead: bool) -> None:
        text = f"nothing has moved for {duration(quiet)}: {who}"
        # Who reports goes first: ranks in a collective fail as soon as any other is gone.
        if self._settings.end and quiet >= 2 * limit + (0 if lead else 4 * self._interval):
            again = "the newest checkpoint stays, and the same command continues from it"
            self._end(f"{text}. The run ends; {again}", lead)
        if self._told:
            return
        self._told = True
        frame = sys._current_frames().get(self._main)
        trace = "".join(traceback.format_stack(frame)) if frame is not None else "  nothing\n"
        print(f"rank {self._world.rank} stands still in:\n{trace}", file=sys.stderr, end="", flush=True)
        if lead:
            end = f"; in another {duration(limit)} the run ends (watchdog.end)" if self._settings.end else ""
            self._say(f"warning: {text}{end}. Each rank's log shows where its program stands")

    def _end(self, text: str, lead: bool) -> None:
        """Leave from this thread: the main one may be in a collective that no exception reaches."""
        print(f"rank {self._world.rank}: {text}", file=sys.stderr, flush=True)
        if lead:
            self._say(f"error: {text}")
            close_run(self._folder, "failed", error=text, again=True)
        sys.stdout.flush()
        os._exit(EXIT_CODE)
