"""Every weight of the backbone is trained, lower blocks more slowly if asked; or only the last blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field
from torch import nn

from downstream.tuning import Groups, hold
from launch import settings as base
from pretrain.models.vit import VisionTransformer
from pretrain.optim import OptimSettings, multipliers

if TYPE_CHECKING:
    from downstream.model import SegmentationModel

__all__ = ["Settings", "groups", "install", "kept"]


class Settings(base.Settings):
    """Settings of full fine-tuning."""

    kind: Literal["full"] = "full"
    layer_decay: float = Field(
        1.0, gt=0, le=1, description="factor of the learning rate from each block to the one before; 1: none"
    )
    last: int | None = Field(
        None, ge=1, description="train so many blocks, the last ones, and the final norm; null: all, and the embedding"
    )


def install(settings: Settings, model: SegmentationModel) -> None:
    """Nothing is added."""
    if settings.last is None:
        model.backbone.requires_grad_(True)
        return
    for block in hold(model.backbone, (), settings.last):
        block.requires_grad_(True)
    model.backbone.norm.requires_grad_(True)


def groups(settings: Settings, backbone: VisionTransformer) -> Groups:
    """Block i of `depth` at layer_decay ** (depth - i), the final norm at 1, the embedding below block 0."""
    factors = multipliers(backbone, OptimSettings(layer_decay=settings.layer_decay, patch_embed_lr=1.0))
    parameters = dict(backbone.named_parameters())
    found: dict[float, list[nn.Parameter]] = {}
    for name, factor in factors.items():
        found.setdefault(factor.lr, []).append(parameters[name])
    return [(found[share], share) for share in sorted(found, reverse=True)]


def kept(settings: Settings) -> None:
    """Nothing: the weights are all there is."""
