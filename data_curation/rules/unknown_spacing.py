"""Exactly 1 x 1 x 1 mm at 512 pixels or more: the affine was lost (LiTS 28 to 47, and their copies in AbdomenCT-1K).

The truth may be known from elsewhere (`assumed_spacing`); the scans of LiTS have it in the Decathlon's copy.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from pydantic import Field

from data_curation.grid import Volume, VolumeError
from launch import settings

__all__ = ["Settings", "apply", "lost", "repair"]

FULL_SIDE = 512

Side = Annotated[float, Field(gt=0)]


class Settings(settings.Settings):
    """What becomes of a volume that has lost its spacing."""

    unknown_spacing: bool = Field(
        False, description="keep 1 x 1 x 1 mm volumes of 512 pixels or more (spacing was lost)"
    )
    assumed_spacing: tuple[Side, Side, Side] | None = Field(
        None, description="spacing (z, y, x) in mm for volumes that have lost theirs; none: refuse them"
    )


def repair(volume: Volume, settings: Settings) -> Volume:
    """The volume with the spacing that the settings know, and a note, where its own was lost."""
    if settings.assumed_spacing is None or not lost(volume):
        return volume
    sides = " x ".join(f"{side:g}" for side in settings.assumed_spacing)
    return replace(volume, spacing=settings.assumed_spacing).noted(f"spacing was lost: {sides} mm assumed")


def apply(volume: Volume, settings: Settings) -> Volume:
    """The volume; VolumeError `unknown_spacing`."""
    if settings.unknown_spacing or not lost(volume):
        return volume
    height, width = volume.hu.shape[1:]
    text = f"{height} x {width} pixels at exactly 1 x 1 x 1 mm: the header has lost the true spacing, take a copy that"
    raise VolumeError("unknown_spacing", f"{text} has it, set limits.assumed_spacing, or limits.unknown_spacing=true")


def lost(volume: Volume) -> bool:
    """Does the header say what it says where nothing is known?"""
    return volume.spacing == (1.0, 1.0, 1.0) and min(volume.hu.shape[1:]) >= FULL_SIDE
