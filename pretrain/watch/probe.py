"""Are the patches of a backbone good for telling tissues apart? k-NN and a linear map on labelled patches.

Nothing is trained by gradient descent, so the numbers are those of the features alone: the same for the same features,
in seconds. From Python, on any backbone:

    backbone, window = load_backbone(Path("export.safetensors"))                     # pretrain.released
    probe(backbone, window, find_pairs(Path("imagesTr"), Path("labelsTr")))          # {"knn/accuracy": 0.8, ...}
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.data.window import HuWindow
from pretrain.models.vit import VisionTransformer
from pretrain.watch.labelled import Drawn, Labelled, label_patches
from pretrain.watch.pairs import Pair, ProbeError, find_pairs

__all__ = [
    "Pair",
    "ProbeError",
    "ProbeSettings",
    "class_scores",
    "find_pairs",
    "knn",
    "label_patches",
    "linear",
    "patch_features",
    "probe",
    "score",
]

_QUERIES = 1024  # compared with all others at once


class ProbeSettings(Drawn):
    """Which patches are looked at, and how they are told apart."""

    neighbours: int = Field(20, ge=1, description="nearest neighbours that vote")
    temperature: float = Field(0.07, gt=0, description="a neighbour's vote is exp(cosine / temperature)")
    ridge: float = Field(
        0.01, gt=0, description="penalty of the linear map on standardised features, against a mean square of 1"
    )


def probe(
    backbone: VisionTransformer,
    window: HuWindow,
    pairs: Sequence[Pair],
    settings: ProbeSettings = ProbeSettings(),  # noqa: B008  (frozen)
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Probe a backbone on labelled scans; `window` is the one its images need, `device` where it lies.

    Returns accuracy, recall and dice below `knn/` and `linear/` (`score`), all from 0 to 1. Raises ProbeError.
    """
    labelled = label_patches(pairs, backbone.patch_size, window, settings)
    training = backbone.training
    try:
        features = patch_features(backbone.eval(), labelled, backbone.in_channels, device)
    finally:
        backbone.train(training)
    return score(features, labelled, settings)


@torch.no_grad()
def patch_features(backbone: nn.Module, labelled: Labelled, in_channels: int, device: torch.device | str) -> Tensor:
    """Features [n, D] of the drawn patches after the final norm, float32 on the CPU."""
    found = []
    for image, chosen in zip(labelled.images, labelled.chosen, strict=True):
        patches = backbone(image.to(device).expand(-1, in_channels, -1, -1)).patches
        found.append(patches.flatten(0, 1)[chosen.to(device)].float().cpu())
    return torch.cat(found)


def score(features: Tensor, labelled: Labelled, settings: ProbeSettings) -> dict[str, float]:
    """Fit on one half of the patients, score on the other, of features [n, D].

    `accuracy` is the share of right patches, `recall` its mean over classes and `dice` the mean Dice of the classes'
    patches. All are of the drawn patches, where large classes are cut, not of whole images; NaN where a feature is not
    finite.
    """
    fit, classes, count = labelled.fit, labelled.classes, len(labelled.values)
    known, asked = features[fit], features[~fit]
    if not torch.isfinite(features).all():
        return {f"{name}/{what}": math.nan for name in ("knn", "linear") for what in ("accuracy", "recall", "dice")}
    found = {
        "knn": knn(known, classes[fit], asked, settings.neighbours, settings.temperature, count),
        "linear": linear(known, classes[fit], asked, settings.ridge, count),
    }
    return {
        f"{name}/{what}": value
        for name, guessed in found.items()
        for what, value in class_scores(guessed, classes[~fit], count).items()
    }


def knn(known: Tensor, classes: Tensor, asked: Tensor, neighbours: int, temperature: float, count: int) -> Tensor:
    """Classes [m] of features `asked` [m, D]: the nearest of `known` [n, D] by cosine vote with exp(cosine /
    temperature), as in DINO."""
    known = F.normalize(known, dim=-1)
    found = []
    for some in torch.split(F.normalize(asked, dim=-1), _QUERIES):
        likeness, nearest = (some @ known.T).topk(min(neighbours, len(known)), dim=1)
        votes = torch.zeros(len(some), count)
        # Less the greatest: the same order, and no overflow at a low temperature.
        votes.scatter_add_(1, classes[nearest], ((likeness - likeness[:, :1]) / temperature).exp())
        found.append(votes.argmax(1))
    return torch.cat(found)


def linear(known: Tensor, classes: Tensor, asked: Tensor, ridge: float, count: int) -> Tensor:
    """Classes [m] of features `asked` [m, D] by ridge regression on one-hot classes, in closed form and float64.

    Features are standardised by those of `known` [n, D]. All classes weigh the same, however many patches they have, or
    a rare one would never be said; the mean is not penalised.
    """
    x, y = known.double(), F.one_hot(classes, count).double()
    weight = (y / (y.sum(0).clamp(min=1) * (y.sum(0) > 0).sum())).sum(1, keepdim=True)  # [n, 1], of sum 1
    mean, centre = (weight * x).sum(0), (weight * y).sum(0)
    deviation = (weight * (x - mean).square()).sum(0).sqrt().clamp(min=1e-8)
    x = (x - mean) / deviation
    square = x.T @ (weight * x) + ridge * torch.eye(x.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(square, x.T @ (weight * (y - centre)))
    guessed: Tensor = ((asked.double() - mean) / deviation @ weights + centre).argmax(1)
    return guessed


def class_scores(guessed: Tensor, truth: Tensor, count: int) -> dict[str, float]:
    """Accuracy, mean recall and mean Dice of classes [m], each mean over the classes that `truth` has."""
    table = torch.bincount(truth * count + guessed, minlength=count**2).view(count, count).double()  # truth, guessed
    right, there, said = table.diagonal(), table.sum(1), table.sum(0)
    has = there > 0
    return {
        "accuracy": float(right.sum() / table.sum()),
        "recall": float((right / there)[has].mean()),
        "dice": float((2 * right / (there + said))[has].mean()),
    }
