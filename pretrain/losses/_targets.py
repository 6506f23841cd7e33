"""The teacher's targets of DINO and iBOT: of a batch at once, or of one that is taken in parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from pretrain.losses import Given
from pretrain.losses._sinkhorn import shifted, sinkhorn, sinkhorn_shift
from pretrain.schedule import Schedule

__all__ = ["sinkhorn_over", "sinkhorn_targets"]


class _Balanced(Protocol):
    @property
    def teacher_temperature(self) -> Schedule: ...
    @property
    def sinkhorn_iterations(self) -> int: ...


@torch.no_grad()
def sinkhorn_targets(settings: _Balanced, given: Given, tokens: Callable[[Given], Tensor]) -> Tensor:
    """Targets [n, K] for the teacher's ``tokens(given)``, balanced over all ranks or, of a part, as shared says."""
    head, temperature = given.teacher_head, settings.teacher_temperature(given.step)
    assert head is not None
    if given.shared is None:
        return sinkhorn(head(tokens(given)), temperature, settings.sinkhorn_iterations)
    bottleneck, shift = given.shared
    return shifted(head(bottleneck, only_last=True), temperature, shift)


@torch.no_grad()
def sinkhorn_over(
    settings: _Balanced, step: int, parts: Sequence[Tensor], head: nn.Module | None
) -> list[tuple[Tensor, Tensor]]:
    """For each part its features and what shifts their logits. Logits are made anew when needed, one part at a time."""
    assert head is not None
    temperature = settings.teacher_temperature(step)
    shift = sinkhorn_shift(
        lambda: (head(part, only_last=True) for part in parts), temperature, settings.sinkhorn_iterations
    )
    return [(part, shift) for part in parts]
