"""A trained model as a function of an image, for use in other programs: `from downstream import load`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_curation.grid import Grid, from_image
from data_curation.rules.lost_offset import NOTE as INTERCEPT
from data_curation.volumes import Found, VolumeError
from downstream.cases import CaseError
from downstream.dicom_seg import on_one_affine, series_slices
from downstream.ensemble import Ensemble, load_models
from downstream.geometry import HARDLY_CT, Place, Scan
from downstream.images import image_of, read_image
from downstream.inference import Window
from downstream.naming import one_image
from downstream.predicting import label_image

__all__ = ["Segmenter", "load"]


def load(
    model: str | Path | Sequence[str | Path], device: str = "auto", window: Window | None = None, **changes: Any
) -> Segmenter:
    """The model behind a `model.safetensors`, a run folder, a folder of folds, or several of them.

    `changes` are settings of the window: `load(path, mirror=True, memory_gib=1)`. ModelError: no such model, or a
    damaged one.
    """
    files = Path(model) if isinstance(model, str | Path) else [Path(one) for one in model]
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    given = (window or Window()).model_dump() | changes
    return Segmenter(load_models(files, chosen), Window.model_validate(given))


class Segmenter:
    """`mask = model(image)`."""

    def __init__(self, ensemble: Ensemble, window: Window) -> None:
        self.ensemble = ensemble
        self.window = window

    @property
    def organs(self) -> dict[str, tuple[int, ...]]:
        """Name -> its values in the label map, several for a region."""
        return dict(self.ensemble.labels.organs)

    def __call__(self, image: Any, *, spacing: Sequence[float] | None = None) -> Any:
        """The label map of a scan.

        A path (a file, or the folder of one DICOM series) or a three-dimensional SimpleITK.Image gives an image of
        SimpleITK (uint8) with the geometry of what was given. A NumPy array of HU [Z, Y, X] (z foot to head, y front to
        back, x right to left of the patient) with its `spacing` (z, y, x) in mm gives an array [Z, Y, X], uint8. Of a
        model of several channels give as many of them, in its order; the first one's geometry counts. Where the slices
        of a series lean, so do the directions of the label map.

        UserWarning: the values are hardly those of CT, or had lost their rescale intercept, which is put back.
        VolumeError, CaseError (both ValueError): it cannot be used; the text says why.
        """
        channels = self.ensemble.headers[0].channels
        given = list(image) if isinstance(image, list | tuple) else [image]
        kinds, names = [channel.kind for channel in channels], [channel.name for channel in channels]
        if len(given) != len(names):
            raise CaseError(f"{len(given)} image(s) for a model of {len(names)} channel(s): {', '.join(names)}")
        what = "image"
        if isinstance(given[0], str | Path):
            founds = [one_image(Path(path), name) for path, name in zip(given, names, strict=True)]
            read, what = read_image(founds, kinds, names), str(given[0])
            place = _placed(founds[0], read.scan)
        else:
            read = image_of([_grid(one, spacing) for one in given], kinds, names)
            place = read.scan.own
        for note in read.scan.volume.notes:
            if HARDLY_CT in note or INTERCEPT in note:
                warnings.warn(f"{what}: {note}", stacklevel=2)
        array = label_image(self.ensemble, read, self.window, what)
        return array if isinstance(given[0], np.ndarray) else _as_image(array, place, given[0])


def _placed(found: Found, scan: Scan) -> Place:
    """The grid of the label map; leaning as the slices of a tilted gantry do. VolumeError: no affine says where."""
    if found.kind != "dicom":
        return scan.own
    place, reason = on_one_affine(series_slices(found, scan), scan.own)
    if reason:
        raise VolumeError("misplaced", f"{found.path}: {reason}; use axial predict with dicom=seg")
    return place


def _grid(image: Any, spacing: Sequence[float] | None) -> Grid:
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.dtype.kind not in "iuf" or 0 in image.shape:
            raise CaseError(f"an array {image.shape} of {image.dtype}: numbers [Z, Y, X] in HU are needed")
        if spacing is None or len(spacing) != 3 or not all(0 < side < np.inf for side in spacing):
            raise CaseError(f"spacing={spacing}: an array needs its spacing=(z, y, x) in mm")
        z, y, x = (float(side) for side in spacing)
        return Grid(image, np.column_stack([np.diag([x, y, z]), np.zeros(3)]))
    if spacing is not None:
        raise CaseError("spacing= is for arrays; this image has its own")
    if not hasattr(image, "GetNumberOfComponentsPerPixel"):
        raise CaseError(f"{type(image).__name__}: a path, a SimpleITK.Image or a NumPy array is needed")
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        raise CaseError(f"an image of size {image.GetSize()}: one value a voxel in three dimensions is needed")
    return from_image(image)


def _as_image(array: Any, place: Place, given: Any) -> Any:
    """A SimpleITK.Image; `given`'s geometry to the last digit where that is one itself."""
    import SimpleITK as sitk

    made = sitk.GetImageFromArray(np.ascontiguousarray(array))
    if isinstance(given, sitk.Image):
        made.CopyInformation(given)
        return made
    made.SetSpacing(place.spacing)
    made.SetOrigin(place.affine[:, 3].tolist())
    made.SetDirection((place.affine[:, :3] / place.spacing).ravel().tolist())
    return made
