"""Values far below air outside the scanner's circle: -2000, -2048 (GE), -3024 (WORD), -1500.

They are kept as stored, since a reader can clip them and cannot bring them back; `air` writes -1024 in their place.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
from pydantic import Field

from data_curation.grid import AIR, Volume
from launch import settings

__all__ = ["Settings", "apply"]

SHARE = 1e-3  # the lowest value is padding if more of the voxels than this have it


class Settings(settings.Settings):
    """What becomes of padding below air."""

    padding: Literal["keep", "air"] = Field("keep", description=f"padding below {AIR}: as stored, or {AIR}")


def apply(volume: Volume, settings: Settings) -> Volume:
    """The volume with a note on its padding: the lowest value, and the range that its header declares, below air."""
    lowest = volume.values.low
    if lowest >= AIR:
        return volume
    ranges = {(lowest, lowest)}
    if volume.padding is not None and volume.padding[0] < AIR:
        declared = (round(volume.padding[0]), min(round(volume.padding[1]), AIR - 1))
        ranges = {declared} if declared[0] <= lowest <= declared[1] else ranges | {declared}
    for low, high in sorted(ranges):
        share = volume.values.between(max(low, -32768), high)
        if share <= SHARE:
            continue
        text = f"padding {low if low == high else f'{low} to {high}'} on {share:.1%} of the voxels"
        if settings.padding == "air":
            hu = np.where((volume.hu >= low) & (volume.hu <= high), np.int16(AIR), volume.hu)
            volume = replace(volume, hu=hu).noted(f"{text} replaced by {AIR}")
        else:
            volume = volume.noted(f"{text} kept")
    return volume
