"""iBOT: where patches are hidden from the student, it predicts the teacher's prototypes there (Zhou et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field
from torch import Tensor

import launch.settings
from pretrain.losses import Given, Views
from pretrain.losses._cross_entropy import soft_cross_entropy
from pretrain.losses._targets import Balanced
from pretrain.models.heads import HeadSettings
from pretrain.schedule import Positive, Schedule, resolved

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
class Ibot(Balanced):
    """The term; only masked positions pass through the heads."""

    settings: Settings

    def tokens(self, views: Views, given: Given) -> Tensor:
        """The patches of the global crops that are hidden from the student."""
        return views.globals_.patches.flatten(0, 1).index_select(0, given.batch.mask_indices)

    def loss(self, given: Given) -> Tensor:
        """Of the masked patches of the batch; the targets are balanced over all ranks together."""
        assert given.student_head is not None
        s, batch = self.settings, given.batch
        targets = self.targets(given)
        predicted = given.student_head(self.tokens(given.student, given))
        return ibot_loss(predicted, targets, batch.mask_weights, len(batch.masks), s.student_temperature)


def build(settings: Settings, *, dim: int, patch_size: int, steps: int) -> Ibot:
    """The term with its schedules resolved for a run of ``steps``, and a new head."""
    return Ibot(resolved(settings, steps), settings.head.build(dim))
