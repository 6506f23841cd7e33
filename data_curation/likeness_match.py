"""Scans that show the same, found by the signs of their slices (data_curation.likeness).

First equal codes propose pairs of volumes, then thumbnails decide: the slices of the smaller volume must look like
those of the larger one in the same order, at an even step, all turned the same way. So the smaller one has to lie in
the larger one for at least half its length.

The limits in `Rules` lie between what was measured on 24 real scans and on phantoms: along the best line two different
patients correlate by at most 0.72 (real) or 0.84 (phantoms) and their codes differ in at least 18 or 10 bits; a copy
that was turned, clipped, cut or resliced up to three times as thick correlates by 0.93 or more and differs in mostly
4 bits or fewer. Made-up heads, smooth and round, correlate by up to 0.98: there only the codes (9 bits or more) help.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from data_curation.likeness import CODE_BITS, SIDE

__all__ = ["Alike", "Rules", "alike", "turned"]

Thumbs = Callable[[int], NDArray[np.uint8]]
Pixel = TypeVar("Pixel", bound=np.generic)
_HITS = 8  # pairs of slices that are kept of a proposed pair of volumes
_POINTS = 48  # pairs of slices through which lines are tried


@dataclass(frozen=True)
class Rules:
    """When two volumes are the same scan."""

    bits: int = 48  # leading bits of the codes that must agree; fewer find more and cost more comparisons
    crowd: int = 64  # where more volumes have equal leading bits, all bits must agree; where those do, they say nothing
    chunk: int = 1 << 16  # slices looked up at a time: bounds the memory
    cached: int = 32  # volumes whose thumbnails are kept, about 1 MB each
    slices: int = 3  # fewer equal slices tie nothing
    correlation: float = 0.90  # least median over the slices of the smaller volume
    distance: int = 7  # greatest median of the bits that differ, of 63: smooth slices correlate whoever they show
    same: float = 0.90  # of one slice that lies on the line
    repeated: float = 0.98  # of one slice, to say that it shows nothing new: another contrast phase stays below
    step: float = 8.0  # largest ratio of the two distances between slices


@dataclass(frozen=True)
class Alike:
    """Two volumes of one scan, by their positions. `correlation` is the median over the smaller volume's slices.

    `turn` turns the second volume's slices into the first one's (see `turned`). `same` [slices of the second] says
    which of them show what the first one has.
    """

    first: int
    second: int
    correlation: float
    turn: int
    same: NDArray[np.bool_]


def turned(planes: NDArray[Pixel], turn: int) -> NDArray[Pixel]:
    """Slices [S, Y, X] after one of the eight turns: 4 swaps the axes, then 2 reverses the rows, 1 the columns."""
    if turn & 4:
        planes = planes.transpose(0, 2, 1)
    return planes[:, :: -1 if turn & 2 else 1, :: -1 if turn & 1 else 1]


def alike(
    codes: Sequence[NDArray[np.uint64]],
    doubts: Sequence[NDArray[np.uint64]],
    thumbs: Thumbs,
    *,
    rules: Rules | None = None,
) -> list[Alike]:
    """Every pair of volumes that are the same scan or parts of it, ordered by `first` and `second`.

    `codes` and `doubts` are those of all slices of each volume in the order of z, and `thumbs(i)` loads the thumbnails
    [S, 32, 32] of volume i; it is called only for volumes that the codes leave in question.
    """
    rules = rules or Rules()

    @lru_cache(maxsize=rules.cached)
    def rows(volume: int) -> NDArray[np.float32]:
        return _rows(thumbs(volume), codes[volume] != 0)

    found = []
    for first, second, hits in _proposed(codes, doubts, rules):
        if _far(codes[first], codes[second], rules):
            continue
        one = _compare(_Signs(rows(first), codes[first]), _Signs(rows(second), codes[second]), hits, rules)
        if one is not None:
            correlation, turn, same = one
            found.append(Alike(first, second, correlation, turn, same))
    return found


def _rows(thumbs: NDArray[np.uint8], shown: NDArray[np.bool_]) -> NDArray[np.float32]:
    """[S, 1024] of zero mean and length 1, so that products are correlations; zeros for slices that show nothing."""
    flat = thumbs.reshape(len(thumbs), SIDE * SIDE).astype(np.float32)
    flat -= flat.mean(1, keepdims=True)
    length = np.linalg.norm(flat, axis=1, keepdims=True)
    flat *= shown[:, None] / np.maximum(length, 1e-6)
    return flat


@dataclass(frozen=True)
class _Signs:
    """What is compared of a volume: its thumbnails as `_rows`, and its codes."""

    rows: NDArray[np.float32]
    codes: NDArray[np.uint64]


@dataclass(frozen=True)
class _Table:
    """All different (code, volume), sorted by code."""

    code: NDArray[np.uint64]
    doubt: NDArray[np.uint64]
    volume: NDArray[np.int32]
    z: NDArray[np.int32]


def _table(codes: Sequence[NDArray[np.uint64]], doubts: Sequence[NDArray[np.uint64]], rules: Rules) -> _Table:
    empty = np.empty(0, np.uint64)
    sizes = [len(values) for values in codes]
    code = np.concatenate([*codes, empty])
    at = np.flatnonzero(code)
    volume = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)[at]
    code, doubt = code[at], np.concatenate([*doubts, empty])[at]
    mask = np.uint64(2**64 - 2 ** (CODE_BITS - rules.bits))
    code = np.where(_crowded(code & mask, volume, rules.crowd), code, code & mask)
    rare = ~_crowded(code, volume, rules.crowd)
    order, new = _distinct(code, volume)
    order = order[new & rare[order]]
    starts = np.cumsum([0, *sizes])
    z = (at - starts[volume]).astype(np.int32)
    return _Table(code[order], doubt[order] & mask, volume[order], z[order])


def _distinct(code: NDArray[np.uint64], volume: NDArray[np.int32]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The order by code, then volume (they come by volume), and where a new pair of both begins."""
    order = np.argsort(code, kind="stable")
    new = np.ones(len(code), bool)
    new[1:] = (np.diff(code[order]) != 0) | (np.diff(volume[order]) != 0)
    return order, new


