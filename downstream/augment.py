"""Cuts a training patch out of a slice and distorts it: nnU-Net's 2D recipe, from the sample's own random numbers.

Cut, rotation, scaling and mirroring are one sampling of the slice, so a patch is interpolated at most once, and not at
all when it is neither turned nor scaled. Intensities are changed after normalisation (z-scores), as in nnU-Net: blur,
contrast and gamma by MONAI's transforms, noise, brightness and low resolution here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, field_validator
from torch import Tensor
from torch.nn import functional

from downstream.channels import AIR
from launch import settings as base

__all__ = ["Augmentation", "Placement", "cut_image", "cut_label", "distort", "off", "place"]

Range = tuple[float, float]
Number = TypeVar("Number", bound=np.generic)


def _probability(default: float, what: str) -> float:
    return Field(default, ge=0, le=1, description=f"chance of {what}")


class Augmentation(base.Settings):
    """Ranges and chances; the defaults are nnU-Net's for 2D, which MedDINOv3 used. All chances 0: plain patches."""

    flip: tuple[Literal["y", "x"], ...] = Field(
        ("y", "x"),
        description="mirrored axes; none, [], where left and right are different labels: a mirrored y, turned by 180 "
        "degrees, is a mirrored x",
    )
    flip_p: float = _probability(0.5, "mirroring, for each axis")
    rotate_degrees: float = Field(180.0, ge=0, le=180, description="largest rotation, either way")
    rotate_p: float = _probability(0.2, "a rotation")
    scale: Range = Field((0.7, 1.4), description="range of the enlargement")
    scale_p: float = _probability(0.2, "scaling")
    noise_variance: float = Field(0.1, ge=0, description="largest variance of the noise")
    noise_p: float = _probability(0.1, "Gaussian noise")
    blur_sigma: Range = Field((0.5, 1.0), description="range of the blur, px")
    blur_p: float = _probability(0.2, "a Gaussian blur")
    brightness: Range = Field((0.75, 1.25), description="range of the factor on intensities")
    brightness_p: float = _probability(0.15, "a change of brightness")
    contrast: Range = Field((0.75, 1.25), description="range of the factor on the distance from the mean")
    contrast_p: float = _probability(0.15, "a change of contrast")
    coarse: Range = Field((0.5, 1.0), description="range of the grid to which a low-resolution patch is shrunk")
    coarse_p: float = _probability(0.25, "low resolution")
    gamma: Range = Field((0.7, 1.5), description="range of the exponent")
    gamma_p: float = _probability(0.3, "a gamma change")
    invert_gamma_p: float = _probability(0.1, "a gamma change of the inverted patch")

    @field_validator("scale", "blur_sigma", "brightness", "contrast", "coarse", "gamma")
    @classmethod
    def _ordered(cls, limits: Range) -> Range:
        if not 0 < limits[0] <= limits[1] < math.inf:
            raise ValueError(f"needs 0 < low <= high, got [{limits[0]:g}, {limits[1]:g}]")
        return limits

    @property
    def blur_reach(self) -> int:
        """px beyond which the widest blur sees nothing."""
        return math.ceil(4 * self.blur_sigma[1])


def off() -> Augmentation:
    """Plain patches."""
    chances = [name for name in Augmentation.model_fields if name.endswith("_p")]
    return Augmentation(**dict.fromkeys(chances, 0.0))


@dataclass(frozen=True)
class Placement:
    """Where a patch lies: `centre` (y, x) in px from the slice's corner, enlargement, radians, mirrored y and x."""

    centre: Range
    scale: float = 1.0
    angle: float = 0.0
    mirror: tuple[bool, bool] = (False, False)

    @property
    def plain(self) -> bool:
        """No interpolation is needed."""
        return self.scale == 1.0 and self.angle == 0.0


def place(
    rng: np.random.Generator, settings: Augmentation, shape: tuple[int, int], size: int, focus: tuple[int, int] | None
) -> Placement:
    """Draws a placement: within the slice where an upright patch fits; the pixel `focus` (y, x), if given, is in it.

    A turned or scaled patch may miss the pixel, or step over it, and is moved until it has a sample on its middle.
    """
    centre = []
    for axis, side in enumerate(shape):
        low, high = min(size, side) / 2, side - min(size, side) / 2
        if focus is not None:  # anywhere that keeps the pixel inside, not always at the middle
            low, high = max(low, focus[axis] + 1 - size / 2), min(high, focus[axis] + size / 2)
        centre.append(low + math.floor(rng.random() * (high - low + 1)) if high > low else low)
    draws = rng.random(6)
    angle = math.radians(settings.rotate_degrees) * (2 * draws[1] - 1) if draws[0] < settings.rotate_p else 0.0
    scale = (
        settings.scale[0] + (settings.scale[1] - settings.scale[0]) * draws[3] if draws[2] < settings.scale_p else 1.0
    )
    mirror = ("y" in settings.flip and draws[4] < settings.flip_p, "x" in settings.flip and draws[5] < settings.flip_p)
    where = Placement((centre[0], centre[1]), float(scale), float(angle), mirror)
    return where if focus is None or where.plain else _moved(where, size, focus)


