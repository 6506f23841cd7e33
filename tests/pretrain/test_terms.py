"""What must hold for every term: finite, differentiable, weighted, in bf16, and two ranks equal to one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from launch.distributed import world
from launch.settings import plugins
from pretrain.data.batch import Batch
from pretrain.losses import Given, Views, dino, gram, koleo
from pretrain.losses._sinkhorn import sinkhorn
from pretrain.models.heads import HeadSettings
from pretrain.models.vit import Features
from pretrain.schedule import Schedule
from tests.gloo import run_ranks

TERMS = ["dino", "gram", "ibot", "koleo"]
IMAGES, DIM, GRID = 4, 16, 4


def _features(seed: int, crops: int = 2, grid: int = GRID) -> Features:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((DIM,), (2, DIM), (grid**2, DIM))
    return Features(*(torch.randn(crops * IMAGES, *shape, generator=generator).requires_grad_() for shape in shapes))


def _fields(features: Features) -> list[Tensor]:
    return [x.detach() for x in (features.cls, features.registers, features.patches)]


def _interleave(first: Tensor, second: Tensor) -> Tensor:
    """Two ranks' crops as one rank would have them: crop by crop, then rank by rank."""
    return torch.cat([x.unflatten(0, (-1, IMAGES)) for x in (first, second)], dim=1).flatten(0, 1)


def _views(seed: int) -> Views:
    return Views(_features(seed), _features(seed + 10, crops=4))


def _masks(rank: int) -> Tensor:
    masks = torch.zeros(2 * IMAGES, GRID**2, dtype=torch.bool)
    for crop in range(IMAGES + rank):
        masks[crop, : 3 + crop] = True
    return masks


def _batch(ranks: tuple[int, ...]) -> Batch:
    parts = [_masks(rank) for rank in ranks]
    masks = _interleave(*parts) if len(parts) == 2 else parts[0]
    weights = (1 / masks.sum(1).clamp(min=1))[:, None].expand_as(masks)[masks]
    crops = torch.zeros(len(masks), 1, 16 * GRID, 16 * GRID)
    images = len(masks) // 2
    return Batch(
        crops,
        torch.zeros(4 * images, 1, 32, 32),
        None,
        masks,
        masks.flatten().nonzero().flatten(),
        weights,
        ("",) * images,
    )


def _settings(name: str, **more: Any) -> Any:
    settings = plugins("pretrain.losses")[name].Settings(**more)
    fields = type(settings).model_fields
    return settings.model_copy(
        update={"head": HeadSettings(prototypes=24, hidden=12, bottleneck=8)} if "head" in fields else {}
    )


def _term(name: str, group: int | None = None, **more: Any) -> Any:
    more |= {"group": group} if name == "koleo" and group else {}
    torch.manual_seed(0)
    return plugins("pretrain.losses")[name].build(_settings(name, **more), dim=DIM, patch_size=16, steps=100)


def _loss(term: Any, student: Views, teacher: Views, rank: int | tuple[int, ...] = 0, step: int = 0) -> Tensor:
    ranks = rank if isinstance(rank, tuple) else (rank,)
    seen = teacher.globals_ if term.needs_gram else None
    given = Given(step, _batch(ranks), student, teacher, term.head, term.head, seen)
    value: Tensor = term.weight(step) * term.loss(given)
    return value


def test_these_are_the_plug_ins() -> None:
    assert set(plugins("pretrain.losses")) >= set(TERMS)


@pytest.mark.parametrize("name", TERMS)
def test_every_term_is_finite_weighted_and_differentiable_in_the_student_alone(name: str) -> None:
    student, teacher = _views(0), _views(2)
    term = _term(name)
    loss = _loss(term, student, teacher)
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    loss.backward()  # type: ignore[no-untyped-call]
    reached = student.globals_.patches.grad if name in {"gram", "ibot"} else student.globals_.cls.grad
    assert reached is not None
    assert reached.any()
    for features in (teacher.globals_, teacher.locals_):
        assert features is not None
        assert all(getattr(features, field).grad is None for field in ("cls", "patches"))
    if term.head is not None:
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in term.head.parameters())
    twice = _term(name, weight=Schedule(peak=0, end=2 * term.weight(0), cosine=11))
    assert twice.weight(0) == 0 == _loss(twice, student, teacher, step=0)
    torch.testing.assert_close(_loss(twice, student, teacher, step=50), 2 * loss)


@pytest.mark.parametrize("name", TERMS)
def test_every_term_runs_in_bf16(name: str) -> None:
    term, exact = _term(name), _loss(_term(name), _views(0), _views(2))
    half = [
        Views(*(Features(*(x.bfloat16() for x in _fields(f))) for f in (v.globals_, v.locals_) if f))
        for v in (_views(0), _views(2))
    ]
    with torch.autocast("cpu", torch.bfloat16):
        loss = _loss(term, half[0], half[1])
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=2e-2, atol=1e-2)


