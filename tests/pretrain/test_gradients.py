"""Gradients in double precision against finite differences: of every term, through heads and backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from launch.distributed import world
from pretrain.data.batch import Batch
from pretrain.loop import Guard
from pretrain.losses import koleo
from pretrain.losses._cross_entropy import soft_cross_entropy
from pretrain.train import build_method
from tests.gloo import run_ranks
from tests.golden import trajectory
from tests.golden.trajectory import VARIANTS, Golden
from tests.pretrain.test_trajectory import recorded, settings_of

STEP = 5  # all weights of the recorded runs are above zero by then


def double(name: str, folder: Path) -> tuple[Any, Batch]:
    """A recorded run's method and batch in float64."""
    method = build_method(settings_of(name, folder), Guard(torch.device("cpu")), "cpu")
    for network, parts in method.networks.items():
        shapes = {key: parameter.shape for key, parameter in parts.named_parameters()}
        parts.load_state_dict(trajectory.weights(network, shapes), strict=False)
        parts.double()
    *_, batch = recorded(name, Golden(name), range(VARIANTS[name].ranks))
    return method, batch.each(lambda x: x.double() if x.is_floating_point() else x)


def directions(parameters: list[nn.Parameter], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator, dtype=p.dtype) * p.detach().std() for p in parameters]


@torch.no_grad()
def move(parameters: list[nn.Parameter], by: list[Tensor], length: float) -> None:
    for parameter, direction in zip(parameters, by, strict=True):
        parameter.add_(direction, alpha=length)


@pytest.mark.parametrize("name", ["plain", "giant", "early", "drawn"])
def test_every_term_has_the_slope_of_its_values(name: str, tmp_path: Path) -> None:
    method, batch = double(name, tmp_path)

    def terms() -> dict[str, Tensor]:
        torch.manual_seed(0)  # the same draws each time
        found: dict[str, Tensor] = method.loss(batch, STEP)
        return found

    values = terms()
    assert all(value.dtype == torch.float64 for value in values.values())
    parts = {part: list(module.parameters()) for part, module in method.student.items()}
    slopes: dict[tuple[str, str], float] = {}
    for term, value in values.items():
        for part, parameters in parts.items():
            gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
            pairs = zip(gradients, directions(parameters), strict=True)
            slopes[term, part] = sum(float((g * d).sum()) for g, d in pairs if g is not None)
    reached: dict[str, set[str]] = {}
    for part, parameters in parts.items():
        along, length, ends = directions(parameters), 1e-6, []
        for sign in (1, -1):
            move(parameters, along, sign * length)
            ends.append({term: float(value.detach()) for term, value in terms().items()})
            move(parameters, along, -sign * length)
        for term in values:
            measured = (ends[0][term] - ends[1][term]) / (2 * length)
            assert slopes[term, part] == pytest.approx(measured, rel=1e-5, abs=1e-7), (term, part)
            if abs(measured) > 1e-4:
                reached.setdefault(term, set()).add(part)
    heads = {"dino": {"dino_head"}, "ibot": {"ibot_head"}}
    assert reached == {term: {"backbone"} | heads.get(term, set()) for term in values}


@pytest.mark.parametrize("shared", [False, True], ids=["own targets", "shared targets"])
def test_cross_entropy_passes_gradcheck(shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.losses._cross_entropy._CHUNK", 14)  # several pieces
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 7, generator=generator, dtype=torch.float64).requires_grad_()
    targets = torch.randn(4, 7, generator=generator, dtype=torch.float64).softmax(-1) * 1.5
    targets = targets if shared else targets.expand(3, -1, -1).contiguous()
    assert torch.autograd.gradcheck(lambda x: soft_cross_entropy(x, targets, 0.3), (logits,))


@pytest.mark.parametrize("neighbours", [1, 2])
def test_koleo_passes_gradcheck(neighbours: int) -> None:
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda y: koleo.koleo_loss(y, neighbours=neighbours), (x,))


def across(rank: int, size: int) -> tuple[float, float]:
    """KoLeo over two ranks: the slope that the gradients say, and that of the values, both summed over the ranks."""
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(rank), dtype=torch.float64).requires_grad_()
    along = torch.randn(3, 5, generator=torch.Generator().manual_seed(10 + rank), dtype=torch.float64)

    def total(y: Tensor) -> Tensor:
        return koleo.koleo_loss(y, *koleo.gather_group(y, 2), 2)

    with world("cpu"):
        (gradient,) = torch.autograd.grad(total(x), x)
        slope = (gradient * along).sum()
        with torch.no_grad():
            measured = (total(x + 1e-6 * along) - total(x - 1e-6 * along)) / 2e-6
        both = torch.stack([slope, measured])
        dist.all_reduce(both)
        return float(both[0]), float(both[1])


def test_gradients_cross_ranks(tmp_path: Path) -> None:
    (slope, measured), again = run_ranks(f"{__file__}:across", 2, tmp_path)
    assert (slope, measured) == again
    assert slope == pytest.approx(measured, rel=1e-6)
    assert abs(slope) > 1e-2
