"""Where the voxels of files lie: label maps are read, brought to an image's LPS order, written on the image's own grid.

Arrays are [z, y, x] as files have them (k, j, i); affines take (i, j, k) to mm in LPS.
"""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_curation import metaimage, nifti, nrrd
from data_curation.aside import aside
from data_curation.extent import SHEAR_DEGREES, orthogonal
from data_curation.finding import KINDS, parts
from data_curation.grid import OBLIQUE_DEGREES, Grid, outgrows
from data_curation.rules import Limits, label, lost_offset, not_ct, windowed
from data_curation.volumes import Found, Volume, VolumeError, load, of_grid
from downstream.cases import CaseError, file_ending
from downstream.label_headers import label_header, sform_header, with_voxels
from downstream.nifti_file import write_nifti

__all__ = [
    "HARDLY_CT",
    "LIMITS",
    "LabelMap",
    "Place",
    "Scan",
    "align",
    "difference",
    "found_at",
    "from_lps",
    "kept_thin",
    "loaded",
    "lps",
    "place_of",
    "planes",
    "read_labelmap",
    "read_scan",
    "scan_of",
    "to_lps",
    "write_labelmap",
]


HARDLY_CT = "hardly CT in HU"
LIMITS = Limits(min_slices=1, phases="first", max_gap=float("inf"))  # what is read, though no corpus would take it


@dataclass(frozen=True)
class Place:
    """A grid without its voxels: sizes (i, j, k) and the affine [3, 4] to mm in LPS."""

    size: tuple[int, int, int]
    affine: NDArray[np.float64]

    @property
    def spacing(self) -> tuple[float, float, float]:
        """mm between neighbours along i, j, k."""
        i, j, k = np.linalg.norm(self.affine[:, :3], axis=0).tolist()
        return i, j, k

    def position(self, index: NDArray[np.float64]) -> NDArray[np.float64]:
        """Index (i, j, k) [..., 3] -> mm [..., 3]."""
        return index @ self.affine[:, :3].T + self.affine[:, 3]

    def index(self, position: NDArray[np.float64]) -> NDArray[np.float64]:
        """mm [..., 3] -> fractional index (i, j, k)."""
        return (position - self.affine[:, 3]) @ np.linalg.inv(self.affine[:, :3]).T

    @property
    def corners(self) -> NDArray[np.float64]:
        """Positions of the eight outermost voxels [8, 3], mm."""
        return self.position(np.array(list(itertools.product(*((0.0, n - 1.0) for n in self.size)))))


@dataclass(frozen=True)
class Scan:
    """A CT volume in LPS order, its file's grid `own`, and the grid `place` on which `volume.hu` lies.

    Of a DICOM series also `places` [k, 3], where each slice of `own` lies, mm in LPS, and `taken` [k], which of the
    series' files or frames it is.
    """

    volume: Volume
    own: Place
    place: Place
    places: NDArray[np.float64] | None = None
    taken: tuple[int, ...] = ()


@dataclass(frozen=True)
class LabelMap:
    """uint8 [z, y, x] in the file's own order, and its grid."""

    array: NDArray[np.uint8]
    place: Place


def difference(a: Place, b: Place) -> str:
    """What differs between two grids, "" when they are one: positions within a hundredth of a voxel, at all corners."""
    if a.size != b.size:
        return f"size {a.size} and {b.size}"
    off = np.abs(a.corners - b.corners).max()
    if off <= 0.01 * min(a.spacing):
        return ""
    for name, one, other in (("spacing", a.spacing, b.spacing), ("origin", a.affine[:, 3], b.affine[:, 3])):
        rounded = [np.round(np.asarray(values), 3).tolist() for values in (one, other)]
        if rounded[0] != rounded[1]:
            return f"{name} {rounded[0]} and {rounded[1]} mm"
    return f"directions: positions differ by up to {off:.3g} mm"


def _order(place: Place) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """For each LPS axis the index axis nearest to it, and whether that runs backwards: the reader's own choice."""
    best = Grid(np.empty((0, 0, 0), np.uint8), place.affine).order
    return best, tuple(bool(place.affine[row, best[row]] < 0) for row in range(3))


def lps(place: Place) -> Place:
    """The same voxels counted along the axes nearest to L, P and S; nothing is resampled, oblique stays oblique."""
    order, back = _order(place)
    first = np.zeros(3)
    for axis, reverse in zip(order, back, strict=True):
        first[axis] = place.size[axis] - 1 if reverse else 0
    signs = np.where(back, -1.0, 1.0)
    affine = np.column_stack([place.affine[:, list(order)] * signs, place.position(first)])
    return Place((place.size[order[0]], place.size[order[1]], place.size[order[2]]), affine)


