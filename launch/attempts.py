"""How often a run's job was tried, what ended each try and where, and whether one more try makes sense.

FOLDER/attempts.jsonl has a line for each time a job was begun and did not reach its end.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from launch.beats import read_beats
from launch.run import now, read_json

__all__ = ["Attempt", "against_another", "newest_checkpoint", "note_attempt", "read_attempts", "step_of"]

FILE = "attempts.jsonl"
SKEW_S = 60.0  # by which the clocks of two machines may differ
FAILURES = ("failed", "killed", "lost")


@dataclass(frozen=True)
class Attempt:
    """Start number ``restart`` (0: the first) of job ``job`` ended by ``how``, in step ``step`` where that is known.

    warned: out of time, pre-empted or sent back, saved. failed: an error. killed: a process died. lost: the machine
    went away, or the job was sent back before it could save. ``checkpoint`` is the newest one's step then.
    """

    job: str
    restart: int
    how: Literal["warned", "failed", "killed", "lost"]
    step: int | None
    checkpoint: int | None
    reason: str
    at: str = ""


def note_attempt(folder: Path, attempt: Attempt) -> None:
    """Add a line to the run folder's record of attempts."""
    row = asdict(attempt) | {"at": attempt.at or now()}
    with (folder / FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read_attempts(folder: Path, job: str | None = None) -> list[Attempt]:
    """The attempts of a run, oldest first; with ``job`` those of that one alone."""
    try:
        lines = (folder / FILE).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        try:
            found.append(Attempt(**json.loads(line)))
        except (ValueError, TypeError):
            continue  # torn by a full disk
    return [attempt for attempt in found if job is None or attempt.job == job]


def against_another(attempts: Sequence[Attempt], restarts: int) -> str:
    """What speaks against one more try after the last of ``attempts``, which are of one job; empty: nothing.

    Two errors in the same step are no bad luck. Other failures may be, ``restarts`` times in a row: a new checkpoint
    begins a new row.
    """
    row: list[Attempt] = []
    for attempt in reversed(attempts):
        if attempt.how not in FAILURES:
            continue
        if row and attempt.checkpoint != row[0].checkpoint:
            break
        row.append(attempt)
    if not row:
        return ""
    same = [attempt for attempt in row if attempt.how != "lost" and attempt.step == row[0].step]
    if row[0].how != "lost" and row[0].step is not None and len(same) > 1:
        return f"it failed twice in step {row[0].step}"
    if len(row) > restarts:
        times = f"{len(row)} times in a row" if len(row) > 1 else "once"
        return f"it failed {times} without a new checkpoint (restarts: {restarts})"
    return ""


def step_of(folder: Path, rank: int | None = None) -> int | None:
    """The step that the start before this moment was in, by its processes' signs of life; None where there are none.

    That of ``rank`` where it has given one, else the furthest.
    """
    record = read_json(folder / "run.json")
    if not record or not record.get("starts"):
        return None
    start = record["starts"][-1]
    begun = datetime.fromisoformat(start.get("begun", start["at"])).timestamp() - SKEW_S
    steps = {beat.rank: beat.step for beat in read_beats(folder) if beat.at >= begun}
    return steps[rank] if rank in steps else max(steps.values(), default=None)


def newest_checkpoint(folder: Path) -> int | None:
    """Step of the newest whole checkpoint; it gets its name when it is whole."""
    names = (path.name.removeprefix("step_") for path in (folder / "checkpoints").glob("step_*"))
    return max((int(name) for name in names if name.isdecimal()), default=None)
