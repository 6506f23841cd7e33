"""Which cases validate: named ones, a share of them, or one fold, of ours or of nnU-Net's `splits_final.json`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from data_curation.folds import FOLD, FOLDS, drawn, fold_of
from downstream.labels import CaseError
from launch import settings as base

__all__ = ["SPLITS", "Split", "read_folds", "split", "split_file"]

SPLITS = "splits_final.json"

_Fold = Annotated[int, Field(ge=0)]


class Split(base.Settings):
    """Which cases validate: named ones, or a fraction, or one fold. Folds are those of nnU-Net's splits_final.json
    where the data set has one; else drawn by the numbers in the cases' names, so the same on every machine, and the
    default fold of a whole benchmark is the one that curation holds out."""

    fold: _Fold | Literal["all"] = Field(
        FOLD,
        description="which of the folds validates (used when neither val nor val_fraction is given); all: each in turn",
    )
    folds: int = Field(FOLDS, ge=1, description="how many folds the cases are cut into")
    file: Path | None = Field(
        None, description="nnU-Net's splits_final.json; null: the one in the data set's folder, where there is one"
    )
    val: tuple[str, ...] | None = Field(None, description="names of the validation cases; an empty list: no validation")
    val_fraction: float | None = Field(None, gt=0, lt=1, description="share of the cases that validates")

    @model_validator(mode="after")
    def _one_way(self) -> Split:
        ways = [name for name in ("file", "val", "val_fraction") if getattr(self, name) is not None]
        if len(ways) > 1:
            raise ValueError(f"give {' or '.join(ways)}, not both")
        if self.fold == "all":
            if ways and ways != ["file"]:
                raise ValueError(f"fold: all goes over the folds, and {ways[0]} names the cases; give one of them")
        elif self.fold >= self.folds:
            raise ValueError(f"fold {self.fold} does not exist among {self.folds} folds, numbered from 0")
        return self


def split(names: Sequence[str], settings: Split, folder: Path | None = None) -> tuple[list[str], list[str]]:
    """Names of the training and of the validation cases, sorted and disjoint.

    `folder` is the data set's, in which a splits_final.json may lie. Cases that such a file does not name are in
    neither list. CaseError: cases that are not there, or none left to train on.
    """
    assert settings.fold != "all", "whoever asks for all folds asks for one after the other"
    ordered = sorted(names)
    path = split_file(settings, folder)
    if settings.val is not None:
        unknown = sorted(set(settings.val) - set(ordered))
        if unknown:
            raise CaseError(f"split.val names {unknown}, which the data set does not have; it has {_some(ordered)}")
        held = set(settings.val)
    elif settings.val_fraction is not None:
        held = set(drawn(ordered)[: max(1, round(len(ordered) * settings.val_fraction))])
    elif path is not None:
        return _from_file(path, settings.fold, settings.folds, ordered)
    elif len(ordered) < settings.folds:
        raise CaseError(f"{len(ordered)} case(s) cannot make {settings.folds} folds; set split.val to a list of names")
    else:
        held = set(fold_of(ordered, settings.fold, settings.folds))
    if len(held) >= len(ordered):
        raise CaseError(f"all {len(ordered)} case(s) are for validation, none is left to train on; change `split`")
    return [name for name in ordered if name not in held], [name for name in ordered if name in held]


def split_file(settings: Split, folder: Path | None) -> Path | None:
    """The splits_final.json that these settings go by, if any."""
    if settings.file is not None or settings.val is not None or settings.val_fraction is not None:
        return settings.file
    beside = folder / SPLITS if folder is not None else None
    return beside if beside is not None and beside.is_file() else None


def _from_file(path: Path, fold: int, folds: int, names: Sequence[str]) -> tuple[list[str], list[str]]:
    listed = read_folds(path)
    if len(listed) != folds:
        raise CaseError(f"{path} has {len(listed)} fold(s) and split.folds is {folds}; set split.folds={len(listed)}")
    train, val = (set(part) for part in listed[fold])
    unknown = sorted((train | val) - set(names))
    if unknown:
        raise CaseError(
            f"{path}: fold {fold} names {_some(unknown)}, which the data set does not have; it has {_some(names)}"
        )
    if both := sorted(train & val):
        raise CaseError(f"{path}: fold {fold} has {_some(both)} both to train on and to validate; keep one of them")
    if not train:
        raise CaseError(f"{path}: fold {fold} has no case to train on; correct it, or set split.val")
    return sorted(train), sorted(val)


def read_folds(path: Path) -> list[tuple[list[str], list[str]]]:
    """(train, val) of each fold of nnU-Net's splits_final.json. CaseError: it is none."""
    try:
        listed: Any = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise CaseError(f"split.file: {path} is not there; give nnU-Net's {SPLITS}, or leave it out") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as fault:
        raise CaseError(f"{path}: not JSON ({fault}); copy it again") from None
    folds = listed if isinstance(listed, list) else [None]
    parts = [tuple(fold.get(part) if isinstance(fold, dict) else None for part in ("train", "val")) for fold in folds]
    found = list[Any]()
    for number, (train, val) in enumerate(parts):
        if not all(isinstance(part, list) and all(isinstance(name, str) for name in part) for part in (train, val)):
            raise CaseError(f'{path}: fold {number} is no {{"train": [names], "val": [names]}}; correct it')
        found.append((train, val))
    return found


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f", ... ({len(names)})" if len(names) > 5 else "")
