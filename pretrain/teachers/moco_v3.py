"""MoCo v3 (Chen et al. 2021): either of its two encoders, which learnt to tell photographs apart."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pretrain.teachers import Teacher
from pretrain.teachers._natural import NaturalSettings, natural_window
from pretrain.teachers._vit import Published, build_teacher

__all__ = ["PUBLISHED", "Settings", "build"]

# facebookresearch/moco-v3 c349e6e2: vits.py (its ViT-S has 12 heads), main_lincls.py, convert_to_deit.py, whose files
# look as those of MAE's encoder do.
PUBLISHED = Published(
    families=("MoCo v3", "MAE (encoder)", "ViT (timm, DINO, iBOT)"),
    where="for instance https://dl.fbaipublicfiles.com/moco-v3/vit-b-300ep/vit-b-300ep.pth.tar (CC-BY-NC 4.0)",
    heads={384: 12, 768: 12},
    eps=1e-6,
)


class Settings(NaturalSettings):
    """An encoder of MoCo v3."""

    kind: Literal["moco_v3"] = "moco_v3"
    encoder: Literal["base", "momentum"] = Field(
        "base", description="base: the one that is evaluated; momentum: its moving average, in the full file alone"
    )


def build(settings: Settings) -> Teacher:
    """Build it on torch's default device."""
    return build_teacher(settings, PUBLISHED, natural_window(settings.hu), encoder=settings.encoder)
