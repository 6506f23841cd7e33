"""NIfTI, NRRD, MetaImage or a DICOM series -> `Volume`: integer HU on the patient's axes, with what was repaired.

`find` lists everything below a folder that could be an image, `read` makes one of them a volume or says why not. In
two steps: `load` returns the voxels as stored, `of_grid` applies the rules, turns them and makes them whole HU.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_curation import dicom, metaimage, nifti, nrrd
from data_curation.finding import Found, find
from data_curation.grid import Grid, Volume, VolumeError, to_lps
from data_curation.rules import OF_GRIDS, OF_VOLUMES, Limits, floats

__all__ = ["Found", "Volume", "VolumeError", "find", "load", "of_grid", "read"]

READERS = MappingProxyType({"nifti": nifti.load, "nrrd": nrrd.load, "metaimage": metaimage.load})


def read(found: Found, limits: Limits = Limits()) -> Volume:  # noqa: B008  (frozen)
    """The volume, LPS, as int16 HU. Raises VolumeError, its `reason` a slug, its text with numbers and a remedy."""
    return of_grid(load(found, limits), found.source or found.path.name, limits)


def load(found: Found, limits: Limits = Limits()) -> Grid:  # noqa: B008
    """The voxels as they are stored, and where they lie. Raises VolumeError."""
    if found.reason and not (found.reason == "single_slice" and limits.min_slices < 2):
        raise VolumeError(found.reason, found.detail)
    try:
        return _load(found, limits)
    except OSError as error:
        raise VolumeError("unreadable", f"{error.strerror or error}: allow reading the file") from None


def of_grid(grid: Grid, source: str, limits: Limits = Limits()) -> Volume:  # noqa: B008
    """The voxels by the rules of grids, in LPS, as int16 HU, by the rules of volumes. Raises VolumeError."""
    for shape_rule in OF_GRIDS:
        grid = shape_rule(grid, limits)
    voxels, spacing, notes = to_lps(grid)
    hu, rounding, more = _to_hu(voxels, limits)
    volume = Volume(hu, spacing, source, rounding, (*notes, *more), grid.padding)
    for rule in OF_VOLUMES:
        volume = rule(volume, limits)
    return volume


def _load(found: Found, limits: Limits) -> Grid:
    if found.kind == "dicom":
        return dicom.load(found.files, found.frames, limits.phases == "first", limits.max_voxels, limits.min_slices)
    return READERS[found.kind](found.path, limits.max_voxels, limits.min_slices)


def _to_hu(voxels: NDArray[Any], limits: Limits) -> tuple[NDArray[np.int16], float, list[str]]:
    """int16 with whole slices one after the other, the largest rounding, and notes; int16 itself is not copied."""
    if voxels.dtype == np.int16 and _by_slices(voxels):
        return voxels, 0.0, []
    hu = np.empty(voxels.shape, np.int16)
    axes = sorted(range(3), key=lambda axis: -abs(voxels.strides[axis]))
    source, target = voxels.transpose(axes), hu.transpose(axes)
    some = 1 if _by_slices(voxels) else 32  # turned over in blocks that the processor's cache holds
    low, high, rounding = np.inf, -np.inf, 0.0
    bad = outside = 0
    for start in range(0, len(source), some):  # piece by piece: a float volume is never held twice
        plane, kept = source[start : start + some], target[start : start + some]
        ends = plane.min(), plane.max()
        if plane.dtype.kind == "f" and not np.isfinite(ends).all():
            bad += int(np.count_nonzero(~np.isfinite(plane)))
            continue
        low, high = min(low, ends[0]), max(high, ends[1])
        values = plane
        if plane.dtype.kind == "f":
            values = np.rint(plane)
            rounding = max(rounding, float(np.abs(plane - values).max()))
        if ends[0] < -32768 or ends[1] > 32767:
            outside += int(np.count_nonzero((values < -32768) | (values > 32767)))
            values = np.clip(values, -32768, 32767)
        kept[...] = values
    floats.judge(float(low), float(high), rounding, bad, voxels.size, limits)
    notes = []
    if rounding > floats.WHOLE:
        notes.append(f"float HU rounded to whole numbers, by at most {rounding:.2f}")
    if outside:
        notes.append(f"{outside:,} voxels from {low:.6g} to {high:.6g} cut to -32768..32767")
    return hu, rounding, notes


def _by_slices(voxels: NDArray[Any]) -> bool:
    """Is an axial slice one piece of memory? Else each would be gathered from all over the volume, again and again."""
    z, y, x = (abs(stride) for stride in voxels.strides)
    return z >= max(y, x) or voxels.shape[0] == 1
