"""What the teacher asks of the student, and how far off it is: the targets of the terms that have prototypes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pretrain.losses._sinkhorn import sinkhorn
from pretrain.losses.dino import Dino
from pretrain.losses.ibot import Ibot
from pretrain.methods import Trainable
from pretrain.methods.self_distillation import SelfDistillation
from pretrain.watch.measures import divergence, target_use

__all__ = ["Tokens", "masked_rows", "of_terms"]

_ROWS = 512  # masked patches that pass through iBOT's heads, so that 65536 prototypes take 128 MiB


@dataclass(frozen=True)
class Tokens:
    """What a network made of the G*S global crops of S slices; G is 2 where crops are compared."""

    cls: Tensor  # [G*S, D]
    masked: Tensor  # [M, D], the patches that are hidden from the student


def masked_rows(indices: Tensor) -> Tensor:
    """Every n-th of the masked patches' indices [M], at most _ROWS of them."""
    return indices[:: max(1, math.ceil(len(indices) / _ROWS))]


@torch.no_grad()
def of_terms(method: Trainable, teacher: Tokens, student: Tokens, step: int) -> dict[str, float]:
    """Numbers of each term with prototypes, below its name (a collective, as Sinkhorn is); none for other methods.

    `entropy`, `entropy_of_mean`, `used` (`measures.target_use`) are of the targets as the loss makes them, `plain_*` of
    the teacher's softmax before Sinkhorn evens it out: only there a collapse onto few prototypes can be seen. `uniform`
    is ln K, the most an entropy can be; `kl` the divergence of the student's prediction from the targets.
    """
    if not isinstance(method, SelfDistillation):
        return {}
    found: dict[str, float] = {}
    for name, term in method.terms.items():
        if isinstance(term, Dino):
            asked, seen = teacher.cls, student.cls.roll(len(student.cls) // 2, 0)  # each from the other crop
        elif isinstance(term, Ibot):
            asked, seen = teacher.masked, student.masked
        else:
            continue
        heads: list[nn.Module] = [net[f"{name}_head"] for net in (method.teacher, method.student)]
        logits, guess = heads[0](asked), heads[1](seen)
        temperature = term.settings.teacher_temperature(step)
        targets = sinkhorn(logits, temperature, term.settings.sinkhorn_iterations)
        if not len(targets):
            continue
        plain = (logits.float() / temperature).softmax(1)
        numbers = {
            **target_use(targets),
            **{f"plain_{key}": value for key, value in target_use(plain).items()},
            "uniform": math.log(logits.shape[1]),
            "kl": divergence(targets, guess, term.settings.student_temperature),
        }
        found |= {f"{name}/{key}": value for key, value in numbers.items()}
    return found
