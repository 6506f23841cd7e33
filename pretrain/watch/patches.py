"""From pixels to patches: which of them lie on the body, and which class each of them shows."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from data_curation.box import BODY_HU

__all__ = ["body_mask", "on_body", "patch_classes", "resize_hu", "resize_image", "resize_labels"]


def body_mask(hu: NDArray[np.float32]) -> NDArray[np.bool_]:
    """The pixels [Y, X] of the patient in a slice: the largest part above -500 HU, with lungs and gas inside it. A
    couch is another part, where air lies between."""
    from scipy import ndimage

    solid = hu > BODY_HU
    parts, count = ndimage.label(solid)
    if not count:
        return np.asarray(solid)
    largest = int(np.bincount(parts[solid]).argmax())
    return np.asarray(ndimage.binary_fill_holes(parts == largest), bool)


def on_body(hu: Tensor, patch: int) -> Tensor:
    """Bool [B, N], for slices [B, 1, H, W] in HU: at least half of the patch's pixels lie on the body."""
    masks = np.stack([body_mask(image.numpy()) for image in hu[:, 0]])
    blocks = masks.reshape(len(masks), masks.shape[1] // patch, patch, masks.shape[2] // patch, patch)
    return torch.from_numpy(blocks.mean((2, 4)) >= 0.5).flatten(1)


def patch_classes(labels: NDArray[np.int64], patch: int) -> NDArray[np.int64]:
    """The commonest label of each patch [B, N] of label maps [B, H, W]; of equally common ones the smallest."""
    batch, height, width = labels.shape
    cells = labels.reshape(batch, height // patch, patch, width // patch, patch)
    cells = cells.transpose(0, 1, 3, 2, 4).reshape(-1, patch * patch)
    found, best = np.zeros(len(cells), np.int64), np.zeros(len(cells), np.int64)
    for value in np.unique(labels).tolist():
        count = (cells == value).sum(1)
        found, best = np.where(count > best, value, found), np.maximum(count, best)
    return found.reshape(batch, -1)


def resize_hu(hu: Tensor, size: tuple[int, int]) -> Tensor:
    """Slices [B, Y, X] in HU of any kind -> float32 [B, 1, *size], between -1000 and 1000 HU."""
    return resize_image(hu.to(torch.float32).clamp(-1000, 1000)[:, None], size)


def resize_image(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Normalised slices [B, C, Y, X] -> [B, C, *size], antialiased bicubic as the training crops are."""
    if image.shape[-2:] == size:
        return image
    return F.interpolate(image, size=size, mode="bicubic", antialias=True)


def resize_labels(labels: NDArray[np.int64], size: tuple[int, int]) -> NDArray[np.int64]:
    """Label maps [B, Y, X] -> [B, *size], each pixel the label at its centre."""
    rows, columns = (
        np.minimum(((np.arange(n) + 0.5) * side / n).astype(np.int64), side - 1)
        for n, side in zip(size, labels.shape[1:], strict=True)
    )
    return labels[:, rows[:, None], columns[None, :]]
