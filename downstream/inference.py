"""Labels of a volume: slices on the model's grid, a sliding window with Gaussian weights, back to the volume's grid."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from data_curation.volumes import Volume
from downstream.model import Header, SegmentationModel
from downstream.prepared import resample, target_size
from launch.settings import Settings
from pretrain.data.window import HuWindow

__all__ = ["Window", "predict_slices", "predict_volume", "slices_at_once"]

LOGIT_BYTES = 256 << 20  # logits held at a time, on the model's grid and again on the volume's


class Window(Settings):
    """How slices are gone over."""

    overlap: float = Field(0.5, ge=0, lt=1, description="share of a window that its neighbour sees again")
    batch_size: int = Field(8, ge=1, description="windows that go through the model at a time")
    mirror: bool = Field(False, description="mean over the four mirrored images: four times the work")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16: matrix products in bfloat16")


def predict_volume(
    model: SegmentationModel, header: Header, volume: Volume, window: Window | None = None
) -> NDArray[np.uint8]:
    """Label values [Z, Y, X] on the volume's own grid. The model stays on its device; memory does not grow with Z."""
    window = window or Window()
    table = np.asarray(header.values, dtype=np.uint8)
    shape = volume.hu.shape
    size = target_size(shape[1:], volume.spacing[1:], header.spacing)
    found = np.empty(shape, dtype=np.uint8)
    each = slices_at_once(shape[1:], size, header)
    for start in range(0, shape[0], each):
        hu = resample(volume.hu[start : start + each], size)
        logits = predict_slices(model, header.window, header.patch, hu, window)
        if size != shape[1:]:
            logits = functional.interpolate(logits, size=shape[1:], mode="bilinear", align_corners=False)
        found[start : start + each] = table[logits.argmax(1).cpu().numpy()]
    return found


def slices_at_once(own: tuple[int, ...], size: tuple[int, int], header: Header) -> int:
    """How many slices' logits fit into the limit, at least one."""
    pixels = max(own[0] * own[1], max(size[0], header.patch) * max(size[1], header.patch))
    return max(1, LOGIT_BYTES // (4 * len(header.values) * pixels))


@torch.no_grad()
def predict_slices(
    model: SegmentationModel, hu_window: HuWindow, patch: int, hu: NDArray[np.int16], window: Window
) -> Tensor:
    """HU [N, Y, X] on the model's grid -> logits [N, classes, Y, X], fp32, on the model's device.

    A slice smaller than the patch is set into air, as in training.
    """
    from monai.inferers import sliding_window_inference  # seconds to import

    device = next(model.parameters()).device
    height, width = hu.shape[1:]
    above, left = max(patch - height, 0), max(patch - width, 0)
    padding = (left // 2, left - left // 2, above // 2, above - above // 2)
    images = hu_window.image(functional.pad(torch.from_numpy(hu).to(device), padding, value=-1000))
    logits: Tensor = sliding_window_inference(
        images,
        roi_size=(patch, patch),
        sw_batch_size=window.batch_size,
        predictor=lambda part: _mirrored(model, part, window),
        overlap=window.overlap,
        mode="gaussian",
    )
    return logits[..., above // 2 : above // 2 + height, left // 2 : left // 2 + width]


def _mirrored(model: SegmentationModel, images: Tensor, window: Window) -> Tensor:
    with _autocast(images.device, window.precision):
        total: Tensor = model(images).float()
        for axes in _mirrors() if window.mirror else ():
            total += model(images.flip(axes)).float().flip(axes)
    return total / 4 if window.mirror else total


def _mirrors() -> Iterator[list[int]]:
    return (list(axes) for n in (1, 2) for axes in itertools.combinations((2, 3), n))


def _autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
