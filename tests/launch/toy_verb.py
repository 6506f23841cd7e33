"""A verb for the tests of the launcher: each mode ends a run in another way."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Literal

from launch.crew import Crew
from launch.run import Outcome, Stopped
from launch.settings import Settings as Base


class Settings(Base):
    """How the toy run ends."""

    folder: Path
    mode: Literal[
        "fine", "not_ok", "mistake", "disk", "bug", "dies", "wait", "stoppable", "stopped", "group", "broken"
    ] = "fine"
    rank: int = 0
    signal: str = "SIGTERM"
    steps: int = 1


def main(settings: Settings) -> Outcome:
    """Leave a file that says which process this is, then end as asked; only ``rank`` misbehaves."""
    rank = int(os.environ.get("RANK", os.environ.get("SUBMITIT_LOCAL_GLOBALID", "0")))
    (settings.folder / f"was_here_{rank}").write_text(str(os.getpid()))
    mode = settings.mode if rank == settings.rank or settings.mode in ("stoppable", "group") else "wait"
    if mode == "mistake":
        raise ValueError("the toy is misused in toy.yaml")
    if mode == "disk":
        raise OSError(28, "No space left on device", "shard.tar")
    if mode == "bug":
        raise RuntimeError("the toy is broken")
    if mode == "broken":
        import package_that_is_not_there  # type: ignore[import-not-found]  # noqa: F401
    if mode == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "stopped":
        raise Stopped(f"stopped by {settings.signal} after step 3")
    if mode == "stoppable":
        _until_told(rank)
    if mode == "group":
        _together()
    if mode == "wait" and settings.mode != "fine":
        time.sleep(300)
    return Outcome(made=("a toy",), next=("play with it",), ok=mode != "not_ok")


def shared(settings: Settings, crew: Crew | None = None) -> Outcome:
    """Say who would do the tasks."""
    return Outcome(made=(str(crew),))


def dry_run(settings: Settings) -> str:
    """What would be done."""
    return f"would be {settings.mode}"


def _until_told(rank: int) -> None:
    told: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: told.append(number))
    print(f"rank {rank} is ready", flush=True)
    while not told:
        time.sleep(0.02)
    raise Stopped(f"stopped by {signal.Signals(told[0]).name} after step 3")


def _together() -> None:
    from launch.distributed import agree, world

    with world("cpu") as here:
        assert here.size == 2
        assert agree(here.rank == 1)
