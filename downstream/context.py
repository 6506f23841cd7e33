"""2.5D: a slice is told apart with its neighbours, each of which goes through the same backbone."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor, nn

from launch.settings import Settings

__all__ = ["Context", "Fusion", "neighbours"]


class Context(Settings):
    """Which neighbours of a slice the network sees."""

    slices: int = Field(0, ge=0, description="neighbours on each side; 0: the slice alone (2D)")
    mm: float | None = Field(
        None, gt=0, description="distance of one neighbour to the next; null: as slices are stored"
    )

    @model_validator(mode="after")
    def _distance_of_something(self) -> Context:
        if self.mm is not None and not self.slices:
            raise ValueError(f"mm={self.mm:g} is the distance of neighbours, and slices=0 sees none; set slices=1")
        return self

    @property
    def size(self) -> int:
        """Slices that the network sees for one that it labels."""
        return 2 * self.slices + 1


def neighbours(chosen: NDArray[np.int64], count: int, spacing: float, context: Context) -> NDArray[np.int64]:
    """Slices `chosen` [n] of a stack of `count`, `spacing` mm apart -> the slices that the network sees [n, size].

    The slice itself stands in the middle; beyond the ends of the stack the last slice is repeated.
    """
    steps = np.arange(-context.slices, context.slices + 1)
    if context.mm is not None:
        steps = np.rint(steps * context.mm / spacing).astype(np.int64)
    found: NDArray[np.int64] = np.clip(chosen[:, None] + steps, 0, count - 1)
    return found


class Fusion(nn.Module):
    """One map of a slice from those of the slice and its neighbours: a 1x1 convolution over all their channels.

    It starts as the map of the slice itself, so that what a backbone knows is there from the first step.
    """

    def __init__(self, dim: int, context: Context) -> None:
        super().__init__()
        self.mix = nn.Conv2d(context.size * dim, dim, kernel_size=1)
        assert self.mix.bias is not None
        with torch.no_grad():
            self.mix.weight.zero_()
            self.mix.bias.zero_()
            nn.init.eye_(self.mix.weight[:, context.slices * dim : (context.slices + 1) * dim, 0, 0])

    def forward(self, maps: Tensor) -> Tensor:
        """[B, S, D, h, w], the slice itself in the middle -> [B, D, h, w]."""
        fused: Tensor = self.mix(maps.flatten(1, 2))
        return fused
