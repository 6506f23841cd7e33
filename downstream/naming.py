"""Which images there are to predict, what their label maps are called, and which files are channels of one image."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from data_curation.finding import KINDS
from data_curation.volumes import Found, find
from downstream import geometry
from downstream.cases import CHANNEL, CaseError, case_name, file_ending
from downstream.channels import kind_of

__all__ = ["Identity", "Refused", "cases", "ending", "identity", "is_data_set", "one_image"]

Refused = tuple[str, str, str]  # image, reason, detail
Identity = tuple[str, str]  # folder of an image below images=, and its series or file: what it is known by later


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


def identity(found: Found, images: Path) -> Identity:
    """What tells an image from all others below `images`, whatever else is put there."""
    root = images if images.is_dir() else images.parent
    folder = found.path if found.kind == "dicom" else found.path.parent
    return folder.relative_to(root).as_posix().encode("utf-8", "backslashreplace").decode(), found.series


def one_image(path: Path, channel: str = "CT") -> Found:
    """The one image at a path: a file, or the folder of one DICOM series. CaseError: there is none, or several."""
    several = _at(path)
    usable = [found for found in several if _fits(found, channel)] or several
    if len(usable) != 1:
        named = ", ".join(found.source or found.path.name for found in usable[:5])
        raise CaseError(f"{path} holds {len(usable)} images ({named or 'none'}); give one, or use `axial predict`")
    return usable[0]


def cases(
    images: Path,
    channels: Sequence[str] = ("CT",),
    folder: Path | None = None,
    known: Mapping[Identity, str] | None = None,
) -> tuple[dict[str, tuple[Found, ...]], list[Refused]]:
    """Case name -> the file of each channel, of one file or of everything below a folder; below sub-folders these come
    first in the name. Also what cannot be a case, with its reason; it takes no name.

    With one channel each image is a case, under the name that `known` gives it. Other images that would have one name
    get a number each, in the order of their files, and none takes another's name; that of an image which is gone goes
    to none but the one that would be called so. With several channels, CASE_0000, CASE_0001, ... of one folder are a
    case. What lies below `folder`, where label maps go, is no image.
    """
    listed, refused = _listed(images, channels, folder, known or {})
    if len(channels) > 1:
        found_by_name, more = _grouped(listed, channels)
        return found_by_name, refused + more
    held: dict[int, str] = {}
    left = dict(known or {})
    for number, (_, found) in enumerate(listed):
        name = left.pop(identity(found, images), None)  # once: no two images may have one name
        if name is not None:
            held[number] = name
    given = set(held.values())
    times = Counter(name for name, _ in listed)
    taken = {*(known or {}).values(), *(name for name, count in times.items() if count == 1)}
    found_by_name = {}
    for number, (name, found) in enumerate(listed):
        if number in held:
            name = held[number]
        elif times[name] > 1 or name in given:
            name = next(free for n in itertools.count(1) if (free := f"{name}_{n}") not in taken)
            taken.add(name)
        found_by_name[name] = (found,)
    return found_by_name, refused


def _listed(
    images: Path, channels: Sequence[str], folder: Path | None, known: Mapping[Identity, str]
) -> tuple[list[tuple[str, Found]], list[Refused]]:
    """Images with the names that they would have if they were alone."""
    several = [found for path in _siblings(images, len(channels)) for found in _at(path)]
    if images.is_file() and not several:
        raise CaseError(f"{images} is no image; {', '.join(KINDS)} and DICOM are read")
    refused: list[Refused] = []
    usable: list[Found] = []
    maps = set(known.values())
    for found in several:
        source = found.source or str(found.path)
        if folder is not None and images.is_dir() and _is_below(found, folder, images):
            if not found.reason and _stem(found.path) not in maps:
                detail = f"lies below folder={folder}, where label maps go, and is none of them: move it elsewhere"
                refused.append((source, "in_folder", detail))
        elif any(_fits(found, channel) for channel in channels):
            usable.append(found)
        else:
            refused.append((source, found.reason, found.detail))
    crowded = Counter(found.path for found in usable if found.kind == "dicom")
    root = images if images.is_dir() else images.parent
    number = "_0000" if len(channels) == 1 else ""  # of the only channel
    return [
        (_name(found, root, images.is_file() or crowded[found.path] > 1, number), found) for found in usable
    ], refused


def _at(path: Path) -> list[Found]:
    if path.is_file() and file_ending(path):
        return [geometry.found_at(path)]
    if not path.exists():
        raise CaseError(f"{path} is not there; give a folder of images, or one image")
    return list(find(path))


def _fits(found: Found, channel: str) -> bool:
    """Can it be that channel, as far as the headers say? One slice can; another modality can where no CT is meant."""
    return found.reason in ("", "single_slice") or (found.reason == "not_ct" and kind_of(channel) != "ct")


def _is_below(found: Found, folder: Path, images: Path) -> bool:
    inside = folder.resolve()
    return not images.resolve().is_relative_to(inside) and found.files[0].parent.resolve().is_relative_to(inside)


def _grouped(
    listed: Sequence[tuple[str, Found]], channels: Sequence[str]
) -> tuple[dict[str, tuple[Found, ...]], list[Refused]]:
    """The files of each case in the order of the channels. Every channel that a case lacks is named."""
    files: dict[str, dict[int, list[Found]]] = {}
    refused: list[Refused] = []
    wanted = ", ".join(f"CASE_{i:04d} ({name})" for i, name in enumerate(channels))
    for name, found in listed:
        parts = CHANNEL.fullmatch(name)
        if parts is None or int(parts[2]) >= len(channels):
            detail = f"the model has {len(channels)} channels, files are called {wanted}: rename it"
            refused.append((found.source or str(found.path), "channels", detail))
        elif not _fits(found, channels[int(parts[2])]):
            refused.append((found.source or str(found.path), found.reason, found.detail))
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


def _siblings(images: Path, channels: int) -> list[Path]:
    """The files of all channels of the case that one file is a channel of; the path alone where it is none."""
    parts = CHANNEL.fullmatch(_stem(images))
    if channels == 1 or parts is None or not images.is_file():
        return [images]
    others = [path for path in sorted(images.parent.iterdir()) if file_ending(path) or path.suffix == images.suffix]
    return [path for path in others if (other := CHANNEL.fullmatch(_stem(path))) and other[1] == parts[1]]


def _stem(file: Path) -> str:
    """The name without the ending of an image; that of DICOM is one of letters, or the last part of an identifier."""
    ending = file_ending(file)
    return file.name.removesuffix(ending) if ending else file.stem if file.suffix[1:].isalpha() else file.name


def _name(found: Found, root: Path, crowded: bool, number: str) -> str:
    """`CASE` of root/CASE_0000.nii.gz, `a_b` of root/a/b.nii.gz and of the DICOM folder root/a/b. A DICOM image of one
    file has that file's name where its folder holds several."""
    if found.kind != "dicom" or (crowded and len(found.files) == 1):
        *parts, file = found.files[0].relative_to(root).parts
        return "_".join([*parts, _stem(Path(file)).removesuffix(number)])
    parts = [*found.path.relative_to(root).parts[:-1]] if found.path != root else []
    return "_".join([*parts, case_name(found.path)])
