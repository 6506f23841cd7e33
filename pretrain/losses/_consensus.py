"""What several teachers agree on, token by token, and how far a student is from it (Mandalika and Lalitha 2025, CoMAD).

Here M teachers' tokens lie in one space and on one grid: [M, B, N, D]. ``valid`` [M, B, N] says which of them a teacher
has seen. Everything is computed in float32 (float64 stays) whatever autocast says, and nothing here waits for a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Consensus", "channel_kl", "consensus", "figures", "mean_over_images", "position_kl"]

_EPS = 1e-6
_LEFT_OUT = -1e30  # a logit whose share is exactly 0, yet finite, so that a row of nothing else has shares too


@dataclass(frozen=True)
class Consensus:
    """The teachers' tokens fused into one target."""

    weights: Tensor  # [M, B, N], detached; 0 where not valid, else they sum to 1 over the teachers
    target: Tensor  # [B, N, D], differentiable in the teachers; 0 where not known
    known: Tensor  # bool [B, N]: at least one teacher is valid
    valid: Tensor  # bool [M, B, N], as given
    cosines: Tensor  # [M, M, B, N], detached: of each two teachers' tokens; 0 where not both are valid, and with itself


def consensus(
    student: Tensor,
    teachers: Tensor,
    valid: Tensor,
    *,
    affinity: float,
    agreement: float,
    temperature: float,
    floor: Tensor | None = None,
) -> Consensus:
    """The target of each token: the mean of the valid teachers, weighted by a gate that has no parameters.

    The gate is a softmax over the valid teachers of (affinity * s + agreement * c) / temperature, where s is the cosine
    of the teacher's token with the student's [B, N, D], and c its mean cosine with the other valid teachers' (0 where
    there is none; equal for two, so that it then changes nothing). No gradient passes through the gate.

    ``floor`` [M] is the least weight of each teacher where it is valid; its sum must be at most 1. Tokens without a
    valid teacher have weights 0 and a target of 0, and give no gradient, whatever numbers stand there.
    """
    assert temperature > 0, temperature
    exact = torch.promote_types(teachers.dtype, torch.float32)
    with torch.autocast(teachers.device.type, enabled=False):
        with torch.no_grad():
            units = [F.normalize(tokens.to(exact), dim=-1, eps=_EPS) for tokens in teachers]
            cosines = _cosines(units, valid)
            score = affinity * _affinity(student.to(exact), units) + agreement * _agreement(cosines, valid)
            weights = (score / temperature).masked_fill(~valid, -torch.inf).softmax(0)
            weights = weights.masked_fill(~valid, 0)
            if floor is not None:
                least = floor.to(weights)[:, None, None] * valid
                weights = (1 - least.sum(0)) * weights + least
        target = torch.zeros_like(teachers[0], dtype=exact)
        for tokens, weight, seen in zip(teachers, weights, valid, strict=True):
            # Chosen, not only multiplied by 0: what a teacher has not seen may be no number.
            target = target + weight[..., None] * tokens.to(exact).masked_fill(~seen[..., None], 0)
    return Consensus(weights, target, valid.any(0), valid, cosines)


def _affinity(student: Tensor, units: Sequence[Tensor]) -> Tensor:
    own = F.normalize(student, dim=-1, eps=_EPS)
    return torch.stack([(own * unit).sum(-1) for unit in units])


def _cosines(units: Sequence[Tensor], valid: Tensor) -> Tensor:
    """Pair by pair: nothing larger than one teacher's tokens lies in memory, and both of a pair get the same number."""
    found = units[0].new_zeros(len(units), *valid.shape)
    for m, k in combinations(range(len(units)), 2):
        cosine = (units[m] * units[k]).sum(-1).masked_fill(~(valid[m] & valid[k]), 0)
        found[m, k] = cosine
        found[k, m] = cosine
    return found


