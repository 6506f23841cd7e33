"""Networks that compute in bfloat16 and keep their parameters in float32, without autocast.

Every layer sees its parameters and inputs in bfloat16; gradients, optimizer and moving averages see the float32 ones.
That is what FSDP2's mixed precision does to a sharded network; here one that is not sharded gets the same arithmetic.
Norms, softmax and sums are computed in float32 inside their kernels; the tables of positions and the losses stay
float32 because nothing casts them.
"""

from __future__ import annotations

from functools import cache
from types import MethodType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

__all__ = ["held_in_bf16", "in_bf16"]

Residual = Literal["bf16", "fp32"]


def in_bf16(part: nn.Module, residual: Residual = "bf16", *, cast_parameters: bool = True) -> None:
    """Make a backbone or head compute in bfloat16, in place; names, parameters and state stay as they are.

    ``residual`` is the precision of the stream of tokens between the blocks of a backbone, and of the features made of
    it. ``cast_parameters`` is off for a network that will be sharded with
    `pretrain.parallel.shard(precision="bf16")`, which gathers them in bfloat16. To be called before `torch.compile` and
    before sharding.
    """
    part.register_forward_pre_hook(_inputs_in_bf16, with_kwargs=True)
    if cast_parameters:
        for module in part.modules():
            if module._parameters:
                layer: Any = type(module)
                module.__class__ = _casting(layer, tuple(module._parameters))
    blocks = getattr(part, "blocks", None)
    if residual == "fp32" and isinstance(blocks, nn.ModuleList):
        blocks[0].register_forward_pre_hook(_stream_in_fp32)
        within = set(blocks.modules())
        for module in part.modules():
            if isinstance(module, nn.LayerNorm):
                run = _norm_to_bf16 if module in within else _norm
                module.forward = MethodType(run, module)  # type: ignore[method-assign]


def held_in_bf16(part: nn.Module) -> None:
    """Make a network that never changes compute in bfloat16 and hold its parameters so; buffers stay as they are."""
    part.register_forward_pre_hook(_inputs_in_bf16, with_kwargs=True)
    for parameter in part.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)


def _inputs_in_bf16(_: nn.Module, args: Any, kwargs: Any) -> Any:
    """A head gets back at its bottleneck what it made itself, unrounded: a teacher's logits are exact products."""
    return None if kwargs.get("only_last") else tree_map(_half, (args, kwargs))


def _half(value: Any) -> Any:
    return value.to(torch.bfloat16) if isinstance(value, Tensor) and value.is_floating_point() else value


def _stream_in_fp32(_: nn.Module, args: Any) -> Any:
    stream, *others = args
    return (stream.float(), *others)


def _norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x.float(), norm.normalized_shape, norm.weight.float(), norm.bias.float(), norm.eps)


def _norm_to_bf16(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """The stream's float32 in, bfloat16 out to the layer that follows."""
    return _norm(norm, x).to(torch.bfloat16)


@cache
def _casting(layer: Any, names: tuple[str, ...]) -> Any:
    """The subclass of ``layer`` whose parameters read as bfloat16; all layers of a kind share it, and so one graph.

    Properties, because a recomputation in the backward pass must find them as the forward pass did, and a compiler can
    follow them. What reads `parameters()` or `state_dict()` gets the float32 ones.
    """
    return type(layer.__name__, (layer,), {name: property(_reader(name)) for name in names})


def _reader(name: str) -> Any:
    def read(self: nn.Module) -> Tensor | None:
        parameter = self._parameters[name]
        return None if parameter is None else parameter.to(torch.bfloat16)

    return read
