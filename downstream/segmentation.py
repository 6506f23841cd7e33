"""Segmentation as a method of the training loop, over patches drawn from prepared cases.

Batch `step` is a function of (seed, step) alone, whatever the number of ranks, workers or restarts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from downstream import tuning
from downstream.augment import Augmentation, Placement, cut_image, cut_label, distort, place
from downstream.cases import Labels
from downstream.channels import Channel
from downstream.context import Context, neighbours
from downstream.losses import SegmentationLoss
from downstream.model import SegmentationModel
from downstream.prepared import Prepared
from launch import settings as base
from launch.distributed import World

__all__ = ["PatchSettings", "Patches", "Segmentation", "Source", "batches", "draw", "parameter_groups", "sample"]

C = TypeVar("C")


class PatchSettings(base.Settings):
    """What a batch is made of."""

    size: int = Field(512, ge=1, description="side of a patch, px")
    batch_size: int = Field(12, ge=1, description="patches a step, on all ranks together")
    foreground: float = Field(
        0.33, ge=0, le=1, description="share of a batch that is sure to hold foreground, if its case has any"
    )
    workers: int = Field(4, ge=1, description="threads that read and cut patches, on each rank")
    ahead: int = Field(3, ge=1, description="batches made in advance")


@dataclass(frozen=True)
class Patches:
    """One rank's part of a batch."""

    images: Tensor  # [B, n, P, P] fp32, normalised; with neighbours [B, S, n, P, P]
    labels: Tensor  # [B, P, P] int64, class indices and IGNORE
    keys: tuple[str, ...]  # case and slice of each
    replaced: tuple[str, ...] = ()  # nothing ever is: a case that cannot be read ends the run

    def parts(self, count: int) -> list[Patches]:
        """In `count` parts of equally many patches."""
        assert len(self.keys) % count == 0, (len(self.keys), count)
        each = len(self.keys) // count
        cuts = [slice(i, i + each) for i in range(0, len(self.keys), each)]
        return [Patches(self.images[cut], self.labels[cut], self.keys[cut]) for cut in cuts]


class Segmentation:
    """Backbone and decoder under nnU-Net's loss."""

    def __init__(self, model: SegmentationModel, labels: Labels) -> None:
        self._model = model
        # One part, so that the loop clips the gradient of the whole as the recipe does.
        self.student: nn.Module = nn.ModuleDict({"model": model})
        self._loss = SegmentationLoss(labels).to(next(model.parameters()).device)

    def parts(self, batch: Patches, step: int, count: int, seed: Callable[[int], None]) -> Sequence[Patches]:
        """Dice is then that of each part."""
        return batch.parts(count)

    def loss(self, batch: Patches, step: int) -> dict[str, Tensor]:
        """Both terms with weight 1, in fp32."""
        terms: dict[str, Tensor] = self._loss(self._model(batch.images), batch.labels)
        return terms

    def after_step(self, step: int) -> None:
        """Nothing follows the optimizer."""

    def numbers(self) -> dict[str, Tensor]:
        """Nothing beside the losses."""
        return {}

    def remark(self, values: Mapping[str, float]) -> str:
        """Nothing."""
        return ""

    def exported(self) -> SegmentationModel:
        """The segmentation model."""
        return self._model

    def state(self) -> dict[str, Any]:
        """All weights and buffers."""
        return {"student": self.student.state_dict()}


def parameter_groups(
    model: SegmentationModel, lr: float, backbone_lr: float, tuned: base.Settings
) -> list[dict[str, Any]]:
    """Everything behind the backbone at the schedule's rate, the backbone as its tuning says, at most at its share."""
    rest = [parameter for parameter in model.added if parameter.requires_grad]
    shares = [
        (list(parameters), share * backbone_lr / lr) for parameters, share in tuning.groups(tuned, model.backbone)
    ]
    return [
        {"params": parameters, "lr_multiplier": share, "wd_multiplier": 1.0, "is_last_layer": False}
        for parameters, share in [(rest, 1.0), *shares]
        if parameters
    ]


