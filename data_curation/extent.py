"""How many voxels a header promises, and where it puts them: what every format must answer before a voxel is read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from data_curation.grid import VolumeError
from data_curation.rules.max_voxels import fits

__all__ = ["SHEAR_DEGREES", "orthogonal", "place", "volume_shape"]

SHEAR_DEGREES = 0.5
_FARTHEST = 1e7  # mm


def volume_shape(sizes: Sequence[int], max_voxels: int, fewest: int = 2) -> tuple[int, int, int]:
    """(i, j, k); trailing axes of length 1 are dropped. With `fewest` 1 one slice is a volume too.

    Raises VolumeError: unreadable, 4d, vector, single_slice, too_large.
    """
    text = " x ".join(map(str, sizes))
    if not sizes or min(sizes) < 1 or max(sizes) > 2**40:
        raise VolumeError("unreadable", f"the header is damaged: it states {text or 'no'} voxels")
    shape = list(sizes)
    while len(shape) > 3 and shape[-1] == 1:
        shape.pop()
    if len(shape) == 2 and fewest < 2:
        shape.append(1)
    if len(shape) > 3:
        reason = "4d" if shape[3] > 1 else "vector"
        what = "a series over time or phases" if reason == "4d" else "a vector image (a field or overlapping masks)"
        raise VolumeError(reason, f"{text} voxels are {what}: write the wanted volume as a file of its own")
    if len(shape) < 3 or sum(n > 1 for n in shape) < (3 if fewest > 1 else 2):
        raise VolumeError("single_slice", f"{text} voxels are one slice, not a volume: leave it out")
    fits(shape, max_voxels)
    return shape[0], shape[1], shape[2]


def place(affine: NDArray[np.float64], slices: int) -> tuple[NDArray[np.float64], tuple[str, ...]]:
    """An affine [3, 4] in LPS mm as a `Grid` takes it, and a note where it was sheared: such slices stay as stored.

    One slice whose third axis has no length gets 1 mm along its normal. Raises VolumeError `no_spacing` where it is no
    place in a patient.
    """
    if not np.isfinite(affine).all() or np.abs(affine).max() > _FARTHEST:
        text = f"the header places voxels at {np.array2string(affine.ravel(), precision=3, max_line_width=10**6)} mm"
        raise VolumeError("no_spacing", f"{text}: write the true spacing and origin into the header and try again")
    if slices == 1 and not affine[:, 2].any() and (area := np.linalg.norm(np.cross(affine[:, 0], affine[:, 1]))):
        affine = affine.copy()
        affine[:, 2] = np.cross(affine[:, 0], affine[:, 1]) / area
    straight, shear = orthogonal(affine)
    return straight, (f"sheared by {shear:.1f} degrees: slices kept as stored",) if shear > SHEAR_DEGREES else ()


def orthogonal(affine: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """The affine with its second and third axis made orthogonal, and the largest angle by which they were not.

    A gantry tilt shears the stack axis against the slices; its projection on the slices' normal is the true distance.
    """
    first, second, third = affine[:, 0], affine[:, 1], affine[:, 2]
    lengths = np.linalg.norm(affine[:, :3], axis=0)
    if lengths.min() < 1e-9 or not np.all(np.isfinite(affine)):
        return affine, 0.0
    unit = affine[:, :3] / lengths
    cosines = np.abs([unit[:, 0] @ unit[:, 1], unit[:, 0] @ unit[:, 2], unit[:, 1] @ unit[:, 2]])
    shear = float(np.degrees(np.arcsin(np.clip(cosines.max(), 0.0, 1.0))))
    if shear <= 1e-3:
        return affine, shear
    second = second - (second @ unit[:, 0]) * unit[:, 0]
    normal = np.cross(first, second)
    normal /= max(float(np.linalg.norm(normal)), 1e-12)
    return np.column_stack([first, second, (third @ normal) * normal, affine[:, 3]]), shear
