"""A linear probe: one 1x1 convolution on normalised tokens, enlarged bilinearly. It shows what the backbone knows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from downstream.decoders import ChannelNorm, Taps

__all__ = ["LinearDecoder", "Settings", "build"]


class Settings(Taps):
    """Settings of the linear decoder."""

    kind: Literal["linear"] = "linear"
    taps: int = Field(1, ge=1, description="how many blocks are read: evenly spaced, the last one among them")


class LinearDecoder(nn.Module):
    """taps x [B, dim, h, w] -> [B, classes, h * patch, w * patch]."""

    def __init__(self, dim: int, classes: int, taps: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.norm = ChannelNorm(dim * taps)
        self.project = nn.Conv2d(dim * taps, classes, kernel_size=1)
        nn.init.normal_(self.project.weight, std=0.01)
        if self.project.bias is not None:
            nn.init.zeros_(self.project.bias)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """See the class."""
        logits = self.project(self.norm(torch.cat(list(maps), dim=1))).float()
        return functional.interpolate(logits, scale_factor=float(self.patch_size), mode="bilinear", align_corners=False)


def build(settings: Settings, dim: int, classes: int, taps: int, patch_size: int) -> LinearDecoder:
    """A linear decoder; its weights are filled."""
    return LinearDecoder(dim, classes, taps, patch_size)
