"""A hole in a stack: slices were not copied, or two ranges of the body share a series.

A few missing slices leave steps of two or three times the usual one (`uneven` tells of them); in the real case of
this rule a slice lies 202.5 mm away from the others, 1.25 mm apart.
"""

from __future__ import annotations

import numpy as np
from pydantic import Field

from data_curation.grid import Grid, VolumeError
from data_curation.rules.uneven import steps
from launch import settings

__all__ = ["Settings", "apply"]


class Settings(settings.Settings):
    """A gap above both limits is a hole."""

    max_gap: float = Field(15.0, gt=0, description="largest distance between neighbouring slices of a stack, mm")
    max_gap_times: float = Field(2.5, ge=1, description="the same in median distances; a hole is beyond both")


def apply(grid: Grid, settings: Settings) -> Grid:
    """The grid; VolumeError `not_a_volume` where its slices leave a hole."""
    if grid.places is None or len(grid.places) < 2:
        return grid
    apart = steps(grid)
    median = float(np.median(apart))
    if apart.max() > max(settings.max_gap, settings.max_gap_times * median):
        text = f"a gap of {apart.max():.1f} mm among {len(grid.places)} slices {median:.2f} mm apart: "
        raise VolumeError("not_a_volume", text + "fetch the missing slices, or split the folder at the gap")
    return grid
