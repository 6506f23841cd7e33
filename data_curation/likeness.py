"""What a slice looks like, in a form that survives repackaging: a thumbnail and a code of 64 bits.

Hashes of pixels find plain copies. A copy that was turned, resampled or windowed has other pixels but nearly the same
thumbnail of its body. `sign` makes the thumbnail and the code; data_curation.likeness_match finds equal scans by both.

The thumbnail shows the box of the body, so table, air and field of view do not count, and has 32 x 32 cells whatever
the spacing, so a wrong spacing does not count either. It is clipped to [-150, 250] HU: over the scans and phantoms that
were measured this window kept different patients furthest apart (highest correlation of two slices of different
patients 0.92, against 0.97 with [-1000, 1000]), and a copy clipped to any wider range has the same thumbnail as long
as the box still tells air from body (data_curation.box: below -500 HU). The
code holds the signs of its low-frequency cosine coefficients, after turning it into a position that the picture itself
defines: perceptual hashing (Zauner, 2010), made to ignore flips and quarter turns.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

__all__ = ["CODE_BITS", "HIGH_HU", "LOW_HU", "SIDE", "Sign", "shown", "sign"]

SIDE = 32  # cells of a thumbnail along each axis
LOW_HU, HIGH_HU = -150, 250
CODE_BITS = 63  # the highest of the 64 says that there is a code
DOUBTS = 4
SURE_BITS = 48  # doubts are marked among the leading bits, the ones that are compared
LEAST_PIXELS = 8  # a smaller box shows nothing
LEAST_CONTRAST = 8.0  # standard deviation of the grey values, 0 to 255, below which a thumbnail says nothing
_WAVES = 8
_SCALE = 2.0**11


@dataclass(frozen=True)
class Sign:
    """`thumb` [32, 32] is a grey picture, 0 at -150 HU and 255 at 250. `code` is 0 where the slice says nothing.

    The bits of the code run from low to high frequency, most significant first. `doubt` marks those four of the first
    48 that a small change would turn over.
    """

    thumb: NDArray[np.uint8]
    code: int
    doubt: int


def sign(hu: NDArray[np.int16]) -> Sign:
    """The sign of one slice, int16 [Y, X] of any strides, already cropped to what it has `shown`.

    The same for all eight flips and quarter turns but for rounding, except that the thumbnail turns with the slice.
    """
    if min(hu.shape) < LEAST_PIXELS:
        return Sign(np.zeros((SIDE, SIDE), np.uint8), 0, 0)
    thumb = np.rint((_cells(hu) - LOW_HU) * np.float32(255 / (HIGH_HU - LOW_HU))).astype(np.uint8)
    grey = thumb.ravel().astype(np.float64)
    if grey @ grey / grey.size - (grey.sum() / grey.size) ** 2 < LEAST_CONTRAST**2:
        return Sign(thumb, 0, 0)
    return Sign(thumb, *_code(thumb))


def shown(hu: NDArray[np.int16]) -> NDArray[np.int16]:
    """The part [y, x] of a slice that counts, of hu [Y, X] already cropped by data_curation.box: rows and columns that
    are body for at least a 25th of their length, so that a table top or a margin of air does not shift the picture.
    """
    thin = max(1, min(hu.shape) // 128)  # the edge is sought in every row, but not over every column of it
    return hu[_filled(hu[:, ::thin], 1), _filled(hu[::thin], 0)]


def _filled(hu: NDArray[np.int16], along: int) -> slice:
    """From the first to the last row (along columns, 1) or column (along rows, 0) that is body for a 25th of it."""
    found = np.flatnonzero(np.add.reduce(hu > LOW_HU, axis=along, dtype=np.int32) > 0.04 * hu.shape[along]).tolist()
    return slice(found[0], found[-1] + 1) if found else slice(0, 0)


def _cells(hu: NDArray[np.int16]) -> NDArray[np.float32]:
    """Means of the clipped HU over 32 x 32 equal cells, whose edges may lie inside pixels."""
    for axis in (0, 1):
        if hu.shape[axis] < SIDE:
            hu = np.repeat(hu, -(-SIDE // hu.shape[axis]), axis)
    clipped = np.clip(hu, LOW_HU, HIGH_HU)
    first, part = _edges(len(hu))
    # A band's sum mostly fits 16 bits, and is then made in half the time.
    kind = np.int16 if len(hu) < SIDE * (32767 // HIGH_HU - 1) else np.int32
    rows = np.empty((SIDE, hu.shape[1]), np.float32)
    bounds = first.tolist()
    for band in range(SIDE):
        rows[band] = np.add.reduce(clipped[bounds[band] : bounds[band + 1]], axis=0, dtype=kind)
    shared = clipped[np.minimum(first, len(hu) - 1)] * part[:, None]
    rows = rows - shared[:-1] + shared[1:]
    first, part = _edges(hu.shape[1])
    cells = np.add.reduceat(rows, first[:-1], axis=1)
    shared = rows[:, np.minimum(first, hu.shape[1] - 1)] * part
    cells = (cells - shared[:, :-1] + shared[:, 1:]) * np.float32(SIDE * SIDE / hu.size)
    return np.asarray(np.clip(cells, LOW_HU, HIGH_HU))


def _edges(n: int) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """The pixels in which the 33 edges of 32 equal parts of n pixels lie, and how far inside each."""
    edges = np.arange(SIDE + 1) * (n / SIDE)
    first = edges.astype(np.intp)
    return first, (edges - first).astype(np.float32)


@lru_cache(maxsize=1)
def _cosines() -> NDArray[np.float64]:
    """[waves, 32] of whole numbers: the products below are then exact, and the code the same on every machine."""
    waves = np.arange(_WAVES)[:, None]
    lengths = np.where(waves == 0, 0.5**0.5, 1.0)
    return np.rint(_SCALE * lengths * np.cos(np.pi * waves * (np.arange(SIDE) + 0.5) / SIDE))


@lru_cache(maxsize=1)
def _order() -> tuple[NDArray[np.intp], NDArray[np.uint64], NDArray[np.bool_]]:
    """Of the 64 coefficients: low to high frequency; their bits; which are odd in rows and even in columns."""
    row, column = np.divmod(np.arange(_WAVES**2), _WAVES)
    order = np.lexsort((row, row**2 + column**2))[1:]
    bits = np.uint64(1) << np.arange(CODE_BITS, dtype=np.uint64)[::-1]
    return order, bits, (row % 2 == 1) & (column % 2 == 0)


def _code(thumb: NDArray[np.uint8]) -> tuple[int, int]:
    """The code of a thumbnail and its doubtful bits."""
    cosines = _cosines()
    order, bits, upright = _order()
    waves = cosines @ thumb @ cosines.T  # [8, 8]
    # Bodies are less alike front to back than left to right: that axis is made the rows.
    if np.square(waves.ravel()[upright]).sum() < np.square(waves.T.ravel()[upright]).sum():
        waves = waves.T
    if waves[1, 0] < 0:
        waves = waves * np.where(np.arange(_WAVES) % 2, -1, 1)[:, None]
    if waves[0, 1] < 0:
        waves = waves * np.where(np.arange(_WAVES) % 2, -1, 1)
    values = waves.ravel()[order]
    code = int(bits[values > 0].sum(dtype=np.uint64)) | 1 << CODE_BITS
    weak = np.argpartition(np.abs(values[:SURE_BITS]), DOUBTS)[:DOUBTS]
    return code, int(bits[weak].sum(dtype=np.uint64))
