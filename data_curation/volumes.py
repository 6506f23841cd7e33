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

from data_curation import dicom, metaimage, nifti, nrrd
from data_curation.grid import AIR, Grid, VolumeError, to_lps

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
_READERS = {"nifti": nifti.load, "nrrd": nrrd.load, "metaimage": metaimage.load}
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
_WHOLE = 1e-3  # a fraction below this is noise of float arithmetic
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
    """Something that could be an image. For DICOM `path` is the folder and `files` one stack in order;
    else `files` is the one file, or a header and its voxels.

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
    for folder, names, problems in _walk(root):
        for path, detail in problems:
            source = _relative(path, root)
            yield Found(path, (path,), "nifti", source, source, reason="unreadable", detail=detail)
        headers: list[Path] = []
        for name in names:
            path = folder / name
            kind = _kind(path)
            if kind == "dicom":
                headers.append(path)
            elif kind in ("nifti", "nrrd", "metaimage"):
                source = _relative(path, root)
                yield Found(path, _parts(path), kind, source, source)
            elif kind == "unreadable":
                source = _relative(path, root)
                detail = "the file cannot be opened: allow reading it"
                yield Found(path, (path,), "dicom", source, source, reason="unreadable", detail=detail)
            else:
                skipped[kind] += 1
        yield from _series(folder, headers, root)


def _parts(path: Path) -> tuple[Path, ...]:
    """The file, and the voxels that its header names, or that lie beside it under the same name."""
    suffix = path.suffix.lower()
    if suffix not in (".hdr", ".mhd", ".nhdr"):
        return (path,)
    if suffix != ".hdr":
        try:
            return metaimage.parts(path) if suffix == ".mhd" else nrrd.parts(path)
        except (VolumeError, OSError):
            pass  # `read` says what is wrong with it
    beside = (path.with_suffix(ending) for ending in (".img", ".IMG", ".img.gz", ".IMG.GZ", ".raw", ".zraw", ".raw.gz"))
    return (path, *(voxels for voxels in beside if voxels.is_file()))


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


def _walk(root: Path) -> Iterator[tuple[Path, list[str], list[tuple[Path, str]]]]:
    """Folder, the names of its files, and what cannot be looked into. Each real folder is entered once."""
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
                listed = sorted((entry.name, _what(entry)) for entry in entries)
        except OSError as error:
            yield folder, [], [(folder, f"the folder cannot be listed ({error.strerror}): allow reading it")]
            continue
        waiting += [folder / name for name, what in reversed(listed) if what == "folder" and not _hidden(name)]
        others = [name for name, what in listed if what == "other" and not _hidden(name)]
        text = "a broken link, a pipe or a device, not a file: mend or remove it"
        yield folder, [name for name, what in listed if what == "file"], [(folder / name, text) for name in others]


def _what(entry: os.DirEntry[str]) -> str:
    """Pipes must not be opened, and links may lead to themselves."""
    try:
        return "folder" if entry.is_dir() else "file" if entry.is_file() else "other"
    except OSError:
        return "other"


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
            return "dicom" if name != "dicomdir" else "dicomdir"
    except OSError:
        return "unreadable"
    return "nifti" if suffix == ".img" else suffix or "files without an ending"


def _relative(path: Path, root: Path) -> str:
    """As text that can be stored: bytes of a name that are no UTF-8 are spelled out."""
    return path.relative_to(root).as_posix().encode("utf-8", "backslashreplace").decode()


def read(found: Found) -> Volume:
    """The volume, LPS, as int16 HU. Raises VolumeError, its `reason` a slug, its text with numbers and a remedy."""
    if found.reason:
        raise VolumeError(found.reason, found.detail)
    try:
        with _quiet():
            grid = _load(found)
            voxels, spacing, notes = to_lps(grid)
    except OSError as error:
        raise VolumeError("unreadable", f"{error.strerror or error}: allow reading the file") from None
    hu, rounding, more = _to_hu(voxels)
    return Volume(hu, spacing, found.source or found.path.name, rounding, (*notes, *more))


def _load(found: Found) -> Grid:
    if found.kind == "dicom":
        return dicom.load(found.files)
    return _READERS[found.kind](found.path)


def _to_hu(voxels: NDArray[Any]) -> tuple[NDArray[np.int16], float, list[str]]:
    """C-contiguous int16, the largest rounding, and notes."""
    notes: list[str] = []
    rounding = 0.0
    if voxels.dtype == np.int16:
        hu = np.array(voxels, np.int16, order="C")
    else:
        low, high = voxels.min(), voxels.max()
        if voxels.dtype.kind == "f":
            rounding = _rounding(voxels, float(low), float(high))
        if rounding > _WHOLE:
            notes.append(f"float HU rounded to whole numbers, by at most {rounding:.2f}")
        hu = np.empty(voxels.shape, np.int16)
        outside = 0
        for source, target in zip(voxels, hu, strict=True):  # slice by slice: a float volume is never held twice
            values = np.rint(source) if voxels.dtype.kind == "f" else source
            if low < -32768 or high > 32767:
                outside += int(np.count_nonzero((values < -32768) | (values > 32767)))
                values = np.clip(values, -32768, 32767)
            target[...] = values
        if outside:
            notes.append(f"{outside:,} voxels from {low:.6g} to {high:.6g} cut to -32768..32767")
    lowest = int(hu.min())
    if lowest < AIR and (share := np.count_nonzero(hu == lowest) / hu.size) > 1e-3:
        notes.append(f"padding {lowest} on {share:.1%} of the voxels kept")
    return hu, rounding, notes


def _rounding(voxels: NDArray[Any], low: float, high: float) -> float:
    """Largest distance to a whole number. Raises VolumeError where values cannot be HU: not finite, or normalised."""
    if not np.isfinite(low) or not np.isfinite(high):
        bad = sum(int(np.count_nonzero(~np.isfinite(plane))) for plane in voxels)
        raise VolumeError("not_finite", f"{bad:,} of {voxels.size:,} voxels are NaN or infinite: write them as {AIR}")
    rounding = max(float(np.abs(plane - np.rint(plane)).max()) for plane in voxels)
    if rounding > _WHOLE and high - low < _NOT_HU_RANGE:
        text = f"values run from {low:.3g} to {high:.3g} with fractions, so they are not HU: undo the normalisation"
        raise VolumeError("not_ct", text)
    return rounding


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
