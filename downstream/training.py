"""One fine-tuning run: settings and prepared cases to a model and its header, then the loop over its steps."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import register_fsdp_forward_method

from downstream import tuning
from downstream.cases import Dataset
from downstream.channels import ZSCORE, Channel, channels_through, kind_of, network_channels
from downstream.model import Header, SegmentationModel, build
from downstream.prepared import Prepared, channel_windows
from downstream.segmentation import Segmentation, Source, batches, parameter_groups
from downstream.settings import Settings
from downstream.validation import Best, Table, validate
from launch.distributed import World
from launch.log import Log, tell
from launch.run import Stopped
from pretrain.checkpoint import Checkpoints
from pretrain.data.window import HuWindow
from pretrain.loop import LoopSettings, train
from pretrain.models.vit import VisionTransformer
from pretrain.models.vit import build as build_vit
from pretrain.parallel import compile_blocks, recompute_blocks, shard
from pretrain.released import load_backbone
from pretrain.schedule import Schedule, Schedules

__all__ = ["assemble", "data_of", "digest", "outline", "run", "speaker"]


def outline(settings: Settings, dataset: Dataset) -> SegmentationModel:
    """The network without its weights, on the meta device: what can be known before a case is read.

    Raises ValueError where settings, backbone and data set do not fit each other.
    """
    vit, window = settings.model, None
    if settings.backbone is not None:
        loaded, window = load_backbone(settings.backbone, say=_silent)
        vit = loaded.settings
    if settings.patches.size % vit.patch_size:
        raise ValueError(f"patches.size {settings.patches.size} is no multiple of the backbone's {vit.patch_size}")
    windows = _windows(settings, dataset, window)
    with torch.device("meta"):
        return build(
            build_vit(vit),
            settings.decoder,
            len(dataset.labels.heads),
            context=settings.context,
            channels=channels_through(dataset.channels, None)
            if windows is None
            else sum(one.channels for one in windows),
            tuning=settings.tuning,
        )


def assemble(
    settings: Settings, dataset: Dataset, cases: Sequence[Prepared], say: Callable[[str], None]
) -> tuple[SegmentationModel, Header]:
    """The model on the CPU, the same on every rank, and its header; `cases` are those to train on.

    What became of each tensor of the backbone's file is told to `say`. Raises ValueError as `outline` does, and where
    the cases have no foreground to take a window of.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        backbone, window = _backbone(settings, say)
        channels = _channels(settings, dataset, cases, window)
        model = build(
            backbone,
            settings.decoder,
            len(dataset.labels.heads),
            context=settings.context,
            channels=network_channels(channels),
            tuning=settings.tuning,
        )
    header = Header(
        vit=backbone.settings,
        decoder=settings.decoder,
        adapters=tuning.kept(settings.tuning),
        context=settings.context,
        organs=dict(dataset.labels.organs),
        values=dataset.labels.values,
        ignore=dataset.labels.ignore,
        order=dataset.labels.order,
        channels=channels,
        spacing=settings.spacing,
        patch=settings.patches.size,
    )
    return model, header


def _backbone(settings: Settings, say: Callable[[str], None]) -> tuple[VisionTransformer, HuWindow | None]:
    """The backbone and the window it was pretrained with, None of random weights."""
    if settings.backbone is None:
        vit, weights, window = settings.model, None, None
    else:
        loaded, window = load_backbone(settings.backbone, say=say)
        vit, weights = loaded.settings, loaded.state_dict()
    # Positions are disturbed in pretraining only.
    rope = vit.rope.model_copy(update={"shift": None, "jitter": None, "rescale": None})
    backbone = build_vit(vit.model_copy(update={"drop_path": settings.drop_path, "rope": rope}))
    if weights is not None:
        backbone.load_state_dict(weights)
    return backbone, window


def _windows(settings: Settings, dataset: Dataset, window: HuWindow | None) -> tuple[HuWindow, ...] | None:
    """The window of each channel, None where the cases decide; `window` is the one the backbone was pretrained with."""
    names, rule = dataset.channels, settings.normalisation
    if rule == "dataset":
        if window is not None and window.channels > 1:
            raise ValueError(
                f"normalisation=dataset is one HU window, and {settings.backbone} was trained on {window.channels} as "
                "channels; use normalisation=pretraining"
            )
        return None
    if rule == "pretraining":
        own = window or HuWindow()
        return tuple(own if kind_of(name) == "ct" else ZSCORE for name in names)
    if len(rule) != len(names):
        raise ValueError(f"normalisation lists {len(rule)} window(s), {dataset.name} has channels {list(names)}")
    return rule


