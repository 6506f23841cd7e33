"""Absolute positions: a table of one vector a patch, learned or fixed, added to the tokens before the first block.

DINOv3 has rotary positions instead (`pretrain.models.rope`); the tables are there for the families that came before.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from launch.settings import Settings

__all__ = ["PositionSettings", "add_positions", "init_positions", "positions_shape"]


class PositionSettings(Settings):
    """A table for a square grid of patches; for any other grid it is interpolated, bicubic, in float64.

    How each family does that, as its own code has it:
    - DINOv2 without registers, DINO, iBOT: offset 0.1 (a slip of rounding that the weights were published with)
    - DINOv2 with registers, timm: antialias
    - Hugging Face's Dinov2Model and ViTModel, MAE: neither; MoCo v3 never interpolates
    """

    grid: int = Field(gt=0, description="patches on a side of the square grid that the table is for")
    on_cls: bool = Field(True, description="the class token has a position too, the first of the table")
    fixed: bool = Field(False, description="sines and cosines that do not train (MAE, MoCo v3)")
    antialias: bool = Field(False, description="a coarser grid takes averages of the table's, not samples")
    offset: float = Field(0.0, ge=0, lt=1, description="added to the sides of another grid to give the scale")


def positions_shape(settings: PositionSettings, dim: int) -> tuple[int, int, int]:
    """Shape of the table: [1, (1 +) grid * grid, D], rows of the grid first."""
    return 1, settings.on_cls + settings.grid**2, dim


@torch.no_grad()
def init_positions(table: Tensor, settings: PositionSettings, generator: torch.Generator | None = None) -> None:
    """Fills the table: N(0, 0.02²), or sines and cosines of row and column (Vaswani et al. 2017), 0 for the class."""
    if not settings.fixed:
        table.normal_(0, 0.02, generator=generator)
        return
    like = torch.arange(settings.grid, device=table.device, dtype=torch.float64)
    dim = table.shape[-1]
    angles = like[:, None] / 10000 ** torch.linspace(0, 1, -(-dim // 4) + 1, device=table.device)[:-1].double()
    one = torch.cat([angles.sin(), angles.cos()], dim=1)  # [grid, about dim / 2]
    rows, columns = one[:, None].expand(-1, settings.grid, -1), one[None].expand(settings.grid, -1, -1)
    table.zero_()
    table[0, settings.on_cls :] = torch.cat([rows, columns], dim=-1).flatten(0, 1)[:, :dim].to(table.dtype)


def add_positions(
    table: Tensor, settings: PositionSettings, cls: Tensor, patches: Tensor, grid: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Class token [1, 1, D] and patches [B, N, D] of a ``grid`` of rows x columns, each with its position.

    A fixed table is in float32 also where the parameters are read as bfloat16; it takes on their precision.
    """
    own = table[:, int(settings.on_cls) :]
    own = own if grid == (settings.grid, settings.grid) else _resized(own, settings, grid)
    own = own.to(cls.dtype)
    if settings.on_cls:
        cls = cls + table[:, :1].to(cls.dtype)
    return cls, patches + own


def _resized(table: Tensor, settings: PositionSettings, grid: tuple[int, int]) -> Tensor:
    """The table [1, grid * grid, D] on another grid, as two products with matrices.

    Interpolating the table itself would add up its gradient in another order each time on CUDA. In float64 no autocast
    makes the products coarse.
    """
    by_row, by_column = (_weights(settings, side, table.device) for side in grid)
    square = torch.unflatten(table[0].double(), 0, (settings.grid, settings.grid))
    return torch.einsum("yi,xj,ijd->yxd", by_row, by_column, square).flatten(0, 1)[None].to(table.dtype)


@torch.no_grad()
def _weights(settings: PositionSettings, side: int, device: torch.device) -> Tensor:
    """What each of the table's rows counts in each of ``side`` rows: bicubic interpolation of the unit vectors."""
    units = torch.eye(settings.grid, dtype=torch.float64, device=device)[None, None]
    how: dict[str, Any] = {"size": (side, settings.grid)}
    if settings.offset:
        how = {"scale_factor": ((side + settings.offset) / settings.grid, 1.0)}
    return F.interpolate(units, mode="bicubic", antialias=settings.antialias, **how)[0, 0]  # [side, grid]
