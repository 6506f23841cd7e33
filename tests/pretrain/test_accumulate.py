"""A batch taken in parts: the same step as uncut, with the statistics of the whole batch where that is asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from launch.distributed import World, world
from pretrain.data.batch import Batch
from pretrain.data.masks import MaskSettings, draw_masks
from pretrain.loop import Guard
from pretrain.losses._sinkhorn import shifted, sinkhorn, sinkhorn_shift
from pretrain.losses.koleo import koleo_loss
from pretrain.methods.self_distillation import SelfDistillation, Settings, build
from pretrain.models.vit import VitSettings
from pretrain.parallel import fill, place
from tests.gloo import run_ranks
from tests.pretrain.test_parallel import trained

HERE = World(0, 1, 0, torch.device("cpu"))
VIT = VitSettings(size="custom", width=32, depth=2, heads=2, in_channels=1, layerscale=0.5)
HEAD = {"prototypes": 24, "hidden": 32, "bottleneck": 16}
TERMS: dict[str, Any] = {"dino": {"head": HEAD}, "ibot": {"head": HEAD}, "koleo": {}}
B = 8


def batch(step: int, rank: int = 0, size: int = 1) -> Batch:
    draw = torch.Generator().manual_seed(step)
    whole = {n: torch.randn(k, B, 1, s, s, generator=draw) for n, k, s in (("g", 2, 64), ("l", 3, 32), ("t", 2, 96))}
    each = B // size
    mine = {n: x[:, rank * each : (rank + 1) * each].flatten(0, 1) for n, x in whole.items()}
    masks = draw_masks(MaskSettings(group=4), (4, 4), each, seed=0, step=step, rank=rank)
    keys = tuple(f"{step}.{rank * each + i}" for i in range(each))
    return Batch(mine["g"], mine["l"], mine["t"], masks.masks, masks.indices, masks.weights, keys)


def make(**more: Any) -> SelfDistillation:
    vit = VIT.model_copy(update=more.pop("vit", {}))
    terms = {**TERMS, **more.pop("terms", {})}
    with torch.device("meta"):
        method = build(Settings(terms=terms, **more), model=vit, steps=10, guard=Guard(HERE.device))
    for network in method.networks.values():
        for part in network.values():
            place(part, HERE.device)
    method.placed()
    for name, parts in method.initial(3, None, lambda text: None).items():
        for part, state in parts.items():
            fill(method.networks[name][part], state)
    return method


def four_steps(rank: int, size: int, folder: Path, words: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Four optimizer steps on the same global batches; the weights of both networks."""
    folder.mkdir(exist_ok=True)
    if size == 1:
        return trained(folder, 4, *words)
    with world("cpu") as here:
        return trained(folder, 4, *words, here=here)


