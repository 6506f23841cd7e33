"""Boxes of a slice resized to squares by antialiased bicubic interpolation: one by one, or a batch of them.

Both forms have the numbers of torch's `interpolate(mode="bicubic", antialias=True)`: Keys' kernel with a = -0.5,
widened when it shrinks, cut at the box's border and normalised to sum 1.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["resample_batch", "resample_one", "resize"]


def resize(images: Tensor, size: int) -> Tensor:
    """[N, C, h, w] -> [N, C, size, size]; the same tensor when it has that size."""
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images, size=(size, size), mode="bicubic", antialias=True)


def resample_one(image: Tensor, box: tuple[int, int, int, int], flip: bool, size: int) -> Tensor:
    """One box (top, left, height, width) of an image [C, Y, X] -> [C, size, size], mirrored left to right if asked.

    Two sparse products, each with its few pixels a row summed by `embedding_bag`, whose loops run along rows: a third
    of the time that `interpolate` takes on a CPU.
    """
    top, left, height, width = box
    channels = len(image)
    table = image[:, top : top + height, left : left + width].transpose(0, 1).reshape(height, channels * width)
    half = _weighted(table, height, size, False)  # [size, C*w]
    table = half.view(size, channels, width).permute(2, 1, 0).reshape(width, channels * size)
    return _weighted(table, width, size, flip).view(size, channels, size).permute(1, 2, 0)


def _weighted(table: Tensor, length: int, size: int, flip: bool) -> Tensor:
    pixels, weights = _taps(length, size)
    if flip:
        pixels, weights = pixels.flip(0), weights.flip(0)
    return F.embedding_bag(pixels, table, per_sample_weights=weights, mode="sum")


@lru_cache(maxsize=2048)
def _taps(length: int, size: int) -> tuple[Tensor, Tensor]:
    """For each of `size` pixels made from `length` ones: which it is made of, int32 [size, T], and their weights."""
    step = length / size
    reach = 2 * max(step, 1.0)
    centre = (torch.arange(size, dtype=torch.float64)[:, None] + 0.5) * step
    pixel = (centre - reach).floor() + torch.arange(math.ceil(2 * reach) + 1)
    weights = _keys(((pixel + 0.5 - centre) / max(step, 1.0)).abs_()) * ((pixel >= 0) & (pixel < length))
    weights /= weights.sum(1, keepdim=True)
    return pixel.clamp_(0, length - 1).int(), weights.float()


def resample_batch(image: Tensor, boxes: Tensor, flips: Tensor, size: int) -> Tensor:
    """Boxes [B, K, 4] of images [B, C, Y, X] -> [B, K, C, size, size], as two dense products; for a device."""
    (batch, channels, height, width), crops = image.shape, boxes.shape[1]
    top, left, h, w = boxes.unbind(-1)
    rows = _weights(top, h, torch.zeros_like(flips), size, height).view(batch, crops * size, height)
    columns = _weights(left, w, flips, size, width).view(batch * crops, size, width)
    beside = image.transpose(1, 2).reshape(batch, height, channels * width)
    half = torch.bmm(rows, beside).view(batch * crops, size, channels, width).transpose(1, 2)
    made = torch.bmm(half.reshape(batch * crops, channels * size, width), columns.mT)
    return made.view(batch, crops, channels, size, size)


def _weights(start: Tensor, length: Tensor, flips: Tensor, size: int, total: int) -> Tensor:
    """Weights [B, K, size, total] of the pixels made from [start, start + length) of `total` pixels."""
    step = (length / size)[..., None, None]
    out = torch.arange(size, device=start.device)
    out = torch.where(flips[..., None], size - 1 - out, out)[..., None]  # [B, K, size, 1]
    pixel = torch.arange(total, device=start.device) - start[..., None, None]  # [B, K, 1, total], from the box's start
    weights = _keys(((pixel + 0.5 - (out + 0.5) * step) / step.clamp(min=1)).abs_())
    weights *= (pixel >= 0) & (pixel < length[..., None, None])
    return weights / weights.sum(-1, keepdim=True)


def _keys(x: Tensor) -> Tensor:
    """Keys' kernel at distances x >= 0."""
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
