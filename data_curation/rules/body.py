"""Air, or noise in air, is no scan of a body. In the real cases of this rule the pixels were replaced by noise."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from data_curation.grid import Volume, VolumeError
from launch import settings

__all__ = ["Settings", "apply"]


class Settings(settings.Settings):
    """How much body is enough."""

    min_body: float = Field(0.01, ge=0, le=1, description="least share above -500 HU in the slice that shows most body")


def apply(volume: Volume, settings: Settings) -> Volume:
    """The volume; VolumeError `no_body`."""
    best, depth = 0.0, len(volume.hu)
    for z in sorted(range(depth), key=lambda z: abs(z - depth // 2)):  # one slice is mostly enough, if not an end
        plane = volume.hu[z]
        best = max(best, float(np.count_nonzero(plane > -500)) / plane.size)
        if best >= settings.min_body:
            return volume
    text = f"at most {best:.2%} of a slice is above -500 HU, less than min_body={settings.min_body:g}"
    raise VolumeError("no_body", f"{text} ({volume.values.low} to {volume.values.high} HU): air or noise, leave it out")
