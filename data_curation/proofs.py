"""That the splits of a corpus are apart and that nothing held out is in them, counted from the index.

The first two proofs trust the groups that the curation made; those of pixels and content trust the hashes alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from data_curation.index import EXCLUDED, CorpusError, read_index, read_part
from data_curation.plan import HELD_OUT

__all__ = ["Proof", "proofs"]

SHOWN = 3  # examples of what is shared
COLUMNS = {
    "patient": "patients",
    "duplicate_group": "duplicate groups",
    "sha256": "slices by equal pixels",
    "content": "slices by equal content (HU clipped to ±1000)",
}


@dataclass(frozen=True)
class Proof:
    """Of `left` and `right` different values on two sides, `shared` are on both; 0 is what is claimed."""

    what: str
    sides: tuple[str, str]
    left: int
    right: int
    shared: int
    examples: tuple[str, ...] = ()  # hashes


def proofs(folder: Path, rules: Mapping[str, Any]) -> tuple[Proof, ...]:
    """`rules` are those of corpus.json. Raises CorpusError where a file of the corpus is missing or damaged."""
    marks = read_index(folder, ["split", "excluded", "held_out"])
    split = marks["split"]
    train, val = pc.equal(split, "train"), pc.equal(split, "val")
    used = pc.or_(train, val)
    gone = pc.and_(pc.equal(split, EXCLUDED), pc.equal(marks["excluded"], HELD_OUT))
    telling = pc.not_equal(
        read_index(folder, ["content"])["content"], ""
    )  # a uniform slice tells nothing of its source
    found = []
    for column, what in COLUMNS.items():
        values = read_index(folder, [column])[column]
        there = telling if column in ("sha256", "content") else pa.scalar(True)
        found.append(_proof(what, ("train", "val"), values, pc.and_(train, there), pc.and_(val, there)))
        if pc.any(gone).as_py():
            sides = ("withdrawn, as they are tied to a held-out case", "train or val")
            found.append(_proof(what, sides, values, pc.and_(gone, there), pc.and_(used, there)))
    secret = read_part(folder / "held_out.parquet", ["patient", "content"])
    sides = ("held out for testing, not in the corpus", "train or val")
    for column, what in (("patient", "patients"), ("content", COLUMNS["content"])):
        values = pc.unique(secret[column].filter(pc.not_equal(secret[column], "")))
        found.append(_shared(what, sides, values, pc.unique(read_index(folder, [column])[column].filter(used))))
    volumes = pc.unique(read_index(folder, ["volume"])["volume"].filter(used))
    refused = _refused(folder)
    for reason, what in (("held_out", "held-out volumes"), ("held_out_related", "volumes tied to a held-out one")):
        found.append(_shared(what, ("refused", "train or val"), _named(refused, reason), volumes))
    others = pc.unique(refused.filter(pc.invert(pc.starts_with(refused["reason"], "held_out")))["volume"])
    found.append(_shared("volumes refused for other reasons", ("refused", "train or val"), others, volumes))
    if not rules.get("include_held_out", False):
        kept = pc.and_(used, pc.not_equal(marks["held_out"], ""))
        names = pc.unique(read_index(folder, ["volume"])["volume"].filter(kept))
        found.append(_shared("volumes of official test sets", ("held out", "train or val"), names, volumes))
    return tuple(found)


def _refused(folder: Path) -> pa.Table:
    path = folder / "refused.parquet"
    if not path.is_file():
        raise CorpusError(f"{path} is missing, so the corpus is not finished: run the same `axial curate` again")
    table = read_part(path, ["volume", "reason"])
    return table.filter(pc.not_equal(table["volume"], ""))


def _named(refused: pa.Table, reason: str) -> pa.Array:
    return pc.unique(refused.filter(pc.equal(refused["reason"], reason))["volume"])


def _proof(what: str, sides: tuple[str, str], values: pa.ChunkedArray, left: Any, right: Any) -> Proof:
    return _shared(what, sides, pc.unique(values.filter(left)), pc.unique(values.filter(right)))


def _shared(what: str, sides: tuple[str, str], left: pa.Array, right: pa.Array) -> Proof:
    small, large = sorted((left, right), key=len)
    both = large.filter(pc.is_in(large, value_set=small))
    return Proof(what, sides, len(left), len(right), len(both), tuple(sorted(both.slice(0, SHOWN).to_pylist())))
