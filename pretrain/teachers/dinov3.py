"""DINOv3 (Siméoni et al. 2025), trained on photographs."""

from __future__ import annotations

from typing import Literal

from pretrain.teachers import Teacher
from pretrain.teachers._natural import NaturalSettings, natural_window
from pretrain.teachers._vit import Published, build_teacher

__all__ = ["PUBLISHED", "Settings", "build"]

# facebookresearch/dinov3 6876159: hub/backbones.py, data/transforms.py. Mean and deviation are ImageNet's for the
# weights that learnt from the web (LVD-1689M); those of satellite images have others: give `window` for them.
PUBLISHED = Published(
    families=(
        "DINOv3", "DINOv3 without registers (teacher)", "DINOv3 (Hugging Face)", "DINOv3 (Hugging Face), gated",
        "DINOv3 (timm)", "DINOv3 (timm), gated",
    ),
    where="the files are gated: ask for them at https://ai.meta.com/dinov3 (DINOv3 License)",
    heads={384: 6, 768: 12, 1024: 16, 1280: 20, 4096: 32},
    eps=1e-5,
    bias=lambda width: width != 4096,  # the 7B model has none; without them a smaller one is MedDINOv3
)  # fmt: skip


class Settings(NaturalSettings):
    """A DINOv3 backbone."""

    kind: Literal["dinov3"] = "dinov3"


def build(settings: Settings) -> Teacher:
    """Build it on torch's default device."""
    return build_teacher(settings, PUBLISHED, natural_window(settings.hu))
