"""The vision transformer of DINOv3: rotary positions, registers, and crops of several sizes in one stream of tokens.

State-dict keys are those of the released DINOv3 files, and `pos_embed` where positions are a table as in DINOv2. Made
on the meta device, it takes memory only at ``to_empty`` and numbers only at ``init_weights`` (or from a checkpoint),
which leave nothing unfilled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, overload

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.export import register_dataclass

from launch.settings import Settings
from pretrain.models.attention import Group
from pretrain.models.layers import Attention, Block, KMaskedLinear, LayerScale, Mlp, Packing, SwiGlu, init_linear
from pretrain.models.positions import PositionSettings, add_positions, init_positions, positions_shape
from pretrain.models.rope import Rope, RopeSettings

__all__ = ["SIZES", "Features", "VisionTransformer", "VitSettings", "build"]

SIZES = {"ti": (192, 12, 3), "s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16)}  # width, depth, heads
Each = Sequence[Tensor | None] | None
_ALIGN = {"swiglu": 8, "swiglu32": 32, "swiglu64": 64, "swiglu128": 128}


class VitSettings(Settings):
    """A vision transformer. The defaults are those of the released DINOv3 ViT-S, -B and -L."""

    size: Literal["ti", "s", "b", "l", "custom"] = Field(
        "s", description="width, depth and heads; custom: give the three"
    )
    width: int | None = Field(None, gt=0, description="channels of a token, only with size: custom")
    depth: int | None = Field(None, gt=0, description="blocks, only with size: custom")
    heads: int | None = Field(None, gt=0, description="attention heads, only with size: custom")
    patch_size: int = Field(16, gt=0, description="side of a patch in pixels")
    in_channels: Literal[1, 3] = Field(3, description="channels of an image")
    registers: int = Field(4, ge=0, description="extra tokens without a position (Darcet et al. 2024)")
    ffn: Literal["mlp", "swiglu", "swiglu32", "swiglu64", "swiglu128"] = Field(
        "mlp", description="feed-forward; the number aligns"
    )
    ffn_ratio: float = Field(4.0, gt=0, description="hidden channels of the feed-forward over width")
    qkv_bias: bool = Field(True, description="bias of the q, k, v projection")
    mask_k_bias: bool = Field(True, description="hold the bias of k at zero, where there is one")
    layerscale: float | None = Field(1e-5, gt=0, description="initial factor of each branch; null: no layer scale")
    norm_eps: float = Field(1e-5, gt=0, description="epsilon of every LayerNorm")
    drop_path: float = Field(0.0, ge=0, lt=1, description="share of the sequences that skip a branch in training")
    untie_cls_and_patch_norms: bool = Field(False, description="own final norm for class token and registers")
    untie_global_and_local_cls_norm: bool = Field(
        False, description="own final norm for those of local crops, in training"
    )
    rope: RopeSettings = Field(RopeSettings(), description="positions that turn q and k, where `positions` is null")
    positions: PositionSettings | None = Field(
        None, description="positions that are added to the tokens, as in DINOv2, MAE, MoCo v3 and iBOT; null: rope"
    )

    @model_validator(mode="after")
    def _shape_is_whole(self) -> VitSettings:
        given = [name for name in ("width", "depth", "heads") if getattr(self, name) is not None]
        if self.size != "custom" and given:
            raise ValueError(
                f"{', '.join(given)} cannot be given with size: {self.size}; use size: custom and give all three"
            )
        if self.size == "custom" and len(given) < 3:
            raise ValueError("size: custom needs width, depth and heads")
        width, _, heads = self.shape
        if width % (4 * heads):
            raise ValueError(
                f"width {width} must be a multiple of 4 x {heads} heads: a head turns pairs of channels on two axes"
            )
        return self

    @property
    def shape(self) -> tuple[int, int, int]:
        """Width, depth, heads."""
        if self.size != "custom":
            return SIZES[self.size]
        assert self.width is not None
        assert self.depth is not None
        assert self.heads is not None
        return self.width, self.depth, self.heads


@dataclass(frozen=True)
class Features:
    """What the network made of B crops of one size."""

    cls: Tensor  # [B, D]
    registers: Tensor  # [B, R, D]
    patches: Tensor  # [B, N, D], rows of the grid first; or [B, K, D] of those that were kept, in their order


register_dataclass(Features)  # so that sharding finds the tensors in it


class PatchEmbed(nn.Module):
    """Each patch of pixels to one token."""

    def __init__(self, in_channels: int, dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """Image [B, C, H, W] to patches [B, N, D]."""
        return self.proj(x).flatten(2).transpose(1, 2)  # type: ignore[no-any-return]


class VisionTransformer(nn.Module):
    """Crops in, `Features` out; a list of crops of different sizes goes through as one stream."""

    pos_embed: Tensor  # only with `positions`

    def __init__(self, settings: VitSettings) -> None:
        super().__init__()
        s = self.settings = settings
        dim, depth, heads = s.shape
        self.dim, self.patch_size, self.in_channels, self.registers = dim, s.patch_size, s.in_channels, s.registers
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        if s.registers:
            self.storage_tokens = nn.Parameter(torch.empty(1, s.registers, dim))
        self.mask_token = nn.Parameter(torch.empty(1, dim))
        self.patch_embed = PatchEmbed(s.in_channels, dim, s.patch_size)
        self.rope_embed = Rope(dim // heads, s.rope) if s.positions is None else None
        if s.positions is not None:
            table = torch.full(positions_shape(s.positions, dim), math.nan)
            if s.positions.fixed:  # a buffer, so that nothing trains it
                self.register_buffer("pos_embed", table)
            else:
                self.pos_embed = nn.Parameter(table)
        self.blocks = nn.ModuleList(_block(s) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, s.norm_eps)
        self.cls_norm = nn.LayerNorm(dim, s.norm_eps) if s.untie_cls_and_patch_norms else None
        self.local_cls_norm = nn.LayerNorm(dim, s.norm_eps) if s.untie_global_and_local_cls_norm else None

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Fills every parameter and buffer, also those a checkpoint would bring."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                init_linear(module, generator)
                if isinstance(module, KMaskedLinear):
                    module.init_mask()
            elif isinstance(module, nn.LayerNorm):
                module.weight.fill_(1)
                module.bias.zero_()
            elif isinstance(module, LayerScale):
                module.gamma.fill_(module.initial)
            elif isinstance(module, Rope):
                module.init_weights()
        bound = 1 / math.sqrt(self.in_channels * self.patch_size**2)
        for parameter in self.patch_embed.parameters():
            parameter.uniform_(-bound, bound, generator=generator)
        self.cls_token.normal_(0, 0.02, generator=generator)
        if self.registers:
            self.storage_tokens.normal_(0, 0.02, generator=generator)
        self.mask_token.zero_()
        if self.settings.positions is not None:
            init_positions(self.pos_embed, self.settings.positions, generator)

    @overload
    def forward(self, crops: Tensor, masks: Tensor | None = None, kept: Tensor | None = None) -> Features: ...
    @overload
    def forward(self, crops: Sequence[Tensor], masks: Each = None, kept: Each = None) -> list[Features]: ...
    def forward(
        self, crops: Tensor | Sequence[Tensor], masks: Tensor | Each = None, kept: Tensor | Each = None
    ) -> Features | list[Features]:
        """Features of crops [B, C, H, W], or of each entry of a list of them; entry 1 of a list are the local crops.

        ``masks`` (bool [B, N], true = the patch is replaced by the mask token) and ``kept`` have the form of ``crops``.
        Of each image only the patches ``kept`` (int64 [B, K], no patch twice) go through the blocks, each with its own
        position, and come out in that order; the class token and the registers always do.
        Raises ValueError for a size that is no multiple of the patch size, or for another number of channels.
        """
        if isinstance(crops, Tensor):
            assert masks is None or isinstance(masks, Tensor)
            assert kept is None or isinstance(kept, Tensor)
            return self._forward([crops], [masks], [kept])[0]
        none: list[Tensor | None] = [None] * len(crops)
        return self._forward(list(crops), none if masks is None else list(masks), none if kept is None else list(kept))

    def intermediate(
        self, image: Tensor, blocks: Sequence[int], norm: bool = True, reshape: bool = True
    ) -> list[Tensor]:
        """Patches after each of ``blocks`` (0 = after the first, negative from the end): [B, D, h, w], or [B, N, D]
        unshaped.

        ``norm`` applies the final norm to each, as the linear probes of DINOv3 do.
        """
        height, width = (side // self.patch_size for side in image.shape[-2:])
        patches = [features.patches for features in self.intermediate_features(image, blocks, norm)]
        return [torch.unflatten(x.mT, -1, (height, width)) for x in patches] if reshape else patches

    def intermediate_features(self, image: Tensor, blocks: Sequence[int], norm: bool = True) -> list[Features]:
        """All tokens after each of ``blocks``, in the order asked; without ``norm`` they are as the block left them."""
        depth = len(self.blocks)
        wrong = [index for index in blocks if not -depth <= index < depth]
        if wrong:
            raise ValueError(f"no such blocks {wrong}: the model has {depth} blocks, 0 to {depth - 1}")
        wanted = [index % depth for index in blocks]
        outputs = {}
        x, groups, grids = self._tokens([image], [None], [None])
        for index, block in enumerate(self.blocks[: max(wanted, default=-1) + 1]):
            x = block(x, self._packing(groups, grids, [None]))
            if index in wanted:
                tokens = torch.unflatten(x, 0, groups[0])
                outputs[index] = self._features(tokens, 0) if norm else _named(*self._parts(tokens))
        return [outputs[index] for index in wanted]

    def _forward(self, crops: list[Tensor], masks: list[Tensor | None], kept: list[Tensor | None]) -> list[Features]:
        x, groups, grids = self._tokens(crops, masks, kept)
        packing = None
        for block in self.blocks:
            if packing is None or (self.rope_embed is not None and self.rope_embed.draws):
                packing = self._packing(groups, grids, kept)
            x = block(x, packing)
        parts = torch.split(x, [count * length for count, length in groups])
        tokens = [torch.unflatten(part, 0, group) for part, group in zip(parts, groups, strict=True)]
        return [self._features(part, entry) for entry, part in enumerate(tokens)]

    def _packing(self, groups: tuple[Group, ...], grids: list[tuple[int, int]], kept: list[Tensor | None]) -> Packing:
        """With augmentation asked for before each block: each block and group gets its own draw of positions."""
        if self.rope_embed is None:
            return Packing(groups, ())
        tables = []
        for grid, rows in zip(grids, kept, strict=True):
            sin, cos = self.rope_embed(*grid)
            tables.append((sin, cos) if rows is None else (sin[rows], cos[rows]))
        return Packing(groups, tuple(tables))

    def _tokens(
        self, crops: list[Tensor], masks: list[Tensor | None], kept: list[Tensor | None]
    ) -> tuple[Tensor, tuple[Group, ...], list[tuple[int, int]]]:
        """The stream [T, D], its groups, and the patch grid of each group."""
        streams, groups, grids = [], [], []
        for images, mask, rows in zip(crops, masks, kept, strict=True):
            self._check(images)
            grids.append((images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size))
            tokens = self._embed(images, mask, rows, grids[-1])
            groups.append(Group(*tokens.shape[:2]))
            streams.append(tokens.flatten(0, 1))
        return streams[0] if len(streams) == 1 else torch.cat(streams), tuple(groups), grids

    def _embed(self, images: Tensor, mask: Tensor | None, kept: Tensor | None, grid: tuple[int, int]) -> Tensor:
        """Class token, registers and patches of each image: [B, 1 + R + N, D], or K in place of N."""
        patches = self.patch_embed(images)
        cls: Tensor = self.cls_token
        if mask is None:
            cls = cls + 0 * self.mask_token  # so that the mask token has a gradient in every step on every rank
        else:
            patches = torch.where(mask[..., None], self.mask_token.to(patches.dtype), patches)
        if self.settings.positions is not None:
            cls, patches = add_positions(self.pos_embed, self.settings.positions, cls, patches, grid)
        if kept is not None:
            patches = patches.gather(1, kept[..., None].expand(-1, -1, self.dim))
        prefix = [cls, self.storage_tokens] if self.registers else [cls]
        return torch.cat([*(token.expand(images.shape[0], -1, -1) for token in prefix), patches], dim=1)

    def _check(self, images: Tensor) -> None:
        channels, height, width = images.shape[-3:]
        if channels != self.in_channels:
            raise ValueError(f"the image has {channels} channel(s), the model takes {self.in_channels}")
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"an image of {height} x {width} pixels is no whole number of patches of {self.patch_size} x "
                f"{self.patch_size}; pad or resize it to multiples of {self.patch_size}"
            )

    def _parts(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Class token with registers, and patches."""
        return tokens[:, : 1 + self.registers], tokens[:, 1 + self.registers :]

    def _features(self, tokens: Tensor, entry: int) -> Features:
        """After the final norm, or norms, of list entry ``entry``."""
        prefix, patches = self._parts(tokens)
        norm = self.norm
        if self.local_cls_norm is not None and self.training and entry == 1:
            norm = self.local_cls_norm
        elif self.cls_norm is not None:
            norm = self.cls_norm
        return _named(norm(prefix), self.norm(patches))


def _named(prefix: Tensor, patches: Tensor) -> Features:
    """Copies of class token and registers: sharding hangs its hooks on what a model returns, and warns of views."""
    return Features(prefix[:, 0].clone(), prefix[:, 1:].clone(), patches)


def _block(s: VitSettings) -> Block:
    dim, _, heads = s.shape
    hidden = int(dim * s.ffn_ratio)
    return Block(
        dim,
        Attention(dim, heads, qkv_bias=s.qkv_bias, mask_k_bias=s.mask_k_bias),
        Mlp(dim, hidden) if s.ffn == "mlp" else SwiGlu(dim, hidden, _ALIGN[s.ffn]),
        eps=s.norm_eps,
        layerscale=s.layerscale,
        drop_path=s.drop_path,
    )


def build(settings: VitSettings) -> VisionTransformer:
    """The model of these settings, initialised; without numbers under ``torch.device("meta")``."""
    model = VisionTransformer(settings)
    if not model.cls_token.is_meta:
        model.init_weights()
    return model
