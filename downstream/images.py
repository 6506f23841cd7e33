"""An image of one or several channels, each from its own file, on the grid of the first one.

CT keeps its HU. A channel of another kind (MR, PET, ...) is kept in thousandths of its own deviation around its own
mean, over all its voxels; what its file holds is not judged by the rules for HU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from data_curation.grid import AIR, Grid, to_lps
from data_curation.rules import OF_GRIDS, phases
from data_curation.volumes import Found, Volume, VolumeError
from downstream import geometry
from downstream.channels import SCALE, Kind
from downstream.geometry import Place, Scan
from downstream.labels import CaseError

__all__ = ["Image", "image_of", "read_image"]

_LEAST = 0.1  # share of the first channel's voxels that another one must cover, or they are of two bodies
_MOST = 32767


@dataclass(frozen=True)
class Image:
    """Stored values [C, Z, Y, X] in LPS, and the first channel's scan, whose `place` they lie on.

    The notes of `scan.volume` tell of all channels.
    """

    stored: NDArray[np.int16]
    scan: Scan


def read_image(founds: Sequence[Found], kinds: Sequence[Kind], names: Sequence[str]) -> Image:
    """One image from the files of its channels. Others than the first are brought onto its grid by position, linear.

    VolumeError: a file that cannot be read. CaseError: a channel that hardly overlaps with the first.
    """
    assert len(founds) == len(kinds) == len(names) > 0, (founds, kinds, names)
    scans = [_read(found, kind, name, len(names)) for found, kind, name in zip(founds, kinds, names, strict=True)]
    return _joined(scans, kinds, names, [str(found.path) for found in founds])


def image_of(grids: Sequence[Grid], kinds: Sequence[Kind], names: Sequence[str]) -> Image:
    """The same of voxels that are in memory."""
    pairs = zip(grids, kinds, names, strict=True)
    scans = [geometry.scan_of(grid, name) if kind == "ct" else _of_other(grid, name) for grid, kind, name in pairs]
    return _joined(scans, kinds, names, names)


def _joined(scans: Sequence[Scan], kinds: Sequence[Kind], names: Sequence[str], whats: Sequence[str]) -> Image:
    first = scans[0]
    if len(scans) == 1:
        return Image(first.volume.hu[None], first)
    notes = _named(first.volume.notes, names[0])
    stored = np.empty((len(scans), *first.volume.hu.shape), np.int16)
    stored[0] = first.volume.hu
    for channel, (scan, name, kind) in enumerate(zip(scans[1:], names[1:], kinds[1:], strict=True), 1):
        notes += _named(scan.volume.notes, name)
        if not geometry.difference(scan.place, first.place):
            stored[channel] = scan.volume.hu
            continue
        empty = AIR if kind == "ct" else int(scan.volume.hu.min())
        stored[channel], share = _brought(scan.volume.hu, scan.place, first.place, empty)
        if share < _LEAST:
            raise CaseError(
                f"{whats[channel]}: channel {name} covers {share:.0%} of {names[0]} ({Path(whats[0]).name}): "
                "they are of two places; pair them again"
            )
        part = "" if share > 0.995 else f", {share:.0%} of the image lies within it"
        notes.append(f"{name}: lies on another grid, brought over by position, linear{part}")
    scan = replace(first, volume=replace(first.volume, hu=stored[0], notes=tuple(notes)))
    return Image(stored, scan)


def _named(notes: Sequence[str], name: str) -> list[str]:
    return [f"{name}: {note}" for note in notes]


def _read(found: Found, kind: Kind, name: str, channels: int) -> Scan:
    try:
        return geometry.read_scan(found) if kind == "ct" else _read_other(found)
    except VolumeError as fault:
        what = f"channel {name} ({found.path.name}): " if channels > 1 else ""
        raise VolumeError(fault.reason, what + fault.message) from None


def _read_other(found: Found) -> Scan:
    """A scan of any modality, in thousandths of its deviation around its mean."""
    if found.reason == "not_ct":  # what the headers of a DICOM series are told apart by
        found = replace(found, reason="", detail="")
    return _of_other(geometry.loaded(found), found.source or found.path.name)


def _of_other(grid: Grid, source: str) -> Scan:
    if grid.voxels.dtype.kind == "f" and not np.isfinite(grid.voxels).all():
        bad = int(np.count_nonzero(~np.isfinite(grid.voxels)))
        raise VolumeError(
            "not_finite", f"{bad:,} voxels are NaN or infinite: write them as the value of the background"
        )
    grid = geometry.kept_thin(phases.apply(grid, geometry.LIMITS))
    lowest = grid.voxels.min()
    # From 0 up, as the rules of grids take what lies far below for padding of a CT; the mean takes it off again.
    above = grid.voxels.astype(np.float32) if lowest == 0 else np.subtract(grid.voxels, lowest, dtype=np.float64)
    mean, deviation = float(above.mean(dtype=np.float64)), float(above.std(dtype=np.float64))
    turned = replace(grid, voxels=above.astype(np.float32, copy=False))
    for rule in OF_GRIDS:
        turned = rule(turned, geometry.LIMITS)
    voxels, spacing, notes = to_lps(turned)
    stored, more = _thousandths(voxels, mean, deviation)
    volume = Volume(stored, spacing, source, 0.0, (*notes, *more))
    return Scan(volume, geometry.place_of(grid), geometry.lps(geometry.place_of(turned)), grid.places, grid.taken)


def _thousandths(voxels: NDArray[Any], mean: float, deviation: float) -> tuple[NDArray[np.int16], list[str]]:
    stored = np.zeros(voxels.shape, np.int16)
    if deviation == 0.0:
        return stored, ["every voxel has one value: the channel tells nothing"]
    cut = 0
    for z, plane in enumerate(voxels):
        values = np.rint((plane.astype(np.float64) - mean) * (SCALE / deviation))
        cut += int(np.count_nonzero(np.abs(values) > _MOST))
        stored[z] = np.clip(values, -_MOST, _MOST)
    return stored, [f"{cut:,} voxels beyond 32 deviations cut"] if cut else []


def _brought(values: NDArray[np.int16], own: Place, target: Place, empty: int) -> tuple[NDArray[np.int16], float]:
    """Values [z, y, x] on `own` -> on `target`, and the share of its voxels that lie within; the others are `empty`."""
    found = np.full(target.size[::-1], empty, np.int16)
    inside_all = 0
    limit = np.array(own.size) - 0.5
    for z, at in geometry.planes(own, target):
        inside = ((at >= -0.5) & (at <= limit)).all(-1)
        if inside.any():
            inside_all += int(np.count_nonzero(inside))
            where = at[inside].T[::-1]
            found[z][inside] = np.rint(
                ndimage.map_coordinates(values, where, output=np.float32, order=1, mode="nearest")
            )
    return found, inside_all / found.size
