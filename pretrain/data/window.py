"""What happens to intensities: the fixed HU window, and the optional distortions of a crop."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from launch.settings import Settings

__all__ = ["Distortions", "HuWindow"]

KERNEL = 9  # taps of the blur, as in DINOv2 and DINOv3


class HuWindow(Settings):
    """Clamps HU to [low, high], then normalises by a fixed mean and deviation (defaults: MedDINOv3 on CT-3M)."""

    low: float = Field(-1000.0, description="lowest HU that is told apart")
    high: float = Field(1000.0, description="highest HU that is told apart")
    mean: float = Field(65.1084213256836, description="HU that becomes 0")
    std: float = Field(178.01663208007812, gt=0, description="HU that become 1")

    @model_validator(mode="after")
    def _ordered(self) -> HuWindow:
        if not self.low < self.high:
            raise ValueError(f"needs low < high, got low={self.low:g}, high={self.high:g}")
        return self

    def apply(self, hu: Tensor) -> Tensor:
        """HU of any dtype and shape -> normalised float32, a new tensor."""
        return hu.to(torch.float32, copy=True).clamp_(self.low, self.high).sub_(self.mean).div_(self.std)

    @property
    def normalised(self) -> tuple[float, float]:
        """The window's ends after normalisation."""
        return (self.low - self.mean) / self.std, (self.high - self.mean) / self.std


class Distortions(Settings):
    """Intensity augmentations, each with its probability; all off by default, as MedDINOv3 trains on crops and flips.

    Applied in the order contrast and brightness, blur, noise; a distorted crop stays inside the window. The draws of a
    crop are four amounts (blur sigma in pixels, noise in HU, contrast factor, brightness in HU) and a noise key.
    """

    blur: tuple[float, float, float] = Field(
        (0.0, 0.0, 0.0),
        description="probability of a Gaussian blur of global crop 0, global crop 1 and local crops; DINOv3 as "
        "shipped: [0, 0.9, 0.5], as intended: [1, 0.1, 0.5]",
    )
    blur_sigma: tuple[float, float] = Field((0.1, 2.0), description="range of the blur's sigma, pixels of the crop")
    noise: float = Field(0.0, ge=0, le=1, description="probability of Gaussian noise")
    noise_hu: tuple[float, float] = Field((0.0, 50.0), description="range of the noise's deviation, HU")
    contrast: float = Field(0.0, ge=0, le=1, description="probability of scaling HU about the window's centre")
    contrast_factor: tuple[float, float] = Field((0.75, 1.25), description="range of the contrast factor")
    brightness: float = Field(0.0, ge=0, le=1, description="probability of adding a constant")
    brightness_hu: tuple[float, float] = Field((-50.0, 50.0), description="range of the constant, HU")

    @model_validator(mode="after")
    def _sensible(self) -> Distortions:
        if not all(0 <= p <= 1 for p in self.blur):
            raise ValueError(f"blur needs three probabilities in [0, 1], got {self.blur}")
        for name in ("blur_sigma", "noise_hu", "contrast_factor", "brightness_hu"):
            low, high = getattr(self, name)
            if low > high or (low < 0 and name != "brightness_hu"):
                raise ValueError(f"{name} needs 0 <= low <= high, got [{low:g}, {high:g}]")
        return self

    @property
    def on(self) -> bool:
        """Whether any of them can happen."""
        return any((*self.blur, self.noise, self.contrast, self.brightness))

    def draw(self, crops: int, rng: np.random.Generator) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Amounts [crops, 4] and noise keys [crops] of a slice's crops: two global ones, then local ones."""
        happens, amount = rng.random((2, crops, 4))
        blur = np.repeat(self.blur, [1, 1, crops - 2])
        probability = np.stack([blur, *np.broadcast_to([[self.noise], [self.contrast], [self.brightness]], (3, crops))])
        low, high = np.array([self.blur_sigma, self.noise_hu, self.contrast_factor, self.brightness_hu]).T
        amounts = np.where(happens < probability.T, low + amount * (high - low), [0.0, 0.0, 1.0, 0.0])
        return amounts.astype(np.float32), rng.integers(2**63, size=crops, dtype=np.int64)

    def apply(self, crops: Tensor, amounts: Tensor, keys: Tensor, window: HuWindow) -> Tensor:
        """Distorted copies of crops [N, S, S] by amounts [N, 4] and keys [N]: the same on every device."""
        if not self.on:
            return crops
        sigma, noise, contrast, brightness = amounts[..., None, None].unbind(1)
        low, high = window.normalised
        centre = (low + high) / 2
        crops = (crops - centre) * contrast + (centre + brightness / window.std)
        if any(self.blur):
            crops = _blur(crops, sigma[:, 0, 0])
        if self.noise:
            crops = crops + _noise(keys, crops.shape[-2:]) * (noise / window.std)
        return crops.clamp(low, high)


def _blur(crops: Tensor, sigma: Tensor) -> Tensor:
    """Each crop of [N, S, S] under its own Gaussian of KERNEL taps, mirrored at the border; sigma 0 changes nothing."""
    offsets = torch.arange(KERNEL, device=crops.device) - KERNEL // 2
    taps = torch.exp(-0.5 * (offsets / sigma.clamp(min=1e-3)[:, None]) ** 2)
    taps = (taps / taps.sum(1, keepdim=True))[:, None]  # [N, 1, KERNEL]
    padded = F.pad(crops[None], (KERNEL // 2,) * 4, mode="reflect")
    rows = F.conv2d(padded, taps[..., None], groups=len(crops))
    return F.conv2d(rows, taps[:, :, None], groups=len(crops))[0]


def _noise(keys: Tensor, shape: torch.Size) -> Tensor:
    """Standard normal [N, *shape] as a function of (key, pixel): splitmix64's mixing, then Box and Muller."""
    x = keys[:, None] + torch.arange(1, math.prod(shape) + 1, device=keys.device) * -0x61C8864680B583EB
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47  # `& ...` makes torch's shift of int64 a logical one
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    x = x ^ ((x >> 31) & 0x1FFFFFFFF)
    first, second = ((x >> 40) & 0xFFFFFF) + 1, (x >> 16) & 0xFFFFFF
    radius = torch.sqrt(-2 * torch.log(first.to(torch.float32) / 2**24))
    return (radius * torch.cos(second.to(torch.float32) * (2 * math.pi / 2**24))).view(len(keys), *shape)
