"""How far a verb is that shares its tasks out over a cluster: a small file, there while it is at it."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from launch.run import RunError, write_text

__all__ = ["Tally", "read_tally"]

NAME = "tasks.json"  # in the folder of the run's jobs
EVERY_S = 5.0


@dataclass(frozen=True)
class Tally:
    """``done`` of ``total`` tasks have ended, ``lost`` of them without a result; ``jobs`` wait or run for the rest."""

    what: str = ""
    total: int = 0
    done: int = 0
    lost: int = 0
    jobs: int = 0
    written: float = float("-inf")

    def __str__(self) -> str:
        """``scan: 120/400 tasks done, 2 lost, 12 jobs``."""
        lost = f", {self.lost:,} lost" if self.lost else ""
        return f"{self.what}: {self.done:,}/{self.total:,} tasks done{lost}, {self.jobs:,} job{'s' * (self.jobs != 1)}"

    def now(self, folder: Path, done: int, lost: int, jobs: int) -> Tally:
        """The same at this moment, written into ``folder`` where the last time was a while ago."""
        known, at = replace(self, done=done, lost=lost, jobs=jobs), time.monotonic()
        if at - self.written < EVERY_S:
            return known
        with suppress(RunError):  # a full disk must not end the work for want of a progress report
            told = {key: value for key, value in asdict(known).items() if key != "written"}
            write_text(folder / NAME, json.dumps(told) + "\n")
        return replace(known, written=at)

    def over(self, folder: Path) -> None:
        """Take the file away: what is over must not look like work."""
        (folder / NAME).unlink(missing_ok=True)


def read_tally(run: Path) -> Tally | None:
    """What the run in ``run`` has shared out, by its last report; None where there is none."""
    try:
        return Tally(**json.loads((run / "jobs" / NAME).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
