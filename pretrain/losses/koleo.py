"""KoLeo: keeps the class tokens of a batch apart by an estimate of their entropy (Sablayrolles et al. 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

import launch.settings
from pretrain.losses import Given
from pretrain.schedule import Schedule, resolved

__all__ = ["Koleo", "Settings", "build", "gather_group", "koleo_loss", "ranks_of_group", "set_size"]

_EPS = 1e-8


class Settings(launch.settings.Settings):
    """Minus the mean logarithm of the distance to the nearest neighbours."""

    kind: Literal["koleo"] = "koleo"
    weight: Schedule = Field(Schedule(peak=0.1), description="weight of the sum over the global crops")
    neighbours: int = Field(1, ge=1, description="nearest neighbours of each image that count")
    group: int | None = Field(
        None,
        ge=2,
        description="images among which neighbours are sought: a rank with more is split into the smallest equal sets "
        "of at least so many, one with fewer joins adjacent ranks; null: all of one rank",
    )


def koleo_loss(x: Tensor, among: Tensor | None = None, first: int = 0, neighbours: int = 1) -> Tensor:
    """-mean log distance from each row of ``x`` [B, D] to its nearest among ``among`` [G, D] (``x`` itself if not
    given).

    Row i of ``x`` is row ``first + i`` of ``among``. In float32 whatever comes in; under bf16 a GPU seeks the
    neighbours by TF32 products, their distances are exact. Zero, with zero gradient, if there
    is nobody to be a neighbour; fewer neighbours than asked for are taken where the group is small.
    """
    exact = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        x = F.normalize(x.to(exact), dim=-1, eps=_EPS)
        others = x if among is None else F.normalize(among.to(exact), dim=-1, eps=_EPS)
        neighbours = min(neighbours, len(others) - 1)
        if neighbours < 1:
            return 0 * x.sum()
        with torch.no_grad():
            likeness = x @ others.T
            likeness.diagonal(first).fill_(-1)
            nearest = likeness.topk(neighbours, dim=1).indices.flatten()
        distances = F.pairwise_distance(x.repeat_interleave(neighbours, 0), others[nearest], eps=_EPS)
        return -(distances + _EPS).log().mean()


def set_size(group: int, images: int) -> int:
    """Images in each of the smallest equal sets of at least ``group`` into which a rank's ``images`` can be split."""
    return next((size for size in range(group, images) if images % size == 0), images)


def ranks_of_group(group: int, images: int, world: int) -> int:
    """How many adjacent ranks of ``images`` each hold ``group`` images: the least that divides the world."""
    return next((ranks for ranks in range(1, world) if world % ranks == 0 and ranks * images >= group), world)


def gather_group(x: Tensor, ranks: int) -> tuple[Tensor, int]:
    """The rows of ``x`` [B, D] of this rank's group of ``ranks`` adjacent ranks, and where its own begin.

    Differentiable: what another rank's loss says of this rank's rows comes back. All ranks must hold as many rows.
    """
    if ranks == 1:
        return x, 0
    everywhere: Tensor = _Gather.apply(x)  # type: ignore[no-untyped-call]
    start = dist.get_rank() // ranks * ranks * len(x)
    return everywhere[start : start + ranks * len(x)], dist.get_rank() * len(x) - start


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous()
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]


@dataclass(frozen=True)
class Koleo:
    """The term: the sum over global crops, each by itself, since two crops of one image are meant to be near."""

    settings: Settings
    head: nn.Module | None = None
    needs_gram: bool = False
    sees: Literal["student", "teacher"] = "student"

    @property
    def weight(self) -> Schedule:
        """The weight by step."""
        return self.settings.weight

    def loss(self, given: Given) -> Tensor:
        """Of the student's global class tokens."""
        cls = given.student.globals_.cls
        if given.shared is None:
            return self._all(torch.unflatten(cls, 0, (-1, given.batch.images)))
        value, gradient = given.shared
        slope = (cls.to(gradient.dtype) * gradient.flatten(0, 1)).sum()
        return value + slope - slope.detach()  # type: ignore[no-any-return]

    def collect(self, given: Given) -> Tensor:
        """The student's class tokens, [2, B, D]."""
        return torch.unflatten(given.student.globals_.cls, 0, (-1, given.batch.images))

    def combine(self, step: int, parts: Sequence[Tensor], teacher_head: nn.Module | None) -> Sequence[Any]:
        """The loss of all parts, and for each part the gradient in its class tokens, times the number of parts."""
        cls = torch.cat(list(parts), 1)
        cls = cls.to(torch.promote_types(cls.dtype, torch.float32)).requires_grad_()
        with torch.enable_grad():
            value = self._all(cls)
        (gradient,) = torch.autograd.grad(value, cls)
        pieces = torch.split(gradient * len(parts), [part.shape[1] for part in parts], 1)
        return [(value.detach(), piece) for piece in pieces]

    def _all(self, crops: Tensor) -> Tensor:
        return torch.stack([self._one(crop) for crop in crops.unbind()]).sum()

    def _one(self, x: Tensor) -> Tensor:
        group, neighbours = self.settings.group or len(x), self.settings.neighbours
        world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        ranks = ranks_of_group(group, len(x), world)
        if ranks > 1:
            return koleo_loss(x, *gather_group(x, ranks), neighbours)
        sets = torch.split(x, set_size(group, len(x)))
        return torch.stack([koleo_loss(part, neighbours=neighbours) for part in sets]).mean()


def build(settings: Settings, *, dim: int, patch_size: int, steps: int) -> Koleo:
    """The term with its schedules resolved for a run of ``steps``."""
    return Koleo(resolved(settings, steps))
