"""The backbone stands still and the decoder learns alone; norms or biases may be trained with it (BitFit)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from downstream.tuning import Groups, Plain, hold, split, undisturbed
from launch import settings as base
from pretrain.models.vit import VisionTransformer

if TYPE_CHECKING:
    from downstream.model import SegmentationModel

__all__ = ["Settings", "groups", "install", "kept"]


class Settings(base.Settings):
    """Settings of a frozen backbone."""

    kind: Literal["frozen"] = "frozen"
    also: tuple[Plain, ...] = Field(
        (), description="what of the backbone is trained all the same: norms (with their biases), biases (BitFit)"
    )


def install(settings: Settings, model: SegmentationModel) -> None:
    """Nothing is added."""
    undisturbed(model.backbone)
    hold(model.backbone, settings.also)


def groups(settings: Settings, backbone: VisionTransformer) -> Groups:
    """Norms and biases at the backbone's rate, if any are trained."""
    return split(backbone, (), 1.0)


def kept(settings: Settings) -> None:
    """Nothing: the weights are all there is."""
