"""Verb `predict`: one model or several and images in, label maps out, each on its image's own grid.

NIfTI, NRRD, MetaImage and DICOM are read. An image that cannot be read, or whose label map could not say where it lies,
is listed with its reason and the rest goes on. predicted.csv says of which image each label map is. One that is there
is not made again unless its image was changed, so the same command goes on where it was stopped.
"""

from __future__ import annotations

import csv
import errno
import itertools
import json
import traceback
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from data_curation.aside import sweep
from data_curation.finding import KINDS
from data_curation.volumes import Found, VolumeError
from downstream.allocator import pages_kept
from downstream.cases import CaseError, file_ending
from downstream.ensemble import Ensemble, load_models, model_files
from downstream.geometry import HARDLY_CT
from downstream.inference import Window
from downstream.naming import Refused, cases, ending, is_data_set
from downstream.notes import FILE as NOTES
from downstream.notes import add_notes, gathered_notes
from downstream.predict_parts import Part, as_known, parts_of, share_of, shares, whole_of
from downstream.predicting import predict_image
from downstream.record import FILE as RECORD
from downstream.record import Entry, entry_of, read_record, write_record
from launch import settings as base
from launch.distributed import WAIT_S, World, barrier, from_first, world
from launch.progress import progress
from launch.run import USER_ERRORS, Outcome, command, write_text

__all__ = ["Settings", "main", "parts"]

_SHOWN = 20  # notes printed; all are in the file


class Settings(base.Settings):
    """Settings of `axial predict`."""

    folder: Path = Field(description="where the label maps go")
    model: Path | tuple[Path, ...] = Field(
        description="model.safetensors of a finetune run, or the run's folder; several of them, or a folder of runs "
        "fold_0, fold_1, ...: the mean of their probabilities decides"
    )
    images: Path = Field(description="folder of images, or one image; CASE_0000.nii.gz becomes CASE.nii.gz")
    window: Window = Field(Window(), description="how slices are gone over")
    dicom: Literal["auto", "nifti", "seg"] = Field(
        "auto",
        description="what a DICOM series gets: a NIfTI file (a sheared one of a tilted gantry) or a DICOM SEG; auto: "
        "NIfTI, but a SEG where its slices lean or lie at uneven distances",
    )
    probabilities: bool = Field(False, description="also CASE.npz with probabilities [heads, k, j, i], as nnU-Net")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    share: str | None = Field(
        None,
        pattern=r"^\d+/[1-9]\d*$",
        description="i/n: one of n parts, in FOLDER/parts/i; set by a command that cuts itself into them (array.parts)",
    )

    @model_validator(mode="after")
    def _apart(self) -> Settings:
        if self.folder.resolve() == self.images.resolve():
            raise ValueError(
                f"folder and images are both {self.images}: label maps would be taken for images; choose another folder"
            )
        return self


def main(settings: Settings) -> Outcome:
    """Predicts every image; with several ranks each takes its share. Not ok if nothing could be predicted."""
    model_files(settings.model)  # before a folder is listed and a device is taken
    if settings.images.is_dir() and is_data_set(settings.images):
        raise CaseError(f"{settings.images} is a data set with labels; give its imagesTs, or imagesTr, as images=")
    with world(settings.device, WAIT_S) as here:
        ensemble = load_models(settings.model, here.device)
        work = from_first(partial(_work, settings, ensemble))
        with pages_kept() if here.device.type == "cpu" else nullcontext():
            own = _predict_all(ensemble, work, settings, here)
        write_text(settings.folder / f".refused_{here.rank}.json", json.dumps(own))
        barrier()
        if here.rank:
            return Outcome()
        refused = sorted(work.refused + _gathered(settings.folder, here.size))
    return _ended(settings, ensemble, work.images, refused)


def parts(settings: Settings, most: int) -> list[Settings]:
    """The same in parts, `most` at most: each a run of its own; empty where there is nothing to be cut."""
    cut = shares(settings.folder, settings.images, most) if settings.share is None else {}
    return [settings.model_copy(update={"folder": folder, "share": share}) for share, folder in cut.items()]


@dataclass(frozen=True)
class _Work:
    """All images by name, what is none with its reason, and the names whose label map is still to be made."""

    images: dict[str, tuple[Found, ...]]
    refused: list[Refused]
    todo: list[str]


