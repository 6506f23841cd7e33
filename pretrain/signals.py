"""Signals that ask a run to save and leave: heard at once, honoured at the next step boundary by all ranks together."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from launch.distributed import agree

__all__ = ["Stop"]


class Stop:
    """Turns SIGTERM, SIGINT and SIGUSR2 into a wish to stop, honoured at the next step boundary by all ranks together.

    A handler that saved by itself would wait for ranks that never got the signal. A second Ctrl-C stops at once,
    unsaved.
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
        self.name = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def agreed(self) -> bool:
        """True on every rank once any rank was asked to stop (a collective)."""
        return agree(bool(self.name))
