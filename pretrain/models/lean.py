"""A linear layer, with what stands before and behind it in a block, that keeps less for the backward pass.

Autograd keeps the input of each linear layer and of each layer scale. Behind a LayerNorm or a GELU the input can be
made again from what those keep anyway; a layer scale can go into the weight. Half of a block's memory is saved so, for
a hundredth of its arithmetic. Where no gradient is wanted, and under ``torch.compile``, which finds such things itself,
the steps are made one by one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["add_rows", "linear"]


def linear(
    x: Tensor,
    layer: nn.Linear,
    bias: Tensor | None,
    *,
    norm: nn.LayerNorm | None = None,
    gelu: bool = False,
    scale: nn.Module | None = None,
) -> Tensor:
    """``scale(layer(x))``, of ``norm(x)`` or of the exact GELU of x; [T, D] to [T, E], in autocast's precision.

    ``bias`` is what the layer adds; ``scale`` multiplies by its ``gamma``, if it has one. Kept are ``x``, two numbers a
    token of the norm, and the parameters.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or x.is_meta:  # autocast has no meta form
        made: Tensor = layer(norm(x) if norm is not None else F.gelu(x) if gelu else x)
        return made if scale is None else scale(made)
    kind, gamma = x.device.type, getattr(scale, "gamma", None)
    lower = torch.is_autocast_enabled(kind) and x.dtype != torch.float64
    weight = layer.weight
    dtype: torch.dtype = torch.get_autocast_dtype(kind) if lower else weight.dtype
    before: tuple[Any, ...] = (None, None, 0.0)
    if norm is not None:  # in the precision of the stream, which may be finer than the layer's
        before = (norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)
    with torch.autocast(kind, enabled=False):
        return _Linear.apply(x, weight, bias, gamma, *before, gelu, dtype)  # type: ignore[no-any-return,no-untyped-call]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor | None, scale: Tensor | None,
        shift: Tensor | None, eps: float, gelu: bool, dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        mean = rstd = None
        given = F.gelu(x) if gelu else x
        if scale is not None:
            given, mean, rstd = torch.native_layer_norm(x, scale.shape, scale, shift, eps)
        ctx.save_for_backward(x, weight, bias, gamma, scale, shift, mean, rstd)
        ctx.eps, ctx.gelu, ctx.dtype = eps, gelu, dtype
        whole, offset = (
            (weight, bias) if gamma is None else (weight * gamma[:, None], None if bias is None else bias * gamma)
        )
        return F.linear(given.to(dtype), whole.to(dtype), None if offset is None else offset.to(dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x, weight, bias, gamma, scale, shift, mean, rstd = ctx.saved_tensors
        (grad,), wanted = gradients, ctx.needs_input_grad
        to_x: Any = None
        to_weight: Any = None
        to_bias = to_gamma = to_scale = to_shift = None
        if wanted[1] or wanted[3]:
            given = F.gelu(x) if ctx.gelu else x
            if scale is not None:
                given = torch.native_layer_norm(x, scale.shape, scale, shift, ctx.eps)[0]
            to_weight = (grad.T @ given.to(ctx.dtype)).to(weight.dtype)
            del given
        if bias is not None:
            to_bias = grad.sum(0).to(bias.dtype)
        if gamma is not None:
            if wanted[3]:
                to_gamma = torch.linalg.vecdot(to_weight, weight)
                to_gamma = to_gamma if bias is None else to_gamma.addcmul_(to_bias, bias)
            to_weight = to_weight * gamma[:, None] if wanted[1] else None
            to_bias = to_bias * gamma if bias is not None else None
            weight = weight * gamma[:, None]
        if any(wanted[i] for i in (0, 4, 5)):
            to_x = grad @ weight.to(ctx.dtype)
            if ctx.gelu:
                to_x = torch.ops.aten.gelu_backward(to_x.to(x.dtype), x)
            if scale is not None:
                to_x, to_scale, to_shift = torch.ops.aten.native_layer_norm_backward(
                    to_x.to(x.dtype), x, scale.shape, mean, rstd, scale, shift, [True, True, True]
                )
            to_x = to_x.to(x.dtype)
        return to_x, to_weight, to_bias, to_gamma, to_scale, to_shift, None, None, None


def add_rows(x: Tensor, rows: Tensor, change: Tensor, factors: list[tuple[int, float]]) -> Tensor:
    """``x`` [T, D] with ``change`` [R, D] added to its ``rows``, times a factor for each run of so many rows.

    ``factors`` are (rows, factor). Neither ``x`` nor ``change`` is kept.
    """
    if torch.compiler.is_compiling():
        return _added(x, rows, change, factors)
    return _AddRows.apply(x, rows, change, factors)  # type: ignore[no-any-return,no-untyped-call]


def _added(x: Tensor, rows: Tensor, change: Tensor, factors: list[tuple[int, float]]) -> Tensor:
    result, sizes = x.clone(), [size for size, _ in factors]
    parts = zip(torch.split(rows, sizes), torch.split(change.to(x.dtype), sizes), factors, strict=True)
    for own, part, (_, factor) in parts:
        result.index_add_(0, own, part, alpha=factor)
    return result


class _AddRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, change: Tensor, factors: list[tuple[int, float]]) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.factors, ctx.dtype = factors, change.dtype
        return _added(x, rows, change, factors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        (rows,) = ctx.saved_tensors
        back = gradients[0].index_select(0, rows)
        for part, (_, factor) in zip(torch.split(back, [size for size, _ in ctx.factors]), ctx.factors, strict=True):
            part.mul_(factor)
        return gradients[0], None, back.to(ctx.dtype), None
