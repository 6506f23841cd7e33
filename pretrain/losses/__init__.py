"""What a loss term of self-distillation is, and what it is given.

One plug-in a file (``dino``, ``ibot``, ``koleo``, ``gram``); a file that begins with an underscore is shared
arithmetic. A plug-in holds ``class Settings`` with a ``kind`` and ``build(settings, *, dim, patch_size, steps) ->
Term``, where ``dim`` is the backbone's width and ``steps`` the length of the run, to which the schedules in the
settings are relative. Beneath the term, each file has its arithmetic as pure functions of tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from torch import Tensor, nn

from pretrain.models.vit import Features
from pretrain.schedule import Schedule

if TYPE_CHECKING:
    from pretrain.data.batch import Batch

__all__ = ["Coupled", "Given", "Term", "Views"]


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
    teacher: Views | None  # None where `shared` holds what the terms need of it
    student_head: nn.Module | None = None
    teacher_head: nn.Module | None = None
    gram: Features | None = None  # the Gram teacher's, of ``batch.gram_crops`` or else of the global crops
    shared: Any = None  # what this term's `combine` says of this part of the batch


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


@runtime_checkable
class Coupled(Protocol):
    """A term in which the loss of one image depends on others, and which can have it over a batch taken in parts."""

    @property
    def sees(self) -> Literal["student", "teacher"]:
        """Whose features `collect` takes."""

    def collect(self, given: Given) -> Tensor:
        """What `combine` must have of one part of a batch, without gradients."""

    def combine(self, step: int, parts: Sequence[Tensor], teacher_head: nn.Module | None) -> Sequence[Any]:
        """From what was collected of all parts, what each part's ``given.shared`` is to be; a collective.

        With it the mean of the losses of the parts, and of their gradients, is that of the batch uncut.
        """
