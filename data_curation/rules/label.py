"""Label maps and masks: few whole values from -1 up, and neighbours that are alike. Also the volume of one value.

In an 8-bit picture, which has as few values, neighbours differ.
"""

from __future__ import annotations

import numpy as np

from data_curation.grid import Volume, VolumeError

__all__ = ["apply"]

MOST_LABELS = 1024
ALIKE = 0.5  # share of the labelled voxels that equal their neighbour


def apply(volume: Volume, _: object) -> Volume:
    """The volume; VolumeError `constant` or `label`."""
    values = volume.values
    if values.low == values.high:
        raise VolumeError("constant", f"every voxel is {values.low}: the file is empty, leave it out")
    if values.low < -1 or values.distinct > MOST_LABELS:
        return volume
    filled = same = 0
    for plane in volume.hu:
        inside = plane[:, 1:] > 0
        filled += int(np.count_nonzero(inside))
        same += int(np.count_nonzero(inside & (plane[:, 1:] == plane[:, :-1])))
    alike = same / max(filled, 1)
    if values.distinct <= 2 or alike >= ALIKE:
        text = f"{values.distinct} whole values from {values.low} to {values.high}, {alike:.0%} of the voxels equal to"
        raise VolumeError("label", f"{text} their neighbour: a label map or mask, not an image")
    return volume
