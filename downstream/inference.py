"""Labels of a volume: slices on the model's grid, windows over them, logits back on the volume's grid, a label each.

A volume is gone through in pieces that fit into `window.memory_gib`, on the model's device; nothing but the label map
grows with the number of slices.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from downstream.cases import Labels
from downstream.channels import AIR, image, network_channels
from downstream.context import neighbours
from downstream.model import Header, ModelError, SegmentationModel
from downstream.prepared import target_size
from downstream.sliding import Pace, Sliding, layout
from launch.settings import Settings

__all__ = ["Window", "decided", "head_scores", "predict_volume", "probabilities", "volume_scores", "windows_at_once"]

PIECE = 64 << 20  # bytes of logits that are brought back to the volume's grid at a time
CACHED = 512**2  # pixels that go through the network at a time on a CPU
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Window(Settings):
    """How slices are gone over."""

    overlap: float = Field(0.5, ge=0, lt=1, description="share of a window that its neighbour sees again")
    batch_size: int | None = Field(
        None, ge=1, description="windows at a time, if they fit; null: 8, on a CPU 1 of 512 px or 8 of 128 px and less"
    )
    mirror: bool = Field(False, description="mean over the four mirrored images: four times the work")
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="of the network; logits are kept in fp32")
    memory_gib: float = Field(4.0, gt=0, description="memory for windows and logits; one window and one slice at least")
    skip_empty: bool = Field(
        True, description="windows without any value above the HU window share one result, which is the same for all"
    )


def predict_volume(
    models: Sequence[SegmentationModel],
    header: Header | Sequence[Header],
    stored: NDArray[np.int16],
    spacing: tuple[float, float, float],
    window: Window | None = None,
) -> NDArray[np.uint8]:
    """Label values [Z, Y, X] of stored values [C, Z, Y, X] with spacing (z, y, x) in mm.

    Several models, of one header or each with its own, decide by the mean of their probabilities. Models stay on their
    device.
    """
    found = np.empty(stored.shape[1:], dtype=np.uint8)
    labels = _headers(models, header)[0].labels
    for part, logits in volume_scores(models, header, stored, spacing, window):
        found[part] = decided(logits, labels).cpu().numpy()
    return found


def decided(logits: Tensor, labels: Labels) -> Tensor:
    """Logits [n, heads, ...] -> label values uint8 [n, ...].

    The class of the largest logit; of regions each that is more likely than not, in `order`, later over earlier ones.
    """
    if not labels.order:
        table = torch.tensor(labels.values, dtype=torch.uint8, device=logits.device)
        return table[logits.argmax(1)]
    found = torch.zeros_like(logits[:, 0], dtype=torch.uint8)
    for head, value in enumerate(labels.order):
        found.masked_fill_(logits[:, head] > 0, value)
    return found


def probabilities(logits: Tensor, labels: Labels) -> Tensor:
    """Logits [n, heads, ...] -> probabilities of the same shape: over the classes, or of each region by itself."""
    return logits.sigmoid() if labels.order else logits.softmax(1)


def volume_scores(
    models: Sequence[SegmentationModel],
    header: Header | Sequence[Header],
    stored: NDArray[np.int16],
    spacing: tuple[float, float, float],
    window: Window | None = None,
) -> Iterator[tuple[slice, Tensor]]:
    """Slices, in order, and their logits [n, heads, Y, X] on the volume's own grid; see `predict_volume`.

    Logits of several models are those of the mean probability.
    """
    window, headers = window or Window(), _headers(models, header)
    pairs = list(zip(models, headers, strict=True))
    stacks = [_Stack(*pair, stored.shape, spacing, window, len(models)) for pair in pairs]
    each = min(stack.each for stack in stacks)
    size = (stored.shape[2], stored.shape[3])
    for start in range(0, stored.shape[1], each):
        own = np.arange(start, min(start + each, stored.shape[1]))
        grids = [stack.logits(stored, own) for stack in stacks]
        some = max(1, PIECE // (4 * grids[0].shape[1] * math.prod(size)))
        for first in range(0, len(own), some):
            pieces = [_enlarged(grid[first : first + some], size) for grid in grids]
            yield slice(start + first, start + first + len(pieces[0])), _mean(pieces, headers[0].labels)


def head_scores(
    model: SegmentationModel, header: Header, stored: NDArray[np.int16], z_mm: float, window: Window | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """Stored values [C, Z, Y, X] on the model's grid, slices `z_mm` apart -> slices, in order, and their logits
    [n, heads, Y, X] on that grid, fp32, on the model's device."""
    on_grid = header.model_copy(update={"spacing": None})
    stack = _Stack(model, on_grid, stored.shape, (z_mm, 1.0, 1.0), window or Window(), 1)
    for start in range(0, stored.shape[1], stack.each):
        own = np.arange(start, min(start + stack.each, stored.shape[1]))
        yield slice(start, start + len(own)), stack.logits(stored, own)