def _agreement(cosines: Tensor, valid: Tensor) -> Tensor:
    """Mean cosine of each teacher with the other valid ones: [M, B, N]."""
    others = valid.sum(0) - valid.to(torch.int64)
    return cosines.sum(1) / others.clamp(min=1)


@torch.no_grad()
def figures(fused: Consensus, names: Sequence[str]) -> dict[str, Tensor]:
    """What is worth watching of a batch, as 0-dim tensors, for teachers of these names.

    - ``weight/A``: mean weight of a teacher over the known tokens
    - ``entropy``: of the gate, over the logarithm of the number of valid teachers, mean over the tokens that have at
      least two; 1: the gate averages, 0: it picks one
    - ``cosine/A-B``: mean over the tokens where both are valid
    - ``target_std``: root of the variance of the target over the batch's known tokens (mean over channels) over its
      mean square; 1: tokens differ fully, 0: all are alike, as when trained adapters have collapsed

    A mean over no token is 0.
    """
    assert len(names) == len(fused.weights), (names, fused.weights.shape)
    weights, valid = fused.weights, fused.valid
    found = {f"weight/{name}": _mean(w, fused.known) for name, w in zip(names, weights, strict=True)}
    count = valid.sum(0)
    entropy = torch.special.entr(weights).sum(0) / count.clamp(min=2).to(weights).log()
    found["entropy"] = _mean(entropy, count > 1)
    for (m, a), (k, b) in combinations(enumerate(names), 2):
        found[f"cosine/{a}-{b}"] = _mean(fused.cosines[m, k], valid[m] & valid[k])
    target = fused.target.detach()
    tokens = fused.known.sum().clamp(min=1)
    apart = _mean((target - target.sum((0, 1)) / tokens).square().mean(-1), fused.known)
    square = _mean(target.square().mean(-1), fused.known)
    found["target_std"] = (apart / square.clamp(min=torch.finfo(square.dtype).tiny)).sqrt()
    return found


def _mean(values: Tensor, counted: Tensor) -> Tensor:
    return values.masked_fill(~counted, 0).sum() / counted.sum().clamp(min=1)


def channel_kl(student: Tensor, target: Tensor, temperature: float) -> Tensor:
    """KL(softmax(target / T) || softmax(student / T)) * T² over the channels: [..., D] twice to [...].

    Differentiable in both. T² keeps the size of the gradient when the temperature changes (Hinton et al. 2015).
    """
    return _kl(_scaled(student, target, temperature), -1) * temperature**2


def position_kl(student: Tensor, target: Tensor, known: Tensor, temperature: float) -> Tensor:
    """The same over the known positions of each image, one number a channel: [B, N, D] twice and [B, N] to [B, D].

    Channel-wise distillation (Shu et al. 2021). 0, without a gradient, for an image of which nothing is known.
    """
    out = ~known[..., None]
    ours, theirs = (x.masked_fill(out, _LEFT_OUT) for x in _scaled(student, target, temperature))
    return _kl((ours, theirs), 1) * temperature**2


def _scaled(student: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    assert temperature > 0, temperature
    exact = torch.promote_types(torch.promote_types(student.dtype, target.dtype), torch.float32)
    return student.to(exact) / temperature, target.to(exact) / temperature


def _kl(logits: tuple[Tensor, Tensor], dim: int) -> Tensor:
    with torch.autocast(logits[0].device.type, enabled=False):
        ours, theirs = (x.log_softmax(dim) for x in logits)
        return (theirs.exp() * (theirs - ours)).sum(dim)


def mean_over_images(values: Tensor, counted: Tensor) -> Tensor:
    """Mean of ``values`` [B, N] over the counted tokens of each image, then over the images: one number.

    An image counts alike whatever the number of its tokens, so that the mean of the losses of equal parts of a batch,
    or of ranks, is that of the whole. An image without a counted token is 0.
    """
    own = values.masked_fill(~counted, 0).sum(1) / counted.sum(1).clamp(min=1)
    return own.mean()
