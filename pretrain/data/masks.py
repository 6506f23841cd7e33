"""Block masks of masked image modelling (BEiT's blocks, iBOT's use, DINOv3's exact counts).

How many patches of how many crops are masked is a function of the grid and the number of images alone, so the masked
tokens of a step have one static shape; where they lie is drawn from (seed, step, group).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, field_validator
from torch import Tensor

from launch.settings import Settings
from pretrain.data.batch import Draw, generator

__all__ = ["MaskSettings", "Masks", "block_masks", "draw_masks", "max_block", "target_counts"]

TRIES = 10  # proposals of one block before the rest is filled with single cells


class MaskSettings(Settings):
    """How the student's global crops are masked."""

    probability: float = Field(0.5, ge=0, le=1, description="share of the global crops that is masked")
    ratio: tuple[float, float] = Field((0.1, 0.5), description="lowest and highest masked share of a masked crop")
    edge: Literal["upper", "middle"] = Field(
        "upper",
        description="where in its part of `ratio` a crop's share lies: upper as in DINOv3, where a small group is "
        "masked more; middle makes the mean independent of the group",
    )
    group: int | None = Field(
        None,
        gt=0,
        description="images over which the ratios are spread; null: one rank's batch. Set it to a divisor of every "
        "rank's batch to get the same masks from another number of ranks",
    )
    min_block: int = Field(4, gt=0, description="smallest area of a proposed block, patches")
    aspect: float = Field(
        0.3, gt=0, le=1, description="blocks are proposed with aspect ratios from this to its inverse"
    )

    @field_validator("ratio")
    @classmethod
    def _ordered(cls, ratio: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= ratio[0] <= ratio[1] <= 1:
            raise ValueError(f"needs 0 <= lowest <= highest <= 1, got {ratio}")
        return ratio


@dataclass(frozen=True)
class Masks:
    """Masks of G*B global crops, crop 0 of all images and then crop 1; the fields are those of `Batch`."""

    masks: Tensor  # bool [G*B, N]
    indices: Tensor  # int64 [M]
    weights: Tensor  # float32 [M]
    counts: tuple[int, ...]  # [G*B], masked patches of each crop

    @staticmethod
    def of(flat: NDArray[np.bool_]) -> Masks:
        """What there is to say of masks [G*B, N]."""
        per_crop = flat.sum(1)
        weights = np.repeat(1.0 / np.maximum(per_crop, 1), per_crop).astype(np.float32)
        indices = torch.from_numpy(np.flatnonzero(flat))
        return Masks(torch.from_numpy(flat), indices, torch.from_numpy(weights), tuple(per_crop.tolist()))


def target_counts(settings: MaskSettings, grid: tuple[int, int], images: int, n_global: int = 2) -> list[int]:
    """Masked patches of each of the n_global*images crops of a group, ascending; deterministic.

    int(N * upper edge) of as many equal parts of `ratio` as crops are masked. The edges are float32 because the
    official recipe's are: in float64 one count in a hundred differs by one.
    """
    patches, crops = grid[0] * grid[1], n_global * images
    masked = int(crops * settings.probability)
    edges = torch.linspace(*settings.ratio, masked + 1, dtype=torch.float32, device="cpu")
    shares = edges[1:] if settings.edge == "upper" else (edges[1:] + edges[:-1]) / 2
    return [0] * (crops - masked) + [int(patches * share) for share in shares]


def max_block(grid: tuple[int, int]) -> int:
    """Most patches one block may newly mask: the rows of half the grid, rounded down."""
    return grid[0] // 2 * grid[1]


def block_masks(
    settings: MaskSettings, grid: tuple[int, int], counts: list[int], rng: np.random.Generator
) -> NDArray[np.bool_]:
    """One mask a count, bool [len(counts), rows, columns], with exactly that many True cells each.

    All masks grow in lockstep, block by block; what blocks cannot fill is filled with single cells at random.
    """
    counts_ = np.asarray(counts, dtype=np.int64)
    mask = np.zeros((len(counts_), *grid), dtype=np.bool_)
    growing = np.flatnonzero(counts_)
    while growing.size:
        remaining = counts_[growing] - mask[growing].sum((1, 2))
        growing, remaining = growing[remaining > 0], remaining[remaining > 0]
        if growing.size:
            added = _add_block(settings, mask, growing, np.minimum(remaining, max_block(grid)), rng)
            growing = growing[added]
    flat = mask.reshape(len(counts_), grid[0] * grid[1])
    missing = counts_ - flat.sum(1)
    rows = np.flatnonzero(missing)
    # A random order of the free cells of each row; the first `missing` of them are filled.
    order = np.where(flat[rows], 2.0, rng.random((rows.size, flat.shape[1]))).argsort(1)
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.arange(flat.shape[1])[None], 1)
    flat[rows] |= rank < missing[rows, None]
    return mask


