"""Dice, normalised surface Dice and the 95 % Hausdorff distance of one organ, and bootstrap intervals over cases.

The definitions are those of MONAI's metrics, which the tests compare with; distances are looked up between surface
voxels alone, so that memory grows with the surfaces and not with the volume. When an organ is absent:

| label | prediction | Dice | NSD | HD95 |                                                             |
|-------|------------|------|-----|------|-------------------------------------------------------------|
| no    | no         | NaN  | NaN | NaN  | nothing to find: the case does not count for this organ     |
| yes   | no         | 0    | 0   | inf  | missed; counted, and left out of the mean distance          |
| no    | yes        | 0    | 0   | inf  | invented; counted, and left out of the mean distance        |

Voxels to ignore count on neither side, and a border that an organ shares with them is no surface of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import KDTree

__all__ = ["Interval", "Score", "bootstrap", "overall", "score", "scores", "with_interval"]

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Score:
    """One organ of one case: `dice` and `nsd` in 0..1, `hd95` in mm; NaN and inf as in the module's table."""

    dice: float
    nsd: float
    hd95: float


@dataclass(frozen=True)
class Interval:
    """A mean over `cases` values with its bootstrap interval; `low` and `high` are NaN for fewer than two cases."""

    mean: float
    low: float
    high: float
    cases: int


def score(
    prediction: Mask, label: Mask, spacing: Sequence[float], tolerance: float = 1.0, ignored: Mask | None = None
) -> Score:
    """Masks [Z, Y, X] on one grid; `spacing` (z, y, x) and `tolerance` in mm; `ignored` voxels count on neither side.

    A surface is the mask's voxels that touch the outside by a face; a voxel at the border of the volume touches it.
    NSD counts surface voxels whose distance to the other surface is <= tolerance, both ways (Nikolov 2021). HD95 is the
    larger of the two directions' 95th percentiles.
    """
    if ignored is not None:
        prediction, label = prediction & ~ignored, label & ~ignored
    sizes = int(np.count_nonzero(prediction)), int(np.count_nonzero(label))
    if not any(sizes):
        return Score(math.nan, math.nan, math.nan)
    if not all(sizes):
        return Score(0.0, 0.0, math.inf)
    dice = 2 * int(np.count_nonzero(prediction & label)) / sum(sizes)
    if dice == 1.0:  # the same mask: the distances are all 0
        return Score(1.0, 1.0, 0.0)
    edges = _surface(prediction, ignored), _surface(label, ignored)
    one_way, other_way = _distances(*edges, spacing), _distances(*edges[::-1], spacing)
    if not one_way.size or not other_way.size:  # an organ with nothing but ignored voxels around it has no surface
        return Score(dice, *((math.nan, math.nan) if one_way.size == other_way.size else (0.0, math.inf)))
    near = np.count_nonzero(one_way <= tolerance) + np.count_nonzero(other_way <= tolerance)
    nsd = float(near) / (one_way.size + other_way.size)
    return Score(dice, nsd, float(max(np.quantile(one_way, 0.95), np.quantile(other_way, 0.95))))


def _surface(mask: Mask, ignored: Mask | None) -> Mask:
    """The mask's voxels with a neighbour, by a face, that is outside of it and not ignored."""
    solid = mask if ignored is None else mask | ignored
    inside = solid.copy()
    for axis in range(solid.ndim):
        across, there = np.moveaxis(inside, axis, 0), np.moveaxis(solid, axis, 0)
        across[1:] &= there[:-1]
        across[:-1] &= there[1:]
        across[0] = across[-1] = False
    found: Mask = mask & ~inside
    return found


def _distances(surface: Mask, other: Mask, spacing: Sequence[float]) -> NDArray[np.float64]:
    """mm from each voxel of a surface to the nearest of another, in any order; inf where the other is empty."""
    away = np.argwhere(surface & ~other)  # the rest lies on both
    found = np.zeros(int(np.count_nonzero(surface)))
    if not len(away):
        return found
    if not other.any():
        return np.full(len(found), np.inf)
    there = np.argwhere(other)
    steps = np.asarray(spacing, dtype=np.float64)
    _, nearest = KDTree(there * steps).query(away * steps)
    # From whole steps, not from positions: a distance of ten steps of 0.1 mm is 1 mm, and within a tolerance of 1 mm.
    found[: len(away)] = np.sqrt((((there[nearest] - away) * steps) ** 2).sum(1))
    return found


