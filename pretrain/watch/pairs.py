"""Labelled scans for the probe: which image belongs to which label map, and both as slices on one grid.

ProbeError(ValueError)    no pairs, a file that cannot be read, two files that do not fit; the text names the file
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_curation import nifti
from data_curation.finding import KINDS, Found, find, parts
from data_curation.grid import Grid, VolumeError, from_image, to_lps
from data_curation.volumes import load

__all__ = ["Pair", "ProbeError", "find_pairs", "groups", "labelled_slices", "read_pair"]


class ProbeError(ValueError):
    """What the probe was given cannot be used; the text names the file and what to do."""


@dataclass(frozen=True)
class Pair:
    """One labelled scan. Pairs of one patient never lie on both sides of the probe; "": the patient is the image."""

    image: Path  # a file, or a folder with one DICOM series
    label: Path
    patient: str = ""

    @property
    def group(self) -> str:
        """A name by which patients are put into an order, wherever their files lie."""
        return self.patient or _stem(self.image).removesuffix("_0000")


def find_pairs(images: Path | None = None, labels: Path | None = None, listing: Path | None = None) -> list[Pair]:
    """The pairs of two folders, or of a list; no voxel is read.

    Folders as in nnU-Net: label CASE.ENDING belongs to image CASE_0000.ENDING or CASE.ENDING, or to DICOM folder CASE.
    A list is JSON, [{"image": FILE, "label": FILE, "patient": NAME}, ...], or Parquet with these columns; `patient` may
    be missing, and paths are relative to the list. Raises ProbeError where there is no pair or a file is not there.
    """
    if listing is not None:
        return _listed(listing)
    assert images is not None and labels is not None, "two folders or a list"
    for folder in (images, labels):
        if not folder.is_dir():
            raise ProbeError(f"{folder} is not a folder; give watch.probe.images and watch.probe.labels two folders")
    scans = {_stem(found.path): found.path for found in find(images)}
    maps = {_stem(found.path): found.path for found in find(labels)}
    named = {name: next((key for key in (f"{name}_0000", name) if key in scans), "") for name in sorted(maps)}
    pairs = [Pair(scans[image], maps[name]) for name, image in named.items() if image]
    if not pairs:
        shown = [", ".join(sorted(names)[:3]) or "nothing" for names in (scans, maps)]
        raise ProbeError(
            f"no label map in {labels} ({shown[1]}) has the name of an image in {images} ({shown[0]}); label "
            "CASE.nii.gz belongs to image CASE_0000.nii.gz, other names need a list (watch.probe.pairs)"
        )
    return pairs


def _stem(path: Path) -> str:
    """`CASE` of CASE.nii.gz, or of a folder."""
    ending = next((ending for ending in KINDS if path.name.lower().endswith(ending)), "")
    return path.name[: len(path.name) - len(ending)]


def _listed(path: Path) -> list[Pair]:
    try:
        rows = _parquet(path) if path.suffix == ".parquet" else json.loads(path.read_text())
    except FileNotFoundError:
        raise ProbeError(f"{path} is not there; watch.probe.pairs names a JSON or Parquet list") from None
    except (OSError, ValueError) as error:  # pyarrow's errors are of both kinds
        raise ProbeError(f"{path} is not a JSON or Parquet list ({error})") from None
    if not isinstance(rows, list) or not rows:
        raise ProbeError(f"{path} holds no list of pairs, such as " + _EXAMPLE)
    pairs = []
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in ("image", "label")):
            raise ProbeError(f"{path}: entry {number} is {row!r}; each needs image and label, such as " + _EXAMPLE)
        files = [path.parent / row[name] for name in ("image", "label")]
        if missing := [str(file) for file in files if not file.exists()]:
            raise ProbeError(f"{path}: entry {number} names {missing[0]}, which is not there; correct the list")
        pairs.append(Pair(files[0], files[1], str(row.get("patient") or "")))
    return pairs


_EXAMPLE = '[{"image": "a.nii.gz", "label": "a_seg.nii.gz", "patient": "a"}]'


def _parquet(path: Path) -> list[dict[str, Any]]:
    from pyarrow import parquet

    rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    return rows


def read_pair(pair: Pair) -> tuple[NDArray[Any], NDArray[Any]]:
    """Stored HU and labels, both [Z, Y, X] (z foot to head, y front to back, x patient right to left), views.

    The slices are those that were stored: an oblique or tilted stack is turned, not resampled. Raises ProbeError where
    a file cannot be read, or the two do not lie on one grid (half a voxel is let pass).
    """
    image, label = _grid(pair.image, load), _grid(pair.label, _labels)
    hu, labels = to_lps(image)[0], to_lps(label)[0]
    if hu.shape != labels.shape or _apart(image, label) > 0.5:
        raise ProbeError(
            f"{pair.label} does not lie on the grid of {pair.image}: sizes (z, y, x) {hu.shape} and {labels.shape}, up "
            f"to {_apart(image, label):.3g} voxels apart; bring the label onto the image's grid, or leave the pair out"
        )
    low, high = labels.min(), labels.max()
    if not (low >= 0 and high <= 65535):
        raise ProbeError(f"{pair.label}: label values run from {low} to {high}; whole numbers from 0 are needed")
    return hu, labels


def labelled_slices(labels: NDArray[Any], count: int | None, seed: int, name: str) -> NDArray[np.int64]:
    """At most `count` of the slices of a label map [Z, Y, X] that hold a label, at even distances; None: all of them.

    Where they begin is drawn by `seed` and the patient's name.
    """
    there = np.flatnonzero([bool(plane.any()) for plane in labels])
    count = len(there) if count is None else min(count, len(there))
    if not count:
        return there
    start = np.random.default_rng([seed, 2, zlib.crc32(name.encode())]).random()
    picked: NDArray[np.int64] = there[((np.arange(count) + start) * len(there) / count).astype(np.int64)]
    return picked


def _grid(path: Path, reader: Any) -> Grid:
    try:
        grid: Grid = reader(_found(path))
    except (VolumeError, OSError, RuntimeError) as error:  # SimpleITK raises RuntimeErrors
        text = str(error).strip().splitlines()[-1]
        raise ProbeError(f"{path} cannot be used by the probe: {text}; copy it again, or leave the pair out") from None
    if grid.voxels.ndim != 3:
        raise ProbeError(f"{path} has {grid.voxels.ndim} dimensions; the probe needs one volume of three")
    return grid


def _found(path: Path) -> Found:
    if path.is_dir():
        series = list(find(path))
        if len(series) != 1:
            raise VolumeError("series", f"the folder holds {len(series)} volumes; name one of them")
        return series[0]
    kind = next((kind for ending, kind in KINDS.items() if path.name.lower().endswith(ending)), "")
    if kind:
        return Found(path, parts(path), kind, path.name, path.name)
    series = [found for found in find(path.parent) if path in found.files]
    if not series:
        raise VolumeError("not_a_volume", f"it is no DICOM file, and its ending is none of {', '.join(KINDS)}")
    return series[0]


def _labels(found: Found) -> Grid:
    """A label map; those of NRRD and MetaImage through ITK, since our own readers take a segmentation for no image."""
    if found.kind == "nifti":
        return nifti.load(found.path)
    if found.kind == "dicom":
        return load(found)
    import SimpleITK as sitk

    image = sitk.ReadImage(str(found.path))
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        raise VolumeError("vector", f"size {image.GetSize()}: one value a voxel in three dimensions is needed")
    return from_image(image)


def _apart(image: Grid, label: Grid) -> float:
    """How many voxels of the image the corners of the two grids lie apart; both are taken in LPS order."""
    corners = [_corners(grid) for grid in (image, label)]
    return float((np.abs(corners[0] - corners[1]).max(0) / image.spacing.min()).max())


def _corners(grid: Grid) -> NDArray[np.float64]:
    """The first and the last voxel in LPS order, [2, 3] in mm."""
    ends = np.array([[0, n - 1] for n in grid.voxels.shape[::-1]], np.float64)  # of i, j, k
    lows, highs = ends[:, 0].copy(), ends[:, 1].copy()
    for row, axis in enumerate(grid.order):
        if grid.affine[row, axis] < 0:
            lows[axis], highs[axis] = highs[axis], lows[axis]
    return np.stack([grid.affine @ (*end, 1.0) for end in (lows, highs)])


def groups(pairs: Iterable[Pair]) -> dict[str, list[Pair]]:
    """The pairs of each patient, both in the order of their names; s0001/ct.nii.gz and s0002/ct.nii.gz are two."""
    found: dict[str, list[Pair]] = {}
    for pair in sorted(pairs, key=lambda pair: (pair.group, str(pair.image))):
        found.setdefault(pair.patient or str(pair.image), []).append(pair)
    return found
