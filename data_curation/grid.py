"""Voxels on an affine grid: what every file format is turned into before it becomes a `Volume`.

A reader returns voxels as they are stored and the affine that places them in the patient; `to_lps` then flips and
transposes them (views, no copy) onto [Z, Y, X] with z foot -> head, y front -> back, x patient right -> left.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["AIR", "OBLIQUE_DEGREES", "Grid", "VolumeError", "from_image", "to_lps"]

AIR = -1024  # HU of what lies outside the scan
OBLIQUE_DEGREES = 5.0  # above this angle to the patient's axes a volume is resampled, below it the axes are relabelled
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

    `voxels` is [k, j, i] (any real dtype), `affine` [3, 4] maps (i, j, k, 1) to millimetres in LPS; its first three
    columns are orthogonal. `as_acquired` keeps a tilted stack from being resampled: its slices are what was measured.
    """

    voxels: NDArray[Any]
    affine: NDArray[np.float64]
    as_acquired: bool = False
    notes: tuple[str, ...] = ()


def from_image(image: Any) -> Grid:
    """The grid of a three-dimensional scalar SimpleITK image."""
    import SimpleITK as sitk

    directions = np.array(image.GetDirection(), np.float64).reshape(3, 3)
    affine = np.column_stack([directions * np.array(image.GetSpacing()), image.GetOrigin()])
    return Grid(sitk.GetArrayFromImage(image), affine)


def to_lps(grid: Grid) -> tuple[NDArray[Any], tuple[float, float, float], tuple[str, ...]]:
    """Voxels [Z, Y, X] in LPS, spacing (z, y, x) in mm, and notes on what had to be done.

    Raises VolumeError `no_spacing` where an axis has no length.
    """
    axes = grid.affine[:, :3]
    spacing = np.linalg.norm(axes, axis=0)
    if not np.all(np.isfinite(grid.affine)) or spacing.min() < 1e-6:
        raise VolumeError(
            "no_spacing",
            f"voxel spacing {_text(spacing)} mm is not usable: write the true spacing into the header and try again",
        )
    cosines = axes / spacing
    order = max(itertools.permutations(range(3)), key=lambda p: sum(abs(cosines[row, p[row]]) for row in range(3)))
    nearest = np.array([cosines[row, order[row]] for row in range(3)])  # x, y, z
    angle = float(np.degrees(np.arccos(np.clip(np.abs(nearest).min(), 0.0, 1.0))))
    if angle > OBLIQUE_DEGREES and not grid.as_acquired:
        straight = _resampled(grid, cosines, spacing, order)
        note = f"oblique by {angle:.1f} degrees: resampled onto the patient's axes, linear"
        voxels, scale, notes = to_lps(straight)
        return voxels, scale, (*grid.notes, note, *notes)
    # Array axis 2 - column: column i of the affine moves along the last array axis.
    voxels = grid.voxels.transpose([2 - order[row] for row in (2, 1, 0)])
    flips = tuple(slice(None, None, -1 if nearest[row] < 0 else 1) for row in (2, 1, 0))
    z, y, x = (float(spacing[order[row]]) for row in (2, 1, 0))
    return voxels[flips], (z, y, x), grid.notes


def _resampled(grid: Grid, cosines: NDArray[np.float64], spacing: NDArray[np.float64], order: Any) -> Grid:
    """The same body on an axis-aligned grid around all voxel centres, spacing kept per nearest axis, linear.

    Padding far below air is lifted to air first, or it would bleed into the skin; the new corners get the lowest
    value that is left, never less than air, so that a mask stays a mask.
    """
    import SimpleITK as sitk

    voxels = np.maximum(grid.voxels.astype(np.float32), AIR)
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(grid.affine[:, 3].tolist())
    image.SetDirection(cosines.ravel().tolist())
    ends = [(0, n - 1) for n in voxels.shape[::-1]]
    corners = np.array([grid.affine @ (*corner, 1) for corner in itertools.product(*ends)])
    low, high = corners.min(0), corners.max(0)
    scale = np.array([spacing[order[row]] for row in range(3)])
    size = np.floor((high - low) / scale + 1e-3) + 1
    if size.prod() > MOST_GROWTH * voxels.size:
        text = f"voxels of {_text(spacing)} mm, oblique, would fill a grid of {_text(size)} voxels: correct the spacing"
        raise VolumeError("spacing", text)
    straight = sitk.Resample(
        image,
        size.astype(int).tolist(),
        sitk.Transform(3, sitk.sitkIdentity),
        sitk.sitkLinear,
        low.tolist(),
        scale.tolist(),
        np.eye(3).ravel().tolist(),
        float(voxels.min()),
        sitk.sitkFloat32,
    )
    affine = np.column_stack([np.diag(scale), low])
    return replace(grid, voxels=sitk.GetArrayFromImage(straight), affine=affine, notes=())


def _text(spacing: NDArray[np.float64]) -> str:
    return " x ".join(f"{value:.3g}" for value in spacing)
