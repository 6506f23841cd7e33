"""MAE (He et al. 2022): its encoder, which learnt from photographs by filling in what three quarters of left out."""

from __future__ import annotations

from typing import Literal

from pretrain.teachers import Teacher
from pretrain.teachers._natural import NaturalSettings, natural_window
from pretrain.teachers._vit import Published, build_teacher

__all__ = ["PUBLISHED", "Settings", "build"]

# facebookresearch/mae efb2a806: models_mae.py, util/pos_embed.py, main_finetune.py. Files with the decoder too.
PUBLISHED = Published(
    families=(
        "MAE (encoder)", "MAE (with its decoder)", "ViT (Hugging Face: MAE, DINO, iBOT)", "ViT (timm, DINO, iBOT)",
    ),
    where="for instance https://dl.fbaipublicfiles.com/mae/pretrain/mae_pretrain_vit_base.pth (CC-BY-NC 4.0)",
    heads={768: 12, 1024: 16, 1280: 16},
    eps=1e-6,
)  # fmt: skip


class Settings(NaturalSettings):
    """The encoder of an MAE; of a file with the decoder that is dropped."""

    kind: Literal["mae"] = "mae"


def build(settings: Settings) -> Teacher:
    """Build it on torch's default device."""
    return build_teacher(settings, PUBLISHED, natural_window(settings.hu))