def _crowded(code: NDArray[np.uint64], volume: NDArray[np.int32], most: int) -> NDArray[np.bool_]:
    """For every slice, whether its code occurs in more than `most` volumes."""
    order, new = _distinct(code, volume)
    group = np.cumsum(np.append(False, np.diff(code[order]) != 0)[: len(code)])
    crowded = np.empty(len(code), bool)
    crowded[order] = np.bincount(group[new], minlength=1)[group] > most
    return crowded


def _probes(code: NDArray[np.uint64], doubt: NDArray[np.uint64]) -> Iterator[NDArray[np.uint64]]:
    """The codes, then with every choice of the doubtful bits turned over, one array at a time."""
    bits = []
    rest = doubt.copy()
    while rest.any():
        lowest = rest & (~rest + np.uint64(1))
        bits.append(lowest)
        rest ^= lowest
    for choice in range(1 << len(bits)):
        probe = code.copy()
        for number, bit in enumerate(bits):
            if choice >> number & 1:
                probe ^= bit
        yield probe


def _proposed(
    codes: Sequence[NDArray[np.uint64]], doubts: Sequence[NDArray[np.uint64]], rules: Rules
) -> Iterator[tuple[int, int, NDArray[np.int32]]]:
    """(first, second, hits [n, 2]): positions in first and second that have nearly the same code."""
    table = _table(codes, doubts, rules)
    shown = np.array([np.count_nonzero(values) for values in codes], np.int64)
    by_volume = np.argsort(table.volume, kind="stable")
    bounds = np.searchsorted(table.volume[by_volume], np.arange(len(codes) + 1))
    pairs: list[NDArray[np.int64]] = []
    kept: list[NDArray[np.int32]] = []
    for part in _parts(bounds, rules.chunk):
        pair, hits = _hits(table, by_volume[part], len(codes))
        starts = np.flatnonzero(np.append(True, pair[1:] != pair[:-1])[: len(pair)])
        counts = np.diff(np.append(starts, len(pair)))
        smaller = np.minimum(shown[pair[starts] // len(codes)], shown[pair[starts] % len(codes)])
        # One equal slice is much in a small volume, and little in a large one.
        enough = counts >= np.where(smaller < 32, 1, 2)
        rank = np.arange(len(pair)) - np.repeat(starts, counts)
        spread = rank * _HITS // np.repeat(np.maximum(counts, 1), counts)
        use = np.repeat(enough, counts) & ((rank == 0) | (np.append(-1, spread[:-1])[: len(spread)] != spread))
        pairs.append(pair[use])
        kept.append(hits[use])
    if not pairs:
        return
    pair, all_hits = np.concatenate(pairs), np.concatenate(kept)
    order = np.argsort(pair, kind="stable")
    pair, all_hits = pair[order], all_hits[order]
    starts = np.flatnonzero(np.append(True, pair[1:] != pair[:-1])[: len(pair)])
    for start, end in pairwise([*starts.tolist(), len(pair)]):
        first, second = divmod(int(pair[start]), len(codes))
        yield first, second, all_hits[start:end]


def _parts(bounds: NDArray[np.int64], most: int) -> Iterator[slice]:
    """Whole volumes, about `most` slices at a time."""
    start = 0
    for end in bounds.tolist():
        if end - start >= most or (end == bounds[-1] and end > start):
            yield slice(start, end)
            start = end


def _hits(table: _Table, chosen: NDArray[np.int64], volumes: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Pairs of volumes (first x volumes + second) and of positions in them, sorted, each once."""
    pairs, places = [], []
    for probe in _probes(table.code[chosen], table.doubt[chosen]):
        order = np.argsort(probe)  # sorted look-ups are several times faster
        sought = probe[order]
        low = np.searchsorted(table.code, sought, "left")
        hit = table.code[np.minimum(low, len(table.code) - 1)] == sought
        low, sought, asking = low[hit], sought[hit], chosen[order[hit]]
        counts = np.searchsorted(table.code, sought, "right") - low
        asking = np.repeat(asking, counts)
        within = np.arange(len(asking)) - np.repeat(np.cumsum(counts) - counts, counts)
        answer = np.repeat(low, counts) + within
        other = table.volume[asking] != table.volume[answer]
        asking, answer = asking[other], answer[other]
        swap = table.volume[asking] > table.volume[answer]
        asking, answer = np.where(swap, answer, asking), np.where(swap, asking, answer)
        pairs.append(table.volume[asking].astype(np.int64) * volumes + table.volume[answer])
        places.append(np.stack([table.z[asking], table.z[answer]], 1))
    pair, place = np.concatenate(pairs), np.concatenate(places)
    order = np.lexsort((place[:, 1], place[:, 0], pair))
    pair, place = pair[order], place[order]
    new = np.ones(len(pair), bool)
    new[1:] = (pair[1:] != pair[:-1]) | (place[1:] != place[:-1]).any(1)
    return pair[new], place[new]


def _far(first: NDArray[np.uint64], second: NDArray[np.uint64], rules: Rules) -> bool:
    """Whether the codes alone, in whatever order, rule out what `_compare` asks of them; saves loading thumbnails."""
    small, large = sorted((first[first != 0], second[second != 0]), key=len)
    return float(np.median(np.bitwise_count(small[:, None] ^ large).min(1))) > rules.distance


def _compare(
    first: _Signs, second: _Signs, hits: NDArray[np.int32], rules: Rules
) -> tuple[float, int, NDArray[np.bool_]] | None:
    """Correlation, turn, and which slices of the second are in the first; None where they are not the same scan."""
    here, there = first.rows[hits[:, 0]], second.rows[hits[:, 1]]
    likeness = np.stack([np.einsum("ij,ij->i", here, _turned_rows(there, turn)) for turn in range(8)])  # [8, hits]
    if likeness.max() < rules.same:
        return None
    turn = int(np.where(likeness >= rules.same, likeness, 0).sum(1).argmax())
    matrix = first.rows @ _turned_rows(second.rows, turn).T
    equal = CODE_BITS - np.bitwise_count(first.codes[:, None] ^ second.codes).astype(np.float32)  # bits that agree
    small, large = first.codes != 0, second.codes != 0
    swap = np.count_nonzero(large) < np.count_nonzero(small)
    if swap:
        matrix, equal, small, large = matrix.T, equal.T, large, small
    line = _line(matrix, rules)
    if line is None:
        return None
    seen, inside = _along(matrix, *line)
    correlation = float(np.median(seen[small]))
    agree = float(np.median(_along(equal, *line)[0][small]))
    enough = np.count_nonzero(seen[small] >= rules.same) >= rules.slices
    if correlation < rules.correlation or agree < CODE_BITS - rules.distance or not enough:
        return None
    if not swap:
        slope, start = line
        seen, inside = _along(matrix.T, 1 / slope, -start / slope)
    return correlation, turn, inside & ((seen >= rules.repeated) | (second.codes == 0))


def _turned_rows(rows: NDArray[np.float32], turn: int) -> NDArray[np.float32]:
    return turned(rows.reshape(-1, SIDE, SIDE), turn).reshape(len(rows), SIDE * SIDE)


def _line(matrix: NDArray[np.float32], rules: Rules) -> tuple[float, float] | None:
    """Slope and start of the line through most pairs of like slices; None where there are too few on any."""
    best = matrix.argmax(1)
    rows = np.flatnonzero(matrix[np.arange(len(matrix)), best] >= rules.same)
    if len(rows) < rules.slices:
        return None
    if len(rows) > _POINTS:
        rows = rows[np.linspace(0, len(rows) - 1, _POINTS).astype(int)]
    x, y = rows.astype(np.float64), best[rows].astype(np.float64)
    one, two = np.triu_indices(len(rows), 1)
    slope = (y[two] - y[one]) / (x[two] - x[one])
    even = (np.abs(slope) >= 1 / rules.step) & (np.abs(slope) <= rules.step)
    if not even.any():
        return None
    slope, start = slope[even], (y[one] - slope * x[one])[even]
    off = np.abs(y - slope[:, None] * x - start[:, None])
    on = off <= _reach(slope)[:, None]
    chosen = int(np.lexsort((np.where(on, off, 0).sum(1), -on.sum(1)))[0])
    if np.count_nonzero(on[chosen]) < rules.slices:
        return None
    slope_fit, start_fit = np.polyfit(x[on[chosen]], y[on[chosen]], 1)
    if not 1 / rules.step <= abs(slope_fit) <= rules.step:
        return None
    return float(slope_fit), float(start_fit)


def _reach(slope: NDArray[np.float64] | float) -> NDArray[np.float64]:
    """How far from the line, in slices of the other volume, a like slice may lie."""
    return np.asarray(1.0 + np.abs(slope) / 2)


def _along(matrix: NDArray[np.float32], slope: float, start: float) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """For every row the highest correlation near the line, and whether the line meets the other volume there."""
    centre = slope * np.arange(len(matrix)) + start
    reach = float(_reach(slope))
    other = np.arange(matrix.shape[1])
    near = np.abs(other - centre[:, None]) <= reach
    return np.asarray(np.where(near, matrix, 0).max(1)), np.asarray(near.any(1))
