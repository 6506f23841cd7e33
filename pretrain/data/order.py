"""Which slice sample n is: a function of n, the seed and the sources alone, without memory of what came before.

Sample n is dealt to a source, and is there the j-th: both follow from n by a table of at most TABLE entries. Slice j of
a source is the j-th of its endless order, epoch after epoch a permutation of its own.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pretrain.data.batch import Draw, generator

__all__ = ["TABLE", "Order", "Run", "Samples", "Source", "deal", "sample_order", "whole_counts"]

ROUNDS = 8  # of the permutation's Feistel network
TABLE = 2**16  # samples after which the pattern of sources repeats, at most

Run = tuple[int, int]  # slices first .. last - 1 of the corpora laid end to end


class Source:
    """Slices that share one endless order and one share of the samples, as runs of neighbours."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = tuple(runs)
        self._first = np.array([first for first, _ in runs], np.int64)
        self._ends = np.cumsum([last - first for first, last in runs], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def slices(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Slices of the corpora at these places (0 .. len - 1) of the source."""
        run = np.searchsorted(self._ends, numbers, side="right")
        begun = np.concatenate([[0], self._ends[:-1]])
        found: NDArray[np.int64] = self._first[run] + numbers - begun[run]
        return found


class Samples(Protocol):
    """Which slice each sample is."""

    def at(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """The slices of samples, as numbers in the corpora laid end to end."""
        ...

    def visits(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """How often the slice of each sample came before."""
        ...

    def following(self, sample: int, count: int) -> list[int]:
        """Slices that may stand in for that of a sample, `count` at most."""
        ...


@dataclass(frozen=True)
class Order:
    """The endless order of a run's samples over its sources.

    The first n samples hold n * counts[k] / sum(counts) of source k, rounded up or down, for every n. A source's
    slices are each seen once before any is seen twice.
    """

    sources: tuple[Source, ...]
    counts: tuple[int, ...]  # samples of each source in one turn of the table
    seed: int
    source: NDArray[np.int32]  # [sum(counts)] the source of each sample of a turn
    number: NDArray[np.int32]  # [sum(counts)] how many samples of that source stand before it in the turn

    @staticmethod
    def of(sources: Sequence[Source], shares: Sequence[Fraction], seed: int) -> Order:
        """The order in which each source has its share of the samples."""
        counts = whole_counts(shares)
        return Order(tuple(sources), counts, seed, *deal(counts))

    def place(self, samples: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """For each sample the number of its source, and its position in that source's endless order."""
        turn, within = np.divmod(samples, len(self.source))
        source = self.source[within]
        return source, turn * np.array(self.counts, np.int64)[source] + self.number[within]

    def visits(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """How often the slice of each sample came before."""
        sources, positions = self.place(samples)
        visits: NDArray[np.int64] = positions // np.array([len(source) for source in self.sources], np.int64)[sources]
        return visits

    def following(self, sample: int, count: int) -> list[int]:
        """The `count` slices after that of a sample in the order of its source."""
        (source,), (position,) = self.place(np.array([sample]))
        found: list[int] = self.slices(int(source), np.arange(position + 1, position + 1 + count)).tolist()
        return found

    def slices(self, source: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The slices at positions of the endless order of a source."""
        chosen = self.sources[source]
        return chosen.slices(sample_order(positions, len(chosen), self.seed, source))

    def at(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """The slices of samples, as numbers in the corpora laid end to end."""
        sources, positions = self.place(samples)
        found = np.empty(len(samples), np.int64)
        for source in np.unique(sources).tolist():
            own = sources == source
            found[own] = self.slices(source, positions[own])
        return found


def whole_counts(shares: Sequence[Fraction]) -> tuple[int, ...]:
    """Whole numbers as the shares (any positive numbers): exact where TABLE samples can hold them, else rounded to it.

    Raises ValueError that gives the number of a source so small that it would get none of TABLE samples.
    """
    total = sum(shares, Fraction(0))
    parts = [share / total for share in shares]
    size = math.lcm(*(part.denominator for part in parts))
    if size <= TABLE:
        return tuple(int(part * size) for part in parts)
    exact = [part * TABLE for part in parts]
    for source, value in enumerate(exact):
        if value < Fraction(1, 2):
            raise ValueError(source)
    counts = [max(1, math.floor(value)) for value in exact]
    by_rest = sorted(range(len(exact)), key=lambda k: (counts[k] - exact[k], k))
    for k in by_rest[: max(0, TABLE - sum(counts))]:
        counts[k] += 1
    for _ in range(sum(counts) - TABLE):  # sources below one sample were given one: the largest pays
        counts[counts.index(max(counts))] -= 1
    divisor = math.gcd(*counts)
    return tuple(count // divisor for count in counts)


def deal(counts: Sequence[int]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """The source of each of sum(counts) samples, and its number within the source.

    Sample j of a source may come from the moment that its share reaches j, and must come before it reaches j + 1; the
    most urgent comes first. With that rule no count is ever one or more away from its share (the Pfair schedule of one
    processor: Baruah et al., Algorithmica 1996).
    """
    total = sum(counts)
    source, number = np.empty(total, np.int32), np.empty(total, np.int32)
    waiting = [(0, -(-total // count), k, 0) for k, count in enumerate(counts)]
    ready: list[tuple[int, int, int]] = []
    heapq.heapify(waiting)
    for sample in range(total):
        while waiting and waiting[0][0] <= sample:
            _, due, k, j = heapq.heappop(waiting)
            heapq.heappush(ready, (due, k, j))
        _, k, j = heapq.heappop(ready)
        source[sample], number[sample] = k, j
        if j + 1 < counts[k]:
            heapq.heappush(waiting, ((j + 1) * total // counts[k], -(-(j + 2) * total // counts[k]), k, j + 1))
    return source, number


def sample_order(positions: NDArray[np.int64], length: int, seed: int, source: int = 0) -> NDArray[np.int64]:
    """Numbers at positions of a source's endless order: epoch after epoch, each a permutation of `length` of its own.

    A keyed bijection, so it needs no memory: a Feistel network over a rectangle of just over `length` cells, walked
    until it lands inside.
    """
    epochs, order = positions // length, positions % length
    for epoch in np.unique(epochs):
        counters = (int(epoch), source) if source else (int(epoch),)
        keys = generator(seed, Draw.ORDER, *counters).integers(2**63, size=ROUNDS, dtype=np.uint64)
        outside = np.flatnonzero(epochs == epoch)
        while outside.size:
            order[outside] = _feistel(order[outside], length, keys)
            outside = outside[order[outside] >= length]
    return order


def _feistel(x: NDArray[np.int64], length: int, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """A bijection of the a*b >= length cells of a rectangle: each round shifts one side by a hash of the other."""
    a = math.isqrt(length - 1) + 1
    b = -(-length // a)
    left, right = np.divmod(x.astype(np.uint64), np.uint64(b))
    for turn, key in enumerate(keys):
        if turn % 2:
            right = (right + _mix(left + key) % np.uint64(b)) % np.uint64(b)
        else:
            left = (left + _mix(right + key) % np.uint64(a)) % np.uint64(a)
    return (left * np.uint64(b) + right).astype(np.int64)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finaliser."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
