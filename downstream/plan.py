"""Verb `plan`: a labelled data set -> what it is like (fingerprint.json) and settings to fine-tune with (plan.yaml).

PlanError (a ValueError): nothing fits the memory, or the patch does not fit the backbone.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from downstream.cases import CaseError, Dataset, Split, open_dataset, split, told
from downstream.channels import ZSCORE, channels_through, kind_of
from downstream.choices import Decoder, Tuning
from downstream.context import Context
from downstream.decoders import pyramid
from downstream.fingerprint import Facts, fingerprint, read_facts, table
from downstream.normalisation import ct_window
from downstream.plan_memory import Network, step_bytes
from downstream.plan_yaml import Choice, Plan, written
from downstream.segmentation import PatchSettings
from downstream.settings import Settings as FinetuneSettings
from downstream.splits import read_folds, split_file
from downstream.tuning import full
from launch import settings as base
from launch.run import Outcome, command, read_json, write_text
from pretrain.data.window import HuWindow
from pretrain.models.vit import VitSettings
from pretrain.parallel import Recompute
from pretrain.released import load_backbone

__all__ = ["PlanError", "Settings", "dry_run", "main", "sided", "wanted_spacing"]

PLAN, FINGERPRINT = "plan.yaml", "fingerprint.json"
RESERVE = 0.2  # of the memory, for kernels' scratch space, a GPU's context, waste
_WORTH = 1.5  # recomputation costs a third more time: it must allow that many times the patches
_SIZE = {896: "MedDINOv3's, who found it better than 640"}
_LONG, _SHORT = frozenset(("left", "lt", "right", "rt")), frozenset("lr")


class PlanError(ValueError):
    """No plan can be made: what stands against it and what to do."""


class Settings(base.Settings):
    """Settings of `axial plan`."""

    dataset: Path = Field(description="nnU-Net raw data set: imagesTr, labelsTr, dataset.json")
    folder: Path = Field(description="where fingerprint.json, plan.yaml and what was read of each case are written")
    backbone: Path | None = Field(None, description="what will be fine-tuned; null: a ViT-B with one channel")
    decoder: Decoder = Field(pyramid.Settings(), description="what makes classes of the backbone's maps")
    tuning: Tuning = Field(full.Settings(), description="what is trained of the backbone")
    context: Context = Field(Context(), description="neighbours of a slice that are seen with it (2.5D)")
    memory_gib: float = Field(24.0, gt=0, description="memory of the GPU, or what may be used of it")
    patch: int = Field(896, ge=1, description="side of a patch, px")
    split: Split | None = Field(None, description="which cases validate; null: by the number of cases")
    workers: int = Field(0, ge=0, description="processes that read cases; 0: one after the other")


def main(settings: Settings) -> Outcome:
    """Reads every case, writes fingerprint.json and plan.yaml. A plan that a person has changed stays as it is."""
    dataset = open_dataset(settings.dataset)
    choice, why = _split(settings.split, dataset)
    training = split([case.name for case in dataset.cases], _first(choice), dataset.folder)[0]
    vit, window = _backbone(settings)
    fit = _fit(_network(settings, dataset, vit, window), settings.patch, settings.memory_gib)
    cases = read_facts(dataset, settings.folder / "cases", settings.workers)
    faults = [case.fault for case in cases if case.fault]
    taught = [case for case in cases if case.name in set(training) and not case.fault]
    if not taught:
        raise CaseError(told(f"{dataset.folder}: no case to train on can be used", faults))
    found = fingerprint(dataset, cases, training)
    plan = Plan(
        about=f"{dataset.name}: {found['training']} cases to train on, {settings.memory_gib:g} GiB of memory",
        given=_given(settings),
        spacing=wanted_spacing(taught, settings.patch),
        size=Choice(
            settings.patch,
            f"{_SIZE.get(settings.patch, 'as asked for')}; a multiple of the backbone's {vit.patch_size}",
        ),
        batch=fit.batch,
        recompute=fit.recompute,
        windows=_windows(dataset, taught, window),
        flip=_flip(dataset.labels.organs),
        split=Choice(choice.model_dump(mode="json", exclude_unset=True), why),
    )
    made = _write(settings.folder, written(plan), found)
    print(table(found))
    if faults:
        print(told(f"{len(faults)} of {len(cases)} cases cannot be used; finetune will refuse the data set", faults))
    following = command("finetune", str(made), "folder=RUN", *([] if settings.backbone else ["backbone=FILE"]))
    return Outcome((f"{settings.folder}/{FINGERPRINT}", str(made)), (following,), ok=not faults)


def dry_run(settings: Settings) -> str:
    """What a step needs, and how many cases would be read."""
    dataset = open_dataset(settings.dataset)
    fit = _fit(_network(settings, dataset, *_backbone(settings)), settings.patch, settings.memory_gib)
    return f"{len(dataset.cases)} cases to read\nbatch_size {fit.batch.value}: {fit.batch.why}"


def _given(settings: Settings) -> dict[str, Any]:
    """What goes into the plan as it was given."""
    given: dict[str, Any] = {"dataset": str(settings.dataset)}
    if settings.backbone is not None:
        given["backbone"] = str(settings.backbone)
    for name in ("decoder", "tuning", "context"):
        value = getattr(settings, name)
        if value != Settings.model_fields[name].default:
            given[name] = value.model_dump(mode="json")
    return given


def _write(folder: Path, text: str, found: dict[str, Any]) -> Path:
    """Both files; the path of the plan, another one where a person has changed the earlier plan."""
    path = folder / PLAN
    before = read_json(folder / FINGERPRINT) or {}
    if path.is_file() and path.read_text(encoding="utf-8") != text and _sha(path) != before.get("plan_sha256"):
        path = folder / "plan.new.yaml"
        print(f"{folder / PLAN} was changed by hand and stays; the new one is {path.name}")
    write_text(path, text)
    kept = before.get("plan_sha256") if path.name != PLAN else hashlib.sha256(text.encode()).hexdigest()
    write_text(folder / FINGERPRINT, json.dumps({**found, "plan_sha256": kept}, indent=1, ensure_ascii=False) + "\n")
    base.load(FinetuneSettings, path, ["folder=run"])  # or it is no plan
    return path


def _sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _first(choice: Split) -> Split:
    return choice.model_copy(update={"fold": 0}) if choice.fold == "all" else choice


def _split(given: Split | None, dataset: Dataset) -> tuple[Split, str]:
    """Which cases validate, and why these."""
    if given is not None:
        return given, "as it was asked for"
    path = split_file(Split(), dataset.folder)
    if path is not None:
        folds = read_folds(path)
        fold = next((number for number, (train, val) in enumerate(folds) if train and val), None)
        if fold is None:
            return Split(fold=0, folds=max(len(folds), 1)), f"no fold in {path.name} has a case to validate"
        why = "" if fold == 0 else ", the first with a case to validate"
        text = f"fold {fold} of the {len(folds)} in {path.name}{why}; fold: all trains a model of each"
        return Split(fold=fold, folds=len(folds)), text
    count = len(dataset.cases)
    if count >= Split().folds:
        return Split(fold=0), f"a fifth of {count} cases, the one that curation holds out; fold: all trains five models"
    if count > 1:
        return Split(
            fold=0, folds=count
        ), f"{count} cases: one validates; fold: all trains a model without each of them"
    return Split(val=()), "there is one case: nothing validates"


def _backbone(settings: Settings) -> tuple[VitSettings, HuWindow | None]:
    """What will be trained, and the HU window it was pretrained with, None of random weights."""
    window: HuWindow | None = None
    if settings.backbone is None:
        vit: VitSettings = FinetuneSettings.model_fields["model"].default
    else:
        loaded, window = load_backbone(settings.backbone, say=lambda _: None)
        vit = loaded.settings
    if settings.patch % vit.patch_size:
        near = max(1, round(settings.patch / vit.patch_size)) * vit.patch_size
        raise PlanError(f"patch {settings.patch} is no multiple of the backbone's {vit.patch_size}; take {near}")
    return vit, window


def _network(settings: Settings, dataset: Dataset, vit: VitSettings, window: HuWindow | None) -> Network:
    """With channels as the normalisation makes them: several windows of CT are several."""
    channels = channels_through(dataset.channels, window)
    return Network(vit, settings.decoder, settings.tuning, dataset.labels, channels, settings.context)


@dataclass(frozen=True)
class _Fit:
    batch: Choice
    recompute: Choice


def _fit(network: Network, patch: int, memory_gib: float) -> _Fit:
    """The largest batch up to the recipe's that fits; recomputation only where it allows many more patches."""
    budget, recipe = memory_gib * (1 - RESERVE) * 2**30, PatchSettings().batch_size
    plain, used = _most(network, patch, budget, "none")
    again, less = (plain, used) if plain == recipe else _most(network, patch, budget, "blocks")
    if not again:
        needed = math.ceil(10 * less / (1 - RESERVE) / 2**30) / 10
        text = f"memory_gib={memory_gib:g}: one patch of {patch} px needs {needed:g} GiB; a smaller patch needs less"
        raise PlanError(text)
    recompute: Recompute = "blocks" if again >= _WORTH * plain else "none"
    batch, used = (again, less) if recompute == "blocks" else (plain, used)
    why = f"a step needs {used / 2**30:.1f} GiB of {memory_gib:g}, of which a fifth is left free; "
    if batch == recipe:
        why += "not more than the recipe has"
    else:
        parts = next(count for count in range(1, recipe + 1) if recipe % count == 0 and recipe // count <= batch)
        why += f"for the recipe's {recipe} set batch_size {recipe} and accumulate {parts}"
    other = "all fits without" if batch == recipe else f"with blocks {again} patches would fit, in a third more time"
    return _Fit(Choice(batch, why), Choice(recompute, f"with none {plain} fit" if recompute == "blocks" else other))


def _most(network: Network, patch: int, budget: float, recompute: Recompute) -> tuple[int, int]:
    """How many patches fit, at most as many as the recipe has, and the bytes of them; of one where none fits."""
    one, two = (step_bytes(network, patch, count, recompute=recompute) for count in (1, 2))
    found = min(PatchSettings().batch_size, max(0, int((budget - (2 * one - two)) // max(two - one, 1))))
    known = {0: one, 1: one, 2: two}
    while True:
        used = known[found] if found in known else step_bytes(network, patch, found, recompute=recompute)
        if found == 0 or used <= budget:
            return found, used
        found -= 1


def wanted_spacing(cases: Sequence[Facts], patch: int) -> Choice:
    """In-plane mm at which the median slice fills a patch: MedDINOv3's rule, 0.78125 mm x 512 / 896 for KiTS23."""
    view = float(np.median([case.view for case in cases]))
    own = float(np.median([min(case.spacing[1:]) for case in cases]))
    spacing = float(f"{view / patch:.4g}")
    why = f"the median slice of {view:.0f} mm fills the patch; pixels are {own:.3g} mm as stored"
    if own > 2 * spacing:
        why += f", so they are enlarged {own / spacing:.1f} times; a smaller patch is faster"
    return Choice(spacing, why)


def _windows(dataset: Dataset, cases: Sequence[Facts], pretrained: HuWindow | None) -> Choice:
    """A window for each channel, or the name of the rule."""
    if pretrained is not None and pretrained.channels > 1:
        return Choice("pretraining", f"the backbone was trained on {pretrained.channels} windows of HU as channels")
    made, why = [], []
    for number, name in enumerate(dataset.channels):
        if kind_of(name) == "ct":
            window = ct_window(case.histograms[number] for case in cases)
            made.append({key: round(value, 4) for key, value in window.model_dump().items()})
            why.append(f"{name}: 0.5 to 99.5 % of the foreground's HU, its mean and deviation")
        else:
            made.append(ZSCORE.model_dump())
            why.append(f"{name}: each image's own mean and deviation, kept in thousandths")
    return Choice(made, "; ".join(why))


def _flip(organs: Iterable[str]) -> Choice:
    names = sided(organs)
    if not names:
        return Choice(["y", "x"], "no organ is named left or right")
    some = f"{', '.join(names[:4])}{' ...' if len(names) > 4 else ''}"
    return Choice([], f"left and right are told apart ({some}), and a mirrored y, turned around, is a mirrored x")


def sided(organs: Iterable[str]) -> list[str]:
    """The organs that are one of left and right. A single letter counts where the other side has its like."""
    words = {name: [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+", name)] for name in organs}
    sides: dict[tuple[str, ...], set[str]] = {}
    for parts in words.values():
        for place, word in enumerate(parts):
            if word in _SHORT:
                sides.setdefault((*parts[:place], "", *parts[place + 1 :]), set()).add(word)
    pairs = {key for key, found in sides.items() if len(found) == 2}
    return [
        name
        for name, parts in words.items()
        if any(word in _LONG for word in parts)
        or any(
            word in _SHORT and (*parts[:place], "", *parts[place + 1 :]) in pairs for place, word in enumerate(parts)
        )
    ]
