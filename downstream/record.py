"""predicted.csv of a folder of label maps: of which image each one is, and whether that is still the same file.

So an image keeps its name when others come, and a map is made again when its image was changed.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from data_curation.volumes import Found
from downstream.labels import CaseError
from downstream.naming import Identity, identity
from launch.run import write_text

__all__ = ["FILE", "Entry", "entry_of", "read_record", "write_record"]

FILE = "predicted.csv"


@dataclass(frozen=True)
class Entry:
    """An image of which a label map is made, or was made: below images= and by its `source`; `folder` and `series` are
    its identity; `state` changes with the name, size or time of change of any of its files."""

    image: str
    folder: str
    series: str
    state: str

    @property
    def identity(self) -> Identity:
        """What the image is known by."""
        return self.folder, self.series


def entry_of(founds: Sequence[Found], images: Path) -> Entry:
    """What is recorded of an image, a file a channel."""
    first = founds[0]
    return Entry(first.source or first.path.name, *identity(first, images), _state(founds))


def _state(founds: Sequence[Found]) -> str:
    try:
        files = [(path.name, path.stat()) for found in founds for path in found.files]
    except OSError:  # gone since it was listed: reading it says so
        return ""
    said = [[(name, about.st_size, about.st_mtime_ns) for name, about in files], [found.frames for found in founds]]
    return hashlib.sha256(json.dumps(said).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def read_record(folder: Path) -> dict[str, Entry]:
    """Case name -> its image; empty for a folder without a record. CaseError: it is damaged."""
    path, names = folder / FILE, [field.name for field in fields(Entry)]
    if not path.is_file():
        return {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            head, *rows = csv.reader(file, strict=True)
        if head != ["case", *names] or any(len(row) != len(head) for row in rows):
            raise ValueError(f"its columns are not case, {', '.join(names)}")
    except (csv.Error, ValueError) as fault:
        text = f"{path} cannot be read ({fault}): it says of which image each label map is; choose another folder="
        raise CaseError(text) from None
    return {name: Entry(*values) for name, *values in rows}


def write_record(folder: Path, entries: Mapping[str, Entry]) -> None:
    """The file appears whole or not at all."""
    text = io.StringIO()
    rows = ([name, *astuple(entry)] for name, entry in sorted(entries.items()))
    csv.writer(text, lineterminator="\n").writerows([["case", *(field.name for field in fields(Entry))], *rows])
    write_text(folder / FILE, text.getvalue())
