"""Segmentation as a method of the training loop: Dice and cross entropy over patches drawn from prepared cases.

Batch `step` is a function of (seed, step) alone, whatever the number of ranks, workers or restarts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from downstream.augment import Augmentation, cut, distort, place
from downstream.model import SegmentationModel
from downstream.prepared import Prepared
from launch import settings as base
from launch.distributed import World
from pretrain.data.window import HuWindow

__all__ = ["PatchSettings", "Patches", "Segmentation", "batches", "parameter_groups", "sample"]


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

    images: Tensor  # [B, C, P, P] fp32, normalised; a channel for each HU window
    labels: Tensor  # [B, P, P] int64, class indices
    keys: tuple[str, ...]  # case and slice of each
    replaced: tuple[str, ...] = ()  # nothing ever is: a case that cannot be read ends the run

    def parts(self, count: int) -> list[Patches]:
        """In `count` parts of equally many patches."""
        assert len(self.keys) % count == 0, (len(self.keys), count)
        each = len(self.keys) // count
        cuts = [slice(i, i + each) for i in range(0, len(self.keys), each)]
        return [Patches(self.images[cut], self.labels[cut], self.keys[cut]) for cut in cuts]


class Segmentation:
    """Backbone and decoder under nnU-Net's loss: Dice over the whole batch without background, plus cross entropy."""

    def __init__(self, model: SegmentationModel, freeze_backbone: bool = False) -> None:
        from monai.losses import DiceLoss  # seconds to import

        self._model = model
        model.frozen = freeze_backbone
        model.backbone.requires_grad_(not freeze_backbone)
        # One part, so that the loop clips the gradient of the whole as the recipe does.
        self.student: nn.Module = nn.ModuleDict({"model": model})
        self._dice = DiceLoss(
            include_background=False, softmax=True, to_onehot_y=True, batch=True, smooth_nr=1e-5, smooth_dr=1e-5
        )
        self._entropy = nn.CrossEntropyLoss()

    def parts(self, batch: Patches, step: int, count: int, seed: Callable[[int], None]) -> Sequence[Patches]:
        """Dice is then that of each part."""
        return batch.parts(count)

    def loss(self, batch: Patches, step: int) -> dict[str, Tensor]:
        """Both terms with weight 1, in fp32."""
        logits = self._model(batch.images).float()
        return {"dice": self._dice(logits, batch.labels[:, None]), "ce": self._entropy(logits, batch.labels)}

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


def parameter_groups(model: SegmentationModel, lr: float, backbone_lr: float) -> list[dict[str, Any]]:
    """Decoder at the schedule's rate, backbone at its share of it; frozen parameters are in no group."""
    groups = []
    for part, rate in ((model.decoder, lr), (model.backbone, backbone_lr)):
        parameters = [parameter for parameter in part.parameters() if parameter.requires_grad]
        if parameters:
            groups.append(
                {"params": parameters, "lr_multiplier": rate / lr, "wd_multiplier": 1.0, "is_last_layer": False}
            )
    return groups


def sample(
    cases: Sequence[Prepared],
    patches: PatchSettings,
    augmentation: Augmentation,
    window: HuWindow,
    seed: int,
    index: int,
) -> tuple[Tensor, Tensor, str]:
    """Patch number `index` of the run: normalised [C, P, P] (a channel a window), class indices [P, P], what it is.

    As in nnU-Net the case is drawn evenly, and the last share of each batch holds a pixel of a class drawn evenly among
    those of the case; its slice is drawn by the number of the class's pixels.
    """
    rng = np.random.default_rng([seed, index])
    case = cases[int(rng.integers(len(cases)))]
    forced = index % patches.batch_size >= round(patches.batch_size * (1 - patches.foreground))
    present = np.flatnonzero(case.counts[:, 1:].sum(0)) + 1
    focus: tuple[int, int] | None = None
    if forced and len(present):
        wanted = int(present[rng.integers(len(present))])
        pixels = np.cumsum(case.counts[:, wanted])
        z = int(np.searchsorted(pixels, rng.integers(pixels[-1]), side="right"))
        hu, label = case.slice(z)
        at = np.flatnonzero(label == wanted)
        y, x = np.unravel_index(int(at[rng.integers(len(at))]), label.shape)
        focus = (int(y), int(x))
    else:
        z = int(rng.integers(case.shape[0]))
        hu, label = case.slice(z)
    where = place(rng, augmentation, (hu.shape[0], hu.shape[1]), patches.size, focus)
    image, classes = cut(hu, label, patches.size, where)
    channels = [distort(channel, deepcopy(rng), augmentation) for channel in window.image(image)]  # one draw for all
    return torch.stack(channels), classes, f"{case.name}/{z}"


def batches(
    cases: Sequence[Prepared],
    patches: PatchSettings,
    augmentation: Augmentation,
    window: HuWindow,
    seed: int,
    world: World,
    start: int,
) -> Generator[Patches]:
    """Endless batches from step `start` on, this rank's part of each, on its device; threads work ahead."""
    each = patches.batch_size // world.size
    pending: deque[list[Future[tuple[Tensor, Tensor, str]]]] = deque()
    step = start
    pool = ThreadPoolExecutor(patches.workers, thread_name_prefix="patches")
    try:
        while True:
            while len(pending) < patches.ahead:
                first = step * patches.batch_size + world.rank * each
                tasks = range(first, first + each)
                pending.append([pool.submit(sample, cases, patches, augmentation, window, seed, i) for i in tasks])
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