def _moved(where: Placement, size: int, focus: tuple[int, int]) -> Placement:
    """The placement with a sample on the middle of the pixel `focus`, one near to where the pixel lay before."""
    cosine, sine = math.cos(where.angle), math.sin(where.angle)
    # px of the patch. Where it is enlarged, the pixel stays where it lay in the patch, instead of at the border.
    y, x = (min(where.scale, 1.0) * (pixel + 0.5 - mid) for pixel, mid in zip(focus, where.centre, strict=True))
    half = (size - 1) / 2
    down, right = (
        min(max(round(offset + half), 0), size - 1) - half for offset in (cosine * y + sine * x, cosine * x - sine * y)
    )
    back = ((cosine * down - sine * right) / where.scale, (sine * down + cosine * right) / where.scale)
    return replace(where, centre=(focus[0] + 0.5 - back[0], focus[1] + 0.5 - back[1]))


def cut_image(image: NDArray[np.int16], size: int, where: Placement) -> Tensor:
    """Stored values [Y, X] -> fp32 [size, size], bilinear. Outside there is air."""
    if where.plain:
        return _flipped(torch.from_numpy(_shifted(image.astype(np.float32), size, where, AIR)), where)
    lifted = torch.from_numpy(image.astype(np.float32)) - AIR  # so that what lies outside, 0, is air
    return _flipped(_sampled(lifted, size, where, "bilinear") + AIR, where)


def cut_label(label: NDArray[np.uint8], size: int, where: Placement) -> Tensor:
    """Class indices [Y, X] -> int64 [size, size], nearest. Outside there is background."""
    if where.plain:
        return _flipped(torch.from_numpy(_shifted(label.astype(np.int64), size, where, 0)), where)
    return _flipped(_sampled(torch.from_numpy(label.astype(np.float32)), size, where, "nearest").long(), where)


def _shifted(plane: NDArray[Number], size: int, where: Placement, outside: float) -> NDArray[Number]:
    top, left = (math.floor(middle - size / 2 + 0.5) for middle in where.centre)
    found = np.full((size, size), outside, plane.dtype)
    ys, xs = (
        slice(max(0, start), min(start + size, side)) for start, side in zip((top, left), plane.shape, strict=True)
    )
    if ys.stop > ys.start and xs.stop > xs.start:
        found[ys.start - top : ys.stop - top, xs.start - left : xs.stop - left] = plane[ys, xs]
    return found


def _sampled(plane: Tensor, size: int, where: Placement, mode: str) -> Tensor:
    steps = (torch.arange(size, dtype=torch.float32) - (size - 1) / 2) / where.scale
    dy, dx = torch.meshgrid(steps, steps, indexing="ij")
    cosine, sine = math.cos(where.angle), math.sin(where.angle)
    y = where.centre[0] + cosine * dy - sine * dx  # px from the slice's outer edge
    x = where.centre[1] + sine * dy + cosine * dx
    grid = torch.stack([2 * x / plane.shape[1] - 1, 2 * y / plane.shape[0] - 1], dim=-1)[None]
    return functional.grid_sample(plane[None, None], grid, mode=mode, align_corners=False)[0, 0]


def _flipped(patch: Tensor, where: Placement) -> Tensor:
    axes = [axis for axis, mirrored in enumerate(where.mirror) if mirrored]
    return patch.flip(axes) if axes else patch


def distort(patch: Tensor, rng: np.random.Generator, settings: Augmentation, plane: int = 0) -> Tensor:
    """Intensity changes of one normalised patch [H, W] fp32, in nnU-Net's order.

    Slices that are seen together are given the same `rng` and their numbers as `plane`: only noise is each one's own.
    """
    from monai.transforms import AdjustContrast, GaussianSmooth, ScaleIntensityFixedMean  # seconds to import

    chance, amount = rng.random(7), rng.random(7)
    if chance[0] < settings.noise_p:
        generator = torch.Generator().manual_seed((int(rng.integers(2**62)) + plane) % 2**62)
        patch = patch + torch.randn(patch.shape, generator=generator) * math.sqrt(settings.noise_variance * amount[0])
    if chance[1] < settings.blur_p:
        patch = _plain(GaussianSmooth(_within(settings.blur_sigma, amount[1])), patch, settings.blur_reach)
    if chance[2] < settings.brightness_p:
        patch = patch * _within(settings.brightness, amount[2])
    if chance[3] < settings.contrast_p:
        patch = _plain(ScaleIntensityFixedMean(_within(settings.contrast, amount[3]) - 1, preserve_range=True), patch)
    if chance[4] < settings.coarse_p:
        small = [max(1, round(side * _within(settings.coarse, amount[4]))) for side in patch.shape]
        shrunk = functional.interpolate(patch[None, None], size=small, mode="nearest-exact")
        patch = functional.interpolate(shrunk, size=patch.shape, mode="bicubic", align_corners=False)[0, 0]
    if chance[5] < settings.invert_gamma_p:
        exponent = _within(settings.gamma, amount[5])
        patch = _plain(AdjustContrast(exponent, invert_image=True, retain_stats=True), patch)
    if chance[6] < settings.gamma_p:
        patch = _plain(AdjustContrast(_within(settings.gamma, amount[6]), retain_stats=True), patch)
    return patch


def _within(limits: Range, share: float) -> float:
    return limits[0] + (limits[1] - limits[0]) * float(share)


def _plain(transform: Callable[[Tensor], Tensor], patch: Tensor, reach: int = 0) -> Tensor:
    """One of MONAI's transforms on [H, W]; it sees `reach` px more on each side, like those at the border."""
    padded = functional.pad(patch[None], (reach,) * 4, mode="replicate") if reach else patch[None]
    changed = torch.as_tensor(transform(padded)).as_subclass(Tensor)[0]
    return changed[reach : changed.shape[0] - reach, reach : changed.shape[1] - reach]
