"""What frozen teachers see of a student's crops: each in its own window and size, and with patches left out.

Patches are chosen by places of the image, the squares of the student's grid, so that models of unequal grids can be
shown the same places. How many a model sees is a function of its grid and share alone: shapes never change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pretrain.data.batch import Draw, generator
from pretrain.data.masks import Masks
from pretrain.data.window import HuWindow

if TYPE_CHECKING:
    from pretrain.data.cached import Kept

__all__ = ["TeacherView", "TeacherViews", "batch_regions", "draw_regions"]


@dataclass(frozen=True)
class TeacherView:
    """How one teacher sees a crop."""

    window: HuWindow
    size: int  # side of its image, pixels
    grid: int  # patches on a side
    mask: float  # share of its patches that are left out, 0 <= mask < 1

    def __post_init__(self) -> None:
        assert self.size > 0 and self.grid > 0 and 0 <= self.mask < 1, self

    @property
    def kept(self) -> int:
        """K, the patches that it is shown: rounded down, at least one."""
        return _shown(self.grid, self.mask)

    @property
    def rule(self) -> tuple[HuWindow, int]:
        """What its image depends on: teachers with the same share one."""
        return self.window, self.size


@dataclass(frozen=True)
class TeacherViews:
    """How all teachers see a crop, and which of its patches the student does not."""

    of: tuple[TeacherView, ...]
    hidden: float  # share of the student's patches that are masked, 0 <= hidden < 1
    nested: bool = False  # one draw for all: of two models with one grid, one sees all that the other sees
    region: int = 1  # side, in patches of the student, of the squares that are kept or left out together
    features: Kept | None = None  # what the teachers once made, which is read; no images are made for them

    def __post_init__(self) -> None:
        assert self.of and self.region > 0 and 0 <= self.hidden < 1, self

    def visible(self, grid: int) -> int:
        """Patches that the student sees of grid x grid: rounded down, at least one."""
        return _shown(grid, self.hidden)

    def seen(
        self, make: Callable[[HuWindow, int], Tensor], there: Mapping[tuple[HuWindow, int], Tensor]
    ) -> tuple[Tensor, ...]:
        """The images of each teacher: those that are there, and the others made once for all that share them."""
        made = dict(there)
        for rule in dict.fromkeys(teacher.rule for teacher in self.of):
            if rule not in made:
                made[rule] = make(*rule)
        return tuple(made[teacher.rule] for teacher in self.of)


def _shown(grid: int, mask: float) -> int:
    """int(N * (1 - mask)), where 100 * (1 - 0.9) is 10 and not 9.99..."""
    return max(1, int(grid**2 * (1 - mask) + 1e-6))


def draw_regions(
    views: TeacherViews, grid: int, crops: int, *, seed: int, sample: int
) -> tuple[NDArray[np.bool_], tuple[NDArray[np.int64] | None, ...]]:
    """Of one sample's crops the student's masks and each teacher's patches, drawn from (seed, sample) alone.

    Returns masks bool [crops, grid*grid], True = hidden from the student, and for each teacher its patches int64
    [crops, K_m] ascending, or None where it keeps all.

    Each square of region x region patches of the student's grid takes a random number (those at the right and bottom
    may be cut). A patch of any model belongs to the student's patch, and so to the square, that its centre lies in; the
    patches in the squares with the lowest numbers are shown. Where only some of a square fit, whole patches of the
    student's grid come first, in random order, and within one of them the model's own patches. Each model has its own
    numbers, or shares them with all others where the draws are nested.
    """
    rng = generator(seed, Draw.REGIONS, sample)
    models, cells = 1 if views.nested else 1 + len(views.of), -(-grid // views.region)
    numbers = [rng.random((models, crops, cells * cells))]  # the last one counts most
    if views.region > 1:
        numbers.insert(0, rng.random((models, crops, grid * grid)))
    orders: dict[tuple[int, int], NDArray[np.int64]] = {}

    def order(model: int, side: int) -> NDArray[np.int64]:
        """A model's patches [crops, side*side], the first to be shown first."""
        if (model, side) not in orders:
            keys = [n[model][:, at] for n, at in zip(numbers, _places(side, grid, views.region), strict=True)]
            own = [] if side == grid else [rng.random((crops, side * side))]
            orders[model, side] = np.lexsort([*own, *keys]) if own or keys[1:] else keys[0].argsort(1)
        return orders[model, side]

    masks = np.ones((crops, grid * grid), np.bool_)
    np.put_along_axis(masks, order(0, grid)[:, : views.visible(grid)], False, 1)
    kept: list[NDArray[np.int64] | None] = []
    for number, teacher in enumerate(views.of, 1):
        first = None
        if teacher.mask:
            first = np.sort(order(0 if views.nested else number, teacher.grid)[:, : teacher.kept], 1)
        kept.append(first)
    return masks, tuple(kept)


@lru_cache(maxsize=64)
def _places(side: int, grid: int, region: int) -> tuple[NDArray[np.int64], ...]:
    """Of each patch of a grid of `side` the student's patch its centre lies in (left out where region is 1, as it is
    the square) and the square: [side*side] each."""
    at = (2 * np.arange(side) + 1) * grid // (2 * side)
    cells = -(-grid // region)
    square = (at[:, None] // region * cells + at // region).ravel()
    return (square,) if region == 1 else ((at[:, None] * grid + at).ravel(), square)


def batch_regions(
    views: TeacherViews, grid: int, crops: int, *, seed: int, samples: Sequence[int]
) -> tuple[Masks, tuple[Tensor | None, ...]]:
    """`draw_regions` of samples as the fields of a `Batch`: crop-major masks, and each teacher's patches [G*B, K_m]."""
    drawn = [draw_regions(views, grid, crops, seed=seed, sample=sample) for sample in samples]
    kept: list[Tensor | None] = []
    for parts in zip(*(kept for _, kept in drawn), strict=True):
        there = [part for part in parts if part is not None]
        kept.append(torch.from_numpy(_crop_major(there)) if there else None)
    return Masks.of(_crop_major([masks for masks, _ in drawn])), tuple(kept)


def _crop_major(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """[G, N] of each sample to [G*B, N]."""
    stacked = np.stack(parts, 1)
    return stacked.reshape(-1, stacked.shape[-1])
