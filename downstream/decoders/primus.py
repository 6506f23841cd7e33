"""The decoder of Primus (arXiv 2503.01835), MedDINOv3's single-scale baseline: the pyramid over one map, the last.

For ViT-B/16 768 -> 384 -> 192 -> 96 -> 48, then a 1x1 convolution.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from downstream.decoders import Taps
from downstream.decoders.pyramid import PyramidDecoder

__all__ = ["Settings", "build"]


class Settings(Taps):
    """Settings of the Primus decoder."""

    kind: Literal["primus"] = "primus"
    taps: int = Field(1, ge=1, description="how many blocks are read: evenly spaced, the last one among them")
    min_channels: int = Field(16, ge=1, description="no step is narrower than this (matters for small backbones only)")


def build(settings: Settings, dim: int, classes: int, taps: int, patch_size: int) -> PyramidDecoder:
    """A pyramid over `taps` maps; its weights are filled."""
    return PyramidDecoder(dim, classes, taps, patch_size, settings.min_channels)
