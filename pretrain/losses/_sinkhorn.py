"""Sinkhorn-Knopp: the teacher's logits as targets that use all prototypes alike (Caron et al. 2020)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["shifted", "sinkhorn", "sinkhorn_shift"]


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


@torch.no_grad()
def sinkhorn_shift(parts: Callable[[], Iterable[Tensor]], temperature: float, iterations: int = 3) -> Tensor:
    """What `shifted` needs to give `sinkhorn`'s targets for samples that never lie in memory together: [K], float32.

    ``parts()`` gives the logits [n, K] of all samples of this rank, part by part, and is called once an iteration. Each
    iteration needs no more of the ones before than one number a prototype.
    """
    assert iterations >= 1
    top, mass = None, None
    for logits in parts():  # one pass: a sum under a maximum that may still rise
        q = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
        peak = q.amax(0) if len(q) else q.new_full(q.shape[1:], -torch.inf)
        if top is None or mass is None:
            top, mass = peak, torch.zeros_like(peak)
        higher = torch.maximum(top, peak)
        mass = mass * (top - higher).exp().nan_to_num(0.0) + (q - higher).exp_().sum(0)
        top = higher
    assert top is not None and mass is not None, "no part, not even an empty one"
    everywhere = _over_ranks(top.clone(), dist.ReduceOp.MAX)
    mass = _over_ranks(mass * (top - everywhere).exp(), dist.ReduceOp.SUM)
    shift = -(everywhere + mass.log())
    for _ in range(iterations - 1):
        share = torch.zeros_like(shift)
        for logits in parts():
            share += shifted(logits, temperature, shift).sum(0)
        shift = shift - _over_ranks(share, dist.ReduceOp.SUM).log()
    return shift


def shifted(logits: Tensor, temperature: float, shift: Tensor) -> Tensor:
    """Targets [n, K] of some of the samples that `sinkhorn_shift` has seen."""
    return (logits.to(shift.dtype) / temperature + shift).softmax(1)


def _over_ranks(values: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values, operation)
    return values
