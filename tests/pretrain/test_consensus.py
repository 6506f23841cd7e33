"""The gate over several teachers and the divergences from its target."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pretrain.losses._consensus import channel_kl, consensus, figures, mean_over_images, position_kl

PAPER: dict[str, Any] = {"affinity": 1.0, "agreement": 1.0, "temperature": 0.1}
B, N, D = 3, 7, 12


def drawn(teachers: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Student [B, N, D], teachers [M, B, N, D], valid [M, B, N] with all numbers of valid teachers."""
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(B, N, D, generator=generator, dtype=dtype)
    own = torch.randn(teachers, B, N, D, generator=generator, dtype=dtype) + 0.5 * student
    valid = torch.rand(teachers, B, N, generator=generator) < 0.6
    valid[:, 0, 0], valid[:, 0, 1] = True, False
    return student, own, valid


def by_loops(
    student: Tensor, teachers: Tensor, valid: Tensor, affinity: float, agreement: float, temperature: float
) -> tuple[Tensor, Tensor]:
    """The equations token by token: weights [M, B, N] and target [B, N, D]."""
    weights, target = torch.zeros(valid.shape, dtype=torch.float64), torch.zeros_like(student)
    for b in range(student.shape[0]):
        for n in range(student.shape[1]):
            seen = [m for m in range(len(teachers)) if valid[m, b, n]]
            scores = []
            for m in seen:
                z = teachers[m, b, n]
                s = float(z @ student[b, n] / (z.norm() * student[b, n].norm()))
                others = [teachers[k, b, n] for k in seen if k != m]
                c = sum(float(z @ y / (z.norm() * y.norm())) for y in others) / max(1, len(others))
                scores.append(math.exp((affinity * s + agreement * c) / temperature))
            for m, score in zip(seen, scores, strict=True):
                weights[m, b, n] = score / sum(scores)
                target[b, n] += weights[m, b, n] * teachers[m, b, n]
    return weights, target


@pytest.mark.parametrize("teachers", [1, 2, 3, 5])
@pytest.mark.parametrize("gate", [(1.0, 1.0, 0.1), (0.3, 2.0, 0.5)])
def test_the_equations(teachers: int, gate: tuple[float, float, float]) -> None:
    student, own, valid = drawn(teachers)
    fused = consensus(student, own, valid, affinity=gate[0], agreement=gate[1], temperature=gate[2])
    weights, target = by_loops(student, own, valid, *gate)
    torch.testing.assert_close(fused.weights, weights, rtol=0, atol=1e-12)
    torch.testing.assert_close(fused.target, target, rtol=0, atol=1e-12)
    assert torch.equal(fused.known, valid.any(0))
    single = consensus(
        *(x.float() for x in (student, own)), valid, affinity=gate[0], agreement=gate[1], temperature=gate[2]
    )
    assert single.target.dtype == single.weights.dtype == torch.float32
    torch.testing.assert_close(single.target.double(), target, rtol=0, atol=2e-5)


@given(
    st.integers(1, 5),
    st.integers(0, 10_000),
    st.floats(0, 3),
    st.floats(0, 3),
    st.floats(0.01, 10),
    st.one_of(st.none(), st.floats(0, 1)),
)
@settings(max_examples=60, deadline=None)
def test_weights_are_shares_of_the_valid(
    teachers: int, seed: int, affinity: float, agreement: float, temperature: float, least: float | None
) -> None:
    student, own, valid = drawn(teachers, seed, torch.float32)
    floor = None if least is None else torch.full((teachers,), least / teachers)
    gate: dict[str, Any] = {"affinity": affinity, "agreement": agreement, "temperature": temperature, "floor": floor}
    fused = consensus(student, own, valid, **gate)
    torch.testing.assert_close(fused.weights.sum(0), fused.known.float())
    assert (fused.weights >= 0).all() and (fused.weights[~valid] == 0).all()
    if floor is not None:
        assert (fused.weights >= floor[:, None, None] * valid - 1e-6).all()
    order = torch.randperm(teachers, generator=torch.Generator().manual_seed(seed))
    turned = consensus(student, own[order], valid[order], **gate)
    torch.testing.assert_close(turned.weights, fused.weights[order], rtol=0, atol=1e-4)
    torch.testing.assert_close(turned.target, fused.target, rtol=0, atol=1e-4)
    scaled = consensus(3 * student, own * torch.arange(1.0, teachers + 1)[:, None, None, None], valid, **gate)
    torch.testing.assert_close(scaled.weights, fused.weights, rtol=0, atol=1e-3)


def test_equal_teachers_count_alike() -> None:
    student, own, _ = drawn(1)
    everywhere = torch.ones(4, B, N, dtype=torch.bool)
    fused = consensus(student, own.expand(4, -1, -1, -1), everywhere, **PAPER)
    torch.testing.assert_close(fused.weights, torch.full_like(fused.weights, 0.25))
    torch.testing.assert_close(fused.target, own[0])


