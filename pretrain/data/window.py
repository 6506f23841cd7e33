"""What happens to intensities: the fixed HU window, and the optional distortions of a crop."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from launch.settings import Settings

__all__ = ["Distortions", "HuWindow", "RandomWindow"]

KERNEL = 9  # taps of the blur, as in DINOv2 and DINOv3


class Row(NamedTuple):
    """The numbers of one window."""

    low: float
    high: float
    mean: float
    std: float


class HuWindow(Settings):
    """Clamps HU to [low, high], then normalises by a fixed mean and deviation (defaults: MedDINOv3 on CT-3M).

    With lists in place of the numbers it is several windows, each a channel of the image: `{low: [-1350, -160], ...}`,
    or written as a list of windows. What stays a number is the same for all of them.
    """

    low: float | tuple[float, ...] = Field(-1000.0, description="lowest HU that is told apart; a list: one a channel")
    high: float | tuple[float, ...] = Field(1000.0, description="highest HU that is told apart")
    mean: float | tuple[float, ...] = Field(65.1084213256836, description="HU that becomes 0")
    std: float | tuple[float, ...] = Field(178.01663208007812, description="HU that become 1")

    @model_validator(mode="before")
    @classmethod
    def _columns(cls, data: Any) -> Any:
        """A list of windows is the table of their numbers, whose columns are the fields."""
        if not isinstance(data, list | tuple):
            return data
        windows = [window.model_dump() if isinstance(window, HuWindow) else window for window in data]
        if not windows or not all(isinstance(window, dict) for window in windows):
            raise ValueError("a window {low, high, mean, std} or a list of such windows is expected")
        if len(windows) == 1:
            return windows[0]
        if unknown := {str(name) for window in windows for name in window} - cls.model_fields.keys():
            raise ValueError(f"no such setting of a window: {', '.join(sorted(unknown))}")
        fields = cls.model_fields.items()
        return {name: [window.get(name, field.default) for window in windows] for name, field in fields}

    @model_validator(mode="after")
    def _ordered(self) -> HuWindow:
        lengths = {len(value) for value in self._columns_given() if isinstance(value, tuple)}
        if len(lengths) > 1 or 0 in lengths:
            raise ValueError(f"needs lists of one length, one number a channel, got {sorted(lengths)}")
        for low, high, _, std in self._rows():
            if not low < high:
                raise ValueError(f"needs low < high, got low={low:g}, high={high:g}")
            if not std > 0:
                raise ValueError(f"needs std > 0, got {std:g}")
        return self

    @property
    def channels(self) -> int:
        """How many windows there are."""
        return len(self._rows())

    @property
    def parts(self) -> tuple[HuWindow, ...]:
        """The window of each channel."""
        if self.channels == 1:
            return (self,)
        return tuple(HuWindow(low=low, high=high, mean=mean, std=std) for low, high, mean, std in self._rows())

    def apply(self, hu: Tensor) -> Tensor:
        """HU of any dtype and shape -> normalised float32, a new tensor; of one window. `image` is for any number."""
        low, high, mean, std = self._numbers()
        return hu.to(torch.float32, copy=True).clamp_(low, high).sub_(mean).div_(std)

    def hu(self, normalised: Tensor) -> Tensor:
        """What `apply` was given, as far as the one window shows it."""
        _, _, mean, std = self._numbers()
        return normalised * std + mean

    def image(self, hu: Tensor) -> Tensor:
        """HU [..., Y, X] -> normalised float32 [..., C, Y, X], a channel for each window."""
        if self.channels == 1:
            return self.apply(hu).unsqueeze(-3)
        return torch.stack([part.apply(hu) for part in self.parts], -3)

    @property
    def normalised(self) -> tuple[float, float]:
        """The ends of the one window after normalisation."""
        low, high, mean, std = self._numbers()
        return (low - mean) / std, (high - mean) / std

    def said(self) -> str:
        """The windows in words, for a summary."""
        rows = (
            f"HU {low:g} to {high:g}, {mean:.1f} becomes 0 and {std:.1f} one" for low, high, mean, std in self._rows()
        )
        return "; ".join(rows)

    def _columns_given(self) -> tuple[float | tuple[float, ...], ...]:
        return self.low, self.high, self.mean, self.std

    def _rows(self) -> list[Row]:
        given = self._columns_given()
        count = max((len(value) for value in given if isinstance(value, tuple)), default=1)
        columns = [value if isinstance(value, tuple) else (value,) * count for value in given]
        return [Row(*row) for row in zip(*columns, strict=True)]

    def _numbers(self) -> Row:
        rows = self._rows()
        if len(rows) > 1:
            raise ValueError(f"one HU window is needed here, and there are {len(rows)}: {self.said()}")
        return rows[0]


class RandomWindow(Settings):
    """A window drawn anew for each slice in training: level and width evenly from their ranges.

    Its ends become what the fixed window's ends become, so the network sees the same range of values with another
    contrast. What is exported is the fixed window.
    """

    probability: float = Field(1.0, ge=0, le=1, description="share of the slices that are seen in a drawn window")
    level: tuple[float, float] = Field((-100.0, 100.0), description="range of the window's centre, HU")
    width: tuple[float, float] = Field((1000.0, 2500.0), description="range of the window's width, HU")

    @model_validator(mode="after")
    def _sensible(self) -> RandomWindow:
        if self.level[0] > self.level[1]:
            raise ValueError(f"level needs low <= high, got [{self.level[0]:g}, {self.level[1]:g}]")
        if not 0 < self.width[0] <= self.width[1]:
            raise ValueError(f"width needs 0 < low <= high, got [{self.width[0]:g}, {self.width[1]:g}]")
        return self

    def draw(self, rng: np.random.Generator) -> tuple[float, float]:
        """Lowest and highest HU for one slice; both 0 where it keeps the fixed window."""
        happens, level, width = rng.random(3)
        if happens >= self.probability:
            return 0.0, 0.0
        centre = self.level[0] + level * (self.level[1] - self.level[0])
        half = (self.width[0] + width * (self.width[1] - self.width[0])) / 2
        return centre - half, centre + half

    def image(self, hu: Tensor, ends: Tensor, fixed: HuWindow) -> Tensor:
        """HU [B, Y, X] in the windows that were drawn for them, ends [B, 2] -> normalised float32 [B, 1, Y, X]."""
        low, high, _, _ = fixed._numbers()
        first, last = fixed.normalised
        kept = ends[:, 0] == ends[:, 1]
        at_low = torch.where(kept, low, ends[:, 0])[:, None, None]
        at_high = torch.where(kept, high, ends[:, 1])[:, None, None]
        inside = torch.minimum(torch.maximum(hu.to(torch.float32), at_low), at_high)
        return ((inside - at_low) * ((last - first) / (at_high - at_low)) + first)[:, None]


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

    def draw(
        self, crops: int, rng: np.random.Generator, n_global: int = 2
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Amounts [crops, 4] and noise keys [crops] of a slice's crops: one or two global ones, then local ones."""
        happens, amount = rng.random((2, crops, 4))
        blur = np.repeat(self.blur, [1, n_global - 1, crops - n_global])
        probability = np.stack([blur, *np.broadcast_to([[self.noise], [self.contrast], [self.brightness]], (3, crops))])
        low, high = np.array([self.blur_sigma, self.noise_hu, self.contrast_factor, self.brightness_hu]).T
        amounts = np.where(happens < probability.T, low + amount * (high - low), [0.0, 0.0, 1.0, 0.0])
        return amounts.astype(np.float32), rng.integers(2**63, size=crops, dtype=np.int64)

    def apply(self, crops: Tensor, amounts: Tensor, keys: Tensor, window: HuWindow) -> Tensor:
        """Distorted copies of crops [N, C, S, S] by amounts [N, 4] and keys [N]: the same on every device.

        Channels are windows of one slice: they share the draws, each to the scale of its own window.
        """
        if not self.on:
            return crops
        sigma, noise, contrast, brightness = amounts[..., None, None, None].unbind(1)
        low, high, std = _scale(window, crops.device)
        centre = (low + high) / 2
        crops = (crops - centre) * contrast + (centre + brightness / std)
        if any(self.blur):
            crops = _blur(crops, sigma[:, 0, 0, 0])
        if self.noise:
            crops = crops + _noise(keys, crops.shape[-2:])[:, None] * (noise / std)
        return torch.clamp(crops, low, high)


