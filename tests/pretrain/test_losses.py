"""The arithmetic of the losses: official numbers on one and two ranks, and the ends of the range of floats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from launch.distributed import world
from pretrain.losses import dino, gram, ibot, koleo
from pretrain.losses._cross_entropy import soft_cross_entropy
from pretrain.losses._sinkhorn import sinkhorn
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


def test_cross_entropy_is_the_same_under_autocast() -> None:
    logits, targets = _random(4, 1000) * 3, _random(4, 1000, seed=1).softmax(-1)
    with torch.autocast("cpu", torch.bfloat16):
        under = soft_cross_entropy(logits, targets, 0.1)
    torch.testing.assert_close(under, soft_cross_entropy(logits, targets, 0.1), rtol=1e-5, atol=0)


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
    ("group", "images", "size"),
    [(16, 256, 16), (16, 40, 20), (16, 16, 16), (16, 8, 8), (3, 4, 4), (5, 7, 7), (2, 6, 2)],
)
def test_koleo_sets_of_a_rank_are_equal_and_the_smallest(group: int, images: int, size: int) -> None:
    assert koleo.set_size(group, images) == size


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
