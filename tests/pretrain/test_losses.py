"""The losses: official numbers on one and two ranks, and what must hold for every term."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from launch.distributed import world
from launch.settings import plugins
from pretrain.data.batch import Batch
from pretrain.losses import Views
from pretrain.losses import dino, gram, ibot, koleo
from pretrain.losses._cross_entropy import soft_cross_entropy
from pretrain.losses._sinkhorn import sinkhorn
from pretrain.models.heads import HeadSettings
from pretrain.models.vit import Features
from pretrain.schedule import Schedule
from tests.gloo import run_ranks

FILE = Path(__file__).resolve().parent.parent / "golden" / "losses.npz"


def _golden() -> dict[str, Tensor]:
    with np.load(FILE) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


GOLDEN = _golden()
RANK0 = "ws1.rank0."


def _close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    assert ours.shape == theirs.shape
    worst = (ours.detach() - theirs).abs().max() / theirs.abs().max()
    assert worst <= tolerance, f"{worst:.2e}"


def _check(loss: Any, inputs: str, key: str) -> None:
    x = GOLDEN[inputs].clone().requires_grad_()
    value = loss(x)
    _close(value, GOLDEN[f"{key}.loss"])
    if f"{key}.grad" in GOLDEN:
        value.backward()
        assert x.grad is not None
        _close(x.grad, GOLDEN[f"{key}.grad"])


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ------------------------------------------------------------------------------------------------------------ arithmetic


@pytest.mark.parametrize(
    ("logits", "temperature", "iterations", "key"),
    [
        ("teacher_logits", 0.07, 3, "dino_sk.temp0.07"),
        ("teacher_logits", 0.07, 1, "dino_sk.temp0.07.n1"),
        ("patch_logits", 0.05, 3, "ibot_sk.temp0.05"),
    ],
)
def test_sinkhorn_is_official(logits: str, temperature: float, iterations: int, key: str) -> None:
    _close(sinkhorn(GOLDEN[RANK0 + logits], temperature, iterations), GOLDEN[RANK0 + key])


def _sinkhorn_by_hand(logits: Tensor, temperature: float) -> Tensor:
    q = (logits.double() / temperature).exp()
    q /= q.sum()
    for _ in range(3):
        q /= q.sum(0) * q.shape[1]
        q /= q.sum(1, keepdim=True) * q.shape[0]
    return q * q.shape[0]


def test_sinkhorn_survives_what_overflows_an_exponential() -> None:
    logits = _random(10, 40)
    torch.testing.assert_close(sinkhorn(logits, 0.1).double(), _sinkhorn_by_hand(logits, 0.1), rtol=1e-4, atol=1e-7)
    logits[3] += 30  # / 0.04 = 750: exp overflows also in float64's neighbourhood of float32
    logits[4] -= 30
    logits[:, 5] -= 20
    q = sinkhorn(logits, 0.04)
    assert q.isfinite().all()
    torch.testing.assert_close(q.sum(1), torch.ones(10))
    torch.testing.assert_close(sinkhorn(logits + 1000, 0.04), q, rtol=1e-2, atol=1e-3)
    assert sinkhorn(logits.bfloat16(), 0.04).dtype == torch.float32
    assert sinkhorn(logits[:0], 0.04).shape == (0, 40)


def test_cross_entropy_equals_the_plain_one_also_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    targets = _random(5, 33, seed=1, dtype=torch.float64).softmax(-1) * 1.7
    logits = _random(3, 5, 33, dtype=torch.float64).requires_grad_()
    plain = -(targets * (logits / 0.1).log_softmax(-1)).sum(-1)
    (expected,) = torch.autograd.grad((plain * plain.detach()).sum(), logits)
    for piece in (1 << 22, 70, 1):
        monkeypatch.setattr("pretrain.losses._cross_entropy._CHUNK", piece)
        ours = soft_cross_entropy(logits, targets, 0.1)
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-12)
        (gradient,) = torch.autograd.grad((ours * ours.detach()).sum(), logits)
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-11)
    assert soft_cross_entropy(logits[:, :0], targets[:0], 0.1).shape == (3, 0)


def test_cross_entropy_computes_half_precision_logits_in_float32() -> None:
    logits, targets = _random(4, 1000).bfloat16().requires_grad_(), _random(4, 1000, seed=1).softmax(-1)
    losses = soft_cross_entropy(logits, targets, 0.1)
    exact = -(targets * (logits.detach().double() / 0.1).log_softmax(-1)).sum(-1)
    torch.testing.assert_close(losses.double(), exact, rtol=1e-6, atol=0)
    losses.sum().backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert logits.grad.dtype == torch.bfloat16


def test_dino_is_official() -> None:
    targets = GOLDEN[RANK0 + "dino.teacher_probs"]
    _check(lambda x: dino.dino_loss(x, targets, 0.1), RANK0 + "dino_local.student_logits", RANK0 + "dino_local")
    for ignore in (True, False):
        _check(
            lambda x, ignore=ignore: dino.dino_loss(x, targets, 0.1, ignore_diagonal=ignore),
            RANK0 + "dino_global.student_logits",
            RANK0 + f"dino_global.ignore_diag_{ignore}",
        )


def test_ibot_is_official() -> None:
    targets, weights = GOLDEN[RANK0 + "ibot.teacher_probs"], GOLDEN[RANK0 + "ibot.masks_weight"]
    crops = len(GOLDEN[RANK0 + "ibot.masks"])
    _check(lambda x: ibot.ibot_loss(x, targets, weights, crops, 0.1), RANK0 + "ibot.student_logits", RANK0 + "ibot")


def test_koleo_is_official() -> None:
    _check(koleo.koleo_loss, RANK0 + "koleo.x", RANK0 + "koleo")
    _check(lambda x: koleo.koleo_loss(x, neighbours=2), RANK0 + "koleo.x", RANK0 + "koleo_dist.topk2.groupNone")


def test_koleo_is_exact_in_bf16_and_safe_where_nothing_is_near() -> None:
    x = GOLDEN[RANK0 + "koleo.x"].bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(koleo.koleo_loss(x), koleo.koleo_loss(x.float()))
    alone = _random(1, 8).requires_grad_()
    loss = koleo.koleo_loss(alone)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss == 0
    assert alone.grad is not None
    assert not alone.grad.any()
    twins = _random(1, 8).repeat(3, 1).requires_grad_()
    koleo.koleo_loss(twins).backward()  # type: ignore[no-untyped-call]
    assert twins.grad is not None
    assert twins.grad.isfinite().all()
    assert koleo.koleo_loss(_random(2, 8), neighbours=5).isfinite()


@pytest.mark.parametrize(
    ("group", "images", "size", "ranks"),
    [(16, 8, 64, 2), (16, 8, 1, 1), (16, 16, 4, 1), (16, 5, 4, 4), (16, 5, 6, 6), (4, 2, 6, 2), (99, 1, 8, 8)],
)
def test_koleo_groups_always_divide_the_ranks(group: int, images: int, size: int, ranks: int) -> None:
    assert koleo.ranks_of_group(group, images, size) == ranks


@pytest.mark.parametrize(
    ("key", "options"),
    [
        ("norm_img", {}),
        ("norm_batch", {"within_image": False}),
        ("norm_img_removeneg", {"negatives": "drop"}),
        ("norm_img_removeteacherneg", {"negatives": "drop_teacher"}),
        ("nonorm_img", {"normalized": False}),
    ],
)
def test_gram_is_official(key: str, options: dict[str, Any]) -> None:
    _check(
        lambda x: gram.gram_loss(x, GOLDEN["gram.small.teacher"], **options), "gram.small.student", f"gram.small.{key}"
    )


def test_gram_resize_is_official(reference: Path) -> None:
    _close(gram.resize_patches(GOLDEN["gram_resize.x"], (12, 12), (6, 6)), GOLDEN["gram_resize.antialias_False"])
    with np.load(reference / "losses.npz") as file:
        smooth = torch.from_numpy(file["gram_resize.antialias_True"])
    _close(gram.resize_patches(GOLDEN["gram_resize.x"], (12, 12), (6, 6), antialias=True), smooth)


# ------------------------------------------------------------------------------------------------------------- two ranks


def two_ranks(rank: int, size: int) -> dict[str, Tensor]:
    """What rank ``rank`` computes from its part of the official inputs."""
    mine = {
        name.removeprefix(f"ws2.rank{rank}."): v for name, v in GOLDEN.items() if name.startswith(f"ws2.rank{rank}.")
    }
    found = {}
    with world("cpu"):
        found["dino_sk.temp0.07"] = sinkhorn(mine["teacher_logits"], 0.07)
        found["ibot_sk.temp0.05"] = sinkhorn(mine["patch_logits"], 0.05)
        found["uneven"] = sinkhorn(mine["patch_logits"][: rank * 3], 0.05)
        for neighbours in (1, 2):
            for group in ("None", "16"):
                x = mine["koleo.x"].clone().requires_grad_()
                ranks = koleo.ranks_of_group(99 if group == "None" else 16, len(x), size)
                loss = koleo.koleo_loss(x, *koleo.gather_group(x, ranks), neighbours)
                loss.backward()  # type: ignore[no-untyped-call]
                assert x.grad is not None
                key = f"koleo_dist.topk{neighbours}.group{group}"
                found |= {f"{key}.loss": loss.detach(), f"{key}.grad": x.grad}
        terms = {name: _term(name, group=8) for name in ("dino", "ibot", "koleo", "gram")}
        found |= {f"term.{name}": _loss(terms[name], _views(rank), _views(rank + 2), rank) for name in terms}
    return found


def test_two_ranks_are_official(tmp_path: Path) -> None:
    results = run_ranks(f"{__file__}:two_ranks", 2, tmp_path)
    compared = 0
    for rank, found in enumerate(results):
        for name, value in found.items():
            if f"ws2.rank{rank}.{name}" in GOLDEN:
                _close(value, GOLDEN[f"ws2.rank{rank}.{name}"])
                compared += 1
    assert compared >= 2 * 8
    # A rank without masked patches takes part all the same.
    assert results[0]["uneven"].shape == (0, 96)
    _close(results[1]["uneven"], sinkhorn(GOLDEN["ws2.rank1.patch_logits"][:3], 0.05))
    # What two ranks compute is, on average, what one rank does with both halves of the batch.
    whole = [Features(*(_interleave(*parts) for parts in zip(*(_fields(_features(r)) for r in pair), strict=True)))
             for pair in ((0, 1), (2, 3))]  # fmt: skip
    local = Features(*(torch.cat(p) for p in zip(*(_fields(_features(r + 10, crops=4)) for r in (0, 1)), strict=True)))
    locals_ = Features(
        *(
            _interleave(*(x.unflatten(0, (4, -1)) for x in p))
            for p in zip(*(_fields(_features(r + 10, crops=4)) for r in (0, 1)), strict=True)
        )
    )
    assert local.cls.shape == locals_.cls.shape
    for name in ("dino", "ibot", "koleo", "gram"):
        one = _loss(_term(name, group=8), Views(whole[0], locals_), Views(whole[1]), (0, 1))
        both = sum(found[f"term.{name}"] for found in results) / 2
        torch.testing.assert_close(both, one, rtol=1e-5, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------------- terms

IMAGES, DIM, GRID = 4, 16, 4


def _features(seed: int, crops: int = 2, grid: int = GRID) -> Features:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((DIM,), (2, DIM), (grid**2, DIM), (3 + grid**2, DIM))
    return Features(*(torch.randn(crops * IMAGES, *shape, generator=generator).requires_grad_() for shape in shapes))


def _fields(features: Features) -> list[Tensor]:
    return [x.detach() for x in (features.cls, features.registers, features.patches, features.prenorm)]


def _interleave(first: Tensor, second: Tensor) -> Tensor:
    """Two ranks' crops as one rank would have them: crop by crop, then rank by rank."""
    if first.shape[0] == 2 * IMAGES:
        first, second = (x.unflatten(0, (2, IMAGES)) for x in (first, second))
    return torch.cat([first, second], dim=1).flatten(0, 1)


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
    value = term.loss(student, teacher, term.head, term.head, _batch(ranks), step, seen)
    return value.detach() if not value.requires_grad else value


def test_these_are_the_plug_ins() -> None:
    assert set(plugins("pretrain.losses")) >= {"dino", "gram", "ibot", "koleo"}


@pytest.mark.parametrize("name", ["dino", "gram", "ibot", "koleo"])
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


@pytest.mark.parametrize("name", ["dino", "gram", "ibot", "koleo"])
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
    loss = term.loss(student, _views(2), term.head, term.head, none, 0, None)
    loss.backward()
    assert loss == 0
    assert all(parameter.grad is not None for parameter in term.head.parameters())


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
    torch.testing.assert_close(term.loss(student, student, None, None, large, 0, seen), expected)
    with pytest.raises(ValueError, match="no Gram teacher"):
        term.loss(student, student, None, None, batch, 0, None)