def to_lps(array: NDArray[np.uint8], place: Place) -> NDArray[np.uint8]:
    """An array [z, y, x] in the order of `place` -> in the order of `lps(place)`; a view."""
    order, back = _order(place)
    return array.transpose([2 - axis for axis in reversed(order)])[_flips(back)]


def from_lps(array: NDArray[np.uint8], place: Place) -> NDArray[np.uint8]:
    """Inverse of `to_lps`."""
    order, back = _order(place)
    return array[_flips(back)].transpose(np.argsort([2 - axis for axis in reversed(order)]))


def _flips(back: tuple[bool, ...]) -> tuple[slice, ...]:
    return tuple(slice(None, None, -1 if reverse else 1) for reverse in reversed(back))


def align(array: NDArray[np.uint8], own: Place, target: Place, what: str, least: float = 0.5) -> NDArray[np.uint8]:
    """A label map brought onto another grid by position, nearest voxel; outside of `own` is background.

    CaseError if less than `least` of the foreground, or none of the volume, lies within the target: two scans, surely.
    """
    if not difference(own, target):
        return array
    found = np.zeros(target.size[::-1], dtype=np.uint8)
    limit = np.array(own.size)
    touched = False
    for z, fractional in planes(own, target):
        at = np.floor(fractional + 0.5 - 1e-6).astype(np.int64)
        inside = ((at >= 0) & (at < limit)).all(-1)
        if inside.any():
            touched = True
            i, j, k = at[inside].T
            found[z][inside] = array[k, j, i]
    if not touched:
        raise CaseError(
            f"{what}: label (around {_middle(own)} mm) and image ({_middle(target)}) do not overlap; pair them again"
        )
    volume = np.prod(own.spacing) * np.count_nonzero(array), np.prod(target.spacing) * np.count_nonzero(found)
    if volume[1] < least * volume[0]:
        raise CaseError(
            f"{what}: only {volume[1] / volume[0]:.0%} of the label's foreground lies within the image; pair them again"
        )
    return found


def planes(own: Place, target: Place) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """For each slice of the target its number, and where its voxels lie on `own`: fractional (i, j, k) [Y, X, 3]."""
    x, y = np.meshgrid(np.arange(target.size[0]), np.arange(target.size[1]), indexing="xy")
    plane = np.stack([x, y, np.zeros_like(x)], axis=-1).astype(np.float64)
    for z in range(target.size[2]):
        plane[..., 2] = z
        yield z, own.index(target.position(plane))


def _middle(place: Place) -> str:
    return ", ".join(f"{value:.0f}" for value in place.corners.mean(0))


def read_labelmap(path: Path) -> LabelMap:
    """A label file with whole numbers 0 to 255; CaseError otherwise, also for a file that is cut short."""
    try:
        grid = _load(found_at(path))
    except (VolumeError, OSError) as fault:
        raise CaseError(f"{path}: {fault}") from None
    array = grid.voxels
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise CaseError(f"{path}: some label values are NaN or infinite; whole numbers from 0 to 255 are needed")
    low, high = array.min(), array.max()
    if low < 0 or high > 255:
        raise CaseError(f"{path}: label values run from {low} to {high}; whole numbers from 0 to 255 are needed")
    if array.dtype.kind == "f" and (uneven := array[array != np.rint(array)]).size:
        told = f"{uneven.size:,} label values are no whole numbers, such as {float(uneven[0])!r}"
        raise CaseError(f"{path}: {told}; round them, or write the label again without interpolation")
    return LabelMap(array.astype(np.uint8), place_of(grid))


def read_scan(found: Found) -> Scan:
    """The image as every reader of this project sees it, and both grids; one slice is an image too.

    What would have to be cut out of a corpus is read where its label map can say where it lies: a series with a hole,
    the first of several phases. The volume's notes tell of it. VolumeError: see `data_curation.volumes`.
    """
    return scan_of(loaded(found), found.source or found.path.name)


def loaded(found: Found) -> Grid:
    """The voxels as stored. VolumeError: it cannot be read."""
    try:
        return load(found, LIMITS)
    except VolumeError as fault:
        if fault.reason != "too_large":
            raise
        text = fault.message.partition(", more than")[0]
        raise VolumeError(
            "too_large", f"{text}, too many: the header is damaged, or cut the image into parts"
        ) from None


