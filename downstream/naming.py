"""Which images there are to predict, what their label maps are called, and which files are channels of one image."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from data_curation.volumes import Found, find
from downstream import geometry
from downstream.cases import CaseError, case_name, file_ending

__all__ = ["Refused", "cases", "ending", "is_data_set"]

Refused = tuple[str, str, str]  # image, reason, detail

_CHANNEL = re.compile(r"(.+)_(\d{4})")


def ending(found: Found, dicom: str = "nifti") -> str:
    """Ending of the label map: the image's, where it can hold it in one file."""
    if found.kind == "dicom" and dicom == "seg":
        return ".dcm"
    if found.kind == "nrrd":
        return ".nrrd"
    if found.kind == "metaimage":
        return ".mha"
    return ".nii" if file_ending(found.path).lower() == ".nii" and found.kind == "nifti" else ".nii.gz"


def is_data_set(folder: Path) -> bool:
    """Is it nnU-Net's raw folder, in which labels lie beside images?"""
    return (folder / "labelsTr").is_dir() and (folder / "imagesTr").is_dir()


def cases(images: Path, channels: Sequence[str] = ("CT",)) -> tuple[dict[str, tuple[Found, ...]], list[Refused]]:
    """Case name -> the file of each channel, of everything below a folder; below sub-folders these come first in the
    name. Also what cannot be a case, with its reason.

    With one channel each image is a case. Those that would have one name get a number each, in the order of their
    files, and none takes another's name. With several, CASE_0000, CASE_0001, ... of one folder are a case.
    """
    if images.is_file() and len(channels) == 1:
        listed: list[tuple[str, Found]] = [(case_name(images), geometry.found_at(images))]
    elif images.is_file():
        listed = [(_stem(path), geometry.found_at(path)) for path in _siblings(images)]
    elif images.is_dir():
        listed = [(_name(found, images, len(channels)), found) for found in find(images)]
    else:
        raise CaseError(f"{images} is not there; images= is a folder of images, or one image")
    if len(channels) > 1:
        return _grouped(listed, channels)
    times = Counter(name for name, _ in listed)
    taken = {name for name, count in times.items() if count == 1}
    found_by_name: dict[str, tuple[Found, ...]] = {}
    for name, found in listed:
        if times[name] > 1:
            name = next(free for n in itertools.count(1) if (free := f"{name}_{n}") not in taken)
            taken.add(name)
        found_by_name[name] = (found,)
    return found_by_name, []


def _grouped(
    listed: Sequence[tuple[str, Found]], channels: Sequence[str]
) -> tuple[dict[str, tuple[Found, ...]], list[Refused]]:
    """The files of each case in the order of the channels. Every channel that a case lacks is named."""
    files: dict[str, dict[int, list[Found]]] = {}
    refused: list[Refused] = []
    wanted = ", ".join(f"CASE_{i:04d} ({name})" for i, name in enumerate(channels))
    for name, found in listed:
        parts = _CHANNEL.fullmatch(name)
        if parts is None or int(parts[2]) >= len(channels):
            detail = f"the model has {len(channels)} channels, files are called {wanted}: rename it"
            refused.append((found.source or str(found.path), "channels", detail))
        else:
            files.setdefault(parts[1], {}).setdefault(int(parts[2]), []).append(found)
    found_by_name = {}
    for case, numbered in files.items():
        missing = [f"{case}_{i:04d} ({name})" for i, name in enumerate(channels) if i not in numbered]
        double = [f"{case}_{i:04d}" for i, several in numbered.items() if len(several) > 1]
        if missing:
            refused.append((case, "channels", f"{', '.join(missing)} not there: put the file beside the others"))
        elif double:
            refused.append((case, "channels", f"{', '.join(double)} is there twice: keep one"))
        else:
            found_by_name[case] = tuple(numbered[i][0] for i in range(len(channels)))
    return found_by_name, refused


def _siblings(image: Path) -> list[Path]:
    """The files of all channels of the case that one file is a channel of; the file alone where it has no number."""
    parts = _CHANNEL.fullmatch(_stem(image))
    if parts is None:
        return [image]
    case = re.compile(re.escape(parts[1]) + r"_\d{4}")
    return [path for path in sorted(image.parent.iterdir()) if file_ending(path) and case.fullmatch(_stem(path))]


def _stem(path: Path) -> str:
    return path.name.removesuffix(file_ending(path))


def _name(found: Found, root: Path, channels: int) -> str:
    """`CASE` of root/CASE_0000.nii.gz, `a_b` of root/a/b.nii.gz and of the DICOM folder root/a/b."""
    parts = found.path.relative_to(root).parts[:-1] if found.path != root else ()
    last = case_name(found.path) if channels == 1 else _stem(found.path)
    return "_".join([*parts, last])
