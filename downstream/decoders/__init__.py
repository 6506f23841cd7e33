"""Decoders: maps of some backbone blocks in, class logits out. One decoder a file, chosen by `decoder.kind`.

`build(settings, dim, classes, taps, patch_size)` makes a module whose forward takes `taps` maps [B, dim, h, w] and
gives logits [B, classes, h * patch_size, w * patch_size]. Its settings derive from `Taps`: which blocks it reads.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from launch.settings import Settings

__all__ = ["ChannelNorm", "Taps", "fill_convolutions"]


class Taps(Settings):
    """Settings that say which blocks a decoder reads."""

    taps: int = Field(4, ge=1, description="how many blocks are read: evenly spaced, the last one among them")
    blocks: tuple[int, ...] | None = Field(
        None, min_length=1, description="the blocks by number from 0, instead of evenly spaced ones"
    )

    def chosen(self, depth: int) -> tuple[int, ...]:
        """Blocks to read of `depth`: (2, 5, 8, 11) for four of twelve. ValueError if they do not exist."""
        if self.blocks is None:
            if self.taps > depth:
                raise ValueError(
                    f"the decoder reads {self.taps} blocks, the backbone has {depth}; set decoder.taps lower"
                )
            return tuple(round((i + 1) * depth / self.taps) - 1 for i in range(self.taps))
        wrong = [block for block in self.blocks if not 0 <= block < depth]
        if wrong or len(set(self.blocks)) < len(self.blocks):
            raise ValueError(f"decoder.blocks {list(self.blocks)}: give different numbers from 0 to {depth - 1}")
        return self.blocks


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of [B, C, H, W], each position by itself; epsilon is that of MedDINOv3's decoder."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, maps: Tensor) -> Tensor:
        """[B, C, H, W] -> the same shape."""
        last = maps.permute(0, 2, 3, 1)
        return functional.layer_norm(last, self.normalized_shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


def fill_convolutions(decoder: nn.Module) -> None:
    """He normal for a leaky slope of 0.01 and biases of zero, as nnU-Net and MedDINOv3 fill theirs; in place."""
    for module in decoder.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(module.weight, a=1e-2)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
