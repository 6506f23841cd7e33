"""Verb `convert`: a public data set as it is downloaded -> nnU-Net's raw format, version 2.

Where images and labels lie, which labels there are and who is for testing is the catalogue's knowledge. What is not
taken is listed in refused.csv with the reason. ConvertError (a ValueError): the data set cannot be converted at all.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import Field, field_validator

from data_curation.aside import sweep
from data_curation.catalogue import CATALOGUE, Case, cases
from data_curation.dataset import TEST_SET, DataSet
from data_curation.folds import FOLDS, fold_of
from downstream.convert_case import RECORDS, Record, Task, convert_case, is_packed
from downstream.convert_labels import structure_files
from downstream.sharing import shared
from downstream.splits import SPLITS
from launch import settings as base
from launch.documents import near
from launch.run import Outcome, command, write_text

__all__ = ["REGIONS", "ConvertError", "Regions", "Settings", "dry_run", "main"]

Refusal = tuple[str, str, str]  # source, reason, detail


class ConvertError(ValueError):
    """A data set that cannot be converted, and what to do."""


@dataclass(frozen=True)
class Regions:
    """Labels that overlap: organ -> label values, and what is written for each, later ones over earlier ones."""

    organs: Mapping[str, tuple[int, ...]]
    order: tuple[int, ...]


# What challenges score where it is not the label values themselves; as nnU-Net's own conversions have it.
REGIONS: Mapping[str, Regions] = MappingProxyType(
    {"kits23": Regions({"kidney": (1, 2, 3), "masses": (2, 3), "tumour": (2,)}, (1, 3, 2))}
)


class Settings(base.Settings):
    """Settings of `axial convert`."""

    name: str = Field(description="a data set with labels; `axial catalogue` lists them")
    root: Path = Field(description="folder of the data set, as it was unpacked")
    folder: Path = Field(description="folder to make, such as nnUNet_raw/Dataset218_AMOS22")
    link: bool = Field(
        False, description="link files instead of copying them, where both lie on one file system: no space is needed"
    )
    structures: tuple[str, ...] | None = Field(
        None, description="of a set with one file an organ: which ones, as labels 1, 2, ...; null: all, by name"
    )
    unknown_spacing: bool = Field(False, description="take scans whose header says 1 x 1 x 1 mm, which is not true")
    workers: int = Field(0, ge=0, description="processes that share the cases; 0: one after the other")

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in CATALOGUE:
            raise ValueError(f"no data set is called so{near(name, CATALOGUE)} (there are: {', '.join(CATALOGUE)})")
        return name


@dataclass(frozen=True)
class _Plan:
    """The cases to convert, what is ruled out, and the labels: `organs` as in dataset.json."""

    tasks: list[Task]
    refused: list[Refusal]
    organs: Mapping[str, int | list[int]]
    order: tuple[int, ...]
    population: tuple[str, ...]  # patients over whom folds are drawn, as curation draws them
    ending: str


def main(settings: Settings) -> Outcome:
    """Converts case by case, then writes dataset.json, splits_final.json, cases.csv and refused.csv."""
    entry, plan = CATALOGUE[settings.name], _plan(settings)
    for part in ("imagesTr", "labelsTr", RECORDS, *{f"{kind}{task.part}" for task in plan.tasks for kind in _KINDS}):
        (settings.folder / part).mkdir(parents=True, exist_ok=True)
        sweep(settings.folder / part)
    records = _converted(plan.tasks, settings.workers)
    made = [record for record in records if not record.reason]
    refused = plan.refused + [(one.image, one.reason, one.detail) for one in records if one.reason]
    write_text(settings.folder / "refused.csv", _csv(("source", "reason", "detail"), sorted(refused)))
    training = [record for record in made if record.part == "Tr"]
    if not training:
        raise ConvertError(
            f"{entry.name}: none of {len(plan.tasks)} case(s) could be converted to train on; "
            f"{settings.folder / 'refused.csv'} tells why"
        )
    folds = _folds(plan, training)
    write_text(settings.folder / SPLITS, json.dumps(folds, indent=1) + "\n")
    write_text(settings.folder / "cases.csv", _cases(made, folds))
    described = _described(entry, settings, plan, training)
    write_text(settings.folder / "dataset.json", json.dumps(described, indent=1, ensure_ascii=False) + "\n")
    print(_told(entry, plan, made, refused, folds))
    folder = settings.folder
    given = f"dataset={folder}"
    following = command("plan", given, "folder=PLANS"), command("finetune", given, "folder=RUN", "backbone=FILE")
    return Outcome(made=(f"{folder}/dataset.json", f"{folder}/refused.csv"), next=following)


def dry_run(settings: Settings) -> str:
    """What would be converted; only headers are read."""
    plan = _plan(settings)
    parts = Counter(task.part for task in plan.tasks)
    counted = f"{settings.name}: {parts['Tr']} cases to train on, {parts['Ts']} of the {TEST_SET}, {plan.ending}"
    return "\n".join([counted, _labels(plan), *_reasons(plan.refused)])


_KINDS = ("images", "labels")


def _plan(settings: Settings) -> _Plan:
    """What lies below the root, sorted into tasks and refusals."""
    entry = CATALOGUE[settings.name]
    if not any(place.reason == "label" or place.label for place in entry.places):
        raise ConvertError(
            f"{entry.name}: the catalogue knows no labels of it; write dataset.json and folders yourself"
        )
    if settings.folder.resolve().is_relative_to(settings.root.resolve()):
        raise ConvertError(f"{settings.folder} lies in {settings.root}, which is read; choose a folder beside it")
    found, refused = cases(entry.name, settings.root)
    if unsplit := [detail for _, reason, detail in refused if reason == "no_split"]:
        raise ConvertError(f"{entry.name}: {unsplit[0]}")
    chosen: dict[str, tuple[Case, str]] = {}
    for case in found:
        name, part = _name(case), "Ts" if case.held_out == TEST_SET else "Tr"
        if part == "Tr" and case.label is None:
            refused.append((case.source, "unlabelled", "no label lies where the data set keeps them: not to train on"))
        elif name in chosen:
            other = chosen[name][0].source
            refused.append((case.source, "same_patient", f"{other} is of the same patient: the first is taken"))
        else:
            chosen[name] = (case, part)
    labelled = [case.patient for case in found if case.label is not None and case.held_out != TEST_SET]
    labels = {case.label for case, _ in chosen.values() if case.label is not None}
    organs, order, values = _organs(entry, settings.structures, labels)
    ending = _ending(case for case, _ in chosen.values())
    tasks = [
        Task(case, name, part, settings.folder, ending, values, settings.link, settings.unknown_spacing)
        for name, (case, part) in sorted(chosen.items())
    ]
    return _Plan(tasks, refused, organs, order, entry.train_ids or tuple(labelled), ending)


def _name(case: Case) -> str:
    """A patient's own name, and the data set's before one that is a mere number."""
    return f"{case.dataset}_{case.patient}" if case.patient.isdigit() else case.patient.replace("/", "_")


def _organs(
    entry: DataSet, wanted: Sequence[str] | None, labels: Iterable[Path]
) -> tuple[dict[str, int | list[int]], tuple[int, ...], dict[str, int]]:
    """The labels of dataset.json, regions_class_order, and organ -> value in the files."""
    if entry.labels is not None:
        if wanted is not None:
            raise ConvertError(
                f"structures is for sets with one file an organ; {entry.name} has label maps: leave it out"
            )
        values = {name.replace(" ", "_"): number for number, name in entry.labels.items()}
        regions = REGIONS.get(entry.name)
        if regions is None:
            return {"background": 0, **{name: number for number, name in entry.labels.items()}}, (), values
        given = {name: list(own) if len(own) > 1 else own[0] for name, own in regions.organs.items()}
        return {"background": 0, **given}, regions.order, values
    there = sorted({name for folder in labels if folder.is_dir() for name in structure_files(folder)})
    names = list(dict.fromkeys(wanted)) if wanted is not None else there
    if unknown := [name for name in names if name not in there]:
        hint = near(unknown[0], there)
        raise ConvertError(
            f"structures: no case has a file of {', '.join(unknown)}{hint}; there are {', '.join(there)}"
        )
    if not 0 < len(names) < 255:
        raise ConvertError(f"structures: {len(names)} organs; a label map holds 1 to 254 of them, name those to take")
    values = {name: number for number, name in enumerate(names, 1)}
    return {"background": 0, **values}, (), values


def _ending(chosen: Iterable[Case]) -> str:
    """nnU-Net wants one ending for all files: what they have, else .nii.gz."""
    for case in chosen:
        files = [case.image.path, *([case.label] if case.label is not None else [])]
        if not all(path.is_file() and not is_packed(path) for path in files):
            return ".nii.gz"
    return ".nii"


def _converted(tasks: Sequence[Task], workers: int) -> list[Record]:
    results = shared(convert_case, tasks, [task.name for task in tasks], max(workers, 1), "convert")
    if lost := [result for result in results if isinstance(result, str)]:
        raise ConvertError(f"{lost[0]}; the same command goes on, with fewer workers")
    return [result for result in results if isinstance(result, Record)]


def _folds(plan: _Plan, training: Sequence[Record]) -> list[dict[str, list[str]]]:
    """The folds of curation, of which fold 0 is held out of a corpus, without the cases that are not here."""
    patients = {task.name: task.case.patient for task in plan.tasks}
    names = sorted(record.name for record in training)
    folds = []
    for fold in range(FOLDS):
        held = fold_of(plan.population, fold)
        val = [name for name in names if patients[name] in held]
        folds.append({"train": [name for name in names if name not in set(val)], "val": val})
    return folds


def _described(entry: DataSet, settings: Settings, plan: _Plan, training: Sequence[Record]) -> dict[str, Any]:
    """dataset.json. Files whose slices lie along another axis need nnU-Net's reader that turns them."""
    described: dict[str, Any] = {
        "name": entry.name,
        "description": entry.title,
        "reference": entry.home_page,
        "citation": entry.citation,
        "licence": "; ".join(f"{one.text} ({one.source})" for one in entry.licences),
        "converted_by": "axial convert",
        "channel_names": {"0": "CT"},
        "labels": dict(plan.organs),
        "numTraining": len(training),
        "file_ending": plan.ending,
    }
    if plan.order:
        described["regions_class_order"] = list(plan.order)
    if any(record.turned for record in training):
        described["overwrite_image_reader_writer"] = "NibabelIOWithReorient"
    return described


