"""The parts of a transformer block on a packed stream of tokens, with the parameter names of the released files."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.attention import Group, offsets, packed_attention
from pretrain.models.lean import add_rows, linear
from pretrain.models.rope import Table, rotate

__all__ = ["Attention", "Block", "KMaskedLinear", "LayerScale", "Mlp", "Packing", "SwiGlu", "init_linear", "k_mask"]


def init_linear(linear: nn.Linear, generator: torch.Generator | None = None) -> None:
    """Weights N(0, 0.02²), bias 0: the official truncation at ±2 lies a hundred deviations out."""
    linear.weight.normal_(0, 0.02, generator=generator)
    if linear.bias is not None:
        linear.bias.zero_()


def k_mask(dim: int) -> Tensor:
    """What multiplies the bias [3 * dim] of q, k and v so that k has none: ones, zeros, ones."""
    mask = torch.ones(3 * dim)
    mask[dim : 2 * dim] = 0
    return mask


class Packing:
    """Where the sequences of a stream are, and the positions of their patches.

    No dataclass and no tuple on purpose: what casts inputs to bf16 looks into those, and the angles must stay float32.
    """

    def __init__(self, groups: tuple[Group, ...], tables: tuple[Table, ...]) -> None:
        self.groups = groups
        self.tables = tables  # one a group, or none with absolute positions

    def subset(self, chosen: list[Tensor]) -> Packing:
        """The packing of the sequences ``chosen[g]`` (int64 [n]) of each group."""
        groups = tuple(Group(len(those), group.length) for those, group in zip(chosen, self.groups, strict=True))
        pairs = zip(self.tables, chosen if self.tables else [], strict=True)
        tables = [(sin, cos) if sin.ndim == 2 else (sin[those], cos[those]) for (sin, cos), those in pairs]
        return Packing(groups, tuple(tables))


class KMaskedLinear(nn.Linear):
    """The q, k, v projection with the k bias held at zero: it would add the same to every score of a query."""

    bias_mask: Tensor  # [3 * dim]: ones, zeros, ones

    def __init__(self, dim: int) -> None:
        super().__init__(dim, 3 * dim)
        self.register_buffer("bias_mask", torch.full((3 * dim,), torch.nan))

    def init_mask(self) -> None:
        """Fills the mask; it is part of the architecture, not of what was learnt."""
        self.bias_mask.copy_(k_mask(self.in_features))

    def masked_bias(self) -> Tensor:
        """The bias [3 * dim] as it is added."""
        return self.bias * self.bias_mask.to(self.bias.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.masked_bias())


class LayerScale(nn.Module):
    """A learnt factor for each channel of a branch (Touvron et al. 2021), small at first."""

    def __init__(self, dim: int, initial: float) -> None:
        super().__init__()
        self.initial = initial
        self.gamma = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Attention(nn.Module):
    """Multi-head self-attention within each sequence of the stream."""

    def __init__(self, dim: int, heads: int, *, qkv_bias: bool, mask_k_bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = KMaskedLinear(dim) if qkv_bias and mask_k_bias else nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self, x: Tensor, packing: Packing, norm: nn.LayerNorm | None = None, scale: nn.Module | None = None
    ) -> Tensor:
        """Stream [T, D] to stream [T, D], with the block's norm before and its scale behind where they are given."""
        bias = self.qkv.masked_bias() if isinstance(self.qkv, KMaskedLinear) else self.qkv.bias
        qkv = torch.unflatten(linear(x, self.qkv, bias, norm=norm), -1, (3 * self.heads, -1))
        qk, v = torch.split(qkv, [2 * self.heads, self.heads], 1)  # each [T, heads, head dim]
        q, k = (_rotated(qk, packing) if packing.tables else qk).chunk(2, 1)  # no tables with absolute positions
        v = v.contiguous() if torch.is_grad_enabled() else v  # a view would keep the unturned q and k too
        attended = packed_attention(q, k, v, packing.groups).flatten(1)
        return linear(attended, self.proj, self.proj.bias, scale=scale)


def _rotated(x: Tensor, packing: Packing) -> Tensor:
    parts = torch.split(x, [count * length for count, length in packing.groups])
    turned = [
        rotate(torch.unflatten(part, 0, group), table).flatten(0, 1)
        for part, group, table in zip(parts, packing.groups, packing.tables, strict=True)
    ]
    return turned[0] if len(turned) == 1 else torch.cat(turned)


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, norm: nn.LayerNorm | None = None, scale: nn.Module | None = None) -> Tensor:
        hidden = linear(x, self.fc1, self.fc1.bias, norm=norm)
        return linear(hidden, self.fc2, self.fc2.bias, gelu=True, scale=scale)


class SwiGlu(nn.Module):
    """Gated feed-forward; two thirds of ``hidden``, rounded up to ``align``, so that it costs what `Mlp` does."""

    def __init__(self, dim: int, hidden: int, align: int) -> None:
        super().__init__()
        hidden = -(-int(hidden * 2 / 3) // align) * align
        self.w1 = nn.Linear(dim, hidden)
        self.w2 = nn.Linear(dim, hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, norm: nn.LayerNorm | None = None, scale: nn.Module | None = None) -> Tensor:
        x = x if norm is None else norm(x)
        gate, value = (linear(x, layer, layer.bias) for layer in (self.w1, self.w2))
        return linear(F.silu(gate) * value, self.w3, self.w3.bias, scale=scale)


class Block(nn.Module):
    """x + attention, x + feed-forward, each on its normalised input, in training for a random part of the sequences."""

    def __init__(
        self, dim: int, attn: Attention, mlp: Mlp | SwiGlu, *, eps: float, layerscale: float | None, drop_path: float
    ) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(dim, eps)
        self.attn = attn
        self.ls1 = LayerScale(dim, layerscale) if layerscale is not None else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps)
        self.mlp = mlp
        self.ls2 = LayerScale(dim, layerscale) if layerscale is not None else nn.Identity()
        self.adapter: nn.Module | None = None  # given the feed-forward's result, its input and norm, makes another

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        """Stream [T, D] to stream [T, D]."""

        def attend(tokens: Tensor, kept: Packing) -> Tensor:
            return self.attn(tokens, kept, self.norm1, self.ls1)  # type: ignore[no-any-return]

        def feed(tokens: Tensor, kept: Packing) -> Tensor:
            made: Tensor = self.mlp(tokens, self.norm2, self.ls2)
            return made if self.adapter is None else self.adapter(made, tokens, self.norm2)

        for branch in (attend, feed):
            x = self._dropped(x, packing, branch) if self.training and self.drop_path else x + branch(x, packing)
        return x

    def _dropped(self, x: Tensor, packing: Packing, branch: Callable[[Tensor, Packing], Tensor]) -> Tensor:
        """Stochastic depth by computing less: the branch runs on a random part of each group and counts for all."""
        kept, every, factors = [], [], []
        for (count, length), start in zip(packing.groups, offsets(packing.groups), strict=False):
            keep = max(int(count * (1 - self.drop_path)), 1)
            chosen = torch.randperm(count, device=x.device)[:keep]
            kept.append((start + chosen[:, None] * length + torch.arange(length, device=x.device)).flatten())
            every.append(chosen)
            factors.append((keep * length, count / keep))
        tokens = kept[0] if len(kept) == 1 else torch.cat(kept)
        return add_rows(x, tokens, branch(x.index_select(0, tokens), packing.subset(every)), factors)
