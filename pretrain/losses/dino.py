"""DINO: each student crop predicts the prototypes of the teacher's other crops of its image (Caron et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

import launch.settings
from pretrain.losses import Given, Views
from pretrain.losses._cross_entropy import soft_cross_entropy
from pretrain.losses._targets import Balanced
from pretrain.models.heads import HeadSettings
from pretrain.schedule import Positive, Schedule, resolved

__all__ = ["Dino", "Settings", "build", "dino_loss"]


class Settings(launch.settings.Settings):
    """Cross-entropy of class tokens over prototypes."""

    kind: Literal["dino"] = "dino"
    weight: Schedule = Field(Schedule(peak=1.0), description="weight of the loss")
    local_weight: Schedule = Field(Schedule(peak=1.0), description="further factor of the part from local crops")
    teacher_temperature: Positive = Field(
        Schedule(peak=0.07), description="below the student's: it sharpens the targets"
    )
    student_temperature: float = Field(0.1, gt=0, description="divides the student's logits")
    sinkhorn_iterations: int = Field(3, ge=1, description="sweeps that spread the targets over the prototypes")
    ignore_diagonal: bool = Field(
        True, description="a student's global crop is not held against the teacher's view of the same crop"
    )
    head: HeadSettings = Field(HeadSettings(), description="projection head")


def dino_loss(student: Tensor, teacher: Tensor, temperature: float, *, ignore_diagonal: bool = False) -> Tensor:
    """Mean cross-entropy over images and pairs of a student crop and a teacher crop.

    ``student`` are logits [S, B, K], ``teacher`` probabilities [T, B, K]; ``ignore_diagonal`` leaves out the pairs of a
    crop with itself (the first min(S, T) crops are the same on both sides).
    """
    crops, images, _ = student.shape
    targets = teacher.sum(0)  # [B, K]: a sum of cross-entropies is the cross-entropy against the sum
    pairs = crops * len(teacher)
    if ignore_diagonal:
        same = min(crops, len(teacher))
        pairs -= same
        targets = targets.expand(crops, -1, -1).clone()
        targets[:same] -= teacher[:same]
    return soft_cross_entropy(student, targets, temperature).sum() / (pairs * images)


@dataclass(frozen=True)
class Dino(Balanced):
    """The term; local crops and the exchange between global crops count by their numbers of pairs."""

    settings: Settings

    def tokens(self, views: Views, given: Given) -> Tensor:
        """The class tokens of the global crops."""
        return views.globals_.cls

    def loss(self, given: Given) -> Tensor:
        """The targets of this step come from the teacher's global crops, all ranks together."""
        assert given.student_head is not None
        s, images, student = self.settings, given.batch.images, given.student
        targets = self.targets(given)
        targets = targets.view(-1, images, targets.shape[-1])
        views = len(targets)
        crops = [student.globals_.cls] if student.locals_ is None else [student.globals_.cls, student.locals_.cls]
        logits = given.student_head(torch.cat(crops))
        global_logits, *local_logits = (
            part.view(-1, images, part.shape[-1]) for part in torch.split(logits, [len(part) for part in crops])
        )
        loss = dino_loss(global_logits, targets, s.student_temperature, ignore_diagonal=s.ignore_diagonal)
        if not local_logits:
            return loss
        pairs, local_pairs = views * (views - s.ignore_diagonal), views * len(local_logits[0])
        local = dino_loss(local_logits[0], targets, s.student_temperature)
        return (pairs * loss + local_pairs * s.local_weight(given.step) * local) / (pairs + local_pairs)


def build(settings: Settings, *, dim: int, patch_size: int, steps: int) -> Dino:
    """The term with its schedules resolved for a run of ``steps``, and a new head."""
    return Dino(resolved(settings, steps), settings.head.build(dim))
