"""Labels of public data sets that are not one label map: a file an organ, or a picture a slice."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_curation.volumes import Found, load
from downstream import geometry
from downstream.cases import CaseError, file_ending
from downstream.geometry import LabelMap, Place

__all__ = ["merged", "pictures", "structure_files"]

_TISSUE = (-50, 300)  # HU of an organ, which most of a mask that lies where it belongs has
_LEAST, _BETTER = 0.8, 0.05


def structure_files(folder: Path) -> dict[str, Path]:
    """Organ -> its mask, of a folder that holds one file an organ."""
    files = sorted(path for path in folder.iterdir() if file_ending(path) and not path.name.startswith("."))
    return {path.name.removesuffix(file_ending(path)): path for path in files}


def merged(folder: Path, values: Mapping[str, int], target: Place) -> tuple[LabelMap, list[str]]:
    """The masks of a folder as one label map on `target`, and notes. What two organs claim is the first one's.

    CaseError: a mask that cannot be read or lies elsewhere, or none of the organs is there.
    """
    files = structure_files(folder)
    wanted = {name: value for name, value in values.items() if name in files}
    if not wanted:
        raise CaseError(f"{folder}: no file of {_some(values)}; it has {_some(files)}")
    array = np.zeros(target.size[::-1], np.uint8)
    notes: list[str] = []
    for name, value in wanted.items():
        mask = geometry.read_labelmap(files[name])
        own = (mask.array > 0).astype(np.uint8)
        if geometry.difference(mask.place, target):
            own = geometry.align(own, mask.place, target, str(files[name]))
            notes.append(f"{name} lies on another grid: nearest voxel by position")
        claimed = array[own > 0]
        for other in np.unique(claimed[claimed > 0]).tolist():
            first = next(known for known, number in values.items() if number == other)
            notes.append(f"{first} and {name} share {np.count_nonzero(claimed == other):,} voxels, kept as {first}")
        array[(own > 0) & (array == 0)] = value
    if absent := [name for name in values if name not in files]:
        notes.append(f"no file of {_some(absent)}: taken as absent")
    return LabelMap(array, target), notes


def _some(names: Mapping[str, object] | list[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:6]) + (f", ... ({len(listed)})" if len(listed) > 6 else "") if listed else "nothing"


def pictures(folder: Path, found: Found) -> tuple[LabelMap, list[str]]:
    """PNG masks, one a slice, of a DICOM series; in the series' own grid, 1 where a picture is not black.

    Picture and file number i in the order of their names belong together. Some are known to run the other way, or to
    be upside down: they are turned where tissue then fits clearly better. CaseError where none of it fits.
    """
    import imagecodecs

    grid = load(found)
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() == ".png" and path.name[0] != ".")
    if len(paths) != len(found.files) or len(paths) != len(grid.voxels):
        raise CaseError(f"{folder}: {len(paths)} pictures for {len(grid.voxels)} slices; fetch the case again")
    ordered = sorted(range(len(paths)), key=lambda index: found.files[index].name)
    array = np.zeros(grid.voxels.shape, np.uint8)
    for path, index in zip(paths, ordered, strict=True):
        plane = imagecodecs.png_decode(path.read_bytes())
        plane = plane.max(axis=-1) if plane.ndim == 3 else plane
        if plane.shape != array.shape[1:]:
            raise CaseError(f"{path}: {plane.shape} pixels, the slice has {array.shape[1:]}; fetch the case again")
        array[index] = plane > 0
    ways = {"": array, "in reverse order": array[::-1], "upside down": array[:, ::-1]}
    ways["in reverse order and upside down"] = array[::-1, ::-1]
    fits = {way: _fit(turned, grid.voxels) for way, turned in ways.items()}
    best = max(fits, key=lambda way: fits[way])
    chosen = best if fits[best] > fits[""] + _BETTER else ""
    if fits[chosen] < _LEAST:
        text = f"{fits[chosen]:.0%} of what they mark is tissue of {_TISSUE[0]} to {_TISSUE[1]} HU"
        raise CaseError(f"{folder}: the pictures do not fit the slices ({text}); fetch the case again")
    label = LabelMap(np.ascontiguousarray(ways[chosen]), geometry.place_of(grid))
    return label, [f"the pictures lie {chosen}: turned"] if chosen else []


def _fit(mask: NDArray[np.uint8], voxels: NDArray[np.int16]) -> float:
    """Share of the marked voxels that are tissue; 1 where nothing is marked."""
    values = voxels[mask > 0]
    return float(np.mean((values >= _TISSUE[0]) & (values <= _TISSUE[1]))) if values.size else 1.0
