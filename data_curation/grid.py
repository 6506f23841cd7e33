"""Voxels on an affine grid, which every file format is turned into, and the `Volume` that is made of it.

A reader returns voxels as they are stored and the affine that places them in the patient; `to_lps` flips and
transposes them (views, no copy) onto [Z, Y, X] with z foot -> head, y front -> back, x patient right -> left.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_curation.histogram import Values, measure

__all__ = [
    "AIR",
    "OBLIQUE_DEGREES",
    "SAME_PLACE_MM",
    "Grid",
    "Volume",
    "VolumeError",
    "from_image",
    "outgrows",
    "resampled",
    "to_lps",
]

AIR = -1024  # HU of what lies outside the scan
OBLIQUE_DEGREES = 5.0  # above this angle to the patient's axes a volume is resampled, below it the axes are relabelled
SAME_PLACE_MM = 0.01  # slices nearer than this are at one position
MOST_GROWTH = 8  # a resampled volume may have this many times the voxels; beyond it the header must be wrong


class VolumeError(ValueError):
    """A file that does not hold a usable CT volume.

    `reason` is a short slug that can be counted; the text says what was found, with numbers, and what to do.
    """

    def __init__(self, reason: str, message: str) -> None:
        message = message.encode("utf-8", "backslashreplace").decode()  # file names need not be UTF-8
        super().__init__(message)
        self.reason = reason
        self.message = message

    def __reduce__(self) -> tuple[type[VolumeError], tuple[str, str]]:
        return type(self), (self.reason, self.message)


@dataclass(frozen=True)
class Grid:
    """Stored voxels and where they lie.

    `voxels` is [k, j, i] (any real dtype; [t, k, j, i] for several phases), `affine` [3, 4] maps (i, j, k, 1) to
    millimetres in LPS; its first three columns are orthogonal. `as_acquired` keeps a tilted stack from being turned:
    its slices are what was measured. `places` [k, 3] says where the first voxel of each slice truly lies, in mm in
    LPS, where that is known slice by slice, and `taken` [k] which of the files or frames of its stack it came from;
    `padding` is the range of HU that the header declares to be no image.
    """

    voxels: NDArray[Any]
    affine: NDArray[np.float64]
    as_acquired: bool = False
    notes: tuple[str, ...] = ()
    places: NDArray[np.float64] | None = None
    padding: tuple[float, float] | None = None
    taken: tuple[int, ...] = ()

    @property
    def spacing(self) -> NDArray[np.float64]:
        """mm between neighbours along i, j, k. Raises VolumeError `no_spacing` where an axis has no length."""
        spacing: NDArray[np.float64] = np.linalg.norm(self.affine[:, :3], axis=0)
        if not np.all(np.isfinite(self.affine)) or spacing.min() < 1e-6:
            text = f"voxel spacing {_text(spacing)} mm is not usable: write the true spacing into the header"
            raise VolumeError("no_spacing", text + " and try again")
        return spacing

    @property
    def order(self) -> tuple[int, ...]:
        """Which of i, j, k lies nearest to the patient's x, y and z."""
        cosines = np.abs(self.affine[:, :3] / self.spacing)
        return max(itertools.permutations(range(3)), key=lambda p: sum(cosines[row, p[row]] for row in range(3)))

    @property
    def angle(self) -> float:
        """Largest angle between an axis of the grid and the patient's axis that it is nearest to, in degrees."""
        cosines = np.abs(self.affine[:, :3] / self.spacing)
        nearest = min(cosines[row, axis] for row, axis in enumerate(self.order))
        return float(np.degrees(np.arccos(np.clip(nearest, 0.0, 1.0))))


@dataclass(frozen=True)
class Volume:
    """A CT volume: `hu` [Z, Y, X] in LPS (z foot -> head, y front -> back, x patient right -> left).

    `hu` may be a flipped view of what was read, and read-only; its slices lie one after the other in memory.
    `spacing` is (z, y, x) in mm; `source` is relative to the data set's root; `rounding` is the largest part of an HU
    lost by rounding a float volume; `notes` say what was repaired, or is unusual, in words. `padding` is the range of
    HU that the header declares to be no image.
    """

    hu: NDArray[np.int16]
    spacing: tuple[float, float, float]
    source: str
    rounding: float = 0.0
    notes: tuple[str, ...] = ()
    padding: tuple[float, float] | None = None

    @cached_property
    def values(self) -> Values:
        """How often each HU occurs; counted when it is first asked for."""
        return measure(self.hu)

    def noted(self, note: str) -> Volume:
        """The same voxels with one more note."""
        other = replace(self, notes=(*self.notes, note))
        if "values" in vars(self):
            vars(other)["values"] = self.values  # the voxels are the same, so are their counts
        return other


