"""Signals that ask a run to save and leave: heard at once, honoured at the next step boundary by all ranks together."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from launch.distributed import largest

__all__ = ["Stop"]


class Stop:
    """Turns SIGTERM, SIGINT and SIGUSR2 into a wish to stop, honoured at the next step boundary by all ranks together.

    A handler that saved by itself would wait for ranks that never got the signal. The first signal counts: SLURM warns
    by SIGUSR2 and may send SIGTERM before the save has ended. A second Ctrl-C stops at once, unsaved.
    """

    def __init__(self) -> None:
        self.name = ""
        self._old: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
                self._old[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.name = self.name or signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def agreed(self) -> str:
        """Name of the signal by which any rank was asked to stop, the same on every rank, else "" (a collective).

        Every rank must know the name: the first rank puts the job back into the queue after SIGUSR2 only.
        """
        number = largest(signal.Signals[self.name].value if self.name else 0)
        return signal.Signals(number).name if number else ""