class _Stack:
    """One model on one volume: `each` slices at a time fit into the memory that the window allows."""

    def __init__(
        self,
        model: SegmentationModel,
        header: Header,
        shape: tuple[int, ...],
        spacing: tuple[float, float, float],
        window: Window,
        models: int,
    ) -> None:
        first = next(model.parameters())
        self.model, self.header, self.z_mm, self.device = model, header, spacing[0], first.device
        self.size = target_size(shape[2:], spacing[1:], header.spacing)
        self.where = layout(self.size, header.patch, window.overlap, self.device)
        self.limits: list[tuple[int, int]] = []  # of each channel, when it is first resampled
        room = window.memory_gib * 2**30 / 2  # for what the network makes of windows; the rest is for logits
        self.each = max(1, int(room / models / self._bytes(shape)))
        lowest = torch.full((len(header.channels), 1, 1), -32768.0, device=self.device)
        kind, dtype = self.device.type, DTYPES.get(window.precision)
        self._sliding = Sliding(
            model,
            self.where,
            pace=partial(Pace, window.batch_size or windows_at_once(header.patch, self.device), room),
            autocast=partial(torch.autocast, kind, dtype or torch.bfloat16, enabled=dtype is not None),
            mirror=window.mirror,
            floor=image(lowest, header.channels)[:, 0, 0] if window.skip_empty else None,
        )

    def _bytes(self, shape: tuple[int, ...]) -> int:
        """Of a slice: its stored values and its images, which may be there twice, its logits, its maps."""
        pixels, header = self.where.height * self.where.width, self.header
        images = 4 * (2 * shape[0] * (shape[2] * shape[3] + pixels) + 2 * network_channels(header.channels) * pixels)
        tokens = (header.patch // header.vit.patch_size + 1) ** 2
        maps = 2 * 4 * tokens * self.model.backbone.dim * len(self.model.blocks) if header.context.slices else 0
        return images + maps + 4 * len(header.labels.heads) * pixels

    @torch.no_grad()
    def logits(self, stored: NDArray[np.int16], own: NDArray[np.int64]) -> Tensor:
        """Logits [n, heads, y, x] of slices `own` on the model's grid, without what was filled up."""
        around = neighbours(own, stored.shape[1], self.z_mm, self.header.context)
        needed, places = np.unique(around, return_inverse=True)
        images = self._images(stored, needed)
        found = self._sliding(images, torch.from_numpy(places.reshape(around.shape)).to(self.device))
        above, left = self.where.above, self.where.left
        found = found[..., above : above + self.size[0], left : left + self.size[1]]
        if not bool(torch.isfinite(found.sum())):
            raise ModelError("the network's answer is not finite; use window.precision=fp32, or train the model again")
        return found

    def _images(self, stored: NDArray[np.int16], needed: NDArray[np.int64]) -> Tensor:
        """Slices `needed` as the network sees them [n, c, height, width], air around them."""
        values = torch.from_numpy(np.ascontiguousarray(stored[:, needed])).to(self.device)
        if self.size != stored.shape[2:]:
            self.limits = self.limits or [(int(channel.min()), int(channel.max())) for channel in stored]
            values = torch.stack([_resized(v, self.size, *ends) for v, ends in zip(values, self.limits, strict=True)])
        below, right = self.where.height - self.size[0], self.where.width - self.size[1]
        above, left = self.where.above, self.where.left
        if below or right:
            values = functional.pad(values, (left, right - left, above, below - above), value=AIR)
        return image(values.transpose(0, 1), self.header.channels)


def windows_at_once(patch: int, device: torch.device) -> int:
    """How many windows of that side a device likes best: on a CPU, as many as its cache has room for."""
    return 8 if device.type != "cpu" else max(1, min(8, CACHED // patch**2))


def _resized(values: Tensor, size: tuple[int, int], low: int, high: int) -> Tensor:
    """Slices [n, Y, X] as `prepared.resample` has them in training."""
    resized = functional.interpolate(values[:, None].float(), size=size, mode="bicubic", antialias=True)
    return resized[:, 0].round_().clamp_(low, high)


def _enlarged(logits: Tensor, size: tuple[int, int]) -> Tensor:
    if logits.shape[2:] == size:
        return logits
    return functional.interpolate(logits, size=size, mode="bilinear", align_corners=False)


def _mean(several: list[Tensor], labels: Labels) -> Tensor:
    """Logits of the mean probability."""
    if len(several) == 1:
        return several[0]
    mean = torch.stack([probabilities(logits, labels) for logits in several]).mean(0)
    return mean.logit() if labels.order else mean.log()


def _headers(models: Sequence[SegmentationModel], header: Header | Sequence[Header]) -> list[Header]:
    return [header] * len(models) if isinstance(header, Header) else list(header)
