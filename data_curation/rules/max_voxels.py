"""A header may promise more voxels than the machine has memory for, by damage or by design: nothing is read then.

The longest real CT seen in public sets has 2,572 slices of 512 x 512, 0.7 billion voxels; as int16 the limit is 4 GB.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from pydantic import Field

from data_curation.grid import VolumeError
from launch import settings

__all__ = ["MAX_VOXELS", "Settings", "fits"]

MAX_VOXELS = 2_000_000_000


class Settings(settings.Settings):
    """How large a volume may be."""

    max_voxels: int = Field(MAX_VOXELS, ge=1, description="most voxels of a volume, checked before any is read")


def fits(shape: Sequence[int], most: int = MAX_VOXELS) -> None:
    """Raises VolumeError `too_large` where a header promises more than `most` voxels."""
    if math.prod(shape) > most:
        text = f"{' x '.join(map(str, shape))} are {math.prod(shape):,} voxels, more than limits.max_voxels={most:,}"
        raise VolumeError("too_large", f"{text}: the header is damaged, or raise the limit and mind the memory")
