"""Functions that the tests of crews hand out: well-behaved ones, and each kind of trouble."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def square(number: int) -> int:
    return number * number


def process(_: object) -> int:
    return os.getpid()


def environment(name: str) -> str | None:
    return os.environ.get(name)


def itk_threads(_: object) -> int:
    import SimpleITK as sitk

    return int(sitk.ProcessObject.GetGlobalDefaultNumberOfThreads())


def call(task: tuple[Callable[..., Any], Any]) -> Any:
    """Tasks of several kinds in one call."""
    function, argument = task
    return function(argument)


def end(code: int) -> None:
    os._exit(code)


def hang(_: object) -> None:
    """As a C++ reader that waits for ever and never gives the interpreter lock back."""
    ctypes.PyDLL(None).sleep(1000)


def allocate(gib: float) -> int:
    import numpy as np

    return int(np.ones(int(gib * 2**30), np.uint8).nbytes)


def allocate_or_say(gib: float) -> str:
    try:
        return str(allocate(gib))
    except MemoryError:
        return "too large"


class OddError(Exception):
    """Cannot be copied: its arguments are not those of its class."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} is odd, {two} too")


def fail(kind: str) -> None:
    if kind == "odd":
        raise OddError(1, 3)
    raise FileNotFoundError(2, "No such file or directory", kind)


def unpicklable(_: object) -> Any:
    return lambda: None


@dataclass(frozen=True)
class Noted:
    """Squares, and notes each start of a task in ``folder``; ``trouble`` strikes ``times`` times at task ``at``."""

    folder: Path
    trouble: str = ""
    at: int = -1
    times: int = 1

    def __call__(self, number: int) -> int:
        with (self.folder / "started").open("a") as file:
            node = os.environ.get("SLURMD_NODENAME", "here")
            file.write(f"{number} {os.getpid()} {os.getppid()} {node}\n")
        if number == self.at and self.starts().count(number) <= self.times:
            strike(self.trouble)
        return number * number

    def starts(self) -> list[int]:
        """The tasks in the order they were started, each as often as it was."""
        return [int(line.split()[0]) for line in (self.folder / "started").read_text().splitlines()]

    def nodes(self) -> list[str]:
        """Where they were started, in the same order."""
        return [line.split()[3] for line in (self.folder / "started").read_text().splitlines()]

    def processes(self) -> set[int]:
        """Who did them, and who started those."""
        return {int(pid) for line in (self.folder / "started").read_text().splitlines() for pid in line.split()[1:3]}


def strike(trouble: str) -> None:
    match trouble:
        case "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "lose the element":
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(1000)
        case "lose the node":
            node = f"nodename={os.environ['SLURMD_NODENAME']}"
            subprocess.run(["scontrol", "update", node, "state=down", "reason=test"], check=True)
            time.sleep(1000)
        case "hang":
            hang(None)
        case "fail":
            fail("/no/such/file")


def name(task: object) -> str:
    return f"task {task}"


def hear() -> None:
    """For a process that is to be interrupted: what starts in the background may inherit that Ctrl-C is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def main(path: str, kind: str) -> None:
    """A command for signals: two tasks that hang, done by two workers, two local jobs or two SLURM jobs."""
    from launch.array import Array
    from launch.crew import Crew, Workers
    from launch.slurm import ArrayRules, Slurm

    folder = Path(path)
    crew: Crew = Workers(2)
    if kind != "workers":
        slurm = Slurm(cluster="slurm" if kind == "slurm" else "local", hours=0.2, array=ArrayRules(parallel=2))
        crew = Array(slurm, folder / "jobs", poll_s=0.1)
    with crew.open() as each:
        list(each(Noted(folder, "hang", at=0, times=2), [0, 0], name))