def test_the_outlier_counts_least() -> None:
    """Teachers that are equally near to the student: two that agree, and one on the other side."""
    student = torch.zeros(1, 1, 3)
    student[..., 0] = 1
    angles = torch.tensor([0.0, 0.4, math.pi])
    own = torch.stack([torch.ones(3), angles.cos(), angles.sin()], dim=1).view(3, 1, 1, 3)
    everywhere = torch.ones(3, 1, 1, dtype=torch.bool)
    weights = consensus(student, own, everywhere, **PAPER).weights.flatten()
    assert weights[2] < 0.01 and weights[:2].min() > 0.4
    alike = consensus(student, own, everywhere, affinity=1, agreement=0, temperature=0.1).weights.flatten()
    torch.testing.assert_close(alike, torch.full((3,), 1 / 3))


@pytest.mark.parametrize("teachers", [1, 2])
def test_agreement_changes_nothing_for_two(teachers: int) -> None:
    student, own, valid = drawn(teachers)
    with_, without = (
        consensus(student, own, valid, affinity=1, agreement=weight, temperature=0.1) for weight in (5, 0)
    )
    torch.testing.assert_close(with_.weights, without.weights, rtol=0, atol=1e-12)


def test_the_floor_of_teachers_that_see_goes_to_them_alone() -> None:
    student, own, valid = drawn(3)
    floor = torch.tensor([0.2, 0.0, 0.5], dtype=torch.float64)
    plain, fused = consensus(student, own, valid, **PAPER), consensus(student, own, valid, **PAPER, floor=floor)
    for b in range(B):
        for n in range(N):
            least = floor * valid[:, b, n]
            expected = (1 - least.sum()) * plain.weights[:, b, n] + least
            torch.testing.assert_close(
                fused.weights[:, b, n], expected if fused.known[b, n] else torch.zeros(3).double()
            )


@pytest.mark.parametrize("unseen", [0.0, math.nan, math.inf])
def test_what_nobody_has_seen_gives_neither_numbers_nor_gradients(unseen: float) -> None:
    student, own, valid = drawn(3)
    own[~valid] = unseen
    student.requires_grad_()
    own.requires_grad_()
    fused = consensus(student, own, valid, **PAPER)
    assert not fused.weights.requires_grad
    assert (fused.target[~fused.known] == 0).all() and torch.isfinite(fused.target).all()
    losses = channel_kl(student, fused.target, 1.0)
    (mean_over_images(losses, fused.known) + position_kl(student, fused.target, fused.known, 1.0).mean()).backward()
    assert student.grad is not None and own.grad is not None
    assert torch.isfinite(student.grad).all() and torch.isfinite(own.grad).all()
    assert (student.grad[~fused.known] == 0).all() and (own.grad[~valid] == 0).all()
    assert (student.grad[fused.known] != 0).any() and (own.grad[valid] != 0).any()
    assert all(torch.isfinite(value) for value in figures(fused, ["a", "b", "c"]).values())


def test_nothing_known_at_all() -> None:
    student, own, valid = drawn(2)
    fused = consensus(student.requires_grad_(), own, torch.zeros_like(valid), **PAPER)
    loss = mean_over_images(channel_kl(student, fused.target, 1.0), fused.known)
    loss = loss + position_kl(student, fused.target, fused.known, 1.0).mean()
    loss.backward()
    assert loss == 0 and student.grad is not None and (student.grad == 0).all()
    assert all(value == 0 for value in figures(fused, ["a", "b"]).values())


