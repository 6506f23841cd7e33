"""A verb for the tests of several runs by one command: it counts its starts, and says what it went on from."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from launch.run import Outcome
from launch.settings import Settings as Base


class Settings(Base):
    """What the run goes on from, and how it ends."""

    folder: Path
    start: Path | None = None
    steps: int = 1
    workers: int = 0
    size: int = 0
    numbers: tuple[float, ...] = ()
    mode: Literal["fine", "not_ok", "mistake", "bug", "interrupt"] = "fine"
    mend: Path | None = None
    wait_for: Path | None = None
    cut: int = 1
    part: int | None = None


def main(settings: Settings) -> Outcome:
    """Write down this start; fail as asked, unless the file `mend` is there."""
    with (settings.folder / "starts").open("a") as file:
        file.write(f"{settings.start} {settings.steps}\n")
    while settings.wait_for is not None and not settings.wait_for.exists():
        time.sleep(0.05)
    mode = settings.mode if settings.mend is None or not settings.mend.exists() else "fine"
    if mode == "mistake":
        raise ValueError("this one fails")
    if mode == "bug":
        raise RuntimeError("this one is broken")
    if mode == "interrupt":
        raise KeyboardInterrupt
    if settings.start is not None and not (settings.start / "weights").exists():
        raise ValueError(f"{settings.start} has no weights")
    if settings.cut > 1:
        missing = [part.folder for part in parts(settings, 9) if not (part.folder / "weights").exists()]
        (settings.folder / "missing").write_text(" ".join(folder.name for folder in missing))
    (settings.folder / "weights").write_text(str(settings.steps))
    return Outcome(made=(f"{settings.folder}/weights",), next=("use it",), ok=mode != "not_ok")


def follow(settings: Settings, before: Settings) -> tuple[str, ...]:
    """Start from what the run before made."""
    return (f"start={before.folder}",)


def parts(settings: Settings, most: int) -> list[Settings]:
    """As many as `cut` says."""
    count = min(settings.cut, most) if settings.cut > 1 else 0
    return [
        settings.model_copy(update={"folder": settings.folder / f"part_{n}", "cut": 1, "part": n}) for n in range(count)
    ]


def dry_run(settings: Settings, coming: Sequence[Path] = ()) -> str:
    """What it would go on from."""
    return f"from {settings.start}, coming {' '.join(map(str, coming)) or 'none'}"
