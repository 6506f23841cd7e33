"""Verb `finetune`: a backbone and a labelled data set in, one segmentation model out.

The recipe is MedDINOv3's (arXiv 2509.02379): a decoder over several blocks, two learning rates, nnU-Net's loss.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import nn

from downstream.augment import Augmentation
from downstream.cases import CaseError, Dataset, Split, open_dataset, split
from downstream.decoders import pyramid
from downstream.inference import Window
from downstream.model import Header, SegmentationModel, build, save_model
from downstream.prepared import Prepared, dataset_window, prepare
from downstream.segmentation import PatchSettings, Segmentation, batches, parameter_groups
from downstream.validation import Best, Table, report, validate
from launch import settings as base
from launch.distributed import World, barrier, world
from launch.log import Log, tell
from launch.run import Outcome, Stopped
from pretrain.checkpoint import Checkpoints, CheckpointSettings
from pretrain.data.window import HuWindow
from pretrain.loop import LoopSettings, train
from pretrain.models.vit import VitSettings
from pretrain.models.vit import build as build_vit
from pretrain.parallel import ParallelSettings, compile_blocks, recompute_blocks, shard
from pretrain.released import load_backbone
from pretrain.schedule import Schedule, Schedules
from pretrain.settings import LogSettings
from pretrain.watchdog import WatchdogSettings

__all__ = ["OptimSettings", "Settings", "dry_run", "main"]

if TYPE_CHECKING:
    Decoder = base.Settings
else:
    Decoder = base.choice("downstream.decoders")


class OptimSettings(base.Settings):
    """AdamW with two learning rates that fall linearly to 0."""

    lr: float = Field(3e-4, gt=0, description="learning rate of the decoder")
    backbone_lr: float = Field(3e-5, ge=0, description="learning rate of the backbone")
    weight_decay: float = Field(0.05, ge=0, description="decoupled weight decay, of all parameters")
    betas: tuple[float, float] = Field((0.9, 0.98), description="decay of Adam's two averages")
    clip: float | None = Field(12.0, gt=0, description="largest gradient norm; null: no clipping")


class Settings(base.Settings):
    """Settings of `axial finetune`."""

    folder: Path = Field(description="run folder: settings, cache, checkpoints, metrics, the model")
    dataset: Path = Field(description="nnU-Net raw data set: imagesTr, labelsTr, dataset.json")
    backbone: Path | None = Field(
        None, description="an export, a run folder or a released checkpoint; null: random weights"
    )
    model: VitSettings = Field(
        VitSettings(size="b", in_channels=1), description="the backbone where `backbone` is null"
    )
    drop_path: float = Field(
        0.2,
        ge=0,
        lt=1,
        description="share of the sequences that skip a branch in training; a frozen backbone skips none",
    )
    decoder: Decoder = Field(pyramid.Settings(), description="what makes classes of the backbone's maps")
    freeze_backbone: bool = Field(False, description="train the decoder alone")
    steps: int = Field(250_000, gt=0, description="optimizer steps")
    seed: int = Field(0, ge=0, description="seed of the decoder's weights and of every draw")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    precision: Literal["fp32", "bf16"] = Field(
        "bf16", description="bf16: matrix products in bfloat16; weights stay fp32"
    )
    split: Split = Field(Split(), description="which cases validate")
    spacing: float | None = Field(None, gt=0, description="in-plane mm that slices are brought to; null: as they are")
    normalisation: Literal["dataset", "pretraining"] = Field(
        "dataset",
        description="HU window: nnU-Net's of the training foreground, or the one the backbone was trained with",
    )
    patches: PatchSettings = Field(PatchSettings(), description="what a batch is made of")
    augmentation: Augmentation = Field(Augmentation(), description="distortions of the patches")
    optim: OptimSettings = Field(OptimSettings(), description="optimizer")
    validate_every: int = Field(2500, ge=0, description="steps between two validations; 0: at the end only")
    window: Window = Field(Window(), description="how validation goes over slices")
    prepare_workers: int = Field(0, ge=0, description="processes that prepare cases; 0: one after the other")
    checkpoint: CheckpointSettings = Field(CheckpointSettings(), description="when checkpoints are written and kept")
    parallel: ParallelSettings = Field(
        ParallelSettings(), description="compilation and recomputation; sharding: replicate"
    )
    log: LogSettings = Field(LogSettings(), description="lines, metrics.jsonl, TensorBoard")
    watchdog: WatchdogSettings = Field(WatchdogSettings(), description="what happens when a run stands still")


def main(settings: Settings) -> Outcome:
    """Fine-tune, or continue where the run folder's newest checkpoint stands; then validate and write the model."""
    dataset = open_dataset(settings.dataset)
    training, validation = split([case.name for case in dataset.cases], settings.split)
    with world(settings.device) as here:
        _check(settings, here)
        cases = _prepared(dataset, settings, here)
        train_cases, val_cases = [cases[name] for name in training], [cases[name] for name in validation]
        model, header = _model(settings, dataset, train_cases)
        say = tell if here.rank == 0 else _silent
        say(_summary(settings, dataset, model, header, train_cases, len(val_cases)))
        recompute_blocks(model.backbone, settings.parallel.recompute)
        if settings.parallel.compile:
            compile_blocks(model.backbone)
        method = Segmentation(model.to(here.device), settings.freeze_backbone)
        shard(nn.ModuleDict({"model": model}), here, settings.parallel)
        ended, table = _train(settings, method, header, train_cases, val_cases, here)
        header = header.model_copy(update={"step": ended})
        save_model(settings.folder / "model.safetensors", model, header, write=here.rank == 0)
        if val_cases:
            table = table or validate(model, header, val_cases, settings.window, here)
            if here.rank == 0:
                print(report(settings.folder, table, ended))
    names = ("model.safetensors", *(("validation.json", "validation.csv", "best.safetensors") if val_cases else ()))
    made = tuple(f"{settings.folder}/{name}" for name in names if (settings.folder / name).exists())
    following = f"axial predict model={settings.folder}/model.safetensors images=IMAGES folder=PREDICTIONS"
    return Outcome(made=made, next=(following,))


