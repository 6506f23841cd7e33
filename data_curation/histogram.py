"""How often each HU value occurs in a volume: what the rules about values ask."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Values", "in_memory_order", "measure"]

SAMPLES = 4_000_000  # up to here every voxel is counted
ENOUGH = 2_000_000  # of a larger volume about this many, on a regular grid
ZERO = 32768  # place of the value 0 among the counts


@dataclass(frozen=True)
class Values:
    """Counts of each value: of every voxel, or of a regular sample of a large volume; `low` and `high` are exact."""

    counts: NDArray[np.int64]  # [65536], of -32768..32767
    low: int
    high: int

    def at(self, value: int) -> float:
        """Share of all voxels that have exactly this value."""
        return float(self.counts[value + ZERO]) / float(self.counts.sum())

    def between(self, low: int, high: int) -> float:
        """Share of all voxels from `low` to `high`, both included."""
        return float(self.counts[low + ZERO : high + ZERO + 1].sum()) / float(self.counts.sum())

    def share(self, low: int, high: int) -> float:
        """Share of voxels from `low` to `high`, both included, among those that are not far below air (padding)."""
        total = int(self.counts[-1100 + ZERO :].sum())
        return float(self.counts[max(low, -1100) + ZERO : high + ZERO + 1].sum()) / max(total, 1)

    def quantile(self, q: float) -> int:
        """Of the voxels that are not far below air."""
        sums = np.cumsum(self.counts[-1100 + ZERO :])
        return int(np.searchsorted(sums, q * sums[-1])) - 1100

    @property
    def distinct(self) -> int:
        """Number of different values."""
        return int(np.count_nonzero(self.counts))


def measure(hu: NDArray[np.int16]) -> Values:
    """The values of hu [Z, Y, X]."""
    hu = in_memory_order(hu)
    seen = hu
    if hu.size > SAMPLES:
        seen = hu[:, ::2, ::2]
        seen = seen[:: max(1, min(seen.size // ENOUGH, len(seen) // 32))]
    counts = np.zeros(65536, np.int64)
    some = max(1, 65536 // max(1, seen[0].size)) if len(seen) else 1
    for start in range(0, len(seen), some):  # in pieces, since bincount makes 64-bit integers of its input
        counts += np.bincount(seen[start : start + some].ravel().view(np.uint16), minlength=65536)
    low = min(int(plane.min()) for plane in hu)
    high = max(int(plane.max()) for plane in hu)
    return Values(np.roll(counts, ZERO), low, high)


def in_memory_order(hu: NDArray[np.int16]) -> NDArray[np.int16]:
    """The same voxels as a view that runs through memory forwards: for what does not depend on their order."""
    turned = hu[tuple(slice(None, None, -1 if stride < 0 else 1) for stride in hu.strides)]
    return turned.transpose(sorted(range(turned.ndim), key=lambda axis: -turned.strides[axis]))
