"""Which slice goes into which shard. Decided when every volume is known and before any shard is written.

A shard holds whole volumes of one split, as they come in an order drawn from the seed, until it has its number of
slices; so it holds many patients, and someone who streams `train-*.tar` gets neither the validation part nor anything
twice. Slices seen before have shards of their own, `duplicates-*.tar`. A corpus that is extended keeps its finished
shards as they are: new volumes go to new shards, into the split of whatever they are tied to.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_curation.index import Links, split_of
from data_curation.shards import Part, Shard

__all__ = ["DUPLICATES", "HELD_OUT", "Candidate", "Plan", "PlanRules", "plan"]

DUPLICATES = "duplicates"
HELD_OUT = "tied to a case that is held out for testing"  # why a volume is withdrawn


@dataclass(frozen=True)
class Candidate:
    """A scanned volume that nothing speaks against, or (`excluded`) a held-out one whose relatives are looked for."""

    volume: str
    patient: str
    names: tuple[str, ...]  # whoever shares one of them is the same patient or scan, by what the catalogue knows
    stamp: str
    name: str  # data set and source, for messages
    excluded: bool
    contents: NDArray[np.uint64]  # [slices]
    codes: NDArray[np.uint64]  # [slices], see likeness.py
    doubts: NDArray[np.uint64]


@dataclass(frozen=True)
class PlanRules:
    """What the plan depends on besides the volumes."""

    seed: int
    shard_slices: int
    fractions: Mapping[str, float]
    drop_duplicates: bool


@dataclass(frozen=True)
class Plan:
    """The shards in the order of the index, the finished ones first.

    `refused`: (reason, detail) of the candidates that get no shard. `withdrawn`: why a volume that lies in a finished
    shard does not count any more.
    """

    shards: tuple[Shard, ...]
    refused: Mapping[str, tuple[str, str]]
    withdrawn: Mapping[str, str]


def plan(candidates: Sequence[Candidate], links: Links, rules: PlanRules, finished: Sequence[Shard] = ()) -> Plan:
    """The same candidates must come in the same order, those of finished shards first; `links` are of that order."""
    leaks = {int(links.related[i]): one.name for i, one in reversed(list(enumerate(candidates))) if one.excluded}
    settled = {part.volume: part.split for shard in finished for part in shard.parts}
    patients: dict[int, str] = {}
    splits: dict[int, str] = {}
    for related, one in zip(links.related.tolist(), candidates, strict=True):
        patients[related] = min(one.patient, patients.get(related, one.patient))
        if one.volume in settled:
            splits.setdefault(related, settled[one.volume])
    refused: dict[str, tuple[str, str]] = {}
    withdrawn: dict[str, str] = {}
    parts: dict[str, list[Part]] = {**{name: [] for name in rules.fractions}, DUPLICATES: []}
    for i, one in enumerate(candidates):
        related = int(links.related[i])
        first = candidates[links.group[i]]
        leak = f"the same patient as, or the same slices as in, {leaks[related]}" if related in leaks else ""
        split = splits.get(related) or split_of(patients[related], rules.seed, rules.fractions)
        if one.excluded:
            continue
        if one.volume in settled:
            if leak:
                withdrawn[one.volume] = HELD_OUT
            elif settled[one.volume] != split:
                withdrawn[one.volume] = f"tied to a patient of the split {split}"
            continue
        if leak:
            refused[one.volume] = ("held_out_related", f"{leak}, which is held out for testing")
            continue
        repeated = links.duplicate[i]
        if rules.drop_duplicates and repeated.all():
            refused[one.volume] = ("duplicate", f"every slice also occurs in {first.name} or others before")
            continue
        for group, chosen in ((split, ~repeated), (DUPLICATES, repeated)):
            rows = tuple(np.flatnonzero(chosen).tolist())
            if rows and not (rules.drop_duplicates and group == DUPLICATES):
                parts[group].append(Part(one.volume, one.stamp, rows, split, first.volume, group == DUPLICATES))
    made = [shard for group, members in parts.items() for shard in _cut(group, members, rules, finished)]
    return Plan((*finished, *made), refused, withdrawn)


def _cut(group: str, parts: Sequence[Part], rules: PlanRules, finished: Sequence[Shard]) -> list[Shard]:
    """Volumes in the seed's order, a new shard whenever the last one is full."""
    ordered = sorted(parts, key=lambda part: hashlib.sha256(f"{rules.seed} {part.volume}".encode()).digest())
    start = sum(shard.name.startswith(f"{group}-") for shard in finished)
    filled: list[list[Part]] = []
    room = 0
    for part in ordered:
        if room <= 0:
            filled.append([])
            room = rules.shard_slices
        filled[-1].append(part)
        room -= len(part.rows)
    return [Shard(f"{group}-{number:06d}", tuple(members), rules.seed) for number, members in enumerate(filled, start)]
