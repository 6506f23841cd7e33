"""Slices must hold at least one patch of the network that will see them."""

from __future__ import annotations

from pydantic import Field

from data_curation.grid import Volume, VolumeError
from launch import settings

__all__ = ["Settings", "apply"]


class Settings(settings.Settings):
    """How small a slice may be."""

    min_side: int = Field(16, ge=1, description="fewest pixels along either side of a slice: one patch of a ViT/16")


def apply(volume: Volume, settings: Settings) -> Volume:
    """The volume; VolumeError `too_small`."""
    height, width = volume.hu.shape[1:]
    if min(height, width) >= settings.min_side:
        return volume
    text = f"slices of {height} x {width} pixels, smaller than min_side={settings.min_side}"
    raise VolumeError("too_small", text + ": leave it out or lower the limit")
