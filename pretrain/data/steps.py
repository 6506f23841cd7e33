"""What one rank loads for a step: slices read, crops and masks drawn, crops made or left to the device."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from data_curation.corpus import CorpusError
from pretrain.data.batch import Batch
from pretrain.data.corpora import Corpora
from pretrain.data.crops import CropDraws, Crops, CropShape, crop_slice, draw_crops
from pretrain.data.masks import draw_masks
from pretrain.data.order import Order
from pretrain.data.settings import DataSettings, StreamError

__all__ = ["Fault", "Loaded", "Steps"]


@dataclass(frozen=True)
class Fault:
    """A slice that could not be read, and its shard: what a CorpusError's text says before the sample's name."""

    shard: str
    text: str


@dataclass(frozen=True)
class Loaded:
    """What a worker makes of a step: a batch with its crops, or without them and the slices to crop on the device."""

    batch: Batch
    shape: CropShape
    faults: tuple[Fault, ...]
    hu: Tensor | None = None  # int16 [B, Y, X], padded at the bottom and right
    draws: CropDraws | None = None

    def pin_memory(self) -> Loaded:
        return self._each(Tensor.pin_memory)

    def to(self, device: torch.device, non_blocking: bool) -> Loaded:
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def _each(self, move: Callable[[Tensor], Tensor]) -> Loaded:
        batch = self.batch.each(move)
        if self.hu is None or self.draws is None:
            return replace(self, batch=batch)
        return replace(self, batch=batch, hu=move(self.hu), draws=CropDraws(*map(move, self.draws.tensors())))


class Steps(Dataset[Any]):
    """Step -> what this rank loads for it, or the StreamError that stops the run; picklable, opens nothing itself."""

    def __init__(
        self,
        settings: DataSettings,
        corpora: Corpora,
        order: Order,
        rank: int,
        ranks: int,
        patch_size: int,
        device: bool,
    ) -> None:
        self.settings, self.corpora, self.order, self.rank, self.patch_size = settings, corpora, order, rank, patch_size
        self.images, self.on_device = settings.batch_size // ranks, device

    def __getitem__(self, step: int) -> Loaded | StreamError:
        settings, first = self.settings, step * self.settings.batch_size + self.rank * self.images
        shape = settings.crops.shape_at(settings.seed, step)
        samples = np.arange(first, first + self.images)
        chosen = self.order.at(samples).tolist()
        faults: list[Fault] = []
        slices, keys, draws, crops = [], [], [], []
        try:
            for sample, index in zip(samples.tolist(), chosen, strict=True):
                hu, key, spacing = self._read(sample, index, faults)
                keys.append(key)
                draws.append(draw_crops(settings.crops, *hu.shape, seed=settings.seed, sample=sample, spacing=spacing))
                if self.on_device:
                    slices.append(hu)
                else:
                    crops.append(crop_slice(hu, draws[-1], settings.crops, shape, settings.window))
        except StreamError as error:
            return error
        grid = shape.global_size // self.patch_size
        masks = draw_masks(settings.masks, (grid, grid), self.images, seed=settings.seed, step=step, rank=self.rank)
        made = _gather(crops) if crops else Crops(torch.empty(0), torch.empty(0), None)
        replaced = tuple(fault.text for fault in faults)
        batch = Batch(*made.tensors(), masks.masks, masks.indices, masks.weights, tuple(keys), replaced, masks.counts)
        if not self.on_device:
            return Loaded(batch, shape, tuple(faults))
        return Loaded(batch, shape, tuple(faults), _pad(slices), CropDraws.stack(draws))

    def _read(
        self, sample: int, index: int, faults: list[Fault]
    ) -> tuple[NDArray[np.int16], str, tuple[float, float] | None]:
        """The slice, its name and spacing, or of the first that can be read of those after it in its source's order."""
        corpus, i = self.corpora.of(index)
        try:
            return corpus.hu(i), corpus.key(i), self._spacing(index)
        except CorpusError as error:
            faults.append(_fault(error))
        (source,), (position,) = self.order.place(np.array([sample]))
        following = np.arange(position + 1, position + 1 + self.settings.max_unreadable)
        for index in self.order.slices(int(source), following).tolist():
            corpus, i = self.corpora.of(index)
            try:
                return corpus.hu(i), corpus.key(i), self._spacing(index)
            except CorpusError as error:
                faults.append(_fault(error))
        raise StreamError(
            f"{1 + len(following)} slices in a row cannot be read; the last one: {faults[-1].text}. "
            f"Run `axial curate` on {self.settings.place} again, or raise data.max_unreadable"
        )

    def _spacing(self, index: int) -> tuple[float, float] | None:
        """Spacing of a slice in mm, where crops need it."""
        if self.settings.crops.unit == "px":
            return None
        corpus, i = self.corpora.of(index)
        spacing = corpus.spacing(i)
        if not all(0 < mm < float("inf") for mm in spacing):
            raise StreamError(
                f"slice {corpus.key(i)} has no spacing that could be true ({spacing[0]:g} x {spacing[1]:g} mm), and "
                "data.crops.unit=mm needs it; use data.crops.unit=px, or curate again without that scan"
            )
        return spacing


def _fault(error: CorpusError) -> Fault:
    return Fault(str(error).partition(", sample ")[0], str(error))


def _gather(crops: list[Crops]) -> Crops:
    """The crops of slices as those of a batch: crop 0 of all, then crop 1 of all, and so on."""
    gram = [crop.gram for crop in crops if crop.gram is not None]
    return Crops(
        torch.stack([crop.globals_ for crop in crops], 1).flatten(0, 1),
        torch.stack([crop.locals_ for crop in crops], 1).flatten(0, 1),
        torch.stack(gram, 1).flatten(0, 1) if gram else None,
    )


def _pad(slices: list[NDArray[np.int16]]) -> Tensor:
    """Slices of any sizes as one [B, Y, X]; what is added is never looked at."""
    shape = len(slices), max(s.shape[0] for s in slices), max(s.shape[1] for s in slices)
    if get_worker_info() is None:
        padded = torch.zeros(shape, dtype=torch.int16)
    else:  # in the memory in which it goes to the trainer, so that it is copied once
        shared = torch.UntypedStorage._new_shared(2 * math.prod(shape))  # type: ignore[no-untyped-call]
        padded = torch.empty(0, dtype=torch.int16).set_(shared, 0, shape, (shape[1] * shape[2], shape[2], 1))
    for out, hu in zip(padded.numpy(), slices, strict=True):
        out[: hu.shape[0], : hu.shape[1]] = hu
    return padded
