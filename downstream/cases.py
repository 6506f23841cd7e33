"""A data set in nnU-Net's raw format: imagesTr/CASE_0000.nii.gz, labelsTr/CASE.nii.gz, dataset.json of version 1 or 2.

CaseError (a ValueError): the folder or one of its cases cannot be trained on; its text names case, value and remedy.
Everything here is checked before any training; faults are gathered and told together.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from data_curation.finding import KINDS
from data_curation.folds import FOLD, FOLDS, drawn, fold_of
from launch import settings as base

__all__ = [
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

_SHOWN = 10  # faults told in full; the rest are counted


class CaseError(ValueError):
    """A data-set folder or a case that cannot be used, with its remedy."""


@dataclass(frozen=True)
class Labels:
    """`organs`: name -> its label values, several for a region; `values`: class index -> label value, 0 first."""

    organs: Mapping[str, tuple[int, ...]]
    values: tuple[int, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """A name for each class index; a value that only regions hold is called `label N`."""
        single = {values[0]: name for name, values in self.organs.items() if len(values) == 1}
        return tuple("background" if value == 0 else single.get(value, f"label {value}") for value in self.values)


@dataclass(frozen=True)
class RawCase:
    """Where one case lies."""

    name: str
    image: Path
    label: Path


@dataclass(frozen=True)
class Dataset:
    """A checked folder: every case has an image and a label."""

    name: str
    folder: Path
    labels: Labels
    cases: tuple[RawCase, ...]


class Split(base.Settings):
    """Which cases validate: named ones, or a fraction, or one fold. By the numbers in their names, so the same on every
    machine; the default fold of a whole benchmark is the one that curation holds out."""

    fold: int = Field(
        FOLD, ge=0, description="which of the folds validates (used when neither val nor val_fraction is given)"
    )
    folds: int = Field(FOLDS, ge=2, description="how many folds the cases are cut into")
    val: tuple[str, ...] | None = Field(None, description="names of the validation cases; an empty list: no validation")
    val_fraction: float | None = Field(None, gt=0, lt=1, description="share of the cases that validates")

    @model_validator(mode="after")
    def _one_way(self) -> Split:
        if self.val is not None and self.val_fraction is not None:
            raise ValueError("give val or val_fraction, not both")
        if self.fold >= self.folds:
            raise ValueError(f"fold {self.fold} does not exist among {self.folds} folds, numbered from 0")
        return self


def split(names: Sequence[str], settings: Split) -> tuple[list[str], list[str]]:
    """Names of the training and of the validation cases, sorted and disjoint."""
    ordered = sorted(names)
    if settings.val is not None:
        unknown = sorted(set(settings.val) - set(ordered))
        if unknown:
            raise CaseError(f"split.val names {unknown}, which the data set does not have; it has {_some(ordered)}")
        held = set(settings.val)
    elif settings.val_fraction is not None:
        held = set(drawn(ordered)[: max(1, round(len(ordered) * settings.val_fraction))])
    elif len(ordered) < settings.folds:
        raise CaseError(f"{len(ordered)} case(s) cannot make {settings.folds} folds; set split.val to a list of names")
    else:
        held = set(fold_of(ordered, settings.fold, settings.folds))
    if len(held) >= len(ordered):
        raise CaseError(f"all {len(ordered)} case(s) are for validation, none is left to train on; change `split`")
    return [name for name in ordered if name not in held], [name for name in ordered if name in held]


def open_dataset(folder: Path) -> Dataset:
    """Reads `dataset.json` and pairs images with labels by file name, no voxel. CaseError tells every fault at once."""
    described = _dataset_json(folder / "dataset.json")
    labels = _labels(described, folder / "dataset.json")
    channels = described.get("channel_names") or described.get("modality") or {"0": "CT"}
    if len(channels) != 1:
        raise CaseError(
            f"{folder / 'dataset.json'}: {len(channels)} channels {channels}; give a data set of one CT channel"
        )
    given = described.get("file_ending")
    endings = (given,) if given else tuple(KINDS)
    images, marks = (_files(folder / part, endings) for part in ("imagesTr", "labelsTr"))
    faults, cases, used = [], [], set()
    for name, label in marks.items():
        image = next((key for key in (f"{name}_0000", name) if key in images), None)
        if image is None:
            faults.append(
                f"{name}: {label.name} has no image; put {name}_0000{file_ending(label)} into {folder / 'imagesTr'}"
            )
            continue
        used.add(image)
        cases.append(RawCase(name, images[image], label))
    for name in sorted(set(images) - used):
        case, without = name.removesuffix("_0000"), images[name]
        faults.append(
            f"{case}: {without.name} has no label; put {case}{file_ending(without)} into {folder / 'labelsTr'}"
        )
    expected = described.get("numTraining")
    if not faults and isinstance(expected, int) and expected != len(cases):
        faults.append(
            f"dataset.json says numTraining {expected}, the folder has {len(cases)} cases; restore files or correct it"
        )
    if faults:
        raise CaseError(told(f"{folder}: {len(faults)} fault(s)", faults))
    if not cases:
        raise CaseError(f"{folder}: no case; imagesTr needs files CASE_0000{endings[0]}, labelsTr CASE{endings[0]}")
    return Dataset(str(described.get("name", folder.name)), folder, labels, tuple(cases))


def read_labels(path: Path) -> Labels:
    """The organs that a `dataset.json` names."""
    return _labels(_dataset_json(path), path)


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


def told(heading: str, faults: Sequence[str]) -> str:
    """One text of many faults, the first ones in full."""
    rest = [f"... and {len(faults) - _SHOWN} more"] if len(faults) > _SHOWN else []
    return "\n  ".join([heading + ":", *faults[:_SHOWN], *rest])


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f", ... ({len(names)})" if len(names) > 5 else "")


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
        described = json.loads(path.read_text())
    except FileNotFoundError:
        raise CaseError(f"{path} is not there; it names the labels: " + _EXAMPLE) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as fault:
        raise CaseError(f"{path}: not JSON ({fault})") from None
    if not isinstance(described, dict) or not isinstance(described.get("labels"), dict):
        raise CaseError(f"{path}: no table `labels`, such as {_EXAMPLE}")
    return described


_EXAMPLE = '{"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1}, "file_ending": ".nii.gz"}'


def _labels(described: Mapping[str, Any], path: Path) -> Labels:
    """Version 2 has name -> value or list of values, version 1 value -> name."""
    organs: dict[str, tuple[int, ...]] = {}
    for key, entry in described["labels"].items():
        name, values = (entry, key) if str(key).lstrip("-").isdigit() and isinstance(entry, str) else (key, entry)
        try:
            numbers = tuple(int(value) for value in (values if isinstance(values, list) else [values]))
        except (TypeError, ValueError):
            raise CaseError(f"{path}: label {key!r}: {entry!r} is neither a number nor a list of numbers") from None
        if str(name).lower() == "ignore":
            raise CaseError(f"{path}: a label `ignore` is not supported; give those voxels a class or 0")
        if not numbers or not all(0 <= number <= 255 for number in numbers):
            raise CaseError(f"{path}: label {name!r} has value {values}; label maps are 8 bit, use 0 to 255")
        if numbers != (0,):
            organs[str(name)] = numbers
    values = (0, *sorted({value for numbers in organs.values() for value in numbers} - {0}))
    if len(values) < 2:
        raise CaseError(f"{path}: no label beside the background, such as {_EXAMPLE}")
    return Labels(organs, values)
