"""One step's input on one rank, and the keyed randomness that its samples, crops and masks are drawn from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Batch", "Draw", "generator"]


class Draw(IntEnum):
    """What a random number is for: draws for one purpose never shift those for another."""

    ORDER = 1
    CROPS = 2
    MASKS = 3
    SIZES = 4
    WINDOW = 5


def generator(seed: int, draw: Draw, *counters: int) -> np.random.Generator:
    """The generator of (seed, purpose, counters); no global state, the same on every rank, worker and machine."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, int(draw), *counters])))


@dataclass(frozen=True)
class Batch:
    """Crops, masks and names of one rank's B images; all crops are normalised float32.

    Crop-major order: rows [k*B, (k+1)*B) of a crop tensor are crop k of images 0 .. B-1.
    """

    global_crops: Tensor  # [2B, C, H, W]
    local_crops: Tensor  # [n_local*B, C, h, w]
    gram_crops: Tensor | None  # [2B, C, G, G]; row i shows the same box as global row i
    masks: Tensor  # bool [2B, N]; True = hidden from the student
    mask_indices: Tensor  # int64 [M], ascending, flat over 2B*N
    mask_weights: Tensor  # float32 [M], 1 / (masked patches of that crop)
    keys: tuple[str, ...]  # [B], the sample each image really is
    replaced: tuple[str, ...] = ()  # what could not be read and was replaced, one line a slice
    masked: tuple[int, ...] = ()  # [2B], masked patches of each crop: lets a batch be cut without asking the device
    shared: Mapping[str, Any] | None = None  # of a part of a batch: what each loss term knows of all parts

    @property
    def images(self) -> int:
        """B, the images of this rank."""
        return len(self.keys)

    def parts(self, count: int) -> list[Batch]:
        """The batch cut into ``count`` parts of equally many images; AssertionError where that cannot be.

        Waits for the device where the batch does not know what is `masked`.
        """
        assert self.images % count == 0, (self.images, count)
        if count == 1:
            return [self]
        masked = self.masked or tuple(self.masks.sum(1).tolist())
        each = self.images // count
        return [self._part(first, first + each, masked) for first in range(0, self.images, each)]

    def _part(self, first: int, end: int, masked: tuple[int, ...]) -> Batch:
        """Images first .. end - 1: two runs of global crops, and so two runs of masked patches."""

        def rows(tensor: Tensor) -> Tensor:
            return torch.unflatten(tensor, 0, (-1, self.images))[:, first:end].flatten(0, 1)

        patches = self.masks.shape[1]
        indices, weights = [], []
        counts: tuple[int, ...] = ()
        for crop in range(2):
            row = crop * self.images + first
            own = masked[row : row + end - first]
            begin = sum(masked[:row])
            run = slice(begin, begin + sum(own))
            indices.append(self.mask_indices[run] - (row - crop * (end - first)) * patches)
            weights.append(self.mask_weights[run])
            counts += own
        return replace(
            self,
            global_crops=rows(self.global_crops),
            local_crops=rows(self.local_crops) if len(self.local_crops) else self.local_crops,
            gram_crops=None if self.gram_crops is None else rows(self.gram_crops),
            masks=rows(self.masks),
            mask_indices=torch.cat(indices),
            mask_weights=torch.cat(weights),
            keys=self.keys[first:end],
            masked=counts,
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch on another device."""
        return self.each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The same batch with every tensor changed."""
        changes: dict[str, Any] = {name: change(tensor) for name, tensor in self.tensors().items()}
        return replace(self, **changes)

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are tensors."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}
