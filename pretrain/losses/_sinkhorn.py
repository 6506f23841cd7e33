"""Sinkhorn-Knopp: the teacher's logits as targets that use all prototypes alike (Caron et al. 2020)."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["sinkhorn"]


@torch.no_grad()
def sinkhorn(logits: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Targets [n, K] whose rows sum to 1, from logits [n, K], in float32 (float64 stays).

    Each iteration scales the prototypes (columns) to equal shares over the samples of all ranks, then each sample (row)
    to a sum of 1. Ranks may hold different numbers of samples, also none. The first iteration is in the log domain, so
    that logits of any size neither overflow nor leave a row or column empty; after it nothing can leave the range of
    floats. A maximum per sample would not do: it changes the result of a few iterations.
    """
    assert iterations >= 1
    q = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    top = _over_ranks(q.amax(0) if len(q) else q.new_full(q.shape[1:], -torch.inf), dist.ReduceOp.MAX)
    mass = _over_ranks((q - top).exp_().sum(0), dist.ReduceOp.SUM)
    q -= top + mass.log()
    q = q.softmax(1)
    for _ in range(iterations - 1):
        q /= _over_ranks(q.sum(0), dist.ReduceOp.SUM)
        q /= q.sum(1, keepdim=True)
    return q


def _over_ranks(values: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values, operation)
    return values
