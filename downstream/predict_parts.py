"""A prediction in parts, each a run of its own in FOLDER/parts/NNN, and how the whole takes up what they made.

A part says i/n: of the images that the whole has no label map of, every n-th from the i-th on. Who takes which is no
promise: the whole makes what no part has made, and of what two have made it takes one.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from data_curation.aside import link_or_copy
from downstream.naming import Identity
from downstream.notes import gathered_notes
from downstream.record import Entry, read_record

__all__ = ["Part", "as_known", "parts_of", "share_of", "shares", "whole_of"]

_PARTS = "parts"
T = TypeVar("T")


@dataclass(frozen=True)
class Part:
    """What one part has made: its folder, which image each of its maps is of, and what is to be told of them."""

    folder: Path
    record: Mapping[str, Entry]
    notes: Mapping[str, str]

    def name_of(self, entry: Entry) -> str | None:
        """What it calls the image, if that is still the same; None where it knows no such image."""
        return next((name for name, known in self.record.items() if known == entry), None)

    def give(self, name: str, folder: Path, called: str, endings: Sequence[str]) -> bool:
        """Link what it has of the image ``name`` into ``folder`` as ``called``; was there anything?"""
        found = [end for end in endings if (self.folder / f"{name}{end}").is_file()]
        for end in found:
            link_or_copy(self.folder / f"{name}{end}", folder / f"{called}{end}")
        return bool(found)


def shares(folder: Path, images: Path, most: int) -> dict[str, Path]:
    """The share of each part and its folder: as many as there are files, ``most`` at most; none where one run does."""
    files = (path for path in images.rglob("*") if path.is_file()) if images.is_dir() else iter(())
    count = len(list(itertools.islice(files, most)))
    return {f"{i}/{count}": folder / _PARTS / f"{i:03d}" for i in range(count)} if count > 1 else {}


def share_of(share: str, all_of_them: Sequence[T]) -> Sequence[T]:
    """Those that fall to the part ``share``."""
    number, count = map(int, share.split("/"))
    return all_of_them[number::count]


def whole_of(folder: Path, share: str | None) -> Path:
    """Where the label maps of the whole go."""
    return folder.parent.parent if share is not None else folder


def parts_of(folder: Path, digest: str) -> list[Part]:
    """The parts of the whole in ``folder`` that were made with the model of this digest."""
    found = []
    for part in sorted((folder / _PARTS).glob("*/")):
        note = part / "model.sha256"
        if note.is_file() and note.read_text().strip() == digest:
            found.append(Part(part, read_record(part), gathered_notes(part)))
    return found


def as_known(records: Sequence[Mapping[str, Entry]]) -> dict[Identity, str]:
    """What each image is called already; the first record counts, and no name is given to two."""
    known: dict[Identity, str] = {}
    taken: set[str] = set()
    for record in records:
        for name, entry in record.items():
            if entry.identity not in known and name not in taken:
                known[entry.identity] = name
                taken.add(name)
    return known