def _silent(text: str) -> None:
    """Say nothing: every rank but the first."""


def _check(settings: Settings, here: World) -> None:
    """What the loop would find out late."""
    if settings.patches.batch_size % here.size:
        raise ValueError(f"patches.batch_size {settings.patches.batch_size} cannot be shared by {here.size} ranks")
    if here.size > 1 and settings.parallel.sharding != "replicate":
        raise ValueError("finetune copies the model to each rank: set parallel.sharding to replicate")


def _prepared(dataset: Dataset, settings: Settings, here: World) -> dict[str, Prepared]:
    """Every rank prepares its share; then all find all of them ready."""
    cache = settings.folder / "cache"
    given = (dataset.labels, settings.spacing, cache)
    if here.size > 1:
        with suppress(CaseError):  # told below by every rank; here the others would wait for this one
            prepare(dataset.cases[here.rank :: here.size], *given, settings.prepare_workers, here.rank == 0)
        barrier()
    workers = settings.prepare_workers if here.size == 1 else 0
    return {case.name: case for case in prepare(dataset.cases, *given, workers, here.rank == 0)}


def _model(settings: Settings, dataset: Dataset, cases: Sequence[Prepared]) -> tuple[SegmentationModel, Header]:
    """The model on the CPU, the same on every rank, and its header."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        if settings.backbone is None:
            vit, weights, window = settings.model, None, None
        else:
            loaded, window = load_backbone(settings.backbone)
            vit, weights = loaded.settings, loaded.state_dict()
        # Positions are disturbed in pretraining only.
        rope = vit.rope.model_copy(update={"shift": None, "jitter": None, "rescale": None})
        drop_path = 0.0 if settings.freeze_backbone else settings.drop_path  # what does not learn needs no disturbance
        backbone = build_vit(vit.model_copy(update={"drop_path": drop_path, "rope": rope}))
        if weights is not None:
            backbone.load_state_dict(weights)
        model = build(backbone, settings.decoder, len(dataset.labels.values))
    if settings.patches.size % backbone.patch_size:
        raise ValueError(f"patches.size {settings.patches.size} is no multiple of the backbone's {backbone.patch_size}")
    if settings.normalisation == "dataset":
        if window is not None and window.channels > 1:
            raise ValueError(
                f"normalisation=dataset is one HU window, and {settings.backbone} was trained on {window.channels} as "
                "channels; use normalisation=pretraining"
            )
        window = dataset_window(cases)
    elif window is None:
        window = HuWindow()
    header = Header(
        vit=vit,
        decoder=settings.decoder,
        organs=dict(dataset.labels.organs),
        values=dataset.labels.values,
        window=window,
        spacing=settings.spacing,
        patch=settings.patches.size,
    )
    return model, header


def _train(
    settings: Settings,
    method: Segmentation,
    header: Header,
    training: Sequence[Prepared],
    validation: Sequence[Prepared],
    here: World,
) -> tuple[int, Table | None]:
    """Runs the loop; the step it ended at, and its validation if there was one then. Stopped if a signal ended it."""
    model = method.exported()
    optim = settings.optim
    groups = parameter_groups(model, optim.lr, optim.backbone_lr)
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=optim.betas, weight_decay=0.0, fused=True)
    # A warm-up from the rate to nothing is a linear fall.
    schedules = Schedules(Schedule(start=optim.lr, peak=0.0, warmup=settings.steps), Schedule(peak=optim.weight_decay))
    about = {"header": header.model_dump(mode="json")}
    checkpoints = Checkpoints(
        settings.folder,
        method,
        optimizer,
        here,
        settings.checkpoint,
        samples_per_step=settings.patches.batch_size,
        fingerprint=hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest(),
        about=about,
        say=tell if here.rank == 0 else _silent,
    )
    start = checkpoints.restore()
    stream = batches(training, settings.patches, settings.augmentation, header.window, settings.seed, here, start)
    log = Log(settings.folder, settings.log.every, settings.log.tensorboard, here.rank == 0, start and start + 1)
    loop = LoopSettings(
        steps=settings.steps,
        seed=settings.seed,
        precision=settings.precision,
        clip=optim.clip,
        log_every=settings.log.every,
        validate_every=settings.validate_every,
        watchdog=settings.watchdog,
    )

    best = Best(settings.folder, model, header, start)
    seen: dict[int, Table] = {}

    def look(step: int) -> dict[str, float]:
        seen.clear()
        seen[step] = validate(model, header, validation, settings.window, here)
        means = seen[step].means()
        best.offer(step, means["mean"], here)
        return {f"dice/{organ}": value for organ, value in means.items() if not math.isnan(value)}

    try:
        ended = train(method, stream, optimizer, schedules, checkpoints, log, here, loop, look if validation else None)
    finally:
        stream.close()
        log.close()
    if ended.stopped_by:
        raise Stopped(
            f"stopped by {ended.stopped_by} after step {ended.step} of {settings.steps}; the same command continues"
        )
    return ended.step, seen.get(ended.step)


def dry_run(settings: Settings) -> str:
    """What a run would be: cases, classes, parameters. No voxel is read."""
    dataset = open_dataset(settings.dataset)
    training, validation = split([case.name for case in dataset.cases], settings.split)
    vit = settings.model if settings.backbone is None else load_backbone(settings.backbone)[0].settings
    with torch.device("meta"):
        model = build(build_vit(vit), settings.decoder, len(dataset.labels.values))
    return "\n".join(_lines(settings, dataset, model, len(training), len(validation)))


def _lines(settings: Settings, dataset: Dataset, model: SegmentationModel, training: int, validation: int) -> list[str]:
    backbone, decoder = (sum(p.numel() for p in part.parameters()) / 1e6 for part in (model.backbone, model.decoder))
    frozen = ", frozen" if settings.freeze_backbone else ""
    passes = settings.steps * settings.patches.batch_size / max(training, 1)
    return [
        f"{dataset.name}: {training} cases to train, {validation} to validate; {', '.join(dataset.labels.names[1:])}",
        f"backbone {backbone:.2f} M parameters{frozen}, blocks {list(model.blocks)} -> decoder {decoder:.2f} M",
        f"{settings.steps} steps of {settings.patches.batch_size} patches of {settings.patches.size} px: "
        f"{passes:.0f} patches a case",
    ]


def _summary(
    settings: Settings,
    dataset: Dataset,
    model: SegmentationModel,
    header: Header,
    cases: Sequence[Prepared],
    validation: int,
) -> str:
    spacings = sorted(case.spacing[1] for case in cases)
    lines = _lines(settings, dataset, model, len(cases), validation)
    lines.append(f"{header.window.said()} ({settings.normalisation})")
    lines.append(f"pixels of {spacings[0]:.3g} to {spacings[-1]:.3g} mm, slices {_slices(cases)}")
    for case in cases:
        lines += [f"  {case.name}: {note}" for note in case.notes]
    return "\n".join(lines)


def _slices(cases: Sequence[Prepared]) -> str:
    sides = [side for case in cases for side in case.shape[1:]]
    return f"{min(sides)} to {max(sides)} px a side, {sum(case.shape[0] for case in cases):,} in all"
