"""Multi-crop of a slice: what is drawn, and two ways to make it, on the CPU one by one and on a device as a batch.

Everything random about a slice's crops is drawn by `draw_crops` from (seed, sample); `crop_slice` and `crop_batch`
only carry it out, and agree. The window comes before interpolation, so padding of -3024 HU cannot ring.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor

from launch.settings import Settings
from pretrain.data.batch import Draw, generator
from pretrain.data.resample import resample_batch, resample_one, resize
from pretrain.data.views import TeacherViews
from pretrain.data.window import Distortions, HuWindow, RandomWindow

__all__ = ["CropDraws", "CropSettings", "CropShape", "Crops", "HuWindow", "crop_batch", "crop_slice", "draw_crops"]

TRIES = 10  # boxes tried before the central one is taken
CHUNK_BYTES = 2**28  # of interpolation weights held at once by crop_batch


class CropShape(Settings):
    """Side lengths of one step's crops, pixels."""

    global_size: int = Field(256, gt=0, description="side of the global crops")
    local_size: int = Field(112, gt=0, description="side of the local crops")
    gram_size: int | None = Field(None, gt=0, description="side of the Gram teacher's crops; null: none are made")
    probability: float = Field(1.0, gt=0, le=1, description="share of the steps that have this shape")


class CropSettings(Settings):
    """Boxes, sizes, flips and distortions of a slice's crops."""

    global_size: int = Field(256, gt=0, description="side of the global crops, pixels")
    local_size: int = Field(112, gt=0, description="side of the local crops, pixels")
    gram_size: int | None = Field(
        None, gt=0, description="side of the Gram teacher's crops, pixels; null: none are made"
    )
    mix: tuple[CropShape, ...] = Field(
        (), description="shapes to mix, one a step on all ranks, instead of global_size, local_size and gram_size"
    )
    n_global: Literal[1, 2] = Field(2, description="global crops of a slice; self_distillation needs both")
    n_local: int = Field(8, ge=0, description="local crops of a slice")
    fixed: int | None = Field(
        None, ge=1, description="how many different crops a slice has, taken in turn; null: new ones each time"
    )
    global_scale: tuple[float, float] = Field((0.32, 1.0), description="share of the slice's area in a global crop")
    local_scale: tuple[float, float] = Field((0.05, 0.32), description="share of the slice's area in a local crop")
    ratio: tuple[float, float] = Field((3 / 4, 4 / 3), description="range of width / height of a box")
    unit: Literal["px", "mm"] = Field(
        "px", description="px: boxes are shares of the slice, global_scale and local_scale; mm: global_mm and local_mm"
    )
    global_mm: tuple[float, float] = Field((200.0, 400.0), description="side of a global crop's box, mm (unit: mm)")
    local_mm: tuple[float, float] = Field((80.0, 200.0), description="side of a local crop's box, mm (unit: mm)")
    flip: float = Field(0.5, ge=0, le=1, description="probability of mirroring a crop left to right")
    gram_no_distortions: bool = Field(True, description="the Gram teacher sees its crops undistorted")
    distortions: Distortions = Field(Distortions(), description="intensity augmentations")
    random_window: RandomWindow | None = Field(
        None, description="another HU window for each slice in training; null: always the fixed one, data.window"
    )

    @model_validator(mode="after")
    def _sensible(self) -> CropSettings:
        for name in ("global_scale", "local_scale", "ratio", "global_mm", "local_mm"):
            low, high = getattr(self, name)
            if not 0 < low <= high or (name.endswith("scale") and high > 1):
                most = " <= 1" if name.endswith("scale") else ""
                raise ValueError(f"{name} needs 0 < low <= high{most}, got [{low:g}, {high:g}]")
        if self.mix and abs(sum(shape.probability for shape in self.mix) - 1) > 1e-6:
            raise ValueError(f"mix: probabilities must sum to 1, not {sum(s.probability for s in self.mix):g}")
        if len({shape.gram_size is None for shape in self.shapes}) > 1:
            raise ValueError("mix: give gram_size to every shape or to none")
        return self

    @property
    def shapes(self) -> tuple[CropShape, ...]:
        """Every shape a step can have."""
        own = CropShape(global_size=self.global_size, local_size=self.local_size, gram_size=self.gram_size)
        return self.mix or (own,)

    def shape_at(self, seed: int, step: int) -> CropShape:
        """The shape of one step, the same on all ranks."""
        if len(self.shapes) == 1:
            return self.shapes[0]
        edges = np.cumsum([shape.probability for shape in self.shapes])
        u = generator(seed, Draw.SIZES, step).random()
        return self.shapes[min(int(np.searchsorted(edges, u, side="right")), len(edges) - 1)]

    def check_patches(self, patch_size: int) -> None:
        """Refuses sides that the patch size does not divide (a convolution would drop the rest in silence)."""
        for i, shape in enumerate(self.shapes):
            for name in ("global_size", "local_size", "gram_size"):
                side = getattr(shape, name)
                if side is not None and side % patch_size and (self.n_local or name != "local_size"):
                    place = f"mix.{i}." if self.mix else ""
                    raise ValueError(f"crops.{place}{name}: {side} is not a multiple of the patch size {patch_size}")


