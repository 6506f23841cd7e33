"""One phantom on disk: an image or label file with its axes turned, a file a structure, or a DICOM series."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from data_curation.phantom import Phantom

__all__ = ["numbered", "structures", "write_dicom", "write_nifti"]

# What of a phantom's anatomy stands for a label of a data set that has another name; no phantom has a tumour.
_STANDS_FOR: dict[str, tuple[str, ...]] = {
    "kidney": ("kidney_right", "kidney_left"),
    "right kidney": ("kidney_right",),
    "left kidney": ("kidney_left",),
    "inferior vena cava": ("inferior_vena_cava",),
}


def numbered(phantom: Phantom, labels: Mapping[int, str]) -> NDArray[np.uint8]:
    """Labels [Z, Y, X] under a data set's own numbers; 0 where the phantom lacks the organ."""
    own = {name: number for number, name in phantom.names.items()}
    table = np.zeros(256, np.uint8)
    for number, name in labels.items():
        for organ in _STANDS_FOR.get(name, (name,)):
            if organ in own:
                table[own[organ]] = number
    return table[phantom.labels]


def write_nifti(array: NDArray[Any], phantom: Phantom, path: Path, axes: str = "LPS", *, header: bool = True) -> Path:
    """[Z, Y, X] in LPS, its voxels stored along `axes` (the patient stays where it is). Without `header` the affine is
    the identity, as when the header was lost."""
    import SimpleITK as sitk

    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.DICOMOrient(_image(array, phantom), axes)
    if not header:
        assert axes == "RAS", "the order in which the identity is the truth but for the spacing"
        image.SetOrigin((0, 0, 0))
        image.SetSpacing((1, 1, 1))
        image.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))  # NIfTI's x and y run against LPS
    sitk.WriteImage(image, str(path), useCompression=True)
    return path


def structures(phantom: Phantom, folder: Path, axes: str, names: Iterable[str] | None = None) -> None:
    """A binary file for each of these labels that the phantom has, else for each of its own organs."""
    own = set(phantom.names.values())
    for name in own if names is None else names:
        if own.intersection(_STANDS_FOR.get(name, (name,))):
            part = numbered(phantom, {1: name})
            write_nifti(part, phantom, folder / f"{name.replace(' ', '_')}.nii.gz", axes)


def write_dicom(
    phantom: Phantom, folder: Path, number: int, order: Iterable[int] | None = None, axes: str = "LPS"
) -> Path:
    """One axial CT series, a file a slice in this order of z, stored as HU + 1024. Name, id and date are made up.

    `axes` LAS stores every slice with its rows from back to front.
    """
    import SimpleITK as sitk

    folder.mkdir(parents=True, exist_ok=True)
    image = sitk.DICOMOrient(_image(phantom.hu, phantom), axes)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    series = {
        "0008|0005": "ISO_IR 100",
        "0008|0008": "ORIGINAL\\PRIMARY\\AXIAL",
        "0008|0016": "1.2.840.10008.5.1.4.1.1.2",
        "0008|0012": "20200102",
        "0008|0013": "030405",
        "0008|0020": "20200102",
        "0008|0030": "030405",
        "0008|0060": "CT",
        "0008|0070": "Axial",
        "0010|0010": f"Phantom^Number{number}",
        "0010|0020": f"PHANTOM{number:04d}",
        "0018|0050": str(phantom.spacing[0]),
        "0018|5100": "HFS",
        "0020|000d": _uid(number, phantom.hu.shape, "study"),
        "0020|000e": _uid(number, phantom.hu.shape, "series"),
        "0020|0052": _uid(number, phantom.hu.shape, "frame"),
        "0020|0011": "2",
        "0028|1052": "-1024",
        "0028|1053": "1",
        "0028|1054": "HU",
    }
    for i, z in enumerate(range(len(phantom.hu)) if order is None else order):
        one = image[:, :, z : z + 1]
        own = {"0008|0018": _uid(number, phantom.hu.shape, "slice", z), "0020|0013": str(i + 1)}
        for key, value in (series | own).items():
            one.SetMetaData(key, value)
        writer.SetFileName(str(folder / f"i{i:04d},0000b.dcm"))
        writer.Execute(one)
    return folder


def _image(array: NDArray[Any], phantom: Phantom) -> Any:
    """SimpleITK image of [Z, Y, X] in LPS, the middle of the volume at a place that is not the origin."""
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(array)
    image.SetSpacing(phantom.spacing[::-1])
    image.SetOrigin(
        [12.5 - (n - 1) / 2 * step for n, step in zip(array.shape[::-1], phantom.spacing[::-1], strict=True)]
    )
    return image


def _uid(*parts: object) -> str:
    """A DICOM UID that depends on `parts` alone."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return f"2.25.{int.from_bytes(digest[:16], 'big')}"
