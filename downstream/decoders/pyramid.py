"""MedDINOv3's decoder (arXiv 2509.02379): the maps of several blocks side by side, then transposed convolutions.

Each stage doubles the grid and halves the channels: for ViT-B/16 and four blocks 3072 -> 1536 -> 768 -> 384 -> 192,
then a 1x1 convolution. There is no skip from the image; fine outlines come from the grid alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from downstream.decoders import ChannelNorm, Taps, fill_convolutions

__all__ = ["PyramidDecoder", "Settings", "build"]


class Settings(Taps):
    """Settings of the pyramid decoder."""

    kind: Literal["pyramid"] = "pyramid"
    min_channels: int = Field(16, ge=1, description="no stage is narrower than this (matters for small backbones only)")


class PyramidDecoder(nn.Module):
    """taps x [B, dim, h, w] -> [B, classes, h * patch, w * patch]; bilinear at the end if patch is no power of two."""

    def __init__(self, dim: int, classes: int, taps: int, patch_size: int, min_channels: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        width = dim * taps
        stages: list[nn.Module] = []
        for _ in range(patch_size.bit_length() - 1):
            narrower = max(width // 2, min_channels)
            stages += [nn.ConvTranspose2d(width, narrower, kernel_size=2, stride=2), ChannelNorm(narrower), nn.GELU()]
            width = narrower
        self.stages = nn.Sequential(*stages)
        self.project = nn.Conv2d(width, classes, kernel_size=1)
        fill_convolutions(self)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """See the class."""
        height, width = (side * self.patch_size for side in maps[0].shape[-2:])
        logits: Tensor = self.project(self.stages(torch.cat(list(maps), dim=1)))
        if logits.shape[-2:] == (height, width):
            return logits
        return functional.interpolate(logits.float(), size=(height, width), mode="bilinear", align_corners=False)


def build(settings: Settings, dim: int, classes: int, taps: int, patch_size: int) -> PyramidDecoder:
    """A pyramid decoder; its weights are filled (He normal for a leaky slope of 0.01, biases zero)."""
    return PyramidDecoder(dim, classes, taps, patch_size, settings.min_channels)
