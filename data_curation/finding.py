"""What lies below a folder and could be an image: files by name or first bytes, DICOM files as stacks."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_curation import dicom_headers, dicom_stacks, metaimage, nrrd
from data_curation.dicom_headers import Header
from data_curation.grid import VolumeError

__all__ = ["KINDS", "Found", "find", "parts"]

KINDS = {  # of images by their ending; longer endings first
    ".nii.gz": "nifti",
    ".nii": "nifti",
    ".hdr": "nifti",
    ".nrrd": "nrrd",
    ".nhdr": "nrrd",
    ".mha": "metaimage",
    ".mhd": "metaimage",
}
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


@dataclass(frozen=True)
class Found:
    """Something that could be an image. For DICOM `path` is the folder (of several, the one around them) and `files`
    one stack in order, or the multi-frame files of one stack, whose slices are then `frames` in order, each as (index
    into `files`, frame). Else `files` is the one file, or a header and its voxels.

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
    frames: tuple[tuple[int, int], ...] = ()


def find(root: Path, skipped: Counter[str] | None = None) -> Iterator[Found]:
    """Everything below `root` that could be an image, folder by folder in sorted order; of one file, what is in it.

    Links to folders are followed once each. Files that are no images by name or first bytes are counted in `skipped`
    by their ending; what should be an image and cannot be opened is yielded with its reason. DICOM comes last, since
    the slices of a series may lie in several folders.
    """
    skipped = Counter() if skipped is None else skipped
    headers: list[Header] = []
    seen: dict[Any, Any] = {}
    walked = [(root.parent, [root.name], [])] if root.is_file() else _walk(root)
    root = root.parent if root.is_file() else root
    for folder, names, problems in walked:
        for path, detail in problems:
            source = _relative(path, root)
            yield Found(path, (path,), "nifti", source, source, reason="unreadable", detail=detail)
        for name in names:
            path = folder / name
            kind = _kind(path)
            source = _relative(path, root)
            if kind == "dicom":
                headers += dicom_headers.read(path, seen)
            elif kind in ("nifti", "nrrd", "metaimage"):
                yield Found(path, parts(path), kind, source, source)
            elif kind == "unreadable":
                detail = "the file cannot be opened: allow reading it"
                yield Found(path, (path,), "dicom", source, source, reason="unreadable", detail=detail)
            else:
                skipped[kind] += 1
    yield from _series(headers, root)


def parts(path: Path) -> tuple[Path, ...]:
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


def _series(headers: list[Header], root: Path) -> Iterator[Found]:
    """The stacks of the whole data set, since a series may be spread over folders; last, as all headers are needed."""
    stacks = dicom_stacks.stacks(headers)
    in_folder = Counter(folder for stack in stacks for folder in {header.path.parent for header in stack.headers})
    files = Counter(path.parent for path in {header.path for header in headers})
    for stack in stacks:
        first = stack.headers[0]
        lowest = min(header.frame for header in stack.headers)
        paths = tuple(dict.fromkeys(header.path for header in stack.headers))
        folders = {path.parent for path in paths}
        folder = first.path.parent if len(folders) == 1 else Path(os.path.commonpath(folders))
        alone = len(folders) == 1 and in_folder[folder] == 1 and files[folder] > 1
        index = {path: number for number, path in enumerate(paths)}
        frames = tuple((index[header.path], header.frame) for header in stack.headers)
        source = _relative(folder if alone else first.path, root)
        yield Found(
            folder,
            paths,
            "dicom",
            stack.name or source,
            source if lowest < 1 else f"{source}#{lowest}",  # a further stack in a multi-frame file
            first.study,
            first.patient,
            stack.reason,
            stack.detail,
            frames if any(header.frame >= 0 for header in stack.headers) else (),
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
    suffix = next((suffix for suffix in KINDS if name.endswith(suffix)), "")
    if suffix:
        return KINDS[suffix]
    suffix = Path(name).suffix
    if suffix in _OTHER:
        return suffix
    if name.removesuffix(".gz").endswith(".img") and any(path.with_suffix(end).exists() for end in (".hdr", ".HDR")):
        return ".img"  # read through its header
    try:
        if suffix in _DICOM or dicom_headers.looks_like(path):
            return "dicom" if name != "dicomdir" else "dicomdir"
    except OSError:
        return "unreadable"
    return "nifti" if suffix == ".img" else suffix or "files without an ending"


def _relative(path: Path, root: Path) -> str:
    """As text that can be stored: bytes of a name that are no UTF-8 are spelled out."""
    return path.relative_to(root).as_posix().encode("utf-8", "backslashreplace").decode()
