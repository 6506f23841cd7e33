"""Slices stored sagittal or coronal: KiTS keeps them so without harm, since the axes say which way they lie.

A reformat for reading, though, has thick slices along one axis of the axial slice, which then look smeared. They can
be told apart by nothing but their distance, so they are kept unless all that is not axial is to be left out.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from data_curation.grid import Grid, VolumeError
from launch import settings

__all__ = ["Settings", "apply"]


class Settings(settings.Settings):
    """What becomes of slices that were stored in another plane."""

    non_axial: Literal["keep", "refuse"] = Field("keep", description="volumes stored as sagittal or coronal slices")


def apply(grid: Grid, settings: Settings) -> Grid:
    """The grid; VolumeError `non_axial` where its slices run along the patient and that is not wanted."""
    plane = ("sagittal", "coronal", "axial")[grid.order.index(2)]
    if settings.non_axial == "refuse" and plane != "axial":
        k, j, i = grid.voxels.shape[-3:]
        text = f"stored as {k} {plane} slices of {j} x {i} pixels, {grid.spacing[2]:.3g} mm apart"
        raise VolumeError("non_axial", f"{text}: take the axial series, or set limits.non_axial=keep")
    return grid
