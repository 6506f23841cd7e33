"""CT stored without its rescale intercept: air is 0 and water 1024.

Taking 1024 off must make it CT: then most of what is no air is soft tissue within -160..240 HU, and little lies
between lung and fat. No scaling of an MR, PET or phantom to 12 bits came near both (soft tissue 0.86 but 0.73 in
between); real CT has 0.70 to 0.97 and 0.00 to 0.11, but for a crop around a lung nodule.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from pydantic import Field

from data_curation.grid import AIR, Volume, VolumeError
from data_curation.histogram import Values
from launch import settings

__all__ = ["NOTE", "Settings", "apply", "repair"]

NOTE = f"rescale intercept was missing: {AIR} added to every voxel"


class Settings(settings.Settings):
    """Whether the lost intercept is put back."""

    repair_offset: bool = Field(True, description="take 1024 off a CT that was stored without its rescale intercept")


def repair(volume: Volume, settings: Settings) -> Volume:
    """The volume with 1024 taken off, and a note, where the rescale intercept was lost; else the volume itself."""
    if not settings.repair_offset or not _lost(volume.values):
        return volume
    return replace(volume, hu=volume.hu + np.int16(AIR), notes=(*volume.notes, NOTE))


def apply(volume: Volume, settings: Settings) -> Volume:
    """The volume; VolumeError `missing_offset` where the intercept is lost and was not put back."""
    values = volume.values
    if not _lost(values):
        return volume
    text = f"values from {values.low} to {values.high}, median {values.quantile(0.5)} are CT without its rescale"
    remedy = "set limits.repair_offset=true, or convert the original again"
    raise VolumeError("missing_offset", f"{text} intercept of {AIR}: {remedy}")


def _lost(values: Values) -> bool:
    if values.low < 0 or not 1500 <= values.high <= 4096:
        return False
    soft = values.share(-160 + 1024, 240 + 1024)
    body = values.share(-300 + 1024, 4096)
    between = values.share(-650 + 1024, -250 + 1024)
    return soft >= 0.05 and soft >= 0.65 * body and between <= 0.25 * soft
