"""CT cut to a display window and saved: many voxels have exactly the lowest or the highest value.

Clipping at -1000 or -1024, or above 500 HU, is common in public sets and loses little: that is kept.
"""

from __future__ import annotations

from data_curation.grid import Volume, VolumeError

__all__ = ["apply"]


def apply(volume: Volume, _: object) -> Volume:
    """The volume; VolumeError `windowed`."""
    values = volume.values
    at_low, at_high = (values.at(end) for end in (values.low, values.high))
    if (-900 < values.low < 0 and at_low > 0.05) or (values.low < 0 and values.high <= 500 and at_high > 0.005):
        text = f"{at_low:.1%} of the voxels are exactly {values.low} and {at_high:.1%} exactly {values.high} HU"
        raise VolumeError("windowed", f"{text}: cut to a display window, which cannot be undone; convert the original")
    return volume
