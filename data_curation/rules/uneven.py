"""Slices at uneven distances: heads are scanned with thin slices below and thick ones above, and slices get lost.

A volume has one distance. For a corpus of single slices the slices count, not what lies between: so they are kept as
acquired and the median distance is written down. Whoever needs a true third dimension has them resampled.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from data_curation.grid import AIR, SAME_PLACE_MM, Grid, VolumeError
from launch import settings

__all__ = ["Settings", "apply", "steps"]


class Settings(settings.Settings):
    """What becomes of a stack whose slices lie at uneven distances."""

    uneven: Literal["keep", "resample", "refuse"] = Field("keep", description="slices at uneven distances")
    uneven_tolerance: float = Field(0.02, ge=0, description="departure from the median distance, relative, let pass")


def apply(grid: Grid, settings: Settings) -> Grid:
    """The grid with a note, or on even distances; VolumeError `uneven` where that is not wanted."""
    if grid.places is None or len(grid.places) < 2:
        return grid
    apart = steps(grid)
    median = float(np.median(apart))
    if np.abs(apart - median).max() <= max(settings.uneven_tolerance * median, SAME_PLACE_MM):
        return grid
    text = f"uneven slice spacing {apart.min():.2f} to {apart.max():.2f} mm"
    if settings.uneven == "refuse":
        raise VolumeError("uneven", f"{text}: fetch the missing slices, or set limits.uneven=keep or resample")
    if settings.uneven == "resample":
        return _even(grid, apart, f"{text}: resampled to {median:.2f} mm, linear")
    return replace(grid, notes=(*grid.notes, f"{text}: the median {median:.2f} is used"))


def steps(grid: Grid) -> NDArray[np.float64]:
    """Distances between neighbouring slices along their normal, mm, [k - 1]."""
    assert grid.places is not None
    axis = grid.affine[:, 2]
    return np.abs(np.diff(grid.places @ (axis / np.linalg.norm(axis))))


def _even(grid: Grid, apart: NDArray[np.float64], note: str) -> Grid:
    """Slices at multiples of the median distance from the first, each between its two neighbours."""
    assert grid.places is not None
    at = np.concatenate([[0.0], np.cumsum(apart)])
    median = float(np.median(apart))
    wanted = np.arange(int(at[-1] / median + 1e-3) + 1) * median
    below = np.clip(np.searchsorted(at, wanted, side="right") - 1, 0, len(apart) - 1)
    weights = np.clip((wanted - at[below]) / apart[below], 0.0, 1.0)
    voxels: NDArray[Any] = np.empty((len(wanted), *grid.voxels.shape[1:]), np.float32)
    places = np.empty((len(wanted), 3))
    for target, (index, weight) in enumerate(zip(below, weights, strict=True)):
        lower, upper = (np.maximum(grid.voxels[i], AIR, dtype=np.float32) for i in (index, index + 1))
        voxels[target] = lower + np.float32(weight) * (upper - lower)
        places[target] = grid.places[index] + weight * (grid.places[index + 1] - grid.places[index])
    return replace(grid, voxels=voxels, places=places, notes=(*grid.notes, note))
