"""Which scanned volumes show the same scan, by likeness; found once and kept until a scan changes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_curation.aside import aside
from data_curation.likeness_match import Alike, alike
from data_curation.plan import Candidate
from data_curation.scan import thumbs

__all__ = ["relatives"]

FOUND = Path("private", "alike.json")
FORMAT = 1  # another number makes an earlier file invalid


def relatives(folder: Path, candidates: Sequence[Candidate]) -> tuple[Alike, ...]:
    """Pairs by the positions of the candidates."""
    known = [[one.volume, one.stamp] for one in candidates]
    key = hashlib.sha256(json.dumps([FORMAT, known]).encode()).hexdigest()
    try:
        stored = json.loads((folder / FOUND).read_text())
        if stored["key"] == key:
            return tuple(_unpacked(pair, len(candidates[pair["second"]].codes)) for pair in stored["pairs"])
    except (OSError, ValueError, LookupError, TypeError):
        pass  # not there, or damaged: found again
    names = [one.volume for one in candidates]
    found = alike(
        [one.codes for one in candidates], [one.doubts for one in candidates], lambda i: thumbs(folder, names[i])
    )
    with aside(folder / FOUND, lasting=False) as file:
        file.write(json.dumps({"key": key, "pairs": [_packed(pair) for pair in found]}).encode())
    return tuple(found)


def _packed(pair: Alike) -> dict[str, object]:
    same = np.flatnonzero(pair.same).tolist()
    return {
        "first": pair.first, "second": pair.second, "correlation": pair.correlation, "turn": pair.turn, "same": same
    }  # fmt: skip


def _unpacked(pair: dict[str, Any], slices: int) -> Alike:
    same = np.zeros(slices, bool)
    same[pair["same"]] = True
    return Alike(pair["first"], pair["second"], pair["correlation"], pair["turn"], same)
