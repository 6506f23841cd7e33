"""Which cases of a benchmark validate: the same ones for curation, which keeps them out, and for fine-tuning."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection

__all__ = ["FOLD", "FOLDS", "drawn", "fold_of"]

FOLD, FOLDS = 0, 5  # the fold that validates unless another one is asked for, and into how many the cases are cut


def drawn(names: Collection[str]) -> list[str]:
    """The names in an order that looks random, and is the same for any order and spelling they come in.

    A case goes by the last run of digits of its name, so amos_0004 and case_4 are drawn alike; by its whole name where
    there is none, and all do where two of them share a number.
    """
    numbers = {name: _number(name) for name in names}
    if len(set(numbers.values())) < len(numbers):
        numbers = {name: name for name in numbers}
    return sorted(numbers, key=lambda name: (hashlib.sha256(numbers[name].encode()).digest(), name))


def fold_of(names: Collection[str], fold: int = FOLD, folds: int = FOLDS) -> frozenset[str]:
    """The names that validate in this fold. Folds are disjoint, hold all names, and differ in size by one at most."""
    assert 0 <= fold < folds, f"fold {fold} of {folds}"
    return frozenset(drawn(names)[fold::folds])


def _number(name: str) -> str:
    found = re.findall("[0-9]+", name)
    return str(int(found[-1])) if found else name
