"""What DINO and iBOT share: the teacher's tokens as targets, spread evenly over the prototypes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from pretrain.losses import Given, Views
from pretrain.losses._sinkhorn import shifted, sinkhorn, sinkhorn_shift
from pretrain.schedule import Schedule

__all__ = ["Balanced"]


class _Settings(Protocol):
    @property
    def weight(self) -> Schedule: ...
    @property
    def teacher_temperature(self) -> Schedule: ...
    @property
    def sinkhorn_iterations(self) -> int: ...


@dataclass(frozen=True)
class Balanced:
    """A term whose targets are the teacher's, balanced over a batch: all ranks and, by ``shared``, all its parts."""

    settings: _Settings
    head: nn.Module | None
    needs_gram: bool = False
    sees: Literal["student", "teacher"] = "teacher"

    @property
    def weight(self) -> Schedule:
        """The weight by step."""
        return self.settings.weight

    def tokens(self, views: Views, given: Given) -> Tensor:
        """The tokens [n, D] of a network that the term is about."""
        raise NotImplementedError

    @torch.no_grad()
    def targets(self, given: Given) -> Tensor:
        """Targets [n, K] whose rows sum to 1, float32."""
        head, temperature = given.teacher_head, self.settings.teacher_temperature(given.step)
        assert head is not None
        if given.shared is not None:
            bottleneck, shift = given.shared
            return shifted(head(bottleneck, only_last=True), temperature, shift)
        assert given.teacher is not None
        return sinkhorn(head(self.tokens(given.teacher, given)), temperature, self.settings.sinkhorn_iterations)

    def collect(self, given: Given) -> Tensor:
        """The teacher's tokens at the bottleneck of its head, [n, bottleneck]."""
        assert given.teacher is not None
        assert given.teacher_head is not None
        return given.teacher_head(self.tokens(given.teacher, given), no_last=True)  # type: ignore[no-any-return]

    @torch.no_grad()
    def combine(self, step: int, parts: Sequence[Tensor], teacher_head: nn.Module | None) -> Sequence[Any]:
        """For each part its features and what shifts their logits, which are made anew when needed, part by part."""
        assert teacher_head is not None
        temperature = self.settings.teacher_temperature(step)
        shift = sinkhorn_shift(
            lambda: (teacher_head(part, only_last=True) for part in parts),
            temperature,
            self.settings.sinkhorn_iterations,
        )
        return [(part, shift) for part in parts]
