"""Several scans of one body in one file or series: arterial and venous phase, the heart's phases, a perfusion run.

Mixed into one stack they make a volume that no scanner saw. A DICOM series is split first by what its headers say.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import Field

from data_curation.grid import Grid, VolumeError
from launch import settings

__all__ = ["Settings", "apply"]


class Settings(settings.Settings):
    """What becomes of a volume with several phases."""

    phases: Literal["refuse", "first"] = Field("refuse", description="of several phases in one stack: refuse, or first")


def apply(grid: Grid, settings: Settings) -> Grid:
    """One phase of a grid [t, k, j, i]; VolumeError `4d` where that is not wanted."""
    if grid.voxels.ndim == 3:
        return grid
    count = grid.voxels.shape[0]
    if settings.phases == "refuse" and count > 1:
        text = " x ".join(map(str, grid.voxels.shape[::-1]))
        remedy = "write the wanted volume as a file of its own, or set limits.phases=first"
        raise VolumeError("4d", f"{text} voxels are a series over time or phases: {remedy}")
    notes = (*grid.notes, f"the first of {count} phases") if count > 1 else grid.notes
    return replace(grid, voxels=grid.voxels[0], notes=notes)
