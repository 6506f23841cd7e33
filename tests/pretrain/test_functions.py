"""Our functions over tables of options against the official ones (tests/golden/make_functions.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pretrain.losses import dino, gram, koleo
from pretrain.losses._sinkhorn import sinkhorn
from pretrain.models.vit import VitSettings, build
from pretrain.schedule import Schedule
from tests.golden import functions, trajectory
from tests.golden.functions import numbers

with np.load(Path(__file__).resolve().parents[1] / "golden/functions.npz") as file:
    GOLDEN = {key: file[key] for key in file.files}
SCHEDULES = sum(key.startswith("v1.") for key in GOLDEN)
FEATURES = {"cls": "x_norm_clstoken", "registers": "x_storage_tokens", "patches": "x_norm_patchtokens"}


def close(ours: Any, key: str, tolerance: float = 1e-5) -> None:
    theirs = GOLDEN[key]
    ours = ours.detach().numpy() if isinstance(ours, Tensor) else np.asarray(ours)
    assert ours.shape == theirs.shape
    worst = np.abs(ours - theirs).max(initial=0) / max(np.abs(theirs).max(initial=0), 1e-30)
    assert worst <= tolerance, f"{key}: {worst:.1e}"


def loss_and_gradient(loss: Any, x: Tensor, key: str) -> None:
    x = x.clone().requires_grad_()
    value = loss(x)
    close(value, key)
    close(torch.autograd.grad(value, x)[0], f"{key}.grad")


@pytest.mark.parametrize("index", range(len(functions.GRAM)), ids=[str(options) for options in functions.GRAM])
def test_gram(index: int) -> None:
    normalized, within, negatives = functions.GRAM[index]
    teacher, options = numbers("gram teacher", 3, 6, 8), {"normalized": normalized, "within_image": within}
    loss_and_gradient(
        lambda x: gram.gram_loss(x, teacher, negatives=negatives, **options), numbers("gram", 3, 6, 8), f"gram.{index}"
    )


def test_koleo_dino_and_sinkhorn() -> None:
    for i, neighbours in enumerate(functions.KOLEO):
        loss_and_gradient(
            lambda x, n=neighbours: koleo.koleo_loss(x, neighbours=n), numbers("koleo", 7, 5), f"koleo.{i}"
        )
    for i, (crops, views, ignore) in enumerate(functions.DINO):
        targets = numbers("targets", views, 4, 16).softmax(-1)
        loss_and_gradient(
            lambda x, t=targets, d=ignore: dino.dino_loss(x, t, 0.1, ignore_diagonal=d),
            numbers("dino", crops, 4, 16),
            f"dino.{i}",
        )
    for i, (temperature, iterations) in enumerate(functions.SINKHORN):
        close(sinkhorn(numbers("sinkhorn", 10, 16), temperature, iterations), f"sinkhorn.{i}", 2e-5)


@pytest.mark.parametrize("form", ["v1", "v2"])
def test_schedules(form: str) -> None:
    assert SCHEDULES == 40
    for i in range(SCHEDULES):
        schedule = Schedule(**getattr(functions, form)(i), form=form).over(functions.LENGTH)
        close([schedule(step) for step in range(functions.LENGTH)], f"{form}.{i}", 1e-12)


@pytest.mark.parametrize("index", range(len(functions.VITS)))
def test_backbones(index: int) -> None:
    shape = {"size": "custom", "width": 32, "depth": 2, "heads": 2, "patch_size": 8}
    model = build(VitSettings(**shape, **functions.VITS[index][1])).train()
    shapes = {name: p.shape for name, p in model.named_parameters()}
    assert not model.load_state_dict(trajectory.weights("student", shapes), strict=False).unexpected_keys
    total = torch.zeros(())
    for kind, features in zip(("global", "local"), model(*functions.vit_inputs()), strict=True):
        for ours, theirs in FEATURES.items():
            x = getattr(features, ours)
            close(x, f"vit.{index}.{kind}.{theirs}")
            total = total + (x * numbers(f"{kind} {theirs}", *x.shape)).sum()
    total.backward()  # type: ignore[no-untyped-call]
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert sorted(gradients) == json.loads(str(GOLDEN[f"vit.{index}.names"]))
    samples, norms = trajectory.picked("student", gradients)
    close(samples, f"vit.{index}.grad")
    np.testing.assert_allclose(norms, GOLDEN[f"vit.{index}.norms"], rtol=2e-5, atol=1e-4)
