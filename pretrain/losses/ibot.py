"""iBOT: where patches are hidden from the student, it predicts the teacher's prototypes there (Zhou et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field
from torch import Tensor, nn

import launch.settings
from pretrain.losses import Given, Views
from pretrain.losses._cross_entropy import soft_cross_entropy
from pretrain.losses._targets import sinkhorn_over, sinkhorn_targets
from pretrain.models.heads import HeadSettings
from pretrain.schedule import Positive, Schedule, resolved

if TYPE_CHECKING:
    from pretrain.data.batch import Batch

__all__ = ["Ibot", "Settings", "build", "ibot_loss"]


class Settings(launch.settings.Settings):
    """Cross-entropy of masked patches over prototypes."""

    kind: Literal["ibot"] = "ibot"
    weight: Schedule = Field(Schedule(peak=1.0), description="weight of the loss")
    teacher_temperature: Positive = Field(
        Schedule(peak=0.07), description="below the student's: it sharpens the targets"
    )
    student_temperature: float = Field(0.1, gt=0, description="divides the student's logits")
    sinkhorn_iterations: int = Field(3, ge=1, description="sweeps that spread the targets over the prototypes")
    head: HeadSettings = Field(HeadSettings(), description="projection head")


def ibot_loss(student: Tensor, teacher: Tensor, weights: Tensor, crops: int, temperature: float) -> Tensor:
    """Mean over all ``crops``, masked or not, of the mean cross-entropy of a crop's masked patches.

    ``student`` are logits and ``teacher`` probabilities [M, K] of the masked patches of all crops; ``weights`` [M] are
    1 / (masked patches of that crop). Crops without a mask add nothing but count.
    """
    return (soft_cross_entropy(student, teacher, temperature) * weights).sum() / crops


@dataclass(frozen=True)
class Ibot:
    """The term; only masked positions pass through the heads."""

    settings: Settings
    head: nn.Module | None
    needs_gram: bool = False
    sees: Literal["student", "teacher"] = "teacher"

    @property
    def weight(self) -> Schedule:
        """The weight by step."""
        return self.settings.weight

    def loss(self, given: Given) -> Tensor:
        """Of the masked patches of the batch; the targets are balanced over all ranks together."""
        assert given.student_head is not None
        s, batch = self.settings, given.batch
        targets = sinkhorn_targets(s, given, _seen)
        predicted = given.student_head(_masked(given.student, batch))
        return ibot_loss(predicted, targets, batch.mask_weights, len(batch.masks), s.student_temperature)

    def collect(self, given: Given) -> Tensor:
        """The teacher's features of the masked patches at the bottleneck of its head, [M, bottleneck]."""
        assert given.teacher_head is not None
        return given.teacher_head(_seen(given), no_last=True)  # type: ignore[no-any-return]

    def combine(self, step: int, parts: Sequence[Tensor], teacher_head: nn.Module | None) -> Sequence[Any]:
        """Targets that are balanced over all parts."""
        return sinkhorn_over(self.settings, step, parts, teacher_head)


def _seen(given: Given) -> Tensor:
    assert given.teacher is not None
    return _masked(given.teacher, given.batch)


def _masked(views: Views, batch: Batch) -> Tensor:
    return views.globals_.patches.flatten(0, 1).index_select(0, batch.mask_indices)


def build(settings: Settings, *, dim: int, patch_size: int, steps: int) -> Ibot:
    """The term with its schedules resolved for a run of ``steps``, and a new head."""
    return Ibot(resolved(settings, steps), settings.head.build(dim))
