"""UPerNet (arXiv 1807.10221) on a plain vision transformer, whose maps are first brought to four grids, as in BEiT.

The maps of four blocks, from low to high, get 4, 2, 1 and 1/2 times the grid of patches (strides 4, 8, 16 and 32 with
patches of 16). The deepest is seen as a whole by pyramid pooling, then each level adds what comes from above, all are
brought to the finest grid and joined, and a 1x1 convolution gives logits, which are enlarged bilinearly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from downstream.decoders import ChannelNorm, Taps, fill_convolutions

__all__ = ["Settings", "UperNetDecoder", "build"]

LEVELS = 4


class Settings(Taps):
    """Settings of the UPerNet decoder."""

    kind: Literal["upernet"] = "upernet"
    channels: int = Field(256, ge=1, description="channels of every level")
    pools: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (1, 2, 3, 6), min_length=1, description="sides of the grids of pyramid pooling"
    )

    def chosen(self, depth: int) -> tuple[int, ...]:
        """As of every decoder; ValueError unless they are four."""
        blocks = super().chosen(depth)
        if len(blocks) != LEVELS:
            raise ValueError(
                f"decoder upernet reads {LEVELS} blocks, {len(blocks)} are given; see decoder.blocks, taps"
            )
        return blocks


class UperNetDecoder(nn.Module):
    """4 x [B, dim, h, w] -> [B, classes, h * patch, w * patch]."""

    def __init__(self, dim: int, classes: int, patch_size: int, settings: Settings) -> None:
        super().__init__()
        width, pools = settings.channels, settings.pools
        self.patch_size, self.pools = patch_size, pools
        self.resize = nn.ModuleList([
            nn.Sequential(_twice(dim), ChannelNorm(dim), nn.GELU(), _twice(dim)),
            _twice(dim),
            nn.Identity(),
            nn.MaxPool2d(2, ceil_mode=True),
        ])  # fmt: skip
        self.pooled = nn.ModuleList(_convolution(dim, width, 1) for _ in pools)
        self.whole = _convolution(dim + len(pools) * width, width, 3)
        self.lateral = nn.ModuleList(_convolution(dim, width, 1) for _ in range(LEVELS - 1))
        self.smooth = nn.ModuleList(_convolution(width, width, 3) for _ in range(LEVELS - 1))
        self.fuse = _convolution(LEVELS * width, width, 3)
        self.project = nn.Conv2d(width, classes, kernel_size=1)
        fill_convolutions(self)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """See the class."""
        height, width = (side * self.patch_size for side in maps[0].shape[-2:])
        levels = [resize(each) for resize, each in zip(self.resize, maps, strict=True)]
        deepest = levels.pop()
        pools = [
            _enlarged(conv(functional.adaptive_avg_pool2d(deepest, side)), deepest)
            for side, conv in zip(self.pools, self.pooled, strict=True)
        ]
        above: Tensor = self.whole(torch.cat([deepest, *pools], dim=1))
        found = [above]
        for level, lateral, smooth in zip(levels[::-1], reversed(self.lateral), reversed(self.smooth), strict=True):
            own = lateral(level)
            above = own + _enlarged(above, own)
            found.append(smooth(above))
        joined = self.fuse(torch.cat([_enlarged(each, found[-1]) for each in found], dim=1))
        logits: Tensor = self.project(joined).float()
        return functional.interpolate(logits, size=(height, width), mode="bilinear", align_corners=False)


def _twice(dim: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(dim, dim, kernel_size=2, stride=2)


def _convolution(channels: int, width: int, size: int) -> nn.Sequential:
    """Normalised position by position, and not over the batch, which is small here."""
    return nn.Sequential(nn.Conv2d(channels, width, size, padding=size // 2, bias=False), ChannelNorm(width), nn.GELU())


def _enlarged(maps: Tensor, like: Tensor) -> Tensor:
    return functional.interpolate(maps, size=like.shape[-2:], mode="bilinear", align_corners=False)


def build(settings: Settings, dim: int, classes: int, taps: int, patch_size: int) -> UperNetDecoder:
    """A UPerNet decoder; its weights are filled (He normal for a leaky slope of 0.01, biases zero)."""
    assert taps == LEVELS, taps
    return UperNetDecoder(dim, classes, patch_size, settings)
