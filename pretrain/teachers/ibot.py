"""iBOT (Zhou et al. 2022), and DINO, whose network is the same: the teacher's backbone, trained on photographs."""

from __future__ import annotations

from typing import Literal

from pretrain.teachers import Teacher
from pretrain.teachers._natural import NaturalSettings, natural_window
from pretrain.teachers._vit import Published, build_teacher

__all__ = ["PUBLISHED", "Settings", "build"]

# bytedance/ibot da316d82: main_ibot.py, models/vision_transformer.py, extract_backbone_weights.py, which saves a file
# that names nothing. Positions come to other grids by a scale that is 0.1 of a patch off, as in DINO.
PUBLISHED = Published(
    families=(
        "iBOT", "iBOT or DINO", "ViT (timm, DINO, iBOT)", "ViT (Hugging Face: MAE, DINO, iBOT)",
    ),
    where="the table in the README of github.com/bytedance/ibot lists the files (Apache-2.0)",
    heads={192: 3, 384: 6, 768: 12, 1024: 16},
    eps=1e-6,
    offset=0.1,
)  # fmt: skip


class Settings(NaturalSettings):
    """The teacher's backbone of an iBOT or DINO file."""

    kind: Literal["ibot"] = "ibot"


def build(settings: Settings) -> Teacher:
    """Build it on torch's default device."""
    return build_teacher(settings, PUBLISHED, natural_window(settings.hu))
