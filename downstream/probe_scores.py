"""What can be told from the features of a probe: k-NN and linear on patches, and a linear map's labels of whole slices.

The linear map of whole slices is the linear discriminant: classes with one covariance, that of the patches within
classes with a ridge, and with the shares that they have in the slices that fit as their priors. Its logits are enlarged
to the slice as the network sees it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from downstream.probe_features import Looked
from downstream.validation import region_dice
from pretrain.watch.labelled import balanced
from pretrain.watch.patches import resize_labels
from pretrain.watch.probe import class_scores, knn, linear

__all__ = ["Discriminant", "Fit", "Patches", "discriminant", "draw_patches", "patch_scores", "slice_dice"]


@dataclass(frozen=True)
class Patches:
    """Drawn patches: features [n, D], classes [n] as indices, and each class's share of all patches on the body."""

    features: Tensor
    classes: Tensor
    shares: Tensor


@dataclass(frozen=True)
class Fit:
    """How patches are told apart."""

    neighbours: int
    temperature: float
    ridge: float


@dataclass(frozen=True)
class Discriminant:
    """Logits of features [..., D]: `features @ weights + offset`; -inf of classes that were never seen."""

    weights: Tensor  # [D, classes]
    offset: Tensor  # [classes]

    def __call__(self, features: Tensor) -> Tensor:
        return features @ self.weights + self.offset


def draw_patches(
    scans: Sequence[Looked], block: int, values: Sequence[int], most: int, rng: np.random.Generator
) -> Patches:
    """At most `most` patches of these scans, classes balanced, none off the body and none of another value."""
    order = np.asarray(values, np.int64)
    classes = [_indices(scan.classes(), order) for scan in scans]
    whole = np.concatenate([part.ravel() for part in classes])
    usable = np.flatnonzero(whole >= 0)
    kept = np.zeros(len(whole), bool)
    kept[usable[balanced(whole[usable], most, rng)]] = True
    ends = np.cumsum([part.size for part in classes])[:-1]
    features = [
        scan.features(block).flatten(0, 1)[torch.from_numpy(chosen)]
        for scan, chosen in zip(scans, np.split(kept, ends), strict=True)
        if chosen.any()
    ]
    counts = np.bincount(whole[usable], minlength=len(values)).astype(np.float64)
    if not features:
        return Patches(torch.empty(0, 1), torch.empty(0, dtype=torch.int64), torch.zeros(len(values)))
    return Patches(torch.cat(features), torch.from_numpy(whole[kept]), torch.from_numpy(counts / counts.sum()))


def _indices(found: NDArray[np.int64], values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Label values -> indices into `values`, -1 for others."""
    at = np.minimum(np.searchsorted(values, found), len(values) - 1)
    return np.where(values[at] == found, at, -1)


def patch_scores(known: Patches, asked: Patches, fit: Fit) -> dict[str, float]:
    """Accuracy, recall and dice, below `knn/` and `linear/`, of the patches `asked`, as in the watch of a run."""
    count = len(known.shares)
    given = (known.features, known.classes, asked.features)
    guessed = {
        "knn": knn(*given, fit.neighbours, fit.temperature, count),
        "linear": linear(*given, fit.ridge, count),
    }
    return {
        f"{name}/{what}": value
        for name, said in guessed.items()
        for what, value in class_scores(said, asked.classes, count).items()
    }


def discriminant(known: Patches, ridge: float) -> Discriminant:
    """The linear discriminant (Fisher 1936) of drawn patches, in closed form and float64.

    Each class counts by its share of all patches, not of those drawn: else the map would change with how far the larger
    classes were cut, that is with the number of cases.
    """
    x, classes = known.features.double(), known.classes
    count, width = len(known.shares), x.shape[1]
    sizes = torch.bincount(classes, minlength=count).double()
    weight = (known.shares.double() / sizes.clamp(min=1))[classes][:, None]  # [n, 1], of sum 1
    mean = (weight * x).sum(0)
    deviation = (weight * (x - mean).square()).sum(0).sqrt().clamp(min=1e-8)
    x = (x - mean) / deviation
    centres = torch.zeros(count, width, dtype=torch.float64).index_add_(0, classes, x) / sizes.clamp(min=1)[:, None]
    within = x - centres[classes]
    covariance = within.T @ (weight * within) + ridge * torch.eye(width, dtype=torch.float64)
    directions = torch.linalg.solve(covariance, centres.T)  # [D, classes]
    offset = torch.log(known.shares.double()) - 0.5 * (centres.T * directions).sum(0)
    offset[(sizes == 0) | (known.shares == 0)] = -math.inf
    weights = directions / deviation[:, None]
    return Discriminant(weights.float(), (offset - mean @ weights).float())


@torch.no_grad()
def slice_dice(
    scan: Looked, block: int, maps: Sequence[Discriminant], values: Sequence[int], organs: Mapping[str, Sequence[int]]
) -> NDArray[np.float64]:
    """Dice [maps, organs] of the scan's slices together, pixel by pixel as the network sees them; NaN where neither
    label nor prediction has the organ. Pixels of a value that is none of `values` do not count."""
    features = scan.features(block)  # [S, h*w, D]
    order = np.asarray(values, np.int64)
    size = (scan.grid[0] * scan.patch, scan.grid[1] * scan.patch)
    _, labels = scan.kept.load()
    table = np.zeros((len(maps), len(values), len(values)), np.int64)  # truth, said
    for tokens, label in zip(features, labels, strict=True):
        truth = _indices(resize_labels(label[None], size)[0], order).ravel()
        counted = truth >= 0
        for number, one in enumerate(maps):
            logits = one(tokens).clamp(min=-1e9).T.reshape(1, -1, *scan.grid)  # [1, classes, h, w]
            large = functional.interpolate(logits, size=size, mode="bilinear", align_corners=False)[0]
            said = large.argmax(0).flatten().numpy()
            joint = truth[counted] * len(values) + said[counted]
            table[number] += np.bincount(joint, minlength=len(values) ** 2).reshape(len(values), -1)
    members = [np.flatnonzero(np.isin(order, some)).tolist() for some in organs.values()]
    return np.array([[region_dice(one, some) for some in members] for one in table])
