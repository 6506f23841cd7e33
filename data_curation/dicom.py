"""One stack of DICOM slices -> `Grid`, in HU: slope and intercept of each slice, or frame, are its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_curation import dicom_headers, dicom_pixels
from data_curation.dicom_headers import numbers
from data_curation.dicom_pixels import Pixels
from data_curation.dicom_stacks import in_order
from data_curation.grid import SAME_PLACE_MM, Grid, VolumeError
from data_curation.rules import max_voxels, tilt

__all__ = ["load"]


@dataclass(frozen=True)
class _Slice:
    stored: NDArray[Any]  # [rows, columns], whole numbers
    texts: Mapping[str, str]  # of the header, by keyword
    slope: float
    intercept: float
    lossy: bool
    padding: tuple[float, float] | None  # HU


def load(
    files: Sequence[Path],
    frames: Sequence[tuple[int, int]] = (),
    first: bool = False,
    most: int = max_voxels.MAX_VOXELS,
    fewest: int = 2,
) -> Grid:
    """One stack. `frames` names its slices as (index into `files`, frame); without it a slice is a file, or a frame of
    the only file.

    Slices at one position are dropped when they are equal, or where `first` takes the first of several phases; else
    VolumeError `not_a_volume`. The grid's stack axis is the slices' normal and its step the median distance along it;
    `places` tells where each slice lies. With `fewest` 1 one slice is a stack, its step the slice's thickness. Raises
    VolumeError `too_large` before pixels are read, `truncated`.
    """
    wanted: dict[int, list[tuple[int, int]]] = {}
    for slot, (index, frame) in enumerate(frames):
        wanted.setdefault(index, []).append((slot, frame))
    voxels: NDArray[Any] = np.empty((0, 0, 0), np.int16)
    found: dict[int, _Slice] = {}
    for index, path in enumerate(files):
        own = wanted.get(index, [])
        slots = [slot for slot, _ in own] or ([index] if len(files) > 1 else None)
        chosen = [frame for _, frame in own]
        for number, (total, one) in enumerate(_read(path, chosen, len(frames) or len(files), most)):
            if not found:
                voxels = np.empty((total, *one.stored.shape), np.int16)
            if one.stored.shape != voxels.shape[1:]:
                text = f"slices of {one.stored.shape[0]} x {one.stored.shape[1]} pixels among others of another size"
                raise VolumeError("not_a_volume", f"{text} ({path.name}): leave them out")
            slot = number if slots is None else slots[number]
            voxels = _put(voxels, slot, one)
            found[slot] = _without_pixels(one)
    return _grid(voxels, [found[slot] for slot in range(len(voxels))], first, fewest)


def _read(path: Path, frames: Sequence[int], total: int, most: int) -> Iterator[tuple[int, _Slice]]:
    """The slices of a file (those of `frames`, else all), each with the number of slices of the stack."""
    try:
        with path.open("rb") as file, dicom_headers.quiet():
            data = dicom_headers.opened(file)
            headers = dict(dicom_headers.per_slice(data))
            chosen = list(frames) or list(headers)
            pixels = dicom_pixels.locate(file, data, headers[chosen[0]])
            total = max(total, len(chosen))
            max_voxels.fits((total, pixels.rows, pixels.columns), most)
            stored = dicom_pixels.frames(pixels, data, [max(0, frame) for frame in chosen])
            for frame, array in zip(chosen, stored, strict=True):
                yield total, _slice(array, headers[frame], pixels)
    except (OSError, VolumeError):
        raise
    except dicom_pixels.Unsupported as error:
        raise VolumeError("unsupported", f"{path.name}: {error}") from None
    except Exception:  # whatever parsers may stumble over in bytes of unknown origin
        text = f"the pixels of {path.name} are cut short or damaged: copy or download it again"
        raise VolumeError("truncated", text) from None


def _slice(stored: NDArray[Any], texts: Mapping[str, str], pixels: Pixels) -> _Slice:
    if [len(numbers(texts.get(name, ""))) for name in _GEOMETRY] != [3, 6, 2]:  # of another modality, not judged before
        raise VolumeError("no_position", f"the header has no usable {', '.join(_GEOMETRY)}: slices cannot be ordered")
    slope = float(texts.get("RescaleSlope") or 1)
    intercept = float(texts.get("RescaleIntercept") or 0)
    lossy = pixels.syntax in dicom_pixels.LOSSY or texts.get("LossyImageCompression") == "01"
    ends = [texts.get(name, "") for name in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
    known = [slope * pixels.number(end) + intercept for end in ends if end]
    padding = (min(known), max(known)) if ends[0] else None
    return _Slice(stored, texts, slope, intercept, lossy, padding)


def _without_pixels(one: _Slice) -> _Slice:
    texts = {name: one.texts[name] for name in _GEOMETRY} | {_THICKNESS: one.texts.get(_THICKNESS, "")}
    return _Slice(np.empty((0, 0), np.int16), texts, one.slope, one.intercept, one.lossy, one.padding)


_GEOMETRY = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")
_THICKNESS = "SliceThickness"


def _put(voxels: NDArray[Any], slot: int, one: _Slice) -> NDArray[Any]:
    """Writes a slice in HU into its slot; the stack grows out of int16 only where a slice does not fit."""
    stored, slope, intercept = one.stored, one.slope, one.intercept
    ends = [slope * int(stored.min()) + intercept, slope * int(stored.max()) + intercept]
    fits = min(ends) >= -32768 and max(ends) <= 32767
    if slope == 1 and intercept.is_integer() and fits and stored.itemsize == 2:
        # Of 16 bits the sum wraps round to the right number, be the stored ones signed or not.
        shift = np.array(int(intercept) & 0xFFFF, np.uint16).view(np.int16)
        if voxels.dtype == np.int16:
            np.add(stored.view(np.int16), shift, out=voxels[slot])
        else:
            voxels[slot] = stored.view(np.int16) + shift
        return voxels
    hu = stored * np.float64(slope) + intercept
    whole = np.array_equal(hu, np.rint(hu))
    needed = np.int16 if whole and fits else np.int32 if whole and np.abs(ends).max() < 2**31 else np.float32
    if voxels.dtype.kind == "i":
        voxels = voxels.astype(needed if needed == np.float32 else np.promote_types(voxels.dtype, needed), copy=False)
    voxels[slot] = hu
    return voxels


def _grid(voxels: NDArray[Any], slices: Sequence[_Slice], first: bool, fewest: int) -> Grid:
    if len(slices) < min(fewest, 2):
        raise VolumeError("single_slice", "one slice is not a volume: leave it out")
    plane = np.array(numbers(slices[0].texts["ImageOrientationPatient"])).reshape(2, 3)
    row, column = plane / np.linalg.norm(plane, axis=1, keepdims=True)
    between_rows, between_columns = numbers(slices[0].texts["PixelSpacing"])
    normal = np.cross(row, column)
    if any(not np.allclose(numbers(one.texts["ImageOrientationPatient"]), plane.ravel(), atol=0.025) for one in slices):
        raise VolumeError(
            "not_a_volume", f"{len(slices)} slices that are not parallel: put each plane into its own folder"
        )
    places = np.array([numbers(one.texts["ImagePositionPatient"]) for one in slices])
    kept, repeats, phases = [0], 0, 0
    if len(slices) > 1:
        kept, repeats, phases = _without_repeats(voxels, places @ normal, in_order(places @ normal), first)
    if kept != list(range(len(slices))):
        voxels = voxels[kept]
    places = places[kept]
    step = float(np.median(np.diff(places @ normal))) if len(kept) > 1 else _thickness(slices[0])
    affine = np.column_stack([row * between_columns, column * between_rows, normal * step, places[0]])
    notes = []
    if repeats:
        notes.append(f"{repeats} repeated slices left out")
    if phases:
        notes.append(f"{phases} slices of further phases left out")
    if lossy := sum(one.lossy for one in slices):
        notes.append(f"{lossy} of {len(slices)} slices were compressed with loss")
    padding = next((one.padding for one in slices if one.padding is not None), None)
    grid = Grid(voxels, affine, False, tuple(notes), places, padding, tuple(kept))
    return replace(grid, as_acquired=tilt.degrees(grid) > tilt.TILT_DEGREES)


def _thickness(one: _Slice) -> float:
    """mm; 1 where the header does not say."""
    found = numbers(one.texts[_THICKNESS])
    return found[0] if len(found) == 1 and 0 < found[0] < np.inf else 1.0


def _without_repeats(
    voxels: NDArray[Any], places: NDArray[np.float64], order: Sequence[int], first: bool
) -> tuple[list[int], int, int]:
    """Slices to keep, in order along the normal, and the numbers of equal ones and of further phases left out."""
    kept, repeats, phases = [order[0]], 0, 0
    for index in order[1:]:
        if places[index] - places[kept[-1]] > SAME_PLACE_MM:
            kept.append(index)
        elif np.array_equal(voxels[index], voxels[kept[-1]]):
            repeats += 1
        elif first:
            phases += 1
        else:
            distinct = 1 + int(np.count_nonzero(np.diff(places[list(order)]) > SAME_PLACE_MM))
            text = f"{len(places)} slices share {distinct} positions (several phases in one series): "
            raise VolumeError("not_a_volume", text + "set limits.phases=first, or use a folder each")
    if len(kept) < 2:
        raise VolumeError("not_a_volume", f"{len(places)} slices all at one position: leave the series out")
    return kept, repeats, phases
