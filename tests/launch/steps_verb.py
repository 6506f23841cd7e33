"""A verb for tests of survival: counts steps like a training run, without torch, and has trouble where told to."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from pathlib import Path
from typing import Literal

from launch.beats import Beat, write_beat
from launch.run import Outcome, Stopped, write_text
from launch.settings import Settings as Base


class Settings(Base):
    """How long, and which trouble in step ``at`` of which rank, in its first ``times`` visits."""

    folder: Path
    steps: int = 20
    step_s: float = 0.05
    every: int = 5
    trouble: Literal["", "kill", "bug", "mistake", "wait"] = ""
    at: int = 0
    rank: int = 0
    times: int = 1000


def main(settings: Settings) -> Outcome:
    """Chain the numbers of the steps by a hash; the last one tells whether every step was made once, in order."""
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    told: list[int] = []
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, lambda number, frame: told.append(number))
    step, value = _restored(settings.folder)
    while step < settings.steps:
        step += 1
        write_beat(settings.folder, Beat(rank, size, "", os.getpid(), step, 0, "data", step, 0.0, time.time()))
        if step == settings.at and rank == settings.rank:
            _strike(settings)
        time.sleep(settings.step_s)
        value = hashlib.sha256(f"{value}{step}".encode()).hexdigest()
        if rank == 0 and (step % settings.every == 0 or told or step == settings.steps):
            _save(settings.folder, step, value)
        if told and step < settings.steps:
            raise Stopped(f"stopped by {signal.Signals(told[0]).name} after step {step}, saved")
    return Outcome(made=(value,))


def samples(settings: Settings, step: int) -> list[str]:
    """What a step sees."""
    return [f"slice-{step}-{number}" for number in range(20)]


def _restored(folder: Path) -> tuple[int, str]:
    found = sorted((folder / "checkpoints").glob("step_*"))
    return (int(found[-1].name[5:]), (found[-1] / "value").read_text()) if found else (0, "")


def _save(folder: Path, step: int, value: str) -> None:
    target = folder / "checkpoints" / f"step_{step:08d}"
    if not target.exists():
        aside = folder / "checkpoints" / f".aside_{os.getpid()}"
        aside.mkdir(parents=True, exist_ok=True)
        write_text(aside / "value", value)
        aside.rename(target)


def _strike(settings: Settings) -> None:
    with (settings.folder / "visits").open("a") as file:
        file.write(f"{settings.at}\n")
    if len((settings.folder / "visits").read_text().splitlines()) > settings.times:
        return
    match settings.trouble:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "bug":
            raise RuntimeError("the verb is broken")
        case "mistake":
            raise ValueError("the verb is misused in steps.yaml")
        case "wait":
            time.sleep(1000)