def _csv(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([" ".join(cell.split()) for cell in row] for row in rows)
    return text.getvalue()


def _cases(made: Sequence[Record], folds: Sequence[Mapping[str, Sequence[str]]]) -> str:
    held = {name: str(number) for number, fold in enumerate(folds) for name in fold["val"]}
    rows = [
        (one.name, f"images{one.part}", held.get(one.name, ""), one.image, one.label, "; ".join(one.notes))
        for one in made
    ]
    return _csv(("case", "part", "fold", "image", "label", "notes"), rows)


def _told(
    entry: DataSet,
    plan: _Plan,
    made: Sequence[Record],
    refused: Sequence[Refusal],
    folds: Sequence[Mapping[str, Sequence[str]]],
) -> str:
    parts = Counter(record.part for record in made)
    marked = sum(1 for record in made if record.part == "Ts" and record.label)
    held = " (what curation holds out)" if entry.benchmark else ""
    lines = [
        f"{entry.name}: {parts['Tr']} cases to train on; {parts['Ts']} of the {TEST_SET}, {marked} with labels",
        _labels(plan),
        f"folds validate {', '.join(str(len(fold['val'])) for fold in folds)} cases; fold 0{held} is the default",
        *([] if folds[0]["val"] else ["fold 0 has none of these cases: choose another one with split.fold"]),
        f"licence: {entry.licence}",
        *_reasons(refused),
    ]
    noted = [record for record in made if record.notes]
    lines += [f"  {record.name}: {'; '.join(record.notes)}" for record in noted[:10]]
    if len(noted) > 10:
        lines.append(f"  ... and notes on {len(noted) - 10} more cases, in cases.csv")
    return "\n".join(lines)


def _labels(plan: _Plan) -> str:
    return f"labels: {', '.join(f'{name} {value}' for name, value in plan.organs.items())}"


def _reasons(refused: Sequence[Refusal]) -> list[str]:
    counted = Counter(reason for _, reason, _ in refused)
    return [f"refused: {count} {reason}" for reason, count in sorted(counted.items())]
