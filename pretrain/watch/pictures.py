"""Pictures of what a backbone sees: main directions of its patches as colours, likeness to a patch, crops and masks.

Everything is uint8 RGB [Y, X, 3] in numpy, encoded by imagecodecs; grey is the soft-tissue window, level 40, width 400.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from pretrain.data.window import HuWindow
from pretrain.watch.reference import Reference

__all__ = ["aligned", "colour_scores", "colours", "crops_picture", "likeness_picture", "pca_picture", "png", "queries"]

Image = NDArray[np.uint8]
LEVEL, WIDTH = 40.0, 400.0  # HU
_SIDE = 192  # least side of a panel, pixels
_GAP = 2
_QUERIES = 3  # patches of a slice whose likeness is shown
_HIDDEN = np.array([0.85, 0.25, 0.1])  # colour laid over masked patches


def png(image: Image) -> bytes:
    """The picture as PNG."""
    import imagecodecs

    return bytes(imagecodecs.png_encode(np.ascontiguousarray(image)))


def colour_scores(patches: Tensor, body: Tensor) -> Tensor:
    """Patches [S, N, D] along the three main directions of those on the body (bool [S, N]): float64 [S, N, 3], each of
    deviation 1 on the body. The sign is the one that makes the direction's largest entry positive."""
    x = patches.double().nan_to_num()
    inside = x[body] if int(body.sum()) > 3 else x.flatten(0, 1)
    mean = inside.mean(0)
    _, axes = torch.linalg.eigh((inside - mean).T @ (inside - mean))
    axes = axes[:, -3:].flip(1)  # [D, 3], the greatest first
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    deviation = ((inside - mean) @ axes).std(0).clamp(min=1e-12)
    scores: Tensor = (x - mean) @ (axes * largest.sign()) / deviation
    return scores


def aligned(scores: Tensor, to: Tensor, body: Tensor) -> Tensor:
    """Scores [S, N, 3] turned so that they are as near as can be to those of an earlier picture of the same slices
    (Schoenemann 1966): a tissue keeps its colour while the network changes, also where directions swap or flip."""
    left, _, right = torch.linalg.svd(scores[body].T @ to[body])
    turned: Tensor = scores @ (left @ right)
    return turned


def colours(scores: Tensor, body: Tensor) -> NDArray[np.float64]:
    """Scores [S, N, 3] as RGB from 0 to 1, the 2nd to the 98th percentile on the body; black off the body."""
    x = scores.numpy()
    inside = x[body.numpy()] if bool(body.any()) else x.reshape(-1, 3)
    low, high = np.percentile(inside, [2, 98], axis=0)
    rgb: NDArray[np.float64] = np.clip((x - low) / np.maximum(high - low, 1e-9), 0, 1) * body.numpy()[..., None]
    return rgb


def queries(body: Tensor, side: int, seed: int) -> NDArray[np.int64]:
    """Patches [S, Q] to compare with: one drawn on the body of each slice, then those farthest from the ones before."""
    cells = np.stack(np.divmod(np.arange(side * side), side), 1).astype(np.float64)
    found = np.zeros((len(body), _QUERIES), np.int64)
    for slice_, inside in enumerate(body.numpy()):
        among = np.flatnonzero(inside) if inside.any() else np.arange(side * side)
        picked = [int(np.random.default_rng([seed, 4, slice_]).choice(among))]
        while len(picked) < _QUERIES:
            distance = np.linalg.norm(cells[among, None] - cells[None, picked], axis=2).min(1)
            picked.append(int(among[distance.argmax()]))
        found[slice_] = picked
    return found


def pca_picture(seen: Reference, rgb: NDArray[np.float64]) -> Image:
    """A line a slice: the slice, its patches in the colours of `colours`, for the slices that `rgb` [P, N, 3] has."""
    lines = []
    for grey, colour in zip(_grey(seen.hu[:, 0]), rgb, strict=False):
        lines.append([_three(grey), colour.reshape(seen.side, seen.side, 3)])
    return _tiled(lines, seen)


def likeness_picture(seen: Reference, patches: Tensor, at: NDArray[np.int64]) -> Image:
    """A line a slice: the slice with its marked patches, then for each of them (`at` [P, Q]) the cosine of all patches
    [P, N, D] with it, from 0 (black) to 1 (white)."""
    from matplotlib import colormaps

    unit = F.normalize(patches.double(), dim=-1)
    marks = [np.array(colour) for colour in ((1.0, 0.3, 0.3), (0.3, 1.0, 0.4), (0.4, 0.6, 1.0))]
    lines = []
    for grey, features, picked in zip(_grey(seen.hu[:, 0]), unit, at, strict=False):
        marked = _three(grey)
        patch = len(grey) // seen.side
        maps = []
        for query, mark in zip(picked.tolist(), marks, strict=True):
            row, column = divmod(query, seen.side)
            marked[row * patch : (row + 1) * patch, column * patch : (column + 1) * patch] = mark
            cosine = (features @ features[query]).clamp(0, 1).view(seen.side, seen.side)
            shown = np.asarray(colormaps["inferno"](cosine.numpy()), np.float64)[..., :3]
            shown[row, column] = mark
            maps.append(shown)
        lines.append([marked, *maps])
    return _tiled(lines, seen)


def crops_picture(seen: Reference, count: int, window: HuWindow) -> Image:
    """A line a slice, for the first `count`: the slice, its global crops with the masked patches in red, its local
    crops."""
    batch, images = seen.batch, seen.batch.images
    lines = []
    for slice_ in range(count):
        line = [_three(_grey(seen.hu[slice_, 0]))]
        for crop in range(slice_, len(batch.global_crops), images):
            grey = _three(_grey(_in_hu(batch.global_crops[crop], window)))
            hidden = _larger(batch.masks[crop].view(seen.side, seen.side).numpy(), len(grey))
            grey[hidden] = 0.6 * grey[hidden] + 0.4 * _HIDDEN
            line.append(grey)
        line += [_three(_grey(_in_hu(crop, window))) for crop in batch.local_crops[slice_::images]]
        lines.append(line)
    return _tiled(lines, seen)


def _grey(hu: Tensor) -> NDArray[np.float64]:
    """HU of any shape -> grey from 0 to 1."""
    grey: NDArray[np.float64] = np.clip((hu.double().numpy() - LEVEL) / WIDTH + 0.5, 0, 1)
    return grey


def _in_hu(crop: Tensor, window: HuWindow) -> Tensor:
    """A normalised crop [C, S, S] back in HU [S, S], from the channel with the widest window."""
    parts = window.parts
    channel = max(range(len(parts)), key=lambda i: parts[i].normalised[1] - parts[i].normalised[0])
    return parts[channel].hu(crop[channel].double())


def _three(grey: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.repeat(grey[..., None], 3, axis=-1)


def _larger(image: NDArray[np.generic], side: int) -> NDArray[np.generic]:
    """A square [n, n, ...] with each cell repeated, so that it is `side` wide."""
    index = (np.arange(side) * len(image)) // side
    return image[index[:, None], index[None, :]]


def _tiled(lines: Sequence[Sequence[NDArray[np.float64]]], seen: Reference) -> Image:
    """Square panels, lines of equally many, at one size and with gaps between."""
    side = max(_SIDE, seen.whole.shape[-1])
    step = side + _GAP
    whole = np.zeros((len(lines) * step - _GAP, len(lines[0]) * step - _GAP, 3), np.uint8)
    for row, line in enumerate(lines):
        for column, panel in enumerate(line):
            place = whole[row * step : row * step + side, column * step : column * step + side]
            place[...] = np.rint(_larger(panel, side) * 255)
    return whole
