"""Boxes of a slice resized to squares by antialiased bicubic interpolation: one by one, or a batch of them.

Both forms have the numbers of torch's `interpolate(mode="bicubic", antialias=True)`: Keys' kernel with a = -0.5,
widened when it shrinks, cut at the box's border and normalised to sum 1.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

__all__ = ["resample_batch", "resample_one", "resize"]


def resize(images: Tensor, size: int) -> Tensor:
    """[N, C, h, w] -> [N, C, size, size]; the same tensor when it has that size."""
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images, size=(size, size), mode="bicubic", antialias=True)


def resample_one(image: Tensor, box: tuple[int, int, int, int], flip: bool, out: Tensor) -> None:
    """Fills out [C, S, S] from a box (top, left, height, width) of an image [C, Y, X], mirrored left to right if asked.

    Two sparse products, each with its few pixels a row summed by `embedding_bag`, whose loops run along rows. NumPy
    transposes between them, faster than torch.
    """
    top, left, height, width = box
    channels, size = out.shape[:2]
    part = image.numpy()[:, top : top + height, left : left + width]
    half = _weighted(part.transpose(1, 0, 2).reshape(height, channels * width), height, size, False)
    beside = half.reshape(size, channels, width).transpose(2, 1, 0)  # [w, C, S]
    made = _weighted(beside.reshape(width, channels * size), width, size, flip)
    out.numpy()[...] = made.reshape(size, channels, size).transpose(1, 2, 0)


def _weighted(table: NDArray[np.float32], length: int, size: int, flip: bool) -> NDArray[np.float32]:
    """[length, N] -> [size, N], each row the weighted sum of its taps."""
    pixels, weights, bags = _taps(length, size)
    if flip:  # of the bags and within them, where order means nothing
        pixels, weights = pixels.flip(0), weights.flip(0)
    rows = torch.from_numpy(np.ascontiguousarray(table))
    summed: Tensor = torch.embedding_bag(rows, pixels, bags, False, 0, False, weights)[0]
    return summed.numpy()


@lru_cache(maxsize=2048)
def _taps(length: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """For each of `size` pixels made from `length` ones its T taps: pixels, int32 [size*T], their weights, and where
    the taps of each begin [size]."""
    step = length / size
    reach = 2 * max(step, 1.0)
    centre = (torch.arange(size, dtype=torch.float64)[:, None] + 0.5) * step
    pixel = (centre - reach).floor() + torch.arange(math.ceil(2 * reach) + 1)
    weights = _keys(((pixel + 0.5 - centre) / max(step, 1.0)).abs_()) * ((pixel >= 0) & (pixel < length))
    weights /= weights.sum(1, keepdim=True)
    taps = pixel.shape[1]
    begins = torch.arange(0, size * taps, taps, dtype=torch.int32)
    return pixel.clamp_(0, length - 1).int().flatten(), weights.float().flatten(), begins


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
