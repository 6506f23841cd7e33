"""Two programs that do the same work by turns, each in a process of its own: A B A B, so that load hits both alike.

A side prints one line of JSON when it is ready, then does a piece of work for each line it reads and answers with one
line of JSON. What it prints otherwise goes to its standard error.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any

__all__ = ["SideFailed", "peak_rss", "reset_peak", "serve", "take_turns"]

Answer = dict[str, Any]


class SideFailed(RuntimeError):
    """A side ended before it had answered; the text holds the end of what it said."""


def serve(ready: Answer, work: Callable[[], Answer]) -> None:
    """The side's half: say that all is built, then one answer for each line that comes in."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # nothing else gets between the answers
    out.write(json.dumps(ready) + "\n")
    for _ in sys.stdin:
        out.write(json.dumps(work()) + "\n")


class _Side:
    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.name = name
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, **environment},
        )  # fmt: skip

    def __enter__(self) -> _Side:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def answer(self) -> Answer:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)  # type: ignore[no-any-return]
        said = self.process.communicate()[1].strip().splitlines()[-12:]
        raise SideFailed("\n".join([f"the side {self.name!r} ended with code {self.process.returncode}:", *said]))

    def ask(self) -> Answer:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # `answer` tells why
            print(file=self.process.stdin, flush=True)
        return self.answer()


def take_turns(
    commands: Mapping[str, Sequence[str]], rounds: int, environment: Mapping[str, str] | None = None
) -> tuple[dict[str, Answer], dict[str, list[Answer]]]:
    """What each side said when it was ready, and its answers, one a round. Raises SideFailed."""
    with ExitStack() as stack:
        sides = {}
        ready = {}
        for name, command in commands.items():  # one after the other: building disturbs nobody's building
            sides[name] = stack.enter_context(_Side(name, command, environment or {}))
            ready[name] = sides[name].answer()
        answers: dict[str, list[Answer]] = {name: [] for name in sides}
        for _ in range(rounds):
            for name, side in sides.items():
                answers[name].append(side.ask())
    return ready, answers


def reset_peak() -> int:
    """Forget this process's largest resident size so far (Linux); bytes that are resident now."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return _status("VmRSS")


def peak_rss() -> int:
    """The largest resident size since `reset_peak`, bytes."""
    return _status("VmHWM")


def _status(name: str) -> int:
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024
