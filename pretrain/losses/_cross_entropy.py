"""Cross-entropy of logits against soft targets, one sweep over each, for tens of thousands of prototypes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["soft_cross_entropy"]

_CHUNK = 1 << 22  # numbers worked on at once: 16 MiB of float32


def soft_cross_entropy(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """-sum_k targets log softmax(logits / temperature) for each row: [..., K], [..., K] to [...] in float32.

    ``targets`` may have fewer leading dimensions, and are then shared along those; their rows may have any sum, so
    targets of several teacher crops can be added up first. They get no gradient. Works through lse(s) sum(t) - s.t in
    pieces: apart from its inputs and the gradient it holds one piece in float32, not the log-probabilities of all rows.
    """
    targets = targets.detach()
    repeats = logits.shape[: logits.ndim - targets.ndim].numel()
    rows = targets.reshape(-1, targets.shape[-1])
    flat = logits.reshape(repeats * len(rows), logits.shape[-1])
    losses: Tensor = _SoftCrossEntropy.apply(flat, rows, 1 / temperature)  # type: ignore[no-untyped-call]
    return losses.view(logits.shape[:-1])


def _pieces(rows: int, shared: int, columns: int) -> list[tuple[slice, slice]]:
    """Rows of the logits in pieces, each with the rows of the targets that belong to it."""
    size = max(_CHUNK // columns, 1)
    found = []
    for first in range(0, rows, max(shared, 1)):
        for start in range(0, shared, size):
            stop = min(start + size, shared)
            found.append((slice(first + start, first + stop), slice(start, stop)))
    return found


class _SoftCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, scale: float) -> Tensor:
        exact = torch.promote_types(logits.dtype, torch.float32)
        lse = logits.new_empty(len(logits), dtype=exact)
        losses = torch.empty_like(lse)
        for own, theirs in _pieces(len(logits), len(targets), logits.shape[1]):
            s, t = logits[own].to(exact) * scale, targets[theirs].to(exact)
            lse[own] = s.logsumexp(1)
            with torch.autocast(logits.device.type, enabled=False):  # it would take the products in bf16
                losses[own] = lse[own] * t.sum(1) - torch.linalg.vecdot(s, t)
        ctx.save_for_backward(logits, targets, lse)
        ctx.scale = scale
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        logits, targets, lse = ctx.saved_tensors
        result = torch.empty_like(logits)
        for own, theirs in _pieces(len(logits), len(targets), logits.shape[1]):
            t = targets[theirs].to(lse.dtype)
            p = (logits[own].to(lse.dtype) * ctx.scale).sub_(lse[own, None]).exp_().mul_(t.sum(1, keepdim=True)).sub_(t)
            result[own] = p.mul_(gradients[0][own, None] * ctx.scale)
        return result, None, None