def _work(settings: Settings, ensemble: Ensemble) -> _Work:
    """Lists the images and makes the folder ready. A label map that is there afterwards is of the image as it is now:
    one of an image that was changed is taken away, and only then the record says what the image is like."""
    folder, channels = settings.folder, [channel.name for channel in ensemble.headers[0].channels]
    whole, record = whole_of(folder, settings.share), read_record(folder)
    others = parts_of(folder, ensemble.digest) if settings.share is None else []
    before = read_record(whole)
    known = as_known([before, record, *(part.record for part in others)])
    images, refused = cases(settings.images, channels, whole, known)
    if not images and not refused:
        raise CaseError(f"{settings.images}: no image; {', '.join(KINDS)} and DICOM are read")
    now = {name: entry_of(founds, settings.images) for name, founds in images.items()}
    if settings.share is not None:
        at_whole = settings.model_copy(update={"folder": whole})
        open_ = [name for name in images if before.get(name) != now[name] or not _is_done(at_whole, name, images[name])]
        images = {name: images[name] for name in share_of(settings.share, open_)}
        now, refused = {name: now[name] for name in images}, []  # what is no image is told by the whole
    folder.mkdir(parents=True, exist_ok=True)
    _same_model(folder, ensemble)
    _clear(folder)
    gathered_notes(folder)
    changed = {name: _made(settings, name, founds) for name, founds in images.items() if record.get(name) != now[name]}
    strange = [path for name, made in changed.items() if name not in record for path in made]
    if strange:
        raise CaseError(
            f"{strange[0]} is there and {folder / RECORD} does not say of which image it is; move it away, or choose "
            "another folder="
        )
    for path in itertools.chain.from_iterable(changed.values()):
        path.unlink()
    write_record(folder, record | now)
    todo = [name for name, founds in images.items() if not _is_done(settings, name, founds)]
    taken = {name for name in todo if any(_taken(part, settings, name, images[name], now[name]) for part in others)}
    return _Work(images, refused, [name for name in todo if name not in taken])


def _taken(part: Part, settings: Settings, name: str, found: tuple[Found, ...], entry: Entry) -> bool:
    """Takes up what a part has made of an image; is the image done with it?"""
    called = part.name_of(entry)
    endings = [path.name.removeprefix(name) for path in _paths(settings, name, found)]
    endings += [".npz"] if settings.probabilities else []
    if called is None or not part.give(called, settings.folder, name, endings):
        return False
    add_notes(settings.folder, 0, name, [note] if (note := part.notes.get(called)) else [])
    return _is_done(settings, name, found)


def _made(settings: Settings, name: str, found: tuple[Found, ...]) -> list[Path]:
    paths = [*_paths(settings, name, found), settings.folder / f"{name}.npz"]
    return [path for path in paths if path.is_file()]


def _is_done(settings: Settings, name: str, found: tuple[Found, ...]) -> bool:
    endings = {path.suffix for path in _made(settings, name, found)}
    return bool(endings - {".npz"}) and (".npz" in endings or not settings.probabilities)


