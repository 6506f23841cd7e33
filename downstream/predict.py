"""Verb `predict`: a model and images in, label maps out, each on its image's own grid.

NIfTI, NRRD, MetaImage and DICOM are read. An image that cannot be read is listed with its reason and the rest goes on.
A label map that is there is not made again, so the same command goes on where it was stopped.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from data_curation.finding import KINDS
from data_curation.volumes import Found, VolumeError, find
from downstream import geometry
from downstream.cases import CaseError, case_name, file_ending
from downstream.inference import Window, predict_volume
from downstream.model import Header, SegmentationModel, load_model
from launch import settings as base
from launch.distributed import World, barrier, world
from launch.progress import progress
from launch.run import Outcome, write_text

__all__ = ["Settings", "main", "named", "predict_image"]


class Settings(base.Settings):
    """Settings of `axial predict`."""

    folder: Path = Field(description="where the label maps go")
    model: Path = Field(description="model.safetensors of a finetune run")
    images: Path = Field(description="folder of images, or one image; CASE_0000.nii.gz becomes CASE.nii.gz")
    window: Window = Field(Window(), description="how slices are gone over")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")


def main(settings: Settings) -> Outcome:
    """Predicts every image; with several ranks each takes its share. Not ok if nothing could be predicted."""
    images = named(settings.images)
    if not images:
        raise CaseError(f"{settings.images}: no image; {', '.join(KINDS)} and DICOM are read")
    with world(settings.device) as here:
        model, header = load_model(settings.model, here.device)
        settings.folder.mkdir(parents=True, exist_ok=True)
        if here.rank == 0:
            _same_model(settings.folder, settings.model)
        barrier()
        refused = _predict_all(model, header, images, settings, here)
        write_text(settings.folder / f".refused_{here.rank}.json", json.dumps(refused))
        barrier()
        if here.rank == 0:
            refused = _gathered(settings.folder, here.size)
    if here.rank:
        return Outcome()
    with (settings.folder / "refused.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "reason", "detail"), *refused])
    for name, reason, detail in refused:
        print(f"not predicted: {name}: {reason}: {detail}")
    done = len(images) - len(refused)
    print(f"{done} of {len(images)} images have their label map in {settings.folder}")
    following = (f"axial evaluate predictions={settings.folder} labels=LABELS folder={settings.folder}_scores",)
    return Outcome(made=(str(settings.folder),), next=following if done else (), ok=done > 0)


def _predict_all(
    model: SegmentationModel, header: Header, images: dict[str, Found], settings: Settings, here: World
) -> list[tuple[str, str, str]]:
    """This rank's share of the images; what could not be read, with its reason."""
    refused = []
    mine = list(images.items())[here.rank :: here.size]
    for name, found in progress(mine, len(mine), "predict", "images", active=here.rank == 0):
        path = settings.folder / (name + ending(found))
        if path.is_file():
            continue
        try:
            predict_image(model, header, found, path, settings.window)
        except VolumeError as fault:
            refused.append((found.source or str(found.path), fault.reason, str(fault)))
    return refused


def predict_image(model: SegmentationModel, header: Header, found: Found, path: Path, window: Window) -> None:
    """Reads one image, writes its label map to `path`: size, spacing, origin and directions are the image's own."""
    scan = geometry.read_scan(found)
    labels = predict_volume(model, header, scan.volume, window)
    if not geometry.difference(scan.place, geometry.lps(scan.own)):
        labels = geometry.from_lps(labels, scan.own)
    else:  # the reader resampled an oblique volume
        labels = geometry.align(labels, scan.place, scan.own, str(found.path), least=0.0)
    geometry.write_labelmap(path, labels, scan.own, None if found.kind == "dicom" else found.path)


def ending(found: Found) -> str:
    """Ending of the label map: the image's, where it can hold it in one file."""
    if found.kind == "nrrd":
        return ".nrrd"
    if found.kind == "metaimage":
        return ".mha"
    return ".nii" if file_ending(found.path).lower() == ".nii" and found.kind == "nifti" else ".nii.gz"


def named(images: Path) -> dict[str, Found]:
    """Case name -> image, of everything below a folder; below sub-folders these come first in the name.

    Images that would have one name get a number each, in the order of their files, and none takes another's name.
    """
    if images.is_file():
        listed: Sequence[tuple[str, Found]] = [(case_name(images), geometry.found_at(images))]
    elif images.is_dir():
        listed = [(_name(found, images), found) for found in find(images)]
    else:
        raise CaseError(f"{images} is not there; images= is a folder of images, or one image")
    times = Counter(name for name, _ in listed)
    taken = {name for name, count in times.items() if count == 1}
    found_by_name = {}
    for name, found in listed:
        if times[name] > 1:
            name = next(free for n in itertools.count(1) if (free := f"{name}_{n}") not in taken)
            taken.add(name)
        found_by_name[name] = found
    return found_by_name


def _name(found: Found, root: Path) -> str:
    """`CASE` of root/CASE_0000.nii.gz, `a_b` of root/a/b.nii.gz and of the DICOM folder root/a/b."""
    parts = found.path.relative_to(root).parts[:-1] if found.path != root else ()
    last = case_name(found.path)
    return "_".join([*parts, last])


def _same_model(folder: Path, model: Path) -> None:
    """Label maps of two models must not lie in one folder."""
    with model.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    note = folder / "model.sha256"
    if note.is_file() and note.read_text().strip() != digest:
        raise CaseError(f"{folder} holds label maps of another model than {model}; choose another folder")
    write_text(note, digest + "\n")


def _gathered(folder: Path, ranks: int) -> list[tuple[str, str, str]]:
    refused: list[tuple[str, str, str]] = []
    for rank in range(ranks):
        part = folder / f".refused_{rank}.json"
        refused += [(name, reason, detail) for name, reason, detail in json.loads(part.read_text())]
        part.unlink()
    return sorted(refused)