@dataclass(frozen=True)
class Source:
    """What batches are made from."""

    cases: Sequence[Prepared]
    patches: PatchSettings
    augmentation: Augmentation
    channels: Sequence[Channel]
    context: Context
    seed: int


def draw(cases: Sequence[C], seed: int, index: int) -> tuple[C, np.random.Generator]:
    """The case of patch number `index` of the run, and what all else of the patch is drawn from."""
    rng = np.random.default_rng([seed, index])
    return cases[int(rng.integers(len(cases)))], rng


def sample(source: Source, index: int) -> tuple[Tensor, Tensor, str]:
    """Patch number `index` of the run: normalised [n, P, P] (with neighbours [S, n, P, P]), class indices [P, P], name.

    As in nnU-Net the case is drawn evenly, and the last share of each batch holds a pixel of a class drawn evenly among
    those of the case; its slice is drawn by the number of the class's pixels.
    """
    patches = source.patches
    case, rng = draw(source.cases, source.seed, index)
    forced = index % patches.batch_size >= round(patches.batch_size * (1 - patches.foreground))
    present = np.flatnonzero(case.counts[:, 1:].sum(0)) + 1
    focus: tuple[int, int] | None = None
    if forced and len(present):
        wanted = int(present[rng.integers(len(present))])
        pixels = np.cumsum(case.counts[:, wanted])
        z = int(np.searchsorted(pixels, rng.integers(pixels[-1]), side="right"))
        stored, label = case.slice(z)
        at = np.flatnonzero(label == wanted)
        y, x = np.unravel_index(int(at[rng.integers(len(at))]), label.shape)
        focus = (int(y), int(x))
    else:
        z = int(rng.integers(case.shape[0]))
        stored, label = case.slice(z)
    where = place(rng, source.augmentation, (label.shape[0], label.shape[1]), patches.size, focus)
    seen = neighbours(np.array([z]), case.shape[0], case.spacing[0], source.context)[0].tolist()
    planes = [stored if n == z else case.slice(n)[0] for n in seen]
    draws = [deepcopy(rng), *rng.spawn(len(source.channels) - 1)]  # channels share no draw
    images = [_image(values, where, source, draws, plane) for plane, values in enumerate(planes)]
    classes = cut_label(label, patches.size, where)
    return torch.stack(images) if source.context.slices else images[0], classes, f"{case.name}/{z}"


def _image(
    stored: NDArray[np.int16], where: Placement, source: Source, draws: Sequence[np.random.Generator], plane: int
) -> Tensor:
    """The patch of one slice [C, Y, X], normalised and distorted [n, P, P]; windows of one channel share draws."""
    found = []
    for values, channel, draw in zip(stored, source.channels, draws, strict=True):
        windows = channel.window.image(cut_image(values, source.patches.size, where))
        found += [distort(window, deepcopy(draw), source.augmentation, plane) for window in windows]
    return torch.stack(found)


def batches(source: Source, world: World, start: int) -> Generator[Patches]:
    """Endless batches from step `start` on, this rank's part of each, on its device; threads work ahead."""
    patches = source.patches
    each = patches.batch_size // world.size
    pending: deque[list[Future[tuple[Tensor, Tensor, str]]]] = deque()
    step = start
    pool = ThreadPoolExecutor(patches.workers, thread_name_prefix="patches")
    try:
        while True:
            while len(pending) < patches.ahead:
                first = step * patches.batch_size + world.rank * each
                tasks = range(first, first + each)
                pending.append([pool.submit(sample, source, i) for i in tasks])
                step += 1
            done = [future.result() for future in pending.popleft()]
            images, labels = torch.stack([image for image, _, _ in done]), torch.stack([d[1] for d in done])
            if world.device.type == "cuda":
                images, labels = images.pin_memory(), labels.pin_memory()
            to = world.device
            yield Patches(
                images.to(to, non_blocking=True), labels.to(to, non_blocking=True), tuple(key for _, _, key in done)
            )
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
