"""A tilted gantry: the slices lean against the direction in which the table moved, most often in heads.

The slices are what was measured, and a corpus of slices wants them so: they are kept, with the distance along their
normal. Resampling puts the sheared stack onto the patient's axes, linear, with air outside; slices then mix neighbours
that may lie 5 mm apart.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
from pydantic import Field

from data_curation.grid import Grid, VolumeError, resampled
from launch import settings

__all__ = ["TILT_DEGREES", "Settings", "apply", "degrees"]

TILT_DEGREES = 0.5


class Settings(settings.Settings):
    """What becomes of a tilted stack."""

    tilt: Literal["keep", "resample", "refuse"] = Field("keep", description="slices of a tilted gantry")
    tilt_degrees: float = Field(TILT_DEGREES, ge=0, description="smallest angle that counts as a tilt")


def apply(grid: Grid, settings: Settings) -> Grid:
    """The grid with a note, or sheared upright; VolumeError `tilted` where that is not wanted."""
    tilt = degrees(grid)
    if tilt <= settings.tilt_degrees:
        return grid
    if settings.tilt == "refuse":
        raise VolumeError("tilted", f"gantry tilt {tilt:.1f} degrees: leave it out, or set limits.tilt=keep")
    if settings.tilt == "resample":
        assert grid.places is not None
        step = (grid.places[-1] - grid.places[0]) / (len(grid.places) - 1)
        affine = np.column_stack([grid.affine[:, :2], step, grid.places[0]])
        return resampled(grid, affine, f"gantry tilt {tilt:.1f} degrees: resampled onto the patient's axes, linear")
    note = f"gantry tilt {tilt:.1f} degrees: slices kept as acquired"
    return replace(grid, as_acquired=True, notes=(*grid.notes, note))


def degrees(grid: Grid) -> float:
    """Angle between the way from the first slice to the last and the slices' normal; 0 where that is not known."""
    if grid.places is None or len(grid.places) < 2:
        return 0.0
    along, normal = grid.places[-1] - grid.places[0], grid.affine[:, 2]
    cosine = abs(along @ normal) / np.linalg.norm(along) / np.linalg.norm(normal)
    return float(np.degrees(np.arccos(np.clip(cosine, 0.0, 1.0))))
