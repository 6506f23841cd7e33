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
from pretrain.schedule import Schedule

if TYPE_CHECKING:
    from pretrain.data.batch import Batch

__all__ = ["Given", "Term", "Views"]


@dataclass(frozen=True)
class Views:
    """What one network made of a batch of B images: the 2B global crops, and the nB local crops (a teacher sees none).

    Both are ordered crop by crop: first crop 0 of all images, then crop 1 of all images.
    """

    globals_: Features
    locals_: Features | None = None


@dataclass(frozen=True)
class Given:
    """What a term is given at one step. The heads are the term's own and None for a term that has none."""

    step: int
    batch: Batch
    student: Views
    teacher: Views
    student_head: nn.Module | None = None
    teacher_head: nn.Module | None = None
    gram: Features | None = None  # the Gram teacher's, of ``batch.gram_crops`` or else of the global crops


class Term(Protocol):
    """One summand of the training loss."""

    @property
    def weight(self) -> Schedule:
        """The weight by step. The method multiplies with it, and need not ask for the loss where it is 0."""

    @property
    def head(self) -> nn.Module | None:
        """Moved by the method to ``student["<name>_head"]``, with a twin in the teacher."""

    @property
    def needs_gram(self) -> bool:
        """Whether `loss` needs ``given.gram``."""

    def loss(self, given: Given) -> Tensor:
        """The loss of this rank's batch, unweighted: one float32 number, differentiable in the student alone."""
