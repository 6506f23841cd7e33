"""Checkpoints and labelled scans in, segmentation models and label maps out.

from downstream import load

model = load("runs/amos22/model.safetensors")
mask = model("scan.nii.gz")  # a SimpleITK.Image on the scan's own grid
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from downstream.api import Segmenter

__all__ = ["load"]


def load(*args: Any, **kwargs: Any) -> Segmenter:
    """See `downstream.api.load`: (model, device="auto", window=None, **settings of the window)."""
    from downstream import api  # torch takes seconds to import

    return api.load(*args, **kwargs)