def _ended(
    settings: Settings, ensemble: Ensemble, images: dict[str, tuple[Found, ...]], refused: list[Refused]
) -> Outcome:
    with (settings.folder / "refused.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "reason", "detail"), *refused])
    for name, reason, detail in refused:
        print(f"not predicted: {name}: {reason}: {detail}")
    _tell(gathered_notes(settings.folder))
    made = [path for name, found in images.items() for path in _paths(settings, name, found) if path.is_file()]
    endings = [file_ending(path) for path in made if path.suffix != ".dcm"]
    _describe(settings.folder, ensemble, endings)
    print(f"{len(made)} of {len(made) + len(refused)} images have their label map in {settings.folder}")
    if settings.dicom == "auto" and (objects := [path.name for path in made if path.suffix == ".dcm"]):
        print(f"as DICOM SEG, since their slices lean or lie unevenly: {', '.join(objects)}")
    gone = sorted(read_record(settings.folder).keys() - images.keys()) if settings.share is None else ()
    if gone:
        more = ", ..." if len(gone) > 10 else ""
        print(f"{RECORD} names {len(gone)} case(s) of images that are no longer there: {', '.join(gone[:10])}{more}")
    scores = f"folder={settings.folder}_scores"
    following = (command("evaluate", f"predictions={settings.folder}", "labels=LABELS", scores),)
    if settings.share is not None:  # the whole brings it together, and says of what there is none
        return Outcome(made=(str(settings.folder),))
    return Outcome(made=(str(settings.folder),), next=following if endings else (), ok=bool(made))


def _tell(notes: Mapping[str, str]) -> None:
    """Those first that may make a label map worthless."""
    listed = sorted(notes.items(), key=lambda one: (HARDLY_CT not in one[1], one))
    for name, text in listed[:_SHOWN]:
        print(f"{'WARNING' if HARDLY_CT in text else 'note'}: {name}: {text}")
    if len(listed) > _SHOWN:
        print(f"notes on {len(listed) - _SHOWN} more images are in {NOTES}")


def _predict_all(ensemble: Ensemble, work: _Work, settings: Settings, here: World) -> list[Refused]:
    """This rank's share of what is to be made; what could not be, with its reason. One image does not end the run."""
    refused = []
    mine = work.todo[here.rank :: here.size]
    for name in progress(mine, len(mine), "predict", "images", active=here.rank == 0):
        found = work.images[name]
        path, *otherwise = _paths(settings, name, found)
        scores = settings.folder / f"{name}.npz" if settings.probabilities else None
        try:
            tell = partial(add_notes, settings.folder, here.rank, name)
            predict_image(ensemble, found, path, settings.window, scores, next(iter(otherwise), None), tell)
        except Exception as fault:
            if isinstance(fault, OSError) and fault.errno in (errno.ENOSPC, errno.EDQUOT):
                raise  # so would all the others
            if not isinstance(fault, USER_ERRORS):
                traceback.print_exc()  # ours: it is to be seen, but the other images are made all the same
            refused.append((found[0].source or str(found[0].path), *_why(fault)))
    return refused


def _why(fault: Exception) -> tuple[str, str]:
    if isinstance(fault, VolumeError):
        return fault.reason, fault.message
    return "channels" if isinstance(fault, CaseError) else type(fault).__name__, " ".join(str(fault).split())


def _paths(settings: Settings, name: str, found: tuple[Found, ...]) -> list[Path]:
    """Where the label map of an image goes, and where it goes instead."""
    path = settings.folder / (name + ending(found[0], settings.dicom))
    auto = settings.dicom == "auto" and found[0].kind == "dicom"
    return [path, settings.folder / f"{name}.dcm"] if auto else [path]


def _describe(folder: Path, ensemble: Ensemble, endings: Sequence[str]) -> None:
    """dataset.json and plans.json, from which nnU-Net's `nnUNetv2_evaluate_folder` knows labels and file ending."""
    labels = ensemble.labels
    named: dict[str, int | list[int]] = {"background": 0}
    named |= {name: values[0] if len(values) == 1 else list(values) for name, values in labels.organs.items()}
    if labels.ignore is not None:
        named["ignore"] = labels.ignore
    described = {
        "channel_names": {str(i): channel.name for i, channel in enumerate(ensemble.headers[0].channels)},
        "labels": named,
        "numTraining": 0,
        "file_ending": max(sorted(set(endings)), key=endings.count) if endings else ".nii.gz",
    }
    if any(len(values) > 1 for values in labels.organs.values()):
        described["regions_class_order"] = list(labels.order) or [values[0] for values in labels.organs.values()]
    write_text(folder / "dataset.json", json.dumps(described, indent=1) + "\n")
    plans = {"dataset_name": "axial", "plans_name": "axial", "label_manager": "LabelManager", "configurations": {}}
    write_text(folder / "plans.json", json.dumps(plans, indent=1) + "\n")


def _same_model(folder: Path, ensemble: Ensemble) -> None:
    """Label maps of two models must not lie in one folder."""
    note, digest = folder / "model.sha256", ensemble.digest
    if note.is_file() and note.read_text().strip() != digest:
        several = ", ".join(map(str, ensemble.files))
        raise CaseError(f"{folder} holds label maps of another model than {several}; choose another folder")
    write_text(note, digest + "\n")


def _clear(folder: Path) -> None:
    """Take away what a killed process was writing; where ITK writes, `.PID.NAME`."""
    sweep(folder)
    for path in folder.iterdir():
        process, _, name = path.name[1:].partition(".")
        if path.name.startswith(".") and process.isdigit() and name and path.is_file():
            path.unlink(missing_ok=True)


def _gathered(folder: Path, ranks: int) -> list[Refused]:
    refused: list[Refused] = []
    for rank in range(ranks):
        part = folder / f".refused_{rank}.json"
        refused += [(name, reason, detail) for name, reason, detail in json.loads(part.read_text())]
        part.unlink()
    return refused
