"""Signs of life: what each process of a run does, in a small file of its own that it writes over again and again.

Files need no collective and no other process: they tell of a rank that is stopped, hangs, or has lost its machine.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

__all__ = ["Beat", "open_beat", "put_beat", "read_beats", "standing", "write_beat"]

FOLDER = "beats"


@dataclass(frozen=True)
class Beat:
    """Rank ``rank`` of ``size`` does ``doing`` at step ``step``, and last got on with it ``idle_s`` seconds ago.

    ``order`` is the place of ``doing`` within a step; ``moves`` counts up as the rank gets on; ``at`` is when this was
    written, in seconds since 1970 by the rank's own clock.
    """

    rank: int
    size: int
    host: str
    pid: int
    step: int
    order: int
    doing: str
    moves: int
    idle_s: float
    at: float


def open_beat(folder: Path, rank: int) -> BinaryIO:
    """The file of a rank's signs of life in the run folder, for `put_beat`; whoever opens it closes it."""
    path = folder / FOLDER / f"{rank:05d}.json"
    path.parent.mkdir(exist_ok=True)
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT, 0o644), "wb", buffering=0)


def put_beat(file: BinaryIO, beat: Beat) -> None:
    """Write a rank's sign of life over the last one. In place and of one length: a full disk does not silence it."""
    os.pwrite(file.fileno(), json.dumps(asdict(beat)).ljust(511).encode() + b"\n", 0)


def write_beat(folder: Path, beat: Beat) -> None:
    """Write a rank's sign of life into the run folder, and close the file: then other machines get to see it."""
    with open_beat(folder, beat.rank) as file:
        put_beat(file, beat)


def read_beats(folder: Path) -> list[Beat]:
    """The signs of life in a run folder by rank; those of another, larger start of the run are left out."""
    found = {}
    for path in sorted((folder / FOLDER).glob("*.json")):
        try:
            beat = Beat(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            continue  # just being written, or gone
        found[beat.rank] = beat
    newest = max(found.values(), key=lambda beat: beat.at, default=None)
    return [beat for beat in found.values() if newest is not None and beat.rank < newest.size]


def standing(beats: Sequence[Beat], silent: Collection[int] = ()) -> str:
    """Who stands where, those furthest behind first, which the others wait for: ``rank 3 on n2 in data at step 12``."""
    groups: dict[tuple[bool, int, int, str], list[Beat]] = {}
    for beat in beats:
        groups.setdefault((beat.rank not in silent, beat.step, beat.order, beat.doing), []).append(beat)
    parts = []
    for (heard, step, _, doing), group in sorted(groups.items()):
        ranks = _ranges(sorted(beat.rank for beat in group))
        hosts = sorted({beat.host for beat in group})
        who = f"rank{'s' * (len(group) > 1)} {ranks} on {hosts[0]}" + (f" and {len(hosts) - 1} more" * (len(hosts) > 1))
        where = f"in {doing} at step {step}"
        silence = "without a sign of life (stopped, killed, or the machine is gone), last seen"
        parts.append(f"{who} {where}" if heard else f"{who} {silence} {where}")
    return "; ".join(parts)


def _ranges(numbers: Sequence[int]) -> str:
    """``0-2, 5`` of [0, 1, 2, 5]."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