def _channels(
    settings: Settings, dataset: Dataset, cases: Sequence[Prepared], window: HuWindow | None
) -> tuple[Channel, ...]:
    """How stored values of each channel become the network's input."""
    names, windows = dataset.channels, _windows(settings, dataset, window)
    if windows is None:
        return channel_windows(cases, names)
    return tuple(
        Channel(name=name, kind=kind_of(name), window=window) for name, window in zip(names, windows, strict=True)
    )


def data_of(training: Sequence[Prepared], validation: Sequence[Prepared]) -> dict[str, dict[str, str]]:
    """Which cases train and which validate, each with a hash of its slices: a corrected label is another case."""

    def content(case: Prepared) -> str:
        parts = [repr((case.shape, case.spacing)).encode(), case.bounds.tobytes(), case.proofs.tobytes()]
        return hashlib.sha256(b"".join(parts)).hexdigest()[:16]

    parts = {"training": training, "validation": validation}
    return {part: {case.name: content(case) for case in cases} for part, cases in parts.items()}


def digest(about: Mapping[str, Any]) -> str:
    """SHA-256 of JSON values."""
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def run(
    settings: Settings,
    model: SegmentationModel,
    header: Header,
    training: Sequence[Prepared],
    validation: Sequence[Prepared],
    here: World,
) -> tuple[int, Table | None]:
    """Runs the loop on this rank's device; the step it ended at, and the validation then, None without cases.

    Goes on from the newest checkpoint in the run folder; CheckpointError if that is of other settings or cases. Raises
    Stopped if a signal ended it.
    """
    method = Segmentation(model.to(here.device), header.labels)
    _spread(model, settings, here)
    optim = settings.optim
    groups = parameter_groups(model, optim.lr, optim.backbone_lr, settings.tuning)
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=optim.betas, weight_decay=0.0, fused=True)
    # A warm-up from the rate to nothing is a linear fall.
    schedules = Schedules(Schedule(start=optim.lr, peak=0.0, warmup=settings.steps), Schedule(peak=optim.weight_decay))
    about = _about(settings, header, training, validation)
    checkpoints = Checkpoints(
        settings.folder,
        method,
        optimizer,
        here,
        settings.checkpoint,
        samples_per_step=settings.patches.batch_size,
        fingerprint=digest(about),
        about=about,
        say=speaker(here),
    )
    start = checkpoints.restore()
    source = Source(training, settings.patches, settings.augmentation, header.channels, header.context, settings.seed)
    stream = batches(source, here, start)
    log = Log(settings.folder, settings.log.every, settings.log.tensorboard, here.rank == 0, start and start + 1)
    best = Best(settings.folder, model, header, start)
    seen: dict[int, Table] = {}

    def look(step: int) -> dict[str, float]:
        seen.clear()
        seen[step] = validate(model, header, validation, settings.window, here)
        means = seen[step].means()
        best.offer(step, means["mean"], here)
        return {f"dice/{organ}": value for organ, value in means.items() if not math.isnan(value)}

    try:
        ended = train(
            method, stream, optimizer, schedules, checkpoints, log, here, _loop(settings), look if validation else None
        )
    finally:
        stream.close()
        log.close()
    if ended.stopped_by:
        raise Stopped(
            f"stopped by {ended.stopped_by} after step {ended.step} of {settings.steps}; the same command continues"
        )
    if validation and ended.step not in seen:
        look(ended.step)
    return ended.step, seen.get(ended.step)


def _about(
    settings: Settings, header: Header, training: Sequence[Prepared], validation: Sequence[Prepared]
) -> dict[str, Any]:
    """What a run must have in common with a checkpoint to go on from it."""
    own = {"header": header.model_dump(mode="json"), "tuning": settings.tuning.model_dump(mode="json")}
    return own | data_of(training, validation)


def _spread(model: SegmentationModel, settings: Settings, here: World) -> None:
    """Recomputation, compilation, and a copy on each rank."""
    recompute_blocks(model.backbone, settings.parallel.recompute)
    if settings.parallel.compile:
        compile_blocks(model.backbone)
    shard(nn.ModuleDict({"model": model}), here, settings.parallel)
    for name in ("encode", "decode") if here.size > 1 else ():  # which prediction calls one by one with a context
        register_fsdp_forward_method(model, name)


def _loop(settings: Settings) -> LoopSettings:
    return LoopSettings(
        steps=settings.steps,
        seed=settings.seed,
        precision=settings.precision,
        accumulate=settings.accumulate,
        clip=settings.optim.clip,
        log_every=settings.log.every,
        validate_every=settings.validate_every,
        watchdog=settings.watchdog,
    )


def speaker(here: World) -> Callable[[str], None]:
    """Says what it is given on the first rank, nothing on the others."""
    return tell if here.rank == 0 else _silent


def _silent(text: str) -> None:
    """Say nothing."""
