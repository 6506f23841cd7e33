"""Dice, normalised surface Dice and the 95 % Hausdorff distance of one organ, and bootstrap intervals over cases.

Surfaces and their distances are MONAI's, computed once for both surface measures. When an organ is absent:

| label | prediction | Dice | NSD | HD95 |                                                             |
|-------|------------|------|-----|------|-------------------------------------------------------------|
| no    | no         | NaN  | NaN | NaN  | nothing to find: the case does not count for this organ     |
| yes   | no         | 0    | 0   | inf  | missed; counted, and left out of the mean distance          |
| no    | yes        | 0    | 0   | inf  | invented; counted, and left out of the mean distance        |
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

__all__ = ["Interval", "Score", "bootstrap", "overall", "score", "scores"]


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
    prediction: NDArray[np.bool_], label: NDArray[np.bool_], spacing: Sequence[float], tolerance: float = 1.0
) -> Score:
    """Two masks [Z, Y, X] on one grid; `spacing` (z, y, x) and `tolerance` in mm.

    A surface is the mask's voxels that touch the outside by a face; a voxel at the border of the volume touches it.
    NSD counts surface voxels whose distance to the other surface is <= tolerance, both ways (Nikolov 2021).
    """
    sizes = int(np.count_nonzero(prediction)), int(np.count_nonzero(label))
    if not any(sizes):
        return Score(math.nan, math.nan, math.nan)
    if not all(sizes):
        return Score(0.0, 0.0, math.inf)
    from monai.metrics import get_mask_edges, get_surface_distance  # seconds to import

    dice = 2 * int(np.count_nonzero(prediction & label)) / sum(sizes)
    if dice == 1.0:  # the same mask: the distances are all 0
        return Score(1.0, 1.0, 0.0)
    edges = get_mask_edges(prediction, label, crop=False)
    one_way = np.asarray(get_surface_distance(edges[0], edges[1], spacing=tuple(spacing)))
    other_way = np.asarray(get_surface_distance(edges[1], edges[0], spacing=tuple(spacing)))
    near = np.count_nonzero(one_way <= tolerance) + np.count_nonzero(other_way <= tolerance)
    nsd = float(near) / (one_way.size + other_way.size)
    return Score(dice, nsd, float(max(np.quantile(one_way, 0.95), np.quantile(other_way, 0.95))))


def scores(
    prediction: NDArray[np.uint8],
    label: NDArray[np.uint8],
    spacing: Sequence[float],
    organs: Mapping[str, Sequence[int]],
    tolerance: float = 1.0,
) -> dict[str, Score]:
    """Label maps [Z, Y, X] on one grid; `organs` names the label values that make up each organ or region."""
    if prediction.shape != label.shape:
        raise ValueError(
            f"the prediction has shape {prediction.shape}, the label {label.shape}; bring both to one grid"
        )
    found = {}
    boxes = [ndimage.find_objects(np.asarray(volume, dtype=np.uint8)) for volume in (prediction, label)]
    for name, values in organs.items():
        box = _union([side[value - 1] for side in boxes for value in values if 0 < value <= len(side)])
        found[name] = score(_member(prediction[box], values), _member(label[box], values), spacing, tolerance)
    return found


def _member(volume: NDArray[np.uint8], values: Sequence[int]) -> NDArray[np.bool_]:
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