def _add_block(
    settings: MaskSettings,
    mask: NDArray[np.bool_],
    growing: NDArray[np.int64],
    allowed: NDArray[np.int64],
    rng: np.random.Generator,
) -> NDArray[np.bool_]:
    """Adds to each growing mask the first of TRIES proposals that masks 1 .. allowed new cells; True where one did."""
    rows, columns = mask.shape[1:]
    u = rng.random((4, growing.size, TRIES))
    area = settings.min_block + u[0] * (allowed[:, None] - settings.min_block)
    root_aspect = np.exp((u[1] - 0.5) * -math.log(settings.aspect))
    height = np.rint(np.sqrt(area) * root_aspect).astype(np.int64)
    width = np.rint(np.sqrt(area) / root_aspect).astype(np.int64)
    fits = (height < rows) & (width < columns)
    height, width = np.where(fits, height, 0), np.where(fits, width, 0)
    top = (u[2] * (rows - height + 1)).astype(np.int64)
    left = (u[3] * (columns - width + 1)).astype(np.int64)
    total = np.zeros((growing.size, rows + 1, columns + 1), dtype=np.int32)  # summed-area table
    np.cumsum(mask[growing].cumsum(1, dtype=np.int32), 2, out=total[:, 1:, 1:])
    n = np.arange(growing.size)[:, None]
    bottom, right = top + height, left + width
    old = total[n, bottom, right] - total[n, top, right] - total[n, bottom, left] + total[n, top, left]
    new = height * width - old
    good = (new > 0) & (new <= allowed[:, None])
    added: NDArray[np.bool_] = good.any(1)
    pick = (np.flatnonzero(added), good.argmax(1)[added])
    y, x = np.arange(rows), np.arange(columns)
    in_rows = (y >= top[pick][:, None]) & (y < bottom[pick][:, None])
    in_columns = (x >= left[pick][:, None]) & (x < right[pick][:, None])
    mask[growing[added]] |= in_rows[:, :, None] & in_columns[:, None, :]
    return added


def draw_masks(
    settings: MaskSettings,
    grid: tuple[int, int],
    images: int,
    *,
    seed: int,
    step: int,
    rank: int,
    n_global: int = 2,
) -> Masks:
    """The masks of one rank's `images`, each with `n_global` crops, at one step.

    Each group of `settings.group` images draws its own from (seed, step, its index in the global batch), so the same
    global batch has the same masks on any number of ranks whose batches the group divides.
    """
    group = settings.group or images
    if images % group:
        raise ValueError(f"masks.group: {group} does not divide the {images} images of a rank")
    groups, patches = images // group, grid[0] * grid[1]
    counts = target_counts(settings, grid, group, n_global)
    masks = np.empty((n_global, groups, group, patches), dtype=np.bool_)
    for g in range(groups):
        rng = generator(seed, Draw.MASKS, step, rank * groups + g)
        drawn = block_masks(settings, grid, counts, rng)[rng.permutation(n_global * group)]
        masks[:, g] = drawn.reshape(n_global, group, patches)
    return Masks.of(masks.reshape(n_global * images, patches))
