"""A volume has at least two slices; a user may ask for more, to leave out fragments."""

from __future__ import annotations

from pydantic import Field

from data_curation.grid import Volume, VolumeError
from launch import settings

__all__ = ["Settings", "apply"]


class Settings(settings.Settings):
    """How many slices are enough."""

    min_slices: int = Field(2, ge=1, description="fewest axial slices")


def apply(volume: Volume, settings: Settings) -> Volume:
    """The volume; VolumeError `single_slice` or `too_few_slices`."""
    slices = volume.hu.shape[0]
    if slices >= settings.min_slices:
        return volume
    text = f"{slices} axial slice(s), fewer than min_slices={settings.min_slices}: leave it out or lower the limit"
    raise VolumeError("single_slice" if slices == 1 else "too_few_slices", text)
