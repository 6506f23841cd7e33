"""Bottleneck adapters: a narrow pair of layers at each frozen feed-forward, beside it or behind it.

beside    AdaptFormer (Chen et al., arXiv 2205.13535): x + MLP(LN x) + s up(ReLU(down(LN x)))
after     Houlsby et al. (arXiv 1902.00751): y = MLP(LN x), then x + y + s up(ReLU(down(y)))
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from downstream.tuning import Groups, Part, hold, split, undisturbed
from pretrain.models.lean import linear
from pretrain.models.vit import VisionTransformer

if TYPE_CHECKING:
    from downstream.model import SegmentationModel

__all__ = ["Bottleneck", "Settings", "groups", "install", "kept"]


class Settings(Part):
    """Settings of adapters."""

    kind: Literal["adapter"] = "adapter"
    place: Literal["beside", "after"] = Field("beside", description="beside the feed-forward, or on what it gives")
    width: int = Field(64, ge=1, description="channels of the bottleneck")
    scale: float = Field(0.1, gt=0, description="factor of what an adapter adds")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of the bottleneck's channels dropped in training")


class Bottleneck(nn.Module):
    """What a block's feed-forward gave [T, D] -> the same plus what the adapter adds; nothing at first, as up is 0."""

    def __init__(self, dim: int, settings: Settings, like: Tensor) -> None:
        super().__init__()
        self.settings = settings
        self.down = nn.Linear(dim, settings.width, device=like.device, dtype=like.dtype)
        self.up = nn.Linear(settings.width, dim, device=like.device, dtype=like.dtype)
        with torch.no_grad():
            nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
            for parameter in (self.down.bias, self.up.weight, self.up.bias):
                parameter.zero_()

    def forward(self, made: Tensor, tokens: Tensor, norm: nn.LayerNorm) -> Tensor:
        """`made` of `tokens` under `norm`, all [T, D]."""
        beside = self.settings.place == "beside"
        low = F.relu(linear(tokens if beside else made, self.down, self.down.bias, norm=norm if beside else None))
        low = F.dropout(low, self.settings.dropout, self.training)
        return made + self.settings.scale * linear(low, self.up, self.up.bias)


def install(settings: Settings, model: SegmentationModel) -> None:
    """Adds an adapter to each block. ValueError for a bottleneck that is none."""
    backbone = model.backbone
    if settings.width >= backbone.dim:
        raise ValueError(f"tuning.width {settings.width} must be below the backbone's {backbone.dim} channels")
    undisturbed(backbone)
    for block in hold(backbone, settings.also, settings.last):
        block.adapter = Bottleneck(backbone.dim, settings, backbone.cls_token)


def groups(settings: Settings, backbone: VisionTransformer) -> Groups:
    """The adapters, and norms and biases if they are trained."""
    adapters = [module for module in backbone.modules() if isinstance(module, Bottleneck)]
    return split(backbone, [parameter for module in adapters for parameter in module.parameters()], settings.lr_factor)


def kept(settings: Settings) -> Settings:
    """All of it: an adapter is a part of the network."""
    return settings