def from_image(image: Any) -> Grid:
    """The grid of a three-dimensional scalar SimpleITK image."""
    import SimpleITK as sitk

    directions = np.array(image.GetDirection(), np.float64).reshape(3, 3)
    affine = np.column_stack([directions * np.array(image.GetSpacing()), image.GetOrigin()])
    return Grid(sitk.GetArrayFromImage(image), affine)


def to_lps(grid: Grid) -> tuple[NDArray[Any], tuple[float, float, float], tuple[str, ...]]:
    """Voxels [Z, Y, X] in LPS as a view, spacing (z, y, x) in mm, and the grid's notes.

    Each axis of the grid is taken for the patient's axis that it is nearest to. Raises VolumeError `no_spacing`.
    """
    spacing, order = grid.spacing, grid.order
    # Array axis 2 - column: column i of the affine moves along the last array axis.
    voxels = grid.voxels.transpose([2 - order[row] for row in (2, 1, 0)])
    flips = tuple(slice(None, None, -1 if grid.affine[row, order[row]] < 0 else 1) for row in (2, 1, 0))
    z, y, x = (float(spacing[order[row]]) for row in (2, 1, 0))
    return voxels[flips], (z, y, x), grid.notes


def resampled(grid: Grid, affine: NDArray[np.float64], note: str) -> Grid:
    """The same body on an axis-aligned grid around all voxel centres, spacing kept per nearest axis, linear.

    `affine` [3, 4] is where the voxels truly lie; its columns may be oblique, and need not be orthogonal. Padding far
    below air is lifted to air first, or it would bleed into the skin; the new corners get the lowest value that is
    left, never less than air, so that a mask stays a mask. Raises VolumeError `spacing` for a grid of absurd size.
    """
    import SimpleITK as sitk

    size, scale, low = _upright(grid, affine)
    if size.prod() > MOST_GROWTH * grid.voxels.size:
        sides = _text(grid.spacing)
        text = f"voxels of {sides} mm, oblique, would fill a grid of {_text(size)} voxels: correct the spacing"
        raise VolumeError("spacing", text)
    voxels = np.maximum(grid.voxels.astype(np.float32), AIR)
    image = sitk.GetImageFromArray(voxels)  # its places are the indices, so that the transform may hold any affine
    inverse = np.linalg.inv(affine[:, :3])
    to_index = sitk.AffineTransform(inverse.ravel().tolist(), (-inverse @ affine[:, 3]).tolist())
    straight = sitk.Resample(
        image,
        size.astype(int).tolist(),
        to_index,
        sitk.sitkLinear,
        low.tolist(),
        scale.tolist(),
        np.eye(3).ravel().tolist(),
        float(voxels.min()),
        sitk.sitkFloat32,
    )
    placed = np.column_stack([np.diag(scale), low])
    array = sitk.GetArrayFromImage(straight)
    return replace(grid, voxels=array, affine=placed, as_acquired=False, places=None, notes=(*grid.notes, note))


def outgrows(grid: Grid) -> bool:
    """Would `resampled` refuse the grid? Of few slices that lie oblique, for one, nothing is left in an upright one."""
    return bool(_upright(grid, grid.affine)[0].prod() > MOST_GROWTH * grid.voxels.size)


def _upright(grid: Grid, affine: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
    """Size, spacing and origin (x, y, z) of the axis-aligned grid around all voxel centres."""
    corners = np.array(
        [affine @ (*corner, 1) for corner in itertools.product(*((0, n - 1) for n in grid.voxels.shape[::-1]))]
    )
    low, high = corners.min(0), corners.max(0)
    scale = grid.spacing[list(grid.order)]
    return np.floor((high - low) / scale + 1e-3) + 1, scale, low


def _text(spacing: NDArray[np.float64]) -> str:
    return " x ".join(f"{value:.3g}" for value in spacing)