def test_no_gradient_passes_the_gate() -> None:
    """The target's gradient is that of fixed weights; the student's is none."""
    student, own, valid = drawn(3)
    student.requires_grad_()
    own.requires_grad_()
    fused = consensus(student, own, valid, **PAPER)
    out = torch.randn(fused.target.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad((fused.target * out).sum(), own)
    torch.testing.assert_close(gradient, fused.weights[..., None] * out)
    fused = consensus(student, own.detach(), valid, **PAPER)
    assert not fused.target.requires_grad

    def target(teachers: Tensor) -> Tensor:
        """With a gate that is constant, and only then, finite differences know nothing that the gradient leaves out."""
        return consensus(student, teachers, valid, affinity=0, agreement=0, temperature=1, floor=floor).target

    floor = torch.tensor([0.1, 0.0, 0.6], dtype=torch.float64)
    assert torch.autograd.gradcheck(target, (own,))


def test_autocast_does_not_round() -> None:
    student, own, valid = drawn(3, dtype=torch.float32)
    plain = consensus(student, own, valid, **PAPER)
    with torch.autocast("cpu", torch.bfloat16):
        cast = consensus(student, own, valid, **PAPER)
        loss = channel_kl(student, cast.target, 1.0)
    assert torch.equal(cast.weights, plain.weights) and torch.equal(cast.target, plain.target)
    assert torch.equal(loss, channel_kl(student, plain.target, 1.0))
    coarse = consensus(student.bfloat16(), own.bfloat16(), valid, **PAPER)
    assert coarse.target.dtype == torch.float32 == channel_kl(student.bfloat16(), coarse.target, 1.0).dtype


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_divergences_are_those_of_the_book(temperature: float) -> None:
    student, own, valid = drawn(1)
    target, known = own[0], valid[0]
    p, q = (target / temperature).softmax(-1), (student / temperature).softmax(-1)
    expected = (p * (p / q).log()).sum(-1) * temperature**2
    torch.testing.assert_close(channel_kl(student, target, temperature), expected)
    found = position_kl(student, target, known, temperature)
    for b in range(B):
        p, q = ((x[b, known[b]] / temperature).softmax(0) for x in (target, student))
        torch.testing.assert_close(found[b], (p * (p / q).log()).sum(0) * temperature**2)


def test_slopes_of_the_divergences() -> None:
    student, own, valid = drawn(1)
    pair = (student[:2, :4, :5].clone().requires_grad_(), own[0, :2, :4, :5].clone().requires_grad_())
    known = valid[0, :2, :4]
    assert torch.autograd.gradcheck(lambda s, t: channel_kl(s, t, 0.7), pair)
    assert torch.autograd.gradcheck(lambda s, t: position_kl(s, t, known, 0.7), pair)


@given(st.integers(0, 10_000), st.floats(-20, 20), st.floats(0.5, 5))
@settings(max_examples=40, deadline=None)
def test_a_divergence_is_zero_only_up_to_a_constant(seed: int, constant: float, temperature: float) -> None:
    student, own, valid = drawn(1, seed)
    target = own[0]
    assert channel_kl(target + constant, target, temperature).abs().max() < 1e-10
    assert position_kl(target + constant, target, valid[0], temperature).abs().max() < 1e-10
    assert (channel_kl(student, target, temperature) > 0).all()
    other = target.clone()
    other[..., 0] += 0.1
    assert (channel_kl(other, target, temperature) > 1e-14).all()


def test_figures_by_loops() -> None:
    student, own, valid = drawn(3)
    names = ["mae", "moco", "ibot"]
    fused = consensus(student, own, valid, **PAPER)
    found = figures(fused, names)
    pairs = [f"cosine/{a}-{b}" for a, b in combinations(names, 2)]
    assert list(found) == [*(f"weight/{name}" for name in names), "entropy", *pairs, "target_std"]
    for m, name in enumerate(names):
        torch.testing.assert_close(found[f"weight/{name}"], fused.weights[m][fused.known].mean())
    several = valid.sum(0) > 1
    shares = fused.weights[:, several]
    entropy = -(shares * shares.clamp(min=1e-300).log()).sum(0) / valid.sum(0)[several].double().log()
    torch.testing.assert_close(found["entropy"], entropy.mean())
    for (m, _), (k, _) in combinations(enumerate(names), 2):
        both = valid[m] & valid[k]
        expected = F.cosine_similarity(own[m][both], own[k][both], dim=-1).mean()
        torch.testing.assert_close(found[f"cosine/{names[m]}-{names[k]}"], expected)
    rows = fused.target[fused.known]
    torch.testing.assert_close(found["target_std"], (rows.var(0, correction=0).mean() / rows.square().mean()).sqrt())


def test_target_std_tells_a_collapse() -> None:
    student, own, _ = drawn(3)
    everywhere = torch.ones(3, B, N, dtype=torch.bool)
    alike = own[:, :1, :1].expand_as(own)
    assert (
        figures(consensus(student, alike, everywhere, affinity=0, agreement=1, temperature=1), "abc")["target_std"]
        < 1e-6
    )
    apart = torch.randn(3, 50, 40, D, generator=torch.Generator().manual_seed(0))
    fused = consensus(apart[0], apart, torch.ones(3, 50, 40, dtype=torch.bool), **PAPER)
    assert figures(fused, "abc")["target_std"] > 0.99


def test_images_count_alike() -> None:
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, math.nan, math.nan], [math.nan] * 3])
    counted = torch.tensor([[True, True, False], [True, False, False], [False] * 3])
    values.requires_grad_()
    whole = mean_over_images(values, counted)
    torch.testing.assert_close(whole, torch.tensor((1.5 + 4 + 0) / 3))
    whole.backward()
    expected = torch.tensor([[1 / 6, 1 / 6, 0], [1 / 3, 0, 0], [0, 0, 0]])
    torch.testing.assert_close(values.grad, expected)
    student, own, valid = drawn(1)
    losses = channel_kl(student, own[0], 1.0)
    parts = torch.stack([mean_over_images(losses[b : b + 1], valid[0, b : b + 1]) for b in range(B)])
    torch.testing.assert_close(parts.mean(), mean_over_images(losses, valid[0]))
