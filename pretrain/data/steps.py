"""What one rank loads for a step: slices read, crops and masks drawn, crops made or left to the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from data_curation.corpus import CorpusError
from pretrain.data.batch import Batch, number_of
from pretrain.data.corpora import Corpora
from pretrain.data.crops import CropDraws, Crops, CropShape, crop_slice, draw_crops
from pretrain.data.masks import Masks, draw_masks
from pretrain.data.order import Samples
from pretrain.data.settings import DataSettings, StreamError
from pretrain.data.views import TeacherViews, batch_regions

__all__ = ["Fault", "Loaded", "Steps"]

_Slice = tuple[int, NDArray[np.int16], str, tuple[float, float] | None]  # number, HU, name, spacing where it is needed


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
        order: Samples,
        rank: int,
        ranks: int,
        patch_size: int,
        device: bool,
        views: TeacherViews | None = None,
    ) -> None:
        crops = settings.crops
        assert views is None or not (crops.mix or crops.n_local or crops.gram_size), "views go with global crops alone"
        self.views, self.kept = views, None if views is None else views.features
        self.pictured = views if self.kept is None else None  # whose images are made
        if self.kept is not None:
            self.kept.load()  # once, for all workers that are forked
        self.settings, self.corpora, self.order, self.rank, self.patch_size = settings, corpora, order, rank, patch_size
        self.images, self.on_device = settings.batch_size // ranks, device

    def __getitem__(self, step: int) -> Loaded | StreamError:
        settings, first = self.settings, step * self.settings.batch_size + self.rank * self.images
        shape = settings.crops.shape_at(settings.seed, step)
        samples = np.arange(first, first + self.images)
        chosen = self.order.at(samples).tolist()
        faults: list[Fault] = []
        fixed = settings.crops.fixed
        turns = (self.order.visits(samples) % (fixed or 1)).tolist()
        slices, keys, draws, crops, read = [], [], [], [], []
        masks, kept = self._masks(step, shape.global_size // self.patch_size, samples)
        try:
            for sample, index, turn in zip(samples.tolist(), chosen, turns, strict=True):
                number, hu, key, spacing = self._read(sample, index, faults)
                keys.append(key)
                read.append((number, turn))
                own = number_of(key, turn) if fixed else sample
                draws.append(draw_crops(settings.crops, *hu.shape, seed=settings.seed, sample=own, spacing=spacing))
                if self.on_device:
                    slices.append(hu)
                else:
                    crops.append(crop_slice(hu, draws[-1], settings.crops, shape, settings.window, self.pictured))
            features = () if self.kept is None else self.kept.read(self._entries(read), kept)
        except StreamError as error:
            return error
        made = _gather(crops) if crops else Crops(torch.empty(0), torch.empty(0), None)
        replaced = tuple(fault.text for fault in faults)
        batch = Batch(*made.tensors(), masks.masks, masks.indices, masks.weights, tuple(keys), replaced, masks.counts)
        batch = replace(batch, views=made.views, kept=kept, features=features)
        if not self.on_device:
            return Loaded(batch, shape, tuple(faults))
        return Loaded(batch, shape, tuple(faults), _pad(slices), CropDraws.stack(draws))

    def _masks(self, step: int, grid: int, samples: NDArray[np.int64]) -> tuple[Masks, tuple[Tensor | None, ...]]:
        """The student's masks, and the patches that each teacher is shown."""
        seed, crops = self.settings.seed, self.settings.crops.n_global
        if self.views is not None:
            return batch_regions(self.views, grid, crops, seed=seed, samples=samples.tolist())
        masking, sides = self.settings.masks, (grid, grid)
        return draw_masks(masking, sides, self.images, seed=seed, step=step, rank=self.rank, n_global=crops), ()

    def _entries(self, read: Sequence[tuple[int, int]]) -> list[int]:
        """The crops of slices, each with its turn, as they are numbered where their features are kept; crop-major."""
        crops = self.settings.crops
        assert crops.fixed is not None, "only what is fixed can be kept"
        first = [(number * crops.fixed + turn) * crops.n_global for number, turn in read]
        return [entry + crop for crop in range(crops.n_global) for entry in first]

    def _read(self, sample: int, index: int, faults: list[Fault]) -> _Slice:
        """The slice, or the first that can be read of those that may stand in for it."""
        try:
            return self._slice(index)
        except CorpusError as error:
            faults.append(_fault(error))
        following = self.order.following(sample, self.settings.max_unreadable)
        for other in following:
            try:
                return self._slice(other)
            except CorpusError as error:
                faults.append(_fault(error))
        raise StreamError(
            f"{1 + len(following)} slices in a row cannot be read; the last one: {faults[-1].text}. "
            f"Run `axial curate` on {self.settings.place} again" + ", or raise data.max_unreadable" * bool(following)
        )

    def _slice(self, index: int) -> _Slice:
        corpus, i = self.corpora.of(index)
        return index, corpus.hu(i), corpus.key(i), self._spacing(index)

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
    made: dict[int, Tensor] = {}

    def gathered(parts: list[Tensor]) -> Tensor:  # what is one tensor of a slice is one of the batch
        if id(parts[0]) not in made:
            made[id(parts[0])] = torch.stack(parts, 1).flatten(0, 1)
        return made[id(parts[0])]

    gram = [crop.gram for crop in crops if crop.gram is not None]
    return Crops(
        gathered([crop.globals_ for crop in crops]),
        gathered([crop.locals_ for crop in crops]),
        gathered(gram) if gram else None,
        tuple(gathered([crop.views[teacher] for crop in crops]) for teacher in range(len(crops[0].views))),
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
