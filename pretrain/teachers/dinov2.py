"""DINOv2 (Oquab et al. 2023), with registers or without, trained on photographs."""

from __future__ import annotations

from typing import Literal

from pretrain.teachers import Teacher
from pretrain.teachers._natural import NaturalSettings, natural_window
from pretrain.teachers._vit import Published, build_teacher

__all__ = ["PUBLISHED", "Settings", "build"]

# facebookresearch/dinov2 b8931f7: hub/backbones.py, data/transforms.py (mean and deviation of ImageNet).
PUBLISHED = Published(
    families=(
        "DINOv2", "DINOv2 with registers", "DINOv2 (Hugging Face)", "DINOv2 with registers (Hugging Face)",
        "DINOv2 (timm)",
    ),
    where="for instance https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth (Apache-2.0)",
    heads={384: 6, 768: 12, 1024: 16, 1536: 24},
    eps=1e-6,
)  # fmt: skip


class Settings(NaturalSettings):
    """A DINOv2 backbone."""

    kind: Literal["dinov2"] = "dinov2"


def build(settings: Settings) -> Teacher:
    """Build it on torch's default device."""
    return build_teacher(settings, PUBLISHED, natural_window(settings.hu))
