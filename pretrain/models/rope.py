"""Rotary position embedding on the two axes of a patch grid, as DINOv3 has it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from launch.settings import Settings

__all__ = ["Rope", "RopeSettings", "Table", "rotate"]

Table = tuple[Tensor, Tensor]  # sin, cos, each [H*W, head dim], or [B, K, head dim] of K patches of each image

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
Factor = Annotated[float, Field(gt=1)]


class RopeSettings(Settings):
    """How positions become angles, and how they are disturbed in training."""

    base: float | None = Field(
        100.0, gt=1, description="ratio of the longest period to the shortest; null with min/max_period"
    )
    min_period: float | None = Field(None, gt=0, description="shortest period, in place of base")
    max_period: float | None = Field(None, gt=0, description="longest period, in place of base")
    normalize: Literal["separate", "max", "min"] = Field(
        "separate",
        description="side by which coordinates are divided: each axis by its own, or both by the longer or shorter one",
    )
    shift: float | None = Field(None, gt=0, description="training: moves each axis by U(-shift, shift)")
    jitter: Factor | None = Field(None, description="training: scales each axis by log-U(1/jitter, jitter)")
    rescale: Factor | None = Field(None, description="training: scales both axes by one log-U(1/rescale, rescale)")
    dtype: Literal["fp32", "bf16", "fp64"] = Field(
        "fp32", description="arithmetic of the angles; bf16 only to repeat models that were trained so"
    )

    @model_validator(mode="after")
    def _one_rule_of_periods(self) -> RopeSettings:
        ends = (self.min_period, self.max_period)
        if (self.base is None) == (None in ends) or (self.base is not None and ends != (None, None)):
            raise ValueError("give either base, or base: null with both min_period and max_period")
        return self


class Rope(nn.Module):
    """Sines and cosines for a grid of patches; in training with augmentation, a new draw at each call."""

    periods: Tensor  # [head dim / 4], saved with the weights

    def __init__(self, head_dim: int, settings: RopeSettings) -> None:
        super().__init__()
        self.settings = settings
        self.head_dim = head_dim
        self.dtype = _DTYPES[settings.dtype]
        self.augmented = bool(settings.shift or settings.jitter or settings.rescale)
        self.register_buffer("periods", torch.full((head_dim // 4,), math.nan, dtype=self.dtype))
        self._tables: dict[tuple[object, ...], Table] = {}

    def init_weights(self) -> None:
        """Fills the periods from the settings."""
        s, quarter = self.settings, self.head_dim // 4
        like: dict[str, Any] = {"device": self.periods.device, "dtype": self.dtype}
        if s.base is not None:
            periods = s.base ** (2 * torch.arange(quarter, **like) / (self.head_dim // 2))
        else:
            assert s.min_period is not None
            assert s.max_period is not None
            ratio = s.max_period / s.min_period
            periods = ratio ** torch.linspace(0, 1, quarter, **like) / ratio * s.max_period
        with torch.no_grad():
            self.periods.copy_(periods)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rope:
        """A model cast to half precision keeps its positions: only ``dtype`` in the settings makes them coarse."""
        before = self.periods
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.periods.dtype.itemsize < before.dtype.itemsize:
            self.periods = before.to(self.periods.device)
        self._tables.clear()
        return self

    @property
    def draws(self) -> bool:
        """Whether each call gives another table."""
        return self.training and self.augmented

    def forward(self, height: int, width: int) -> Table:
        """Sine and cosine [H*W, head dim] of a grid of ``height`` x ``width`` patches, rows first."""
        if self.draws:
            return self._table(self._augment(self._coordinates(height, width)))
        if torch.compiler.is_compiling():  # a graph keeps its own
            return self._table(self._coordinates(height, width))
        periods = self.periods
        version = None if periods.is_inference() else periods._version  # loading weights writes in place
        key = (height, width, periods.dtype, periods.device, id(periods), version)
        if key not in self._tables:
            with torch.inference_mode(False), torch.no_grad():  # a table first made in inference must do for training
                self._tables[key] = self._table(self._coordinates(height, width))
        return self._tables[key]

    def _coordinates(self, height: int, width: int) -> Tensor:
        """Centres of the patches [H*W, 2], between -1 and 1 along an axis that is divided by its own side."""
        like: dict[str, Any] = {"device": self.periods.device, "dtype": self.periods.dtype}
        sides = {"separate": (height, width), "max": (max(height, width),) * 2, "min": (min(height, width),) * 2}
        by_row, by_column = sides[self.settings.normalize]
        rows = torch.arange(0.5, height, **like) / by_row
        columns = torch.arange(0.5, width, **like) / by_column
        return 2 * torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1) - 1

    def _augment(self, coordinates: Tensor) -> Tensor:
        """Shift, then jitter, then rescale, each drawn from the device's default generator, shared by all images."""
        s = self.settings
        if s.shift:
            coordinates = coordinates + coordinates.new_empty(2).uniform_(-s.shift, s.shift)
        if s.jitter:
            coordinates = coordinates * coordinates.new_empty(2).uniform_(-math.log(s.jitter), math.log(s.jitter)).exp()
        if s.rescale:
            coordinates = (
                coordinates * coordinates.new_empty(1).uniform_(-math.log(s.rescale), math.log(s.rescale)).exp()
            )
        return coordinates

    def _table(self, coordinates: Tensor) -> Table:
        angles = 2 * math.pi * coordinates[:, :, None] / self.periods  # [HW, 2, head dim / 4]
        angles = angles.flatten(1).tile(2)  # channel i turns with channel i + head dim / 2
        return angles.sin(), angles.cos()


def rotate(x: Tensor, table: Table) -> Tensor:
    """Turns the last H*W, or K, tokens of ``x`` [B, L, heads, head dim]; class token and registers before them stay.

    Computed in the table's precision, returned in that of ``x``. Nothing of ``x`` is kept for the backward pass: it
    turns the gradient back.
    """
    if torch.compiler.is_compiling():
        return _turn(x, *table)
    return _Rotate.apply(x, *table)  # type: ignore[no-any-return,no-untyped-call]


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
        ctx.save_for_backward(sin, cos)
        return _turn(x, sin, cos)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        sin, cos = ctx.saved_tensors
        return _turn(gradients[0], -sin.roll(sin.shape[-1] // 2, -1), cos), None, None


def _turn(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """Each half of a head in one sweep, written where it belongs."""
    (sin_a, sin_b), (cos_a, cos_b) = (
        part.unsqueeze(-2).chunk(2, dim=-1) for part in (sin, cos)
    )  # [.., 1, head dim / 2]
    prefix = x.shape[1] - sin.shape[-2]
    y = x.to(sin.dtype)
    a, b = y[:, prefix:].chunk(2, dim=-1)
    result = torch.empty_like(x, memory_format=torch.contiguous_format)
    result[:, :prefix] = y[:, :prefix]
    half = a.shape[-1]
    result[:, prefix:, :, :half] = a * cos_a - b * sin_a
    result[:, prefix:, :, half:] = b * cos_b + a * sin_b
    return result
