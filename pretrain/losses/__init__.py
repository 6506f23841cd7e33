"""What a loss term of self-distillation is, and what it is given.

One plug-in a file (``dino``, ``ibot``, ``koleo``, ``gram``); a file that begins with an underscore is shared
arithmetic. A plug-in holds ``class Settings`` with a ``kind`` and ``build(settings, *, dim, patch_size, steps) ->
Term``, where ``dim`` is the backbone's width and ``steps`` the length of the run, to which the schedules in the
settings are relative. Beneath the term, each file has its arithmetic as pure functions of tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor, nn

from pretrain.models.vit import Features

if TYPE_CHECKING:
    from pretrain.data.batch import Batch

__all__ = ["Term", "Views"]


@dataclass(frozen=True)
class Views:
    """What one network made of a batch of B images: the 2B global crops, and the nB local crops (a teacher sees none).

    Both are ordered crop by crop: first crop 0 of all images, then crop 1 of all images.
    """

    globals_: Features
    locals_: Features | None = None


class Term(Protocol):
    """One summand of the training loss."""

    head: nn.Module | None
    """Moved by the method to ``student["<name>_head"]``, with a twin in the teacher; None for a term without a head."""

    needs_gram: bool
    """Whether `loss` needs the Gram teacher's features of ``batch.gram_crops``."""

    def weight(self, step: int) -> float:
        """The weight at this step, already contained in `loss`; while it is 0 the term need not be computed."""
        ...

    def loss(
        self,
        student: Views,
        teacher: Views,
        student_head: nn.Module | None,
        teacher_head: nn.Module | None,
        batch: Batch,
        step: int,
        gram: Features | None,
    ) -> Tensor:
        """The weighted loss of this rank's batch: one float32 number, differentiable in the student alone."""
        ...