@dataclass(frozen=True)
class CropDraws:
    """What is drawn for the K = n_global + n_local crops of a slice, global ones first; of a batch with a leading B."""

    boxes: Tensor  # int64 [K, 4]: top, left, height, width; inside the slice
    flips: Tensor  # bool [K]
    amounts: Tensor  # float32 [K, 4], of the distortions
    keys: Tensor  # int64 [K], of the noise
    window: Tensor  # float32 [2], lowest and highest HU of the slice's own window; both 0: the fixed one

    @staticmethod
    def stack(draws: list[CropDraws]) -> CropDraws:
        """The draws of several slices as one, [B, K, ...]."""
        return CropDraws(*(torch.stack(parts) for parts in zip(*(d.tensors() for d in draws), strict=True)))

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors in the order of the constructor."""
        return self.boxes, self.flips, self.amounts, self.keys, self.window


@dataclass(frozen=True)
class Crops:
    """Normalised float32 crops, crop-major: of B slices, G global crops each, rows [k*B, (k+1)*B) are crop k."""

    globals_: Tensor  # [G*B, C, S, S]
    locals_: Tensor  # [n_local*B, C, s, s]
    gram: Tensor | None  # [G*B, C, g, g]
    views: tuple[Tensor, ...] = ()  # a teacher: [G*B, C_m, S_m, S_m], undistorted; one tensor for those that see alike

    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Global, local and Gram crops."""
        return self.globals_, self.locals_, self.gram


def draw_crops(
    settings: CropSettings,
    height: int,
    width: int,
    *,
    seed: int,
    sample: int,
    spacing: tuple[float, float] | None = None,
) -> CropDraws:
    """Draws the crops of a slice of height x width pixels from (seed, global sample counter) alone.

    `spacing` is the distance between its rows and between its columns in mm, needed where boxes are in mm. The square
    of a box's side is drawn evenly, so that both units give the same boxes for the same limits. A box in mm that does
    not fit in TRIES tries is cut to the slice, and shows fewer mm than were asked for; one in px becomes the central
    box.
    """
    rng = generator(seed, Draw.CROPS, sample)
    crops = settings.n_global + settings.n_local
    u = rng.random((crops, TRIES, 4))
    boxes = _boxes(u, settings, height, width, spacing)
    flips = rng.random(crops) < settings.flip
    if settings.distortions.on:
        amounts, keys = settings.distortions.draw(crops, rng, settings.n_global)
    else:
        amounts, keys = np.zeros((crops, 4), np.float32), np.zeros(crops, np.int64)
    ends = (0.0, 0.0)
    if settings.random_window is not None:
        ends = settings.random_window.draw(generator(seed, Draw.WINDOW, sample))
    return CropDraws(*(torch.from_numpy(part) for part in (boxes, flips, amounts, keys, np.array(ends, np.float32))))


