"""nnU-Net's loss: soft Dice over the whole batch plus cross entropy, over classes or over regions that may overlap.

Sums go over the patches of all ranks, so that any number of ranks learns the same from a batch. Voxels to be ignored
count in no sum.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn import functional

from downstream.cases import IGNORE, Labels

__all__ = ["SegmentationLoss", "soft_dice"]

SMOOTH = 1e-5


class SegmentationLoss(nn.Module):
    """Dice and cross entropy of logits. Of classes: softmax, no Dice of background; of regions: a sigmoid each."""

    members: Tensor  # [heads, classes], 1 where a class belongs to a head

    def __init__(self, labels: Labels) -> None:
        super().__init__()
        self.overlapping = bool(labels.order)
        self.ignores = labels.ignore is not None
        table = [[float(value in head) for value in labels.values] for head in labels.heads]
        self.register_buffer("members", torch.tensor(table), persistent=False)

    def forward(self, logits: Tensor, classes: Tensor) -> dict[str, Tensor]:
        """Logits [B, heads, H, W], class indices [B, H, W] -> `dice` and `ce` (of regions `bce`), both fp32 scalars."""
        logits, known = logits.float(), classes != IGNORE
        classes = classes.masked_fill(~known, 0)
        return self._regions(logits, classes, known) if self.overlapping else self._classes(logits, classes, known)

    def _classes(self, logits: Tensor, classes: Tensor, known: Tensor) -> dict[str, Tensor]:
        logarithm = functional.log_softmax(logits, 1)
        own = logarithm.gather(1, classes[:, None])[:, 0]  # [B, H, W], of the true class
        probability = logarithm.exp()
        if self.ignores:
            probability = probability * known[:, None]
        both = _by_class(own.exp() * known, classes, logits.shape[1])
        sizes = probability.sum((0, 2, 3)) + _by_class(known.float(), classes, logits.shape[1])
        return {"dice": 1 - soft_dice(both[1:], sizes[1:]).mean(), "ce": _mean(-own, known)}

    def _regions(self, logits: Tensor, classes: Tensor, known: Tensor) -> dict[str, Tensor]:
        truth = self.members.T[classes].movedim(-1, 1) * known[:, None]  # [B, heads, H, W]
        probability = logits.sigmoid() * known[:, None]
        both, sizes = (probability * truth).sum((0, 2, 3)), (probability + truth).sum((0, 2, 3))
        each = functional.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean(1)
        return {"dice": 1 - soft_dice(both, sizes).mean(), "bce": _mean(each, known)}


def soft_dice(both: Tensor, sizes: Tensor) -> Tensor:
    """Sums [K] over this rank's voxels, of the product and of both sides -> soft Dice [K] over those of all ranks."""
    both, sizes = _all_ranks(torch.stack([both, sizes]))
    return (2 * both + SMOOTH) / (sizes + SMOOTH)


def _by_class(values: Tensor, classes: Tensor, count: int) -> Tensor:
    """Sums [count] of values [B, H, W] by class. By rows first: millions added one by one into a fp32 cell drift."""
    rows = values.new_zeros(*classes.shape[:2], count)
    return rows.scatter_add(2, classes, values).sum((0, 1))


def _mean(each: Tensor, known: Tensor) -> Tensor:
    """Mean over the voxels that count. The loop takes the mean over ranks, which may have unequal numbers of them."""
    count = _all_ranks(known.sum().float()) / _ranks()
    return (each * known).sum() / count.clamp(min=1)


def _all_ranks(values: Tensor) -> Tensor:
    if _ranks() == 1:
        return values
    return all_reduce(values) if values.requires_grad else _reduced(values)  # type: ignore[no-untyped-call]


def _reduced(values: Tensor) -> Tensor:
    values = values.clone()
    dist.all_reduce(values)
    return values


def _ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
