"""MedDINOv3 (Li et al. 2025): a DINOv3 ViT-B/16 that went on to learn from 3.87 million CT slices (CT-3M)."""

from __future__ import annotations

from typing import Literal

from pretrain.data.window import HuWindow
from pretrain.teachers import Teacher, TeacherSettings
from pretrain.teachers._vit import Published, build_teacher

__all__ = ["PUBLISHED", "Settings", "build"]

# ricklisz/MedDINOv3 a2460c2: inference/demo.ipynb (clamp to -1000..1000 HU, mean and deviation as in HuWindow, one
# channel three times; epsilon 1e-6 in the printed model). Its file has the teacher's heads, which are not needed here.
PUBLISHED = Published(
    families=("MedDINOv3 (teacher)", "DINOv3", "DINOv3 (Hugging Face)", "DINOv3 (timm)"),  # as published, or converted
    where="model.pth of https://huggingface.co/ricklisz123/MedDINOv3-ViTB-16-CT-3M",
    heads={768: 12},
    eps=1e-6,
    bias=lambda width: width == 4096,  # by which its conversions are told from those of DINOv3
)


class Settings(TeacherSettings):
    """The published MedDINOv3."""

    kind: Literal["meddinov3"] = "meddinov3"


def build(settings: Settings) -> Teacher:
    """Build it on torch's default device."""
    return build_teacher(settings, PUBLISHED, HuWindow())
