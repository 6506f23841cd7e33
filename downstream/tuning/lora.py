"""LoRA (Hu et al., arXiv 2106.09685): beside each frozen weight W a product of two thin matrices learns a change of it.

It is computed as a branch, so that no gradient of W is made, and added to W when the model is saved.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field
from torch import nn

from downstream.tuning import Groups, Part, hold, split, undisturbed
from pretrain.models.lean import Side
from pretrain.models.vit import VisionTransformer

if TYPE_CHECKING:
    from downstream.model import SegmentationModel

__all__ = ["Settings", "groups", "install", "kept"]

Target = Literal["qkv", "proj", "fc1", "fc2"]
_NAMES = {"w1": "fc1", "w2": "fc1", "w3": "fc2"}  # of a gated feed-forward, by those of a plain one


class Settings(Part):
    """Settings of LoRA."""

    kind: Literal["lora"] = "lora"
    rank: int = Field(16, ge=1, description="columns of the thin matrices")
    alpha: float = Field(16.0, gt=0, description="the change of a weight is their product times alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of a branch's inputs that are dropped in training")
    targets: tuple[Target, ...] = Field(
        ("qkv", "proj", "fc1", "fc2"),
        min_length=1,
        description="layers with a branch: qkv and proj of the attention, fc1 and fc2 of the feed-forward (where that "
        "is gated: w1 and w2, w3)",
    )


def install(settings: Settings, model: SegmentationModel) -> None:
    """Adds a branch that gives zero to each target. ValueError for a rank that is no saving."""
    undisturbed(model.backbone)
    for block in hold(model.backbone, settings.also, settings.last):
        for name, layer in block.named_modules():
            last = name.rpartition(".")[2]
            if not isinstance(layer, nn.Linear) or _NAMES.get(last, last) not in settings.targets:
                continue
            thin = min(layer.in_features, layer.out_features)
            if settings.rank >= thin:
                raise ValueError(f"tuning.rank {settings.rank} must be below {thin}, the smaller side of {name}")
            layer.side = Side(layer, settings.rank, settings.alpha, settings.dropout)


def groups(settings: Settings, backbone: VisionTransformer) -> Groups:
    """The thin matrices, and norms and biases if they are trained."""
    sides = [module for module in backbone.modules() if isinstance(module, Side)]
    return split(backbone, [parameter for side in sides for parameter in side.parameters()], settings.lr_factor)


def kept(settings: Settings) -> None:
    """Nothing: the branches are part of the weights by then."""
