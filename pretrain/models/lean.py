"""A linear layer, with what stands before and behind it in a block, that keeps less for the backward pass.

Autograd keeps the input of each linear layer and of each layer scale. Behind a LayerNorm or a GELU the input can be
made again from what those keep anyway; a layer scale can go into the weight. Half of a block's memory is saved so, for
a hundredth of its arithmetic. Where no gradient is wanted, and under ``torch.compile``, which finds such things itself,
the steps are made one by one.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Side", "add_rows", "linear"]


class Side(nn.Module):
    """A branch of low rank beside a linear layer (LoRA, Hu et al. 2021): `linear` adds up(down(x)) times a factor.

    A layer has one as its child ``side``. It starts as nothing, since ``up`` is zero.
    """

    factor: Tensor  # alpha / rank, kept with the weights so that these alone tell what is to be added

    def __init__(self, layer: nn.Linear, rank: int, alpha: float, dropout: float = 0.0) -> None:
        super().__init__()
        like: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
        self.dropout = dropout
        self.down = nn.Parameter(torch.empty(rank, layer.in_features, **like))
        self.up = nn.Parameter(torch.zeros(layer.out_features, rank, **like))
        self.register_buffer("factor", torch.tensor(alpha / rank, **like))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """[T, D] to [T, E]."""
        return F.linear(F.linear(F.dropout(x, self.dropout, self.training), self.down), self.up * self.factor)


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
    token of the norm, and the parameters; nothing but them where neither gradient nor norm needs ``x``. A `Side` of
    the layer stands before ``scale``, and keeps its ``rank`` numbers a token.
    """
    side: Side | None = getattr(layer, "side", None)
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or x.is_meta:  # autocast has no meta form
        given = norm(x) if norm is not None else F.gelu(x) if gelu else x
        made: Tensor = layer(given)
        made = made if side is None else made + side(given)
        return made if scale is None else scale(made)
    kind, gamma = x.device.type, getattr(scale, "gamma", None)
    lower = torch.is_autocast_enabled(kind) and x.dtype != torch.float64
    weight = layer.weight
    dtype: torch.dtype = torch.get_autocast_dtype(kind) if lower else weight.dtype
    before: tuple[Any, ...] = (None, None, 0.0)
    if norm is not None:  # in the precision of the stream, which may be finer than the layer's
        before = (norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)
    with torch.autocast(kind, enabled=False):
        if side is None:
            return _Linear.apply(x, weight, bias, gamma, *before, gelu, dtype, None, None)  # type: ignore[no-any-return,no-untyped-call]
        up = side.up * side.factor if gamma is None else side.up * (side.factor * gamma)[:, None]
        if not (side.dropout and side.training):
            return _Linear.apply(x, weight, bias, gamma, *before, gelu, dtype, side.down, up)  # type: ignore[no-any-return,no-untyped-call]
        made = _Linear.apply(x, weight, bias, gamma, *before, gelu, dtype, None, None)  # type: ignore[no-untyped-call]
        given = norm(x.to(norm.weight.dtype)) if norm is not None else F.gelu(x) if gelu else x
        low = F.linear(F.dropout(given, side.dropout).to(dtype), side.down.to(dtype))
        return torch.addmm(made, low, up.to(dtype).T)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor | None, scale: Tensor | None,
        shift: Tensor | None, eps: float, gelu: bool, dtype: torch.dtype, down: Tensor | None, up: Tensor | None,
    ) -> Tensor:  # fmt: skip
        mean = rstd = low = None
        given = F.gelu(x) if gelu else x
        if scale is not None:
            given, mean, rstd = torch.native_layer_norm(x, scale.shape, scale, shift, eps)
        given = given.to(dtype)
        whole, offset = (
            (weight, bias) if gamma is None else (weight * gamma[:, None], None if bias is None else bias * gamma)
        )
        made = F.linear(given, whole.to(dtype), None if offset is None else offset.to(dtype))
        if down is not None and up is not None:
            low = F.linear(given, down.to(dtype))  # [T, rank]
            made = torch.addmm(made, low, up.to(dtype).T)  # in place it would change what a recomputation keeps
        wanted = ctx.needs_input_grad
        again = gelu or scale is not None  # what stands before the layer has a gradient of its own, which is made of x
        needed = wanted[1] or wanted[3] or wanted[9] or (again and (wanted[0] or wanted[4] or wanted[5]))
        ctx.save_for_backward(x if needed else None, weight, bias, gamma, scale, shift, mean, rstd, low, down, up)
        ctx.eps, ctx.gelu, ctx.dtype, ctx.given = eps, gelu, dtype, x.dtype
        return made

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x, weight, bias, gamma, scale, shift, mean, rstd, low, down, up = ctx.saved_tensors
        (grad,), wanted = gradients, ctx.needs_input_grad
        to_x: Any = None
        to_weight: Any = None
        to_bias = to_gamma = to_scale = to_shift = to_down = to_up = to_low = None
        if low is not None:
            to_up = (grad.T @ low).to(up.dtype)
            to_low = grad @ up.to(ctx.dtype)
        if wanted[1] or wanted[3] or wanted[9]:
            given = F.gelu(x) if ctx.gelu else x
            if scale is not None:
                given = torch.native_layer_norm(x, scale.shape, scale, shift, ctx.eps)[0]
            given = given.to(ctx.dtype)
            to_weight = (grad.T @ given).to(weight.dtype) if wanted[1] or wanted[3] else None
            to_down = (to_low.T @ given).to(down.dtype) if to_low is not None else None
            del given
        if bias is not None and (wanted[2] or wanted[3]):
            to_bias = grad.sum(0).to(bias.dtype)
        if gamma is not None:
            if wanted[3]:
                to_gamma = torch.linalg.vecdot(to_weight, weight)
                to_gamma = to_gamma if bias is None else to_gamma.addcmul_(to_bias, bias)
            to_weight = to_weight * gamma[:, None] if wanted[1] else None
            to_bias = to_bias * gamma if to_bias is not None else None
            weight = weight * gamma[:, None]
        if any(wanted[i] for i in (0, 4, 5)):
            to_x = grad @ weight.to(ctx.dtype)
            if to_low is not None:
                to_x = torch.addmm(to_x, to_low, down.to(ctx.dtype))
            if ctx.gelu:
                to_x = torch.ops.aten.gelu_backward(to_x.to(x.dtype), x)
            if scale is not None:
                to_x, to_scale, to_shift = torch.ops.aten.native_layer_norm_backward(
                    to_x.to(x.dtype), x, scale.shape, mean, rstd, scale, shift, [True, wanted[4], wanted[5]]
                )
            to_x = to_x.to(ctx.given)
        return to_x, to_weight, to_bias, to_gamma, to_scale, to_shift, None, None, None, to_down, to_up


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
