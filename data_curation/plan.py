"""Which slice goes into which shard. Decided when every volume is known and before any shard is written.

A shard holds whole volumes of one split, as they come in an order drawn from the seed, until it has its number of
slices; so it holds many patients, and someone who streams `train-*.tar` gets neither the validation part nor anything
twice. Slices seen before have shards of their own, `duplicates-*.tar`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_curation.index import link, split_of
from data_curation.shards import Part, Shard

__all__ = ["Candidate", "Plan", "PlanRules", "plan"]

DUPLICATES = "duplicates"


@dataclass(frozen=True)
class Candidate:
    """A scanned volume that nothing speaks against, or (`excluded`) a held-out one whose relatives are looked for."""

    volume: str
    patient: str
    stamp: str
    name: str  # data set and source, for messages
    excluded: bool
    contents: NDArray[np.uint64]  # [slices]


@dataclass(frozen=True)
class PlanRules:
    """What the plan depends on besides the volumes."""

    seed: int
    shard_slices: int
    fractions: Mapping[str, float]
    drop_duplicates: bool


@dataclass(frozen=True)
class Plan:
    """The shards in the order of the index, and (reason, detail) of the candidates that get none."""

    shards: tuple[Shard, ...]
    refused: Mapping[str, tuple[str, str]]


def plan(candidates: Sequence[Candidate], rules: PlanRules) -> Plan:
    """The same candidates, in whatever order the workers finished them, must be given in the same order."""
    links = link([one.patient for one in candidates], [one.contents for one in candidates])
    leaks = {int(links.related[i]): one.name for i, one in reversed(list(enumerate(candidates))) if one.excluded}
    patients: dict[int, str] = {}
    for related, one in zip(links.related, candidates, strict=True):
        patients[int(related)] = min(one.patient, patients.get(int(related), one.patient))
    refused: dict[str, tuple[str, str]] = {}
    parts: dict[str, list[Part]] = {**{name: [] for name in rules.fractions}, DUPLICATES: []}
    for i, one in enumerate(candidates):
        related = int(links.related[i])
        first = candidates[links.group[i]]
        if one.excluded:
            continue
        if related in leaks:
            text = f"the same patient as, or slices shared with, {leaks[related]}, which is held out for testing"
            refused[one.volume] = ("held_out_related", text)
            continue
        repeated = links.duplicate[i]
        if rules.drop_duplicates and repeated.all():
            refused[one.volume] = ("duplicate", f"every slice also occurs in {first.name} or others before")
            continue
        split = split_of(patients[related], rules.seed, rules.fractions)
        for group, chosen in ((split, ~repeated), (DUPLICATES, repeated)):
            rows = tuple(np.flatnonzero(chosen).tolist())
            if rows and not (rules.drop_duplicates and group == DUPLICATES):
                parts[group].append(Part(one.volume, one.stamp, rows, split, first.volume, group == DUPLICATES))
    shards = [shard for group, members in parts.items() for shard in _cut(group, members, rules)]
    return Plan(tuple(shards), refused)


def _cut(group: str, parts: Sequence[Part], rules: PlanRules) -> list[Shard]:
    """Volumes in the seed's order, a new shard whenever the last one is full."""
    ordered = sorted(parts, key=lambda part: hashlib.sha256(f"{rules.seed} {part.volume}".encode()).digest())
    filled: list[list[Part]] = []
    room = 0
    for part in ordered:
        if room <= 0:
            filled.append([])
            room = rules.shard_slices
        filled[-1].append(part)
        room -= len(part.rows)
    return [Shard(f"{group}-{number:06d}", tuple(members), rules.seed) for number, members in enumerate(filled)]