def scores(
    prediction: NDArray[np.uint8],
    label: NDArray[np.uint8],
    spacing: Sequence[float],
    organs: Mapping[str, Sequence[int]],
    tolerance: float | Mapping[str, float] = 1.0,
    ignored: Mask | None = None,
) -> dict[str, Score]:
    """Label maps [Z, Y, X] on one grid; `organs` names the label values that make up each organ or region.

    `tolerance` is one for all, or that of each organ, mm.
    """
    if prediction.shape != label.shape:
        raise ValueError(
            f"the prediction has shape {prediction.shape}, the label {label.shape}; bring both to one grid"
        )
    found = {}
    boxes = [ndimage.find_objects(np.asarray(volume, dtype=np.uint8)) for volume in (prediction, label)]
    for name, values in organs.items():
        box = _union([side[value - 1] for side in boxes for value in values if 0 < value <= len(side)])
        if ignored is not None:  # what lies around it decides where its surface is
            box = tuple(slice(max(0, axis.start - 1), axis.stop + 1) for axis in box if axis.stop) or box
        masks = _member(prediction[box], values), _member(label[box], values)
        allowed = tolerance[name] if isinstance(tolerance, Mapping) else tolerance
        found[name] = score(*masks, spacing, allowed, None if ignored is None else ignored[box])
    return found


def _member(volume: NDArray[np.uint8], values: Sequence[int]) -> Mask:
    return volume == values[0] if len(values) == 1 else np.isin(volume, np.asarray(values, dtype=np.uint8))


def _union(boxes: Sequence[tuple[slice, ...] | None]) -> tuple[slice, ...]:
    """Smallest box round all boxes; empty where there is none."""
    given = [box for box in boxes if box is not None]
    if not given:
        return (slice(0), slice(0), slice(0))
    return tuple(slice(min(s.start for s in axis), max(s.stop for s in axis)) for axis in zip(*given, strict=True))


def bootstrap(
    table: NDArray[np.float64], seed: int = 0, draws: int = 2000, level: float = 0.95
) -> tuple[list[Interval], Interval]:
    """`table` [cases, organs] -> an interval for each organ, and one for the mean over organs of the organs' means.

    Percentile bootstrap: whole cases are drawn with replacement, so organs of one patient stay together. Values that
    are not finite do not count; an organ that no case has is NaN and left out of the mean over organs.
    """
    cases, organs = table.shape
    picks = np.random.default_rng(seed).integers(0, cases, size=(draws, cases))
    weights = np.stack([np.bincount(pick, minlength=cases) for pick in picks]).astype(np.float64)  # [draws, cases]
    finite = np.isfinite(table)
    drawn = _means(weights, table, finite)  # [draws, organs]
    means = _means(np.ones((1, cases)), table, finite)[0]
    counts = finite.sum(0)
    each = [_interval(means[o], drawn[:, o], int(counts[o]), level) for o in range(organs)]
    whole = _interval(overall(means), np.array([overall(row) for row in drawn]), int(finite.any(1).sum()), level)
    return each, whole


def with_interval(mean: float, low: float, high: float, digits: int, sign: str = "") -> str:
    """A mean and its interval as text; "-" of none, without the interval where there is none. `sign` is "+" or ""."""
    if math.isnan(mean):
        return "-"
    text = f"{mean:{sign}.{digits}f}"
    return text if math.isnan(low) else f"{text} [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"


def overall(means: NDArray[np.float64]) -> float:
    """Mean of the finite values, NaN when there is none."""
    finite = means[np.isfinite(means)]
    return float(finite.mean()) if finite.size else math.nan


def _means(weights: NDArray[np.float64], table: NDArray[np.float64], finite: NDArray[np.bool_]) -> NDArray[np.float64]:
    total = weights @ finite  # [draws, organs]
    means = np.full(total.shape, np.nan)
    np.divide(weights @ np.where(finite, table, 0.0), total, out=means, where=total > 0)
    return means


def _interval(mean: float, drawn: NDArray[np.float64], cases: int, level: float) -> Interval:
    drawn = drawn[np.isfinite(drawn)]
    if cases < 2 or not drawn.size:
        return Interval(float(mean), math.nan, math.nan, cases)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(mean), float(low), float(high), cases)
