"""Volumes at an angle to the patient's axes: up to a few degrees the axes are relabelled, beyond that resampled.

TotalSegmentator's rotated scans and reformats along an organ are of this kind. A tilted gantry is not: see `tilt`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from data_curation.grid import OBLIQUE_DEGREES, Grid, VolumeError, resampled
from launch import settings

__all__ = ["Settings", "apply"]


class Settings(settings.Settings):
    """What becomes of an oblique volume."""

    oblique: Literal["resample", "refuse"] = Field("resample", description="volumes at an angle to the patient's axes")
    oblique_degrees: float = Field(OBLIQUE_DEGREES, ge=0, le=45, description="largest angle that is only relabelled")


def apply(grid: Grid, settings: Settings) -> Grid:
    """The grid, or the same body along the patient's axes; VolumeError `oblique` where that is not wanted."""
    angle = grid.angle
    if angle <= settings.oblique_degrees or grid.as_acquired:
        return grid
    if settings.oblique == "refuse":
        text = f"oblique by {angle:.1f} degrees, above oblique_degrees={settings.oblique_degrees:g}"
        raise VolumeError("oblique", text + ": set limits.oblique=resample, or leave it out")
    return resampled(grid, grid.affine, f"oblique by {angle:.1f} degrees: resampled onto the patient's axes, linear")
