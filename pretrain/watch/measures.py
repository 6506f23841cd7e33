"""What is computed of features and of targets: pure functions, each a number that shows one way a run can fail.

The mean cosine of patches and the effective rank follow the literature on collapsing features: Simeoni et al. 2025
(DINOv3) for patches that grow alike while the loss falls, Garrido et al. 2023 for RankMe.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["divergence", "patch_cosine", "rankme", "spread", "target_use"]

_EPS = 1e-7


def target_use(targets: Tensor) -> dict[str, float]:
    """How targets [n, K], rows that sum to 1, use the K prototypes.

    `entropy` is the mean over samples of a target's entropy (ln K: it says nothing), `entropy_of_mean` that of the mean
    target (ln K: all prototypes alike; 0: all samples get one), both in nats; `used` counts the prototypes that are the
    largest of at least one sample, so it is at most n.
    """
    p = targets.double()
    mean = p.mean(0)
    return {
        "entropy": float(torch.special.entr(p).sum(1).mean()),
        "entropy_of_mean": float(torch.special.entr(mean).sum()),
        "used": float((torch.bincount(p.argmax(1)) > 0).sum()),
    }


def divergence(targets: Tensor, logits: Tensor, temperature: float) -> float:
    """Mean KL divergence in nats of targets [n, K] from softmax(logits / temperature): the loss less its floor."""
    p = targets.double()
    cross = -(p * (logits.double() / temperature).log_softmax(1)).sum(1)
    return float((cross - torch.special.entr(p).sum(1)).mean())


def patch_cosine(patches: Tensor, body: Tensor) -> float:
    """Mean cosine of two different patches of one image, over the images of patches [B, N, D].

    Only patches on the `body` (bool [B, N]) count, since air looks alike to any network; images with fewer than two are
    left out, and NaN is returned where none is left.
    """
    means = []
    for image, inside in zip(patches, body, strict=True):
        unit = F.normalize(image[inside].double(), dim=-1)
        n = len(unit)
        if n > 1:
            means.append(float((unit.sum(0).square().sum() - unit.square().sum()) / (n * (n - 1))))
    return sum(means) / len(means) if means else math.nan


def rankme(features: Tensor) -> float:
    """The effective rank of features [n, D], from 1 to min(n, D): e to the entropy of the singular values' shares.

    They are the roots of the eigenvalues of the smaller product of the matrix with itself, in float64. NaN where a
    feature is not finite.
    """
    x = features.double()
    if not torch.isfinite(x).all():
        return math.nan
    square = x @ x.T if len(x) < x.shape[1] else x.T @ x
    values = torch.linalg.eigvalsh(square).clamp(min=0).sqrt()
    share = values / values.sum().clamp(min=_EPS) + _EPS
    return float((-(share * share.log()).sum()).exp())


def spread(features: Tensor) -> float:
    """How far apart features [n, D] point: sqrt(D) times the mean deviation of a channel of the unit vectors; near 1
    where they point everywhere, 0 where all point one way (Chen & He 2021)."""
    if len(features) < 2:
        return math.nan
    unit = F.normalize(features.double(), dim=-1)
    return float(unit.std(0).mean() * math.sqrt(features.shape[1]))
