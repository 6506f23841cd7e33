"""NIfTI, NRRD, MetaImage or a DICOM series -> `Volume`: integer HU on the patient's axes, with what was repaired.

`find` lists everything below a folder that could be an image, `read` makes one of them a volume or says why not.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_curation import dicom, nifti
from data_curation.grid import AIR, Grid, VolumeError, from_image, to_lps

__all__ = ["Found", "Volume", "VolumeError", "find", "read"]

_KINDS = {
    ".nii.gz": "nifti",
    ".nii": "nifti",
    ".hdr": "nifti",
    ".nrrd": "nrrd",
    ".nhdr": "nrrd",
    ".mha": "metaimage",
    ".mhd": "metaimage",
}
_IMAGE_IO = {"nrrd": "NrrdImageIO", "metaimage": "MetaImageIO"}
_DICOM = (".dcm", ".ima", ".dicom", ".dic")
_OTHER = frozenset(  # files that are not opened to see whether they are DICOM
    f".{ending}"
    for endings in (
        "bmp gif jpeg jpg png svg tif tiff npy npz pkl pt raw zraw",
        "csv doc docx htm html json log md pdf py sh tsv txt xls xlsx xml yaml yml",
        "7z gz rar tar tgz zip",
    )
    for ending in endings.split()
)
_NOT_HU_RANGE = 100.0  # a float volume with fractions whose values span less than this was normalised, or is PET


@dataclass(frozen=True)
class Volume:
    """A CT volume: `hu` [Z, Y, X] in LPS (z foot -> head, y front -> back, x patient right -> left), C-contiguous.

    `spacing` is (z, y, x) in mm; `source` is relative to the data set's root; `rounding` is the largest part of an HU
    lost by rounding a float volume; `notes` say what was repaired, or is unusual, in words.
    """

    hu: NDArray[np.int16]
    spacing: tuple[float, float, float]
    source: str
    rounding: float = 0.0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Found:
    """Something that could be an image. For DICOM `path` is the folder and `files` one stack in order.

    `series`, `study` and `patient` are the DICOM identifiers in clear, for hashing; other formats have none, and
    `series` is then the file's relative path. `reason` and `detail` are set where the headers already rule it out.
    """

    path: Path
    files: tuple[Path, ...]
    kind: str  # "nifti" | "nrrd" | "metaimage" | "dicom"
    series: str
    source: str = ""
    study: str = ""
    patient: str = ""
    reason: str = ""
    detail: str = ""


def find(root: Path, skipped: Counter[str] | None = None) -> Iterator[Found]:
    """Everything below `root` that could be an image, folder by folder in sorted order.

    Links to folders are followed once each. Files that are no images by name or first bytes are counted in `skipped`
    by their ending; what should be an image and cannot be opened is yielded with its reason.
    """
    skipped = Counter() if skipped is None else skipped
    for folder, names, error in _walk(root):
        if error:
            source = _relative(folder, root)
            yield Found(folder, (folder,), "nifti", source, source, reason="unreadable", detail=error)
        headers: list[Path] = []
        for name in names:
            path = folder / name
            kind = _kind(path)
            if kind == "dicom":
                headers.append(path)
            elif kind in ("nifti", "nrrd", "metaimage"):
                source = _relative(path, root)
                yield Found(path, (path,), kind, source, source)
            elif kind == "unreadable":
                source = _relative(path, root)
                detail = "the file cannot be opened: allow reading it, or mend the link"
                yield Found(path, (path,), "dicom", source, source, reason="unreadable", detail=detail)
            else:
                skipped[kind] += 1
        yield from _series(folder, headers, root)


def _series(folder: Path, files: list[Path], root: Path) -> Iterator[Found]:
    with _quiet():
        stacks = dicom.stacks(files) if files else []
    for stack in stacks:
        first = stack.headers[0]
        paths = tuple(header.path for header in stack.headers)
        alone = len(stacks) == 1 and len(files) > 1
        yield Found(
            folder,
            paths,
            "dicom",
            stack.name or _relative(first.path, root),
            _relative(folder if alone else first.path, root),
            first.study,
            first.patient,
            stack.reason,
            stack.detail,
        )


def _walk(root: Path) -> Iterator[tuple[Path, list[str], str]]:
    """Folder, its file names, and what went wrong with listing it. Each real folder is entered once."""
    entered: set[tuple[int, int]] = set()
    waiting = [root]
    while waiting:
        folder = waiting.pop()
        try:
            status = folder.stat()
            if (status.st_dev, status.st_ino) in entered:
                continue
            entered.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                listed = sorted((entry.name, entry.is_dir()) for entry in entries)
        except OSError as error:
            yield folder, [], f"the folder cannot be listed ({error.strerror}): allow reading it"
            continue
        waiting += [folder / name for name, is_dir in reversed(listed) if is_dir and not _hidden(name)]
        yield folder, [name for name, is_dir in listed if not is_dir], ""


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _kind(path: Path) -> str:
    """A kind of image, or "unreadable", or what to count a file under that is none."""
    name = path.name.lower()
    if _hidden(path.name):
        return "hidden files"
    suffix = next((suffix for suffix in _KINDS if name.endswith(suffix)), "")
    if suffix:
        return _KINDS[suffix]
    suffix = Path(name).suffix
    if suffix in _OTHER:
        return suffix
    if name.removesuffix(".gz").endswith(".img") and any(path.with_suffix(end).exists() for end in (".hdr", ".HDR")):
        return ".img"  # read through its header
    try:
        if suffix in _DICOM or dicom.looks_like(path):
            path.stat()
            return "dicom" if name != "dicomdir" else "dicomdir"
    except OSError:
        return "unreadable"
    return "nifti" if suffix == ".img" else suffix or "files without an ending"


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def read(found: Found) -> Volume:
    """The volume, LPS, as int16 HU. Raises VolumeError, its `reason` a slug, its text with numbers and a remedy."""
    if found.reason:
        raise VolumeError(found.reason, found.detail)
    try:
        with _quiet():
            grid = _load(found)
            voxels, spacing, notes = to_lps(grid)
    except OSError as error:
        raise VolumeError(
            "unreadable", f"{error.strerror or error}: allow reading the file, or mend the link"
        ) from None
    hu, rounding, more = _to_hu(voxels)
    return Volume(hu, spacing, found.source or found.path.name, rounding, (*notes, *more))


def _load(found: Found) -> Grid:
    if found.kind == "dicom":
        return dicom.load(found.files)
    if found.path.stat().st_size == 0:
        raise VolumeError("empty", "the file has 0 bytes: copy or download it again")
    if found.kind == "nifti":
        return nifti.load(found.path)
    return _with_itk(found)


def _with_itk(found: Found) -> Grid:
    """NRRD and MetaImage. The header is looked at before any voxel is read."""
    import SimpleITK as sitk

    reader = sitk.ImageFileReader()
    reader.SetFileName(str(found.path))
    reader.SetImageIO(_IMAGE_IO[found.kind])
    try:
        reader.ReadImageInformation()
        size, parts = reader.GetSize(), reader.GetNumberOfComponents()
        text = " x ".join(map(str, size))
        if any(key.startswith("Segment0_") for key in reader.GetMetaDataKeys()):
            raise VolumeError("label", f"a segmentation of {text} voxels written by 3D Slicer, not an image")
        if parts > 1:
            raise VolumeError("vector", f"{text} voxels of {parts} values each are not one CT volume: split them")
        if len(size) > 3 and max(size[3:]) > 1:
            raise VolumeError("4d", f"{text} voxels are a series: write the wanted volume as a file of its own")
        if len(size) < 3 or sum(n > 1 for n in size[:3]) < 3:
            raise VolumeError("single_slice", f"{text} voxels are one slice, not a volume: leave it out")
        image = reader.Execute()
    except RuntimeError as error:
        last = str(error).strip().splitlines()[-1]
        raise VolumeError("unreadable", f"cut short or damaged ({last}): copy or download it again") from None
    if image.GetDimension() > 3:
        image = image[(slice(None),) * 3 + (0,) * (image.GetDimension() - 3)]
    return from_image(image)


def _to_hu(voxels: NDArray[Any]) -> tuple[NDArray[np.int16], float, list[str]]:
    """int16, the largest rounding, and notes. Works slice by slice, so a float volume is never held twice."""
    notes: list[str] = []
    low, high = voxels.min(), voxels.max()
    rounding = 0.0
    if voxels.dtype.kind == "f":
        if not np.isfinite(low) or not np.isfinite(high):
            bad = sum(int(np.count_nonzero(~np.isfinite(plane))) for plane in voxels)
            text = f"{bad:,} of {voxels.size:,} voxels are NaN or infinite: write them as {AIR}"
            raise VolumeError("not_finite", text)
        rounding = max(float(np.abs(plane - np.rint(plane)).max()) for plane in voxels)
        if rounding > 1e-3 and high - low < _NOT_HU_RANGE:
            text = f"values run from {low:.3g} to {high:.3g} with fractions, so they are not HU: undo the normalisation"
            raise VolumeError("not_ct", text)
        if rounding > 1e-3:
            notes.append(f"float HU rounded to whole numbers, by at most {rounding:.2f}")
    hu = np.empty(voxels.shape, np.int16)
    outside = 0
    for source, target in zip(voxels, hu, strict=True):
        values = np.rint(source) if voxels.dtype.kind == "f" else source
        if low < -32768 or high > 32767:
            outside += int(np.count_nonzero((values < -32768) | (values > 32767)))
            values = np.clip(values, -32768, 32767)
        target[...] = values
    if outside:
        notes.append(f"{outside:,} voxels from {low:.6g} to {high:.6g} cut to -32768..32767")
    if low < AIR:
        lowest = int(hu.min())
        share = np.count_nonzero(hu == lowest) / hu.size
        if share > 1e-3:
            notes.append(f"padding {lowest} on {share:.1%} of the voxels kept")
    return hu, rounding, notes


@contextmanager
def _quiet() -> Iterator[None]:
    """Without ITK's warnings on the console; what is wrong reaches the user as a VolumeError or a note."""
    import SimpleITK as sitk

    shown = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(shown)
