"""Verb `probe`: how much a backbone knows of organs, before any fine-tuning, on any labelled set.

Patches of training cases fit a k-NN vote and linear maps in closed form, which are scored on the validation cases: with
a few cases and with all, over several draws of them. Nothing is trained by gradient descent. Slices and features are
kept in the folder, so that the same command goes on after an interruption.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator, Field, model_validator

from downstream import cases, probe_report
from downstream.probe_cases import Kept, Patients, keep, patients
from downstream.probe_features import RANDOM, Looked, Network, look, network
from downstream.probe_scores import Fit, discriminant, draw_patches, patch_scores, slice_dice
from launch import settings as base
from launch.distributed import world
from launch.log import tell
from launch.run import Outcome, read_json, write_text
from pretrain.data.window import HuWindow
from pretrain.models.vit import VitSettings
from pretrain.released import read

__all__ = ["Settings", "dry_run", "main"]

Shots = Annotated[int, Field(ge=1)] | Literal["all"]
VERSION = 1  # of the results


def _listed(value: Any) -> Any:
    return (value,) if isinstance(value, str | int | Path) else value


class Settings(base.Settings):
    """Settings of `axial probe`."""

    folder: Path = Field(description="run folder: slices, features, probe.csv, probe.json, probe.png")
    backbone: Annotated[tuple[str, ...], BeforeValidator(_listed), Field(min_length=1)] = Field(
        description="an export, a run folder or a released checkpoint; several as [a, b]; `random`: random weights"
    )
    model: VitSettings | None = Field(
        None, description="shape of `random`; null: that of the first other backbone, or a ViT-B of one channel"
    )
    dataset: Path | None = Field(None, description="nnU-Net raw data set: imagesTr, labelsTr, dataset.json")
    images: Path | None = Field(None, description="folder of scans, in place of a data set")
    labels: Path | None = Field(None, description="folder of their label maps")
    pairs: Path | None = Field(None, description="JSON or Parquet list of image, label, patient; in place of folders")
    names: Path | None = Field(
        None, description="dataset.json that names the labels; null: the one beside them, or none"
    )
    leave_out: tuple[str, ...] = Field((), description="cases that are not used")
    split: cases.Split = Field(cases.Split(), description="which cases validate; the others fit")
    shots: Annotated[tuple[Shots, ...], BeforeValidator(_listed), Field(min_length=1)] = Field(
        (1, 5, 10, "all"), description="training cases that fit; all: every one of them"
    )
    draws: int = Field(3, ge=1, description="draws of the cases of each few-shot number")
    blocks: Annotated[tuple[int, ...], BeforeValidator(_listed), Field(min_length=1)] = Field(
        (-1,), description="blocks whose patches are probed, each by itself; negative from the end"
    )
    size: int = Field(384, gt=0, description="pixels of a slice's longer side, rounded to whole patches")
    slices: int = Field(4, ge=1, description="slices of a training case, spread over those that hold a label")
    val_slices: int | None = Field(
        8, ge=1, description="slices of a validation case, spread over those that hold a label; null: all of these"
    )
    patches: int = Field(8000, ge=2, description="patches that fit, and patches that are scored, classes balanced")
    neighbours: int = Field(20, ge=1, description="nearest neighbours that vote")
    temperature: float = Field(0.07, gt=0, description="a neighbour's vote is exp(cosine / temperature)")
    ridge: float = Field(0.01, gt=0, description="penalty of the linear maps on standardised features")
    seed: int = Field(0, ge=0, description="of the draws of cases, slices and patches, and of random weights")
    workers: int = Field(0, ge=0, description="processes that read the scans; 0: one for each core")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")

    @model_validator(mode="after")
    def _one_source(self) -> Settings:
        folders = self.images is not None or self.labels is not None
        if [self.dataset is not None, folders, self.pairs is not None].count(True) != 1:
            raise ValueError("give one of: dataset; images and labels; pairs")
        if folders and (self.images is None or self.labels is None):
            raise ValueError("give both images and labels, two folders")
        for name in ("backbone", "shots", "blocks"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name} names one of {list(values)} twice")
        return self


def main(settings: Settings) -> Outcome:
    """Probes every backbone; writes probe.csv, probe.json and probe.png, and prints the table.

    CaseError, ProbeError, ReleasedError: data set, scans or backbone cannot be used.
    """
    found, training, validation = _chosen(settings)
    with world(settings.device) as here:
        networks = [(net, _blocks(settings.blocks, net)) for net in _networks(settings)]
        counts = dict.fromkeys(training, settings.slices) | dict.fromkeys(validation, settings.val_slices)
        kept = keep(found, counts, settings.folder / "slices", settings.seed, settings.workers)
        labels = found.labels or _unnamed([one for some in kept.values() for one in some])
        shots = _shots(settings, training)
        tell(
            f"probe: {len(training)} cases fit, {len(validation)} are scored, {len(labels.organs)} organs; "
            f"shots {', '.join(str(shot) for shot, _ in shots)}"
        )
        rows: list[dict[str, Any]] = []
        for net, blocks in networks:
            every = [one for some in kept.values() for one in some]
            folder = settings.folder / "features" / net.mark
            looked = look(net, every, blocks, settings.size, folder, here.device)
            by_case = _by_patient(kept, looked)
            for block in blocks:
                rows += _probed(settings, net, block, by_case, (training, validation), shots, labels)
    about = {"training": training, "validation": validation, "organs": list(labels.organs)}
    made, text = probe_report.write(settings.folder, rows, {"settings": settings.model_dump(mode="json"), **about})
    print(text)
    return Outcome(made=tuple(str(path) for path in made))


def dry_run(settings: Settings) -> str:
    """Which cases would fit and which would be scored. Raises as `main` does, but for scans and backbones."""
    _, training, validation = _chosen(settings)
    lines = []
    for what, names in (("fit", training), ("are scored", validation)):
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        lines.append(f"{len(names)} cases {what}: {', '.join(names[:5])}{more}")
    return "\n".join(lines)


def _chosen(settings: Settings) -> tuple[Patients, list[str], list[str]]:
    """The scans, and the names of those that fit and of those that are scored."""
    found = patients(settings.dataset, settings.images, settings.labels, settings.pairs, settings.names)
    unknown = sorted(set(settings.leave_out) - set(found.pairs))
    if unknown:
        raise cases.CaseError(f"leave_out names {unknown}, which are no cases; there are {sorted(found.pairs)[:5]}")
    names = [name for name in found.pairs if name not in settings.leave_out]
    if not isinstance(settings.split.fold, int):
        raise cases.CaseError(f"split.fold={settings.split.fold}: a probe has one fold; give its number")
    training, validation = cases.split(names, settings.split, settings.dataset)
    if not training or not validation:
        raise cases.CaseError(f"{len(training)} case(s) to fit and {len(validation)} to score; change `split`")
    return found, training, validation


def _networks(settings: Settings) -> list[Network]:
    """All are loaded at once, so that a wrong one is told before any work."""
    real = [given for given in settings.backbone if given != RANDOM]
    like, window = settings.model, HuWindow()
    if real and RANDOM in settings.backbone:
        first = read(Path(real[0]).expanduser())
        like, window = like or first.settings, first.window
    like = like or VitSettings(size="b", in_channels=1)
    return [network(given, like, window, settings.seed, tell) for given in settings.backbone]


def _blocks(blocks: Sequence[int], net: Network) -> list[int]:
    depth = len(net.model.blocks)
    wrong = [block for block in blocks if not -depth <= block < depth]
    if wrong:
        raise cases.CaseError(f"blocks: {net.name} has {depth} blocks, 0 to {depth - 1}, and no {wrong}")
    return list(dict.fromkeys(block % depth for block in blocks))


def _unnamed(kept: Sequence[Kept]) -> cases.Labels:
    """Organs called by the values that occur in any scan."""
    values = sorted({value for one in kept for value in one.values} - {0})
    if not values:
        raise cases.CaseError("no label map holds a label; give others")
    return cases.Labels({f"label {value}": (value,) for value in values}, (0, *values))


def _shots(settings: Settings, training: Sequence[str]) -> list[tuple[int | str, list[list[str]]]]:
    """Each number of shots with its draws of training cases; numbers that there are not enough cases for are told."""
    found: list[tuple[int | str, list[list[str]]]] = []
    for shot in settings.shots:
        if shot == "all":
            found.append((shot, [list(training)]))
        elif shot > len(training):
            tell(f"probe: shots {shot} left out, there are {len(training)} training cases")
        else:
            draws = [np.random.default_rng([settings.seed, 4, shot, draw]) for draw in range(settings.draws)]
            found.append((shot, [sorted(rng.choice(training, shot, replace=False).tolist()) for rng in draws]))
    if not found:
        raise cases.CaseError(f"shots: all are more than the {len(training)} training cases; add `all`")
    return found


def _by_patient(kept: Mapping[str, Sequence[Kept]], looked: Sequence[Looked]) -> dict[str, list[Looked]]:
    ready = iter(looked)
    return {name: [next(ready) for _ in some] for name, some in kept.items()}


def _probed(
    settings: Settings,
    net: Network,
    block: int,
    scans: Mapping[str, Sequence[Looked]],
    sides: tuple[Sequence[str], Sequence[str]],
    shots: Sequence[tuple[int | str, list[list[str]]]],
    labels: cases.Labels,
) -> list[dict[str, Any]]:
    """A row for each draw of each number of shots, read again where an earlier start left them."""
    kept = {name: [one.kept.key for one in some] for name, some in scans.items()}
    given = settings.model_dump(mode="json", include={"patches", "neighbours", "temperature", "ridge", "seed", "size"})
    organs = {organ: list(values) for organ, values in labels.organs.items()}
    facts = [VERSION, net.mark, block, kept, given, sides, shots, organs, labels.values, labels.ignore]
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    path = settings.folder / "results" / f"{net.mark}_{block}.json"
    ready = read_json(path)
    if ready is None or ready.get("key") != key:
        ready = {"key": key, "rows": _score(settings, block, scans, sides[1], shots, labels)}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(ready) + "\n")
    return [{"backbone": net.name, "block": block, **row} for row in ready["rows"]]


def _score(
    settings: Settings,
    block: int,
    scans: Mapping[str, Sequence[Looked]],
    validation: Sequence[str],
    shots: Sequence[tuple[int | str, list[list[str]]]],
    labels: cases.Labels,
) -> list[dict[str, Any]]:
    values = sorted(labels.values)
    held = [one for name in validation for one in scans[name]]
    fit = Fit(settings.neighbours, settings.temperature, settings.ridge)
    asked = draw_patches(held, block, values, settings.patches, np.random.default_rng([settings.seed, 5]))
    if not len(asked.classes):
        raise cases.CaseError("no validation slice shows a labelled body; give other cases, or a larger size")
    maps = []
    rows: list[dict[str, Any]] = []
    for shot, draws in shots:
        for draw, names in enumerate(draws):
            rng = np.random.default_rng([settings.seed, 6, len(names), draw])
            some = [one for name in names for one in scans[name]]
            known = draw_patches(some, block, values, settings.patches, rng)
            if not len(known.classes):
                raise cases.CaseError(f"no slice of {', '.join(names[:5])} shows a body; leave it out with leave_out=")
            maps.append(discriminant(known, fit.ridge))
            rows.append({"shots": shot, "draw": draw, "cases": names, **patch_scores(known, asked, fit)})
    tables = np.stack([slice_dice(one, block, maps, values, labels.organs) for one in held], 1)  # [maps, scans, organs]
    for row, table in zip(rows, tables, strict=True):
        row["pixel/dice"] = probe_report.organ_means(table, list(labels.organs))
    return rows
