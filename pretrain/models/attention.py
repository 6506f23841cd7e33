"""Attention within each of many short sequences that lie in one stream of tokens.

Crops of several sizes share one stream [T, D], so that every linear layer is one matrix product whatever the crops.
Only attention must know where a crop ends. On CUDA xformers' block-diagonal kernel does; elsewhere (xformers has no CPU
kernel) the crops of one size are one batch of torch's attention, which computes the same sums without a mask. So are
they in a compiled block: xformers' call would cut its graph in two, and a graph that is cut cannot be recomputed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Group", "block_diagonal", "offsets", "packed_attention"]


class Group(NamedTuple):
    """``sequences`` of ``length`` tokens each, next to each other in the stream."""

    sequences: int
    length: int


def offsets(groups: Sequence[Group]) -> list[int]:
    """Where each group starts in the stream, and at last where the stream ends."""
    return list(accumulate((group.sequences * group.length for group in groups), initial=0))


def packed_attention(q: Tensor, k: Tensor, v: Tensor, groups: Sequence[Group]) -> Tensor:
    """softmax(q k^T / sqrt(d)) v within each sequence; tensors [T, heads, head dim] of all tokens."""
    assert q.shape[0] == offsets(groups)[-1], (q.shape, groups)
    if len(groups) > 1 and _has_kernel(q) and not torch.compiler.is_compiling():
        return _attend_blocks(q, k, v, tuple(groups))
    sizes = [group.sequences * group.length for group in groups]
    parts = zip(torch.split(q, sizes), torch.split(k, sizes), torch.split(v, sizes), groups, strict=True)
    attended: list[Tensor] = [_attend(*part) for part in parts]
    return attended[0] if len(attended) == 1 else torch.cat(attended)


def _has_kernel(x: Tensor) -> bool:
    return x.is_cuda


def _attend(q: Tensor, k: Tensor, v: Tensor, group: Group) -> Tensor:
    q, k, v = (torch.unflatten(x, 0, group).transpose(1, 2) for x in (q, k, v))  # [B, heads, L, head dim]
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)


def _attend_blocks(q: Tensor, k: Tensor, v: Tensor, groups: tuple[Group, ...]) -> Tensor:
    from xformers.ops import memory_efficient_attention

    mask = block_diagonal(groups, q.device)
    return cast(Tensor, memory_efficient_attention(q[None], k[None], v[None], attn_bias=mask)[0])


@lru_cache(maxsize=64)
def block_diagonal(groups: tuple[Group, ...], device: torch.device) -> Any:
    """xformers' mask of these groups; kept, because making it copies the lengths to the device."""
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    with torch.inference_mode(False):  # a mask first made for a teacher must do for a student
        return BlockDiagonalMask.from_seqlens(_lengths(groups), device=device)


def _lengths(groups: Sequence[Group]) -> list[int]:
    return [group.length for group in groups for _ in range(group.sequences)]