def _scale(window: HuWindow, device: torch.device) -> tuple[Any, Any, Any]:
    """The normalised ends and the deviation: numbers of one window, else tensors [C, 1, 1]."""
    if window.channels == 1:
        return *window.normalised, window._numbers().std
    rows = [(*part.normalised, part._numbers().std) for part in window.parts]
    low, high, std = torch.tensor(rows, device=device)[..., None, None].unbind(1)
    return low, high, std


def _blur(crops: Tensor, sigma: Tensor) -> Tensor:
    """Each crop of [N, C, S, S] under its own Gaussian of KERNEL taps, mirrored at the border; 0 changes nothing."""
    offsets = torch.arange(KERNEL, device=crops.device) - KERNEL // 2
    taps = torch.exp(-0.5 * (offsets / sigma.clamp(min=1e-3)[:, None]) ** 2)
    taps = (taps / taps.sum(1, keepdim=True)).repeat_interleave(crops.shape[1], 0)[:, None]  # [N*C, 1, KERNEL]
    padded = F.pad(crops.flatten(0, 1)[None], (KERNEL // 2,) * 4, mode="reflect")
    rows = F.conv2d(padded, taps[..., None], groups=len(taps))
    return F.conv2d(rows, taps[:, :, None], groups=len(taps)).view(crops.shape)


def _noise(keys: Tensor, shape: torch.Size) -> Tensor:
    """Standard normal [N, *shape] as a function of (key, pixel): splitmix64's mixing, then Box and Muller."""
    x = keys[:, None] + torch.arange(1, math.prod(shape) + 1, device=keys.device) * -0x61C8864680B583EB
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47  # `& ...` makes torch's shift of int64 a logical one
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    x = x ^ ((x >> 31) & 0x1FFFFFFFF)
    first, second = ((x >> 40) & 0xFFFFFF) + 1, (x >> 16) & 0xFFFFFF
    radius = torch.sqrt(-2 * torch.log(first.to(torch.float32) / 2**24))
    return (radius * torch.cos(second.to(torch.float32) * (2 * math.pi / 2**24))).view(len(keys), *shape)
