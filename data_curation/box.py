"""The part of a slice that shows the patient, so that air and couch are not stored.

A third of the pixels of a CT slice lie outside it. The rule sees the slice in blocks of about 3 mm: a block is body
where its samples, and those of its four neighbours, all exceed -500 HU. That passes over the shells of couches, cables
and noise. Every group of at least `PARTS` such blocks counts, so that arms, hands and feet beside the trunk are kept.
What lies outside the box is measured on every slice (`outside_max`, `outside_body` of the index).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["BODY_HU", "Box", "body_box", "outside"]

BODY_HU = -500  # above: soft tissue, bone, fat, blood; below: air and most of the lung
BLOCK_MM = 3.0
PARTS = 4  # blocks that are left of a part: about 15 mm across, a finger


@dataclass(frozen=True)
class Box:
    """Rows y to y + height and columns x to x + width of a slice."""

    y: int
    x: int
    height: int
    width: int

    def of(self, plane: NDArray[np.int16]) -> NDArray[np.int16]:
        """The pixels [height, width] of a slice [Y, X], a view."""
        return plane[self.y : self.y + self.height, self.x : self.x + self.width]


def body_box(plane: NDArray[np.int16], spacing: tuple[float, float], margin_mm: float) -> tuple[Box, Box]:
    """The box around all parts of the patient in a slice [Y, X] of `spacing` (y, x) mm, and `margin_mm` around it;
    and the box around the parts that are not small against the largest one, without a margin.

    The whole slice where no part is found.
    """
    from scipy import ndimage

    height, width = plane.shape
    steps = [min(4, n, max(1, round(BLOCK_MM / side))) for n, side in zip(plane.shape, spacing, strict=True)]
    sampled = _sampled(plane, *steps)
    solid = np.zeros((sampled.shape[0] + 2, sampled.shape[1] + 2), bool)
    np.greater(sampled, BODY_HU, out=solid[1:-1, 1:-1])
    core = solid[1:-1, 1:-1] & solid[:-2, 1:-1] & solid[2:, 1:-1] & solid[1:-1, :-2] & solid[1:-1, 2:]
    labels, _ = ndimage.label(core)
    sizes = np.bincount(labels[core])
    if sizes.size == 0 or sizes.max() < PARTS:
        return Box(0, 0, height, width), Box(0, 0, height, width)
    # A block at the edge of a part was worn off, and may have one sample outside it.
    margins = [math.ceil(margin_mm / side) + 2 * step - 1 for step, side in zip(steps, spacing, strict=True)]
    places = ndimage.find_objects(labels)
    every, large = (np.flatnonzero(sizes >= least) - 1 for least in (PARTS, max(PARTS, sizes.max() / 5)))
    return (
        _around([places[part] for part in every.tolist()], steps, margins, plane.shape),
        _around([places[part] for part in large.tolist()], steps, steps, plane.shape),
    )


def _around(
    parts: Sequence[tuple[slice, ...]], steps: Sequence[int], margins: Sequence[int], shape: tuple[int, ...]
) -> Box:
    ends = []
    for axis, (step, margin, whole) in enumerate(zip(steps, margins, shape, strict=True)):
        first, last = min(part[axis].start for part in parts), max(part[axis].stop for part in parts)
        ends.append((max(0, first * step - margin), min(whole, last * step + margin)))
    (top, bottom), (left, right) = ends
    return Box(top, left, bottom - top, right - left)


def _sampled(plane: NDArray[np.int16], down: int, across: int) -> NDArray[np.int16]:
    """The least of the four samples of each block; a rest at the far edges belongs to no block."""
    height, width = (max(n // step, 1) * step for n, step in zip(plane.shape, (down, across), strict=True))
    rows = np.minimum(plane[:height:down], plane[down // 2 : height : down])
    return np.minimum(rows[:, :width:across], rows[:, across // 2 : width : across])


def outside(plane: NDArray[np.int16], box: Box) -> tuple[int, int]:
    """Highest HU outside the box and how many pixels there exceed -500 HU; (-32768, 0) where nothing lies outside."""
    bottom, right = box.y + box.height, box.x + box.width
    middle = plane[box.y : bottom]
    strips = [part for part in (plane[: box.y], plane[bottom:], middle[:, : box.x], middle[:, right:]) if part.size]
    highest = max((int(part.max()) for part in strips), default=-32768)
    if highest <= BODY_HU:
        return highest, 0
    return highest, sum(int(np.count_nonzero(part > BODY_HU)) for part in strips)
