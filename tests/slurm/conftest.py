"""One SLURM of two nodes for all tests of this folder, and what they look at it with."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from launch.jobs import held, last_job, queue
from launch.run import read_json
from tests.slurm.one_machine import Machine, missing, slurm

REPOSITORY = Path(__file__).parents[2]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """First: they wait more than they work, and each process of the test run starts a SLURM of its own for them."""
    own = [item for item in items if Path(__file__).parent in item.path.parents]
    items[:] = own + [item for item in items if item not in own]


@pytest.fixture(scope="session")
def machine() -> Iterator[Machine]:
    if why := missing():
        pytest.skip(f"no SLURM to be had here: {why}")
    with slurm() as machine:
        yield machine


@dataclass(frozen=True)
class Cluster:
    """A running SLURM, empty again after each test."""

    machine: Machine

    def queued(self) -> list[str]:
        """Lines of squeue, without its head."""
        return self.ask("squeue", "-h", "-r", "-o", "%i %T %r %j").splitlines()

    def ask(self, *command: str) -> str:
        """What a program of SLURM prints."""
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout

    def state(self, folder: Path) -> str:
        """SLURM's word for the newest job of a run, empty where the queue no longer holds it."""
        found = held(last_job(folder), queue())
        return "" if found is None else found.state

    def until(self, ready: Callable[[], object], seconds: float = 60.0, what: str = "") -> None:
        """Wait; what the queue, and the last lines of all logs, are is said where it is in vain."""
        deadline = time.monotonic() + seconds
        while not ready():
            if time.monotonic() > deadline:
                pytest.fail(f"in vain for {seconds:g} s: {what}\n" + "\n".join(self.queued()))
            time.sleep(0.1)

    def ended(self, folder: Path, seconds: float = 90.0) -> dict[str, object]:
        """The outcome of a run, once the queue no longer holds its job; empty where there is none."""
        self.until(lambda: not self.state(folder), seconds, f"the end of {folder}, {tail(folder)}")
        return read_json(folder / "outcome.json") or {}


def tail(folder: Path) -> str:
    """The end of what the jobs of a run printed."""
    return "\n".join(f"{path.name}: {path.read_text()[-1500:]}" for path in sorted(folder.glob("jobs/*_log.*")))


@pytest.fixture
def cluster(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.setenv("SLURM_CONF", str(machine.conf))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests" / "launch")]))
    monkeypatch.syspath_prepend(str(REPOSITORY / "tests" / "launch"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("SLURM_JOB_ID", "1")  # as if called in a small job
    monkeypatch.setenv("SLURM_NNODES", "1000")
    found = Cluster(machine)
    yield found
    subprocess.run(["scancel", "-u", "root"], check=False, timeout=30)
    found.until(lambda: not found.queued(), 30, "an empty queue after the test")
