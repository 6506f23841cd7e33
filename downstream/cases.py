"""A data set in nnU-Net's raw format: imagesTr/CASE_0000.nii.gz, labelsTr/CASE.nii.gz, dataset.json of version 1 or 2.

Several channels are several files, CASE_0000, CASE_0001, ... Instead of the two folders a dataset.json of version 2 may
have a table `dataset` of paths. CaseError (a ValueError): the folder or one of its cases cannot be trained on; its text
names case, value and remedy. Everything here is checked before any training; faults are gathered and told together.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_curation.finding import KINDS
from downstream.labels import EXAMPLE, IGNORE, CaseError, Labels, parse_labels, told
from downstream.splits import Split, split

__all__ = [
    "CHANNEL",
    "IGNORE",
    "CaseError",
    "Dataset",
    "Labels",
    "RawCase",
    "Split",
    "case_name",
    "file_ending",
    "label_files",
    "open_dataset",
    "read_labels",
    "split",
    "told",
]

# nnU-Net's names of normalisations that a network here cannot be given; any name but CT is another kind of image.
_REFUSED = ("nonorm", "rescale_to_0_1", "rgb_to_0_1")
CHANNEL = re.compile(r"(.+)_(\d{4})")  # name of a file of one of several channels: case, number


@dataclass(frozen=True)
class RawCase:
    """Where one case lies; `images` holds a file for each channel."""

    name: str
    images: tuple[Path, ...]
    label: Path


@dataclass(frozen=True)
class Dataset:
    """A checked folder: every case has an image of each channel and a label."""

    name: str
    folder: Path
    labels: Labels
    channels: tuple[str, ...]
    cases: tuple[RawCase, ...]


def open_dataset(folder: Path) -> Dataset:
    """Reads `dataset.json` and pairs images with labels by file name, no voxel. CaseError tells every fault at once."""
    path = folder / "dataset.json"
    described = _dataset_json(path)
    labels, channels = parse_labels(described, path), _channels(described, path)
    endings = _endings(described, path)
    faults: list[str] = []
    if "dataset" in described:
        cases = _listed(described["dataset"], path, len(channels), faults)
    else:
        cases = _paired(folder, endings, channels, faults)
    expected = described.get("numTraining")
    if not faults and isinstance(expected, int) and expected != len(cases):
        faults.append(
            f"dataset.json says numTraining {expected}, the folder has {len(cases)} cases; restore files or correct it"
        )
    if faults:
        raise CaseError(told(f"{folder}: {len(faults)} fault(s)", faults))
    if not cases:
        raise CaseError(f"{folder}: no case; imagesTr needs files CASE_0000{endings[0]}, labelsTr CASE{endings[0]}")
    return Dataset(str(described.get("name", folder.name)), folder, labels, channels, tuple(cases))


def read_labels(path: Path) -> Labels:
    """The organs that a `dataset.json` names."""
    return parse_labels(_dataset_json(path), path)


def case_name(path: Path) -> str:
    """`CASE` of `CASE_0000.nii.gz`, `CASE.nrrd` or a DICOM folder `CASE`, also where that is called `.`."""
    ending = file_ending(path)
    if ending:
        return path.name.removesuffix(ending).removesuffix("_0000")
    return (path if path.name not in ("", "..") else path.resolve()).name or "image"


def file_ending(path: Path, endings: Iterable[str] = KINDS) -> str:
    """The first of the endings that the file has, as it is written there; "" if it has none of them."""
    name = path.name.lower()
    return next((path.name[-len(ending) :] for ending in endings if name.endswith(ending.lower())), "")


def label_files(folder: Path) -> dict[str, Path]:
    """Case name -> label map, of a folder of label maps."""
    return _files(folder, KINDS)


def _paired(folder: Path, endings: tuple[str, ...], channels: tuple[str, ...], faults: list[str]) -> list[RawCase]:
    """The cases of imagesTr and labelsTr; what is missing, or too much, is added to `faults`."""
    images, marks = (_files(folder / part, endings) for part in ("imagesTr", "labelsTr"))
    cases: list[RawCase] = []
    used: set[str] = set()
    for name, label in marks.items():
        keys = [f"{name}_{number:04d}" for number in range(len(channels))]
        if len(channels) == 1 and keys[0] not in images and name in images:
            keys = [name]  # without the number of its only channel
        used.update(keys)
        lacking = [key for key in keys if key not in images]
        if lacking:
            needed = ", ".join(f"{key}{file_ending(label)}" for key in lacking)
            which = "image" if len(channels) == 1 else f"image of {len(lacking)} of {len(channels)} channels"
            faults.append(f"{name}: {label.name} has no {which}; put {needed} into {folder / 'imagesTr'}")
        else:
            cases.append(RawCase(name, tuple(images[key] for key in keys), label))
    alone: dict[str, Path] = {}
    for key in sorted(set(images) - used):
        numbered = CHANNEL.fullmatch(key)
        if numbered is not None and numbered[1] in marks:
            faults.append(
                f"{numbered[1]}: {images[key].name} is a channel that dataset.json does not name, it names "
                f"{_numbered(channels)}; add it there, or take the file away"
            )
            continue
        several = len(channels) > 1 and numbered is not None
        alone.setdefault(numbered[1] if several and numbered else key.removesuffix("_0000"), images[key])
    for case, image in alone.items():
        faults.append(f"{case}: {image.name} has no label; put {case}{file_ending(image)} into {folder / 'labelsTr'}")
    return cases


def _listed(table: Any, path: Path, channels: int, faults: list[str]) -> list[RawCase]:
    """The cases of nnU-Net's table `dataset`: paths from the data set's folder, $NAMES of the environment expanded."""
    if not isinstance(table, dict):
        raise CaseError(f'{path}: `dataset` is no table {{CASE: {{"images": [paths], "label": path}}}}')
    cases = []
    for name, entry in sorted(table.items()):
        if Path(name).name != name:
            faults.append(f"{name}: a case is called as its files will be, without a folder; rename it in `dataset`")
            continue
        images, label = (entry.get("images"), entry.get("label")) if isinstance(entry, dict) else (None, None)
        given: list[Any] = [*images, label] if isinstance(images, list) else []
        if len(given) < 2 or not all(isinstance(one, str) for one in given):
            faults.append(f'{name}: its entry in `dataset` is no {{"images": [paths], "label": path}}')
            continue
        files = [path.parent / os.path.expandvars(one) for one in given]
        missing = [file for file in files if not file.is_file()]
        if missing:
            unset = " (a $NAME in it is not set)" if any("$" in str(file) for file in missing) else ""
            faults.append(f"{name}: {', '.join(map(str, missing))} is not there{unset}; correct `dataset`")
        elif unread := [file for file in files if not file_ending(file)]:
            faults.append(f"{name}: {unread[0].name} is none of the kinds that are read: {', '.join(KINDS)}")
        elif len(files) != channels + 1:
            faults.append(
                f"{name}: {len(files) - 1} image(s) in `dataset`, and dataset.json names {channels} channel(s)"
            )
        else:
            cases.append(RawCase(name, tuple(files[:-1]), files[-1]))
    return cases


def _channels(described: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    """Names of the channels in the order of their numbers; one called CT holds HU."""
    key = next((name for name in ("channel_names", "modality") if described.get(name)), "")
    given = described[key] if key else {"0": "CT"}
    if not isinstance(given, dict) or not all(isinstance(name, str) for name in given.values()):
        raise CaseError(f'{path}: {key} is {given!r}; a table of numbers and names is needed, such as {{"0": "CT"}}')
    names = {str(number): name for number, name in given.items()}
    if set(names) != {str(number) for number in range(len(names))}:
        raise CaseError(f"{path}: {key} numbers its channels {', '.join(names)}; they are numbered from 0, no gap")
    ordered = tuple(names[str(number)] for number in range(len(names)))
    for number, name in enumerate(ordered):
        if name.strip().casefold() in _REFUSED:
            raise CaseError(
                f"{path}: {key} calls channel {number} {name!r}, a normalisation that is not supported; call it CT if "
                "its values are HU, else by the name of the modality: each image is then brought to mean 0, deviation 1"
            )
    return ordered


def _numbered(channels: Iterable[str]) -> str:
    return ", ".join(f"{number:04d} {name}" for number, name in enumerate(channels))


def _endings(described: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    given = described.get("file_ending")
    if not given:
        return tuple(KINDS)
    if not isinstance(given, str) or not file_ending(Path("x" + str(given))):
        raise CaseError(f"{path}: file_ending {given!r} is not read here; convert the images to {', '.join(KINDS)}")
    return (given,)


def _files(folder: Path, endings: Iterable[str]) -> dict[str, Path]:
    """Stem -> file of the volumes of a folder, sorted; hidden files (macOS leaves `._x` beside x) are none."""
    if not folder.is_dir():
        raise CaseError(f"{folder} is not a folder; nnU-Net's raw format has imagesTr, labelsTr and dataset.json")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        ending = file_ending(path, endings)
        if ending and not path.name.startswith("."):
            stem = path.name.removesuffix(ending)
            if stem in found:
                raise CaseError(f"{stem}: both {found[stem].name} and {path.name} in {folder}; keep one")
            found[stem] = path
    return found


def _dataset_json(path: Path) -> dict[str, Any]:
    try:
        described = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise CaseError(f"{path} is not there; it names the labels: " + EXAMPLE) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as fault:
        raise CaseError(f"{path}: not JSON ({fault})") from None
    if not isinstance(described, dict) or not isinstance(described.get("labels"), dict):
        raise CaseError(f"{path}: no table `labels`, such as {EXAMPLE}")
    return described