def scan_of(grid: Grid, source: str) -> Scan:
    """The same of voxels that are in memory."""
    grid = kept_thin(grid)
    volume = _judged(of_grid(grid, source, LIMITS))
    own = place_of(grid)
    turned = grid.as_acquired or grid.angle <= OBLIQUE_DEGREES
    straight = lps(own) if turned else _straight(own, volume)
    assert straight.size == volume.hu.shape[::-1], f"{source}: {straight.size} is not the grid of {volume.hu.shape}"
    return Scan(volume, own, straight, grid.places, grid.taken)


def kept_thin(grid: Grid) -> Grid:
    """Few slices that lie oblique stay as acquired: between them is nothing that could be resampled."""
    if grid.voxels.ndim != 3 or grid.as_acquired or grid.angle <= OBLIQUE_DEGREES or not outgrows(grid):
        return grid
    note = f"oblique by {grid.angle:.1f} degrees and thin: slices kept as acquired"
    return replace(grid, as_acquired=True, notes=(*grid.notes, note))


def _judged(volume: Volume) -> Volume:
    """CT whose rescale intercept was lost gets it back; values that are hardly those of CT are told, not refused."""
    volume = lost_offset.repair(volume, LIMITS)
    try:
        for rule in (label.apply, windowed.apply, not_ct.apply):
            rule(volume, LIMITS)
    except VolumeError as fault:
        return volume.noted(f"{HARDLY_CT}, taken as it is: {fault}")
    return volume


def found_at(path: Path) -> Found:
    """One file, as `data_curation.volumes.find` would list it; VolumeError for other endings."""
    kind = KINDS.get(file_ending(path).lower())
    if kind is None:
        raise VolumeError("not_a_volume", f"the ending is none of {', '.join(KINDS)}")
    return Found(path, parts(path), kind, path.name, path.name)


def _load(found: Found) -> Grid:
    """A label map, placed by its header as an image with that header is."""
    if found.kind == "nifti":
        return nifti.load(found.path, fewest=1)
    if found.kind == "nrrd":
        return nrrd.load(found.path, fewest=1, labels=True)
    return metaimage.load(found.path, fewest=1)


def place_of(grid: Grid) -> Place:
    """Where the voxels of a reader's grid lie."""
    k, j, i = grid.voxels.shape
    return Place((i, j, k), grid.affine)


def _straight(own: Place, volume: Volume) -> Place:
    """The grid of an oblique volume after the reader resampled it: along the axes, from the lowest corner."""
    z, y, x = volume.hu.shape
    return Place((x, y, z), np.column_stack([np.diag(volume.spacing[::-1]), own.corners.min(0)]))


def write_labelmap(path: Path, array: NDArray[np.uint8], place: Place, like: Path | None = None) -> None:
    """uint8 [z, y, x], compressed; the file appears whole or not at all.

    With `like`, a file of the same kind, the geometry is that file's, to the last digit: its header is taken over.
    """
    assert array.shape == place.size[::-1], f"{array.shape} on a grid of {place.size}"
    kind = KINDS[file_ending(path).lower()]
    header = label_header(like, kind) if like is not None else None
    if header is None and kind == "nifti" and orthogonal(place.affine)[1] > SHEAR_DEGREES:
        header = sform_header(place.size, place.affine)
    if header is not None:
        with aside(path) as file:
            file.writelines(with_voxels(header, kind, array, path.name.endswith(".gz")))
    elif kind == "nifti":
        write_nifti(path, array, place.affine)
    else:
        _write_itk(path, array, place)


def _write_itk(path: Path, array: NDArray[np.uint8], place: Place) -> None:
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(np.ascontiguousarray(array))
    image.SetDirection((place.affine[:, :3] / place.spacing).ravel().tolist())
    image.SetSpacing(place.spacing)
    image.SetOrigin(place.affine[:, 3].tolist())
    part = path.with_name(f".{os.getpid()}.{path.name}")  # ITK goes by the ending
    try:
        sitk.WriteImage(image, str(part), useCompression=True)
        os.replace(part, path)
    except RuntimeError as fault:
        text = f"cannot be written ({str(fault).strip().splitlines()[-1]}); make room, then run the same command again"
        raise OSError(errno.EIO, text, str(path)) from None
    finally:
        part.unlink(missing_ok=True)
