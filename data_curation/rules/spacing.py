"""Voxel sizes that no scanner makes: a header in other units, or none."""

from __future__ import annotations

from pydantic import Field

from data_curation.grid import Volume, VolumeError
from launch import settings

__all__ = ["Settings", "apply"]


class Settings(settings.Settings):
    """How small and how large a voxel may be."""

    min_spacing: float = Field(0.1, gt=0, description="smallest voxel side, mm")
    max_pixel: float = Field(8.0, gt=0, description="largest pixel side in a slice, mm")
    max_slice_spacing: float = Field(25.0, gt=0, description="largest distance between slices, mm")


def apply(volume: Volume, settings: Settings) -> Volume:
    """The volume; VolumeError `spacing`."""
    z, y, x = volume.spacing
    sides = f"{z:.3g} x {y:.3g} x {x:.3g} mm"
    if min(z, y, x) < settings.min_spacing:
        text = f"voxels of {sides}, a side below min_spacing={settings.min_spacing:g}: correct the header"
        raise VolumeError("spacing", text)
    if max(y, x) > settings.max_pixel or z > settings.max_slice_spacing:
        limits = f"max_pixel={settings.max_pixel:g} or max_slice_spacing={settings.max_slice_spacing:g}"
        raise VolumeError("spacing", f"voxels of {sides}, above {limits}: correct the header, or raise the limit")
    return volume
