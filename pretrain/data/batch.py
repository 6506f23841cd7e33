"""One step's input on one rank, and the keyed randomness that its samples, crops and masks are drawn from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Batch", "Draw", "generator", "number_of"]


class Draw(IntEnum):
    """What a random number is for: draws for one purpose never shift those for another."""

    ORDER = 1
    CROPS = 2
    MASKS = 3
    SIZES = 4
    WINDOW = 5
    REGIONS = 6


def generator(seed: int, draw: Draw, *counters: int) -> np.random.Generator:
    """The generator of (seed, purpose, counters); no global state, the same on every rank, worker and machine."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, int(draw), *counters])))


def number_of(key: str, which: int) -> int:
    """64 bits that stand for one of several draws for a named thing, in the place of a counter."""
    return int.from_bytes(hashlib.blake2b(f"{key} {which}".encode(), digest_size=8).digest(), "big")


@dataclass(frozen=True)
class Batch:
    """Crops, masks and names of one rank's B images, G global crops of each; all crops are normalised float32.

    Crop-major order: rows [k*B, (k+1)*B) of a crop tensor are crop k of images 0 .. B-1. Teachers that see a crop in
    the same way have one tensor among `views`, which is `global_crops` itself where the student sees it so too.
    """

    global_crops: Tensor  # [G*B, C, H, W]
    local_crops: Tensor  # [n_local*B, C, h, w]
    gram_crops: Tensor | None  # [G*B, C, g, g]; row i shows the same box as global row i
    masks: Tensor  # bool [G*B, N]; True = hidden from the student
    mask_indices: Tensor  # int64 [M], ascending, flat over G*B*N
    mask_weights: Tensor  # float32 [M], 1 / (masked patches of that crop)
    keys: tuple[str, ...]  # [B], the sample each image really is
    replaced: tuple[str, ...] = ()  # what could not be read and was replaced, one line a slice
    masked: tuple[int, ...] = ()  # [G*B], masked patches of each crop: lets a batch be cut without asking the device
    shared: Mapping[str, Any] | None = None  # of a part of a batch: what each loss term knows of all parts
    views: tuple[Tensor, ...] = ()  # a teacher: [G*B, C_m, S_m, S_m], the boxes of the global crops as it sees them
    kept: tuple[Tensor | None, ...] = ()  # a teacher: int64 [G*B, K_m], ascending, the patches it is shown; None: all
    features: tuple[Tensor, ...] = ()  # a teacher, read and not made: [G*B, 1 + K_m, D_m], the class token first

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
        """Images first .. end - 1: a run of rows for each global crop, and so as many runs of masked patches."""

        def rows(tensor: Tensor) -> Tensor:
            if not len(tensor):  # no local crops
                return tensor
            return torch.unflatten(tensor, 0, (-1, self.images))[:, first:end].flatten(0, 1)

        cut = self._each(rows, ("global_crops", "local_crops", "gram_crops", "masks", "views", "kept", "features"))
        patches = self.masks.shape[1]
        indices, weights = [], []
        counts: tuple[int, ...] = ()
        for crop in range(len(self.masks) // self.images):
            row = crop * self.images + first
            own = masked[row : row + end - first]
            begin = sum(masked[:row])
            run = slice(begin, begin + sum(own))
            indices.append(self.mask_indices[run] - (row - crop * (end - first)) * patches)
            weights.append(self.mask_weights[run])
            counts += own
        return replace(
            cut,
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
        return self._each(change, tuple(field.name for field in fields(self)))

    def _each(self, change: Callable[[Tensor], Tensor], names: tuple[str, ...]) -> Batch:
        """The same batch with every tensor of these fields changed; what was one tensor stays one."""
        changed: dict[int, Tensor] = {}

        def once(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(once, value))
            if not isinstance(value, Tensor):
                return value
            if id(value) not in changed:
                changed[id(value)] = change(value)
            return changed[id(value)]

        return replace(self, **{name: once(getattr(self, name)) for name in names})

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are tensors, and those of a field with several by its name and their number."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in ("views", "kept", "features"):
            values |= {f"{name}.{number}": value for number, value in enumerate(values[name])}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}