def test_dino_counts_local_and_global_crops_by_their_pairs() -> None:
    student, teacher = _views(0), _views(2)
    term = _term("dino", local_weight=0.5, teacher_temperature=0.05)
    with torch.no_grad():
        targets = sinkhorn(term.head(teacher.globals_.cls), 0.05).unflatten(0, (2, -1))
        assert student.locals_ is not None
        local = term.head(student.locals_.cls).unflatten(0, (4, -1))
        both = term.head(student.globals_.cls).unflatten(0, (2, -1))
        expected = (
            8 * 0.5 * dino.dino_loss(local, targets, 0.1) + 2 * dino.dino_loss(both, targets, 0.1, ignore_diagonal=True)
        ) / 10
    torch.testing.assert_close(_loss(term, student, teacher).detach(), expected)
    alone = _loss(term, Views(student.globals_), teacher).detach()
    torch.testing.assert_close(alone, dino.dino_loss(both, targets, 0.1, ignore_diagonal=True))


def test_new_heads_start_at_the_logarithm_of_the_prototypes() -> None:
    for name in ("dino", "ibot"):
        loss = _loss(_term(name), _views(0), _views(2))
        masked = 0.5 if name == "ibot" else 1  # half of the crops have no mask, and count
        assert loss.item() == pytest.approx(masked * math.log(24), rel=0.02)


def test_a_batch_without_masks_costs_nothing() -> None:
    batch = _batch((0,))
    empty = torch.zeros(0)
    none = Batch(batch.global_crops, batch.local_crops, None, batch.masks & False, empty.long(), empty, batch.keys)
    term, student = _term("ibot"), _views(0)
    loss = term.loss(Given(0, none, student, _views(2), term.head, term.head))
    loss.backward()
    assert loss == 0
    assert all(parameter.grad is not None for parameter in term.head.parameters())


def test_koleo_seeks_neighbours_within_sets_of_a_group() -> None:
    student = _views(0)
    crops = student.globals_.cls.detach().split(IMAGES)

    def mean_over_sets(images: int) -> Tensor:
        losses = [torch.stack([koleo.koleo_loss(part) for part in crop.split(images)]).mean() for crop in crops]
        return 0.1 * torch.stack(losses).sum()

    assert not torch.allclose(mean_over_sets(2), mean_over_sets(4))
    for group, images in ((2, 2), (3, 4), (4, 4), (99, 4), (None, 4)):
        torch.testing.assert_close(_loss(_term("koleo", group), student, student).detach(), mean_over_sets(images))


def test_gram_takes_a_larger_view_and_asks_for_a_teacher() -> None:
    term, student, batch = _term("gram"), _views(0), _batch((0,))
    large = Batch(
        batch.global_crops,
        batch.local_crops,
        torch.zeros(8, 1, 128, 128),
        *list(batch.tensors().values())[2:],
        batch.keys,
    )
    seen = _features(5, grid=8)
    expected = gram.gram_loss(student.globals_.patches, gram.resize_patches(seen.patches, (8, 8), (4, 4)))
    torch.testing.assert_close(term.loss(Given(0, large, student, student, gram=seen)), expected)
    with pytest.raises(ValueError, match="no Gram teacher"):
        term.loss(Given(0, batch, student, student))


@pytest.mark.parametrize("tokens", ["masked", "unmasked"])
def test_gram_takes_only_the_patches_asked_for(tokens: str) -> None:
    batch, student, seen = _batch((0,)), _views(0), _features(5)
    term = _term("gram", tokens=tokens, within_image=False)
    chosen = batch.masks if tokens == "masked" else ~batch.masks
    expected = gram.gram_loss(student.globals_.patches[chosen][None], seen.patches[chosen][None])
    torch.testing.assert_close(term.loss(Given(0, batch, student, student, gram=seen)), expected)
    none = Batch(*list(batch.tensors().values())[:2], None, ~chosen & chosen, *[torch.zeros(0).long()] * 2, batch.keys)
    if tokens == "masked":
        assert term.loss(Given(0, none, student, student, gram=seen)) == 0
    with pytest.raises(ValueError, match="set within_image: false"):
        _term("gram", tokens=tokens)


# A rank holds 4 images: groups of 8 join both, groups of 2 split each.
GROUPED = [*((name, 8) for name in TERMS), ("koleo", 4), ("koleo", 2)]


def two_ranks(rank: int, size: int) -> dict[tuple[str, int], Tensor]:
    """The loss of each term on rank ``rank``'s half of the batch."""
    with world("cpu"):
        return {
            (name, group): _loss(_term(name, group), _views(rank), _views(rank + 2), rank).detach()
            for name, group in GROUPED
        }


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    results = run_ranks(f"{__file__}:two_ranks", 2, tmp_path)

    def whole(*views: Views) -> Views:
        pairs = [[view.globals_ for view in views], [view.locals_ for view in views if view.locals_]]
        return Views(*(Features(*map(_interleave, *(_fields(half) for half in pair))) for pair in pairs))

    for name, group in GROUPED:
        one = _loss(_term(name, group), whole(_views(0), _views(1)), whole(_views(2), _views(3)), (0, 1))
        both = (results[0][name, group] + results[1][name, group]) / 2
        torch.testing.assert_close(both, one.detach(), rtol=1e-5, atol=1e-6)