def worst(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.mark.parametrize("parts", [2, 8])
def test_gradients_in_parts_are_those_of_the_uncut_batch_to_the_last_digits(parts: int) -> None:
    def gradients(count: int, statistics: str) -> tuple[list[float], dict[str, Tensor]]:
        method = make(statistics=statistics)
        for network in method.networks.values():
            network.double()
        whole = batch(0).each(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
        total: dict[str, float] = {}
        for part in method.parts(whole, 0, count, torch.manual_seed):
            terms = method.loss(part, 0)
            (sum(terms.values()) / count).backward()  # type: ignore[union-attr]
            total = {name: total.get(name, 0.0) + term.item() / count for name, term in terms.items()}
        return list(total.values()), {n: p.grad for n, p in method.student.named_parameters() if p.grad is not None}

    (losses, whole), (again, cut), (_, alone) = (
        gradients(1, "part"),
        gradients(parts, "batch"),
        gradients(parts, "part"),
    )
    assert again == pytest.approx(losses, rel=1e-6)
    largest = max(tensor.abs().max().item() for tensor in whole.values())
    assert worst(whole, cut) < 1e-6 * largest
    assert worst(whole, alone) > 1e-2 * largest


@pytest.mark.parametrize("parts", [2, 8])
def test_in_parts_with_the_statistics_of_the_batch_is_the_uncut_batch(tmp_path: Path, parts: int) -> None:
    whole = four_steps(0, 1, tmp_path / "whole")
    cut = four_steps(0, 1, tmp_path / "cut", (f"accumulate={parts}", "method.statistics=batch"))
    assert worst(whole, cut) < 1e-4  # KoLeo of tokens that are nearly one divides rounding by their distance
    alone = four_steps(0, 1, tmp_path / "alone", (f"accumulate={parts}",))
    assert worst(whole, alone) > 1e-3  # without them it is another step: this test can fail


@pytest.mark.parametrize("sharding", ["replicate", "full"])
def test_two_ranks_in_parts_are_one_rank_uncut(tmp_path: Path, sharding: str) -> None:
    one = four_steps(0, 1, tmp_path / "one")
    words = ("accumulate=2", "method.statistics=batch", f"parallel.sharding={sharding}")
    pair = run_ranks(f"{__file__}:four_steps", 2, tmp_path, folder=tmp_path / "two", words=words)
    for both in pair:
        assert worst(one, both) < 1e-4


def test_random_draws_of_a_part_are_the_same_when_it_is_looked_at_and_when_it_is_learnt_from() -> None:
    """With drop path and moved positions, KoLeo's gradient through two passes is that of one graph over all parts."""
    only = {"dino": None, "ibot": None, "koleo": {"weight": 1.0}}
    noisy = {"drop_path": 0.5, "rope": VIT.rope.model_copy(update={"rescale": 2.0})}
    method = make(terms=only, vit=noisy, statistics="batch")
    whole = batch(0)
    for part in method.parts(whole, 0, 4, torch.manual_seed):
        torch.manual_seed(next(i for i in range(4) if whole.keys[2 * i] == part.keys[0]))
        (method.loss(part, 0)["koleo"] / 4).backward()  # type: ignore[no-untyped-call]
    found = {name: p.grad for name, p in method.student.named_parameters() if p.grad is not None}

    graph = make(terms=only, vit=noisy)
    tokens = []
    for number, part in enumerate(whole.parts(4)):
        torch.manual_seed(number)
        seen = graph.student["backbone"]([part.global_crops, part.local_crops], [part.masks, None])
        tokens.append(seen[0].cls.view(2, 2, -1))
    torch.stack([koleo_loss(crop) for crop in torch.cat(tokens, 1)]).sum().backward()  # type: ignore[no-untyped-call]
    for name, p in graph.student.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(found[name], p.grad, atol=1e-6, rtol=1e-4, msg=name)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.floats(0.01, 400), st.integers(1, 4), st.integers(0, 99))
def test_sinkhorn_over_parts_is_sinkhorn_of_all(sizes: list[int], spread: float, iterations: int, seed: int) -> None:
    torch.manual_seed(seed)
    parts = [torch.randn(n, 7, dtype=torch.float64) * spread for n in [*sizes, 3]]
    expected = sinkhorn(torch.cat(parts), 0.07, iterations)
    shift = sinkhorn_shift(lambda: parts, 0.07, iterations)
    found = torch.cat([shifted(part, 0.07, shift) for part in parts])
    torch.testing.assert_close(found, expected, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("known", [False, True])
def test_parts_hold_every_crop_and_mask_once(known: bool) -> None:
    whole = batch(1)
    if known:
        whole = replace(whole, masked=tuple(whole.masks.sum(1).tolist()))
        assert len(whole.to("meta").parts(4)) == 4, "a device was asked for a number"
    parts = whole.parts(4)
    assert [key for part in parts for key in part.keys] == list(whole.keys)
    for name in ("global_crops", "local_crops", "gram_crops", "masks"):
        back = torch.cat([getattr(part, name).unflatten(0, (-1, 2)) for part in parts], 1).flatten(0, 1)
        assert torch.equal(back, getattr(whole, name)), name
    for part in parts:
        assert torch.equal(part.mask_indices, part.masks.flatten().nonzero()[:, 0])
        crops = part.mask_indices // part.masks.shape[1]
        torch.testing.assert_close(part.mask_weights, 1 / part.masks.sum(1).float()[crops])
        assert part.masked == tuple(part.masks.sum(1).tolist())
    assert sum(len(part.mask_indices) for part in parts) == len(whole.mask_indices)
