"""notes.csv of a folder of label maps: what is to be told of each image, of this run and of those before it.

Each rank adds to a file of its own as soon as a label map is there, so that a killed run loses no note.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from launch.run import write_text

__all__ = ["FILE", "add_notes", "gathered_notes"]

FILE = "notes.csv"


def add_notes(folder: Path, rank: int, case: str, notes: Sequence[str]) -> None:
    """The notes of a label map that was made; they take the place of earlier ones."""
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow((case, "; ".join(notes)))
    with (folder / f".notes_{rank}.csv").open("a", newline="", encoding="utf-8") as file:
        file.write(line.getvalue())


def gathered_notes(folder: Path) -> dict[str, str]:
    """Case -> its notes, where there are some. Brings what all ranks added into notes.csv."""
    parts = sorted(folder.glob(".notes_*.csv"))
    found: dict[str, str] = {}
    for path in (folder / FILE, *parts):
        if path.is_file():
            lines = path.read_bytes().decode("utf-8", "replace").splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("\n")]  # a killed run may break the last one
            found |= {row[0]: row[1] for row in csv.reader(whole) if len(row) == 2}
    found.pop("case", None)
    found = {case: notes for case, notes in sorted(found.items()) if notes}
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([("case", "notes"), *found.items()])
    write_text(folder / FILE, text.getvalue())
    for path in parts:
        path.unlink()
    return found