def _boxes(
    u: NDArray[np.float64],
    settings: CropSettings,
    height: int,
    width: int,
    spacing: tuple[float, float] | None,
) -> NDArray[np.int64]:
    """Boxes of random resized crops [K, 4] from uniforms u [K, TRIES, 4]: the first try that fits, or as said above."""
    in_mm = settings.unit == "mm"
    if in_mm:
        assert spacing is not None, "boxes in mm need the slice's spacing"
        (y_mm, x_mm), whole, limits = spacing, 1, np.square([settings.global_mm, settings.local_mm])
    else:
        (y_mm, x_mm), whole, limits = (
            (1.0, 1.0),
            height * width,
            np.array([settings.global_scale, settings.local_scale]),
        )
    scale = limits.repeat([settings.n_global, len(u) - settings.n_global], 0)
    area = whole * (scale[:, :1] + u[..., 0] * (scale[:, 1:] - scale[:, :1]))
    low, high = math.log(settings.ratio[0]), math.log(settings.ratio[1])
    aspect = np.exp(low + u[..., 1] * (high - low))
    w, h = np.rint(np.sqrt(area * aspect) / x_mm), np.rint(np.sqrt(area / aspect) / y_mm)
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    pick = (np.arange(len(u)), fits.argmax(1))
    h, w = h[pick], w[pick]
    if in_mm:
        h, w = h.clip(1, height), w.clip(1, width)
    boxes = np.stack([u[..., 2][pick] * (height - h + 1), u[..., 3][pick] * (width - w + 1), h, w], 1).astype(np.int64)
    if not in_mm and not fits.any(1).all():
        h0 = min(height, max(1, round(width / settings.ratio[0])))
        w0 = min(width, max(1, round(height * settings.ratio[1])))
        boxes[~fits.any(1)] = ((height - h0) // 2, (width - w0) // 2, h0, w0)
    return boxes


def crop_slice(
    hu: NDArray[np.int16],
    draws: CropDraws,
    settings: CropSettings,
    shape: CropShape,
    window: HuWindow,
    views: TeacherViews | None = None,
) -> Crops:
    """The crops of one slice [Y, X], each interpolated from its box alone; for the CPU."""
    image = _windowed(torch.from_numpy(hu)[None], draws.window[None], settings, window)[0]
    base, n, n_global = max(shape.global_size, shape.gram_size or 0), settings.n_local, settings.n_global
    globals_ = torch.empty(n_global, len(image), base, base)
    locals_ = torch.empty(n, len(image), shape.local_size, shape.local_size)
    boxes, flips = draws.boxes.tolist(), draws.flips.tolist()
    for box, flip, out in zip(boxes, flips, [*globals_, *locals_], strict=True):
        resample_one(image, box, flip, out)
    crops = _finish(globals_, locals_, draws.amounts, draws.keys, settings, shape, window)

    def view(own: HuWindow, size: int) -> Tensor:
        seen, made = own.image(torch.from_numpy(hu)), torch.empty(n_global, own.channels, size, size)
        for box, flip, out in zip(boxes[:n_global], flips[:n_global], made, strict=True):
            resample_one(seen, box, flip, out)
        return made

    return _with_views(crops, views, view, settings, shape, window)


@torch.no_grad()
def crop_batch(
    hu: Tensor,
    draws: CropDraws,
    settings: CropSettings,
    shape: CropShape,
    window: HuWindow,
    views: TeacherViews | None = None,
) -> Crops:
    """The crops of slices [B, Y, X], padded to one size with anything finite, as two matrix products; for a device.

    The products read the whole slice for every crop: 30 times the arithmetic of `crop_slice`, in the form that a GPU
    does for nothing. No value is read back to the host.
    """
    globals_, locals_ = slice(0, settings.n_global), slice(settings.n_global, None)
    base = max(shape.global_size, shape.gram_size or 0)

    def own(hu: Tensor, ends: Tensor) -> Tensor:
        return _windowed(hu, ends, settings, window)

    made = _resampled(hu, draws, own, window.channels, ((globals_, base), (locals_, shape.local_size)))
    amounts, keys = draws.amounts.transpose(0, 1).flatten(0, 1), draws.keys.transpose(0, 1).flatten()
    crops = _finish(made[0], made[1], amounts, keys, settings, shape, window)

    def view(own: HuWindow, size: int) -> Tensor:
        return _resampled(hu, draws, lambda hu, _: own.image(hu), own.channels, ((globals_, size),))[0]

    return _with_views(crops, views, view, settings, shape, window)


def _resampled(
    hu: Tensor,
    draws: CropDraws,
    image_of: Callable[[Tensor, Tensor], Tensor],
    channels: int,
    groups: Sequence[tuple[slice, int]],
) -> list[Tensor]:
    """Of slices [B, Y, X] the crops of each group (which of the K, side): [K*B, C, S, S], a chunk of slices at a time.

    `image_of` makes [b, C, Y, X] of slices and their own windows' ends [b, 2].
    """
    batch, side = len(hu), max(hu.shape[1:])
    counts = [draws.boxes[0, g].shape[0] for g, _ in groups]
    made = [torch.empty(n, batch, channels, s, s, device=hu.device) for n, (_, s) in zip(counts, groups, strict=True)]
    per_image = 8 * side * sum(n * size for n, (_, size) in zip(counts, groups, strict=True))
    chunk = max(1, CHUNK_BYTES // per_image)
    with _exact_products():
        for first in range(0, batch, chunk):
            part = slice(first, first + chunk)
            image = image_of(hu[part], draws.window[part])
            for (group, size), out in zip(groups, made, strict=True):
                boxes, flips = draws.boxes[part, group], draws.flips[part, group]
                out[:, part] = resample_batch(image, boxes, flips, size).transpose(0, 1)
    return [crops.flatten(0, 1) for crops in made]


def _with_views(
    crops: Crops,
    views: TeacherViews | None,
    view: Callable[[HuWindow, int], Tensor],
    settings: CropSettings,
    shape: CropShape,
    window: HuWindow,
) -> Crops:
    """Adds the teachers' views; the student's crops are one of them where nothing changes them."""
    if views is None:
        return crops
    plain = settings.random_window is None and not settings.distortions.on and shape.gram_size is None
    return replace(crops, views=views.seen(view, {(window, shape.global_size): crops.globals_} if plain else {}))


def _windowed(hu: Tensor, ends: Tensor, settings: CropSettings, window: HuWindow) -> Tensor:
    """HU [B, Y, X] -> [B, C, Y, X], each slice in its own window where windows are drawn."""
    if settings.random_window is None:
        return window.image(hu)
    return settings.random_window.image(hu, ends, window)


def _finish(
    base: Tensor,
    locals_: Tensor,
    amounts: Tensor,
    keys: Tensor,
    settings: CropSettings,
    shape: CropShape,
    window: HuWindow,
) -> Crops:
    """Distorts, and takes student and Gram views from the base crops [G*B, C, S, S].

    As in the official recipe both are resized from one base crop; the student's is distorted at its own size, or before
    the resizing when the Gram teacher shares the distortions.
    """
    n, distort = len(base), settings.distortions.apply
    locals_ = distort(locals_, amounts[n:], keys[n:], window) if len(locals_) else locals_
    if shape.gram_size is None:
        return Crops(distort(base, amounts[:n], keys[:n], window), locals_, None)
    if settings.gram_no_distortions:
        small = resize(base, shape.global_size)
        return Crops(distort(small, amounts[:n], keys[:n], window), locals_, resize(base, shape.gram_size))
    base = distort(base, amounts[:n], keys[:n], window)
    return Crops(resize(base, shape.global_size), locals_, resize(base, shape.gram_size))


@contextmanager
def _exact_products() -> Iterator[None]:
    """Full float32 products inside, whatever the trainer allows its own (TF32 would cost 0.003 standard deviations)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
