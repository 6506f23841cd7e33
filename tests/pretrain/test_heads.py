"""The projection head: official numbers, initial distribution, precision of a teacher's logits."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pretrain.models.heads import DinoHead, HeadSettings


def _head(layers: int = 3) -> DinoHead:
    return HeadSettings(prototypes=96, hidden=48, bottleneck=32, layers=layers).build(64)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_official_numbers(reference: Path, layers: int) -> None:
    with np.load(reference / "dino_head.npz") as file:
        golden = {
            k.removeprefix(f"n{layers}."): torch.from_numpy(file[k]) for k in file.files if k.startswith(f"n{layers}.")
        }
    head = _head(layers)
    head.load_state_dict({name.removeprefix("state."): v for name, v in golden.items() if name.startswith("state.")})
    x = golden["x"].requires_grad_()

    def close(ours: Tensor, theirs: Tensor) -> None:
        torch.testing.assert_close(ours.to(theirs.dtype), theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())

    out = head(x)
    close(out, golden["out"])
    close(head(x, no_last=True), golden["out_no_last_layer"])
    close(head(golden["x_only_last"], only_last=True), golden["out_only_last_layer"])
    (out * golden["w"]).sum().backward()
    assert x.grad is not None
    close(x.grad, golden["grad_x"])
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None
        close(parameter.grad, golden[f"grad.{name}"])
    exact = head.double()(x.detach().double())
    torch.testing.assert_close(exact, golden["out_fp64"], rtol=0, atol=1e-6 * exact.abs().max().item())


def test_official_initial_distribution(reference: Path) -> None:
    stats = json.loads((reference / "init_stats.json").read_text())
    torch.manual_seed(0)
    state = DinoHead(384, 2048, 256, 8192).state_dict()
    assert {f"head.{name}" for name in state} == {name for name in stats if name.startswith("head.")}
    for name, value in state.items():
        theirs = stats[f"head.{name}"]
        assert list(value.shape) == theirs["shape"]
        assert value.std().item() == pytest.approx(theirs["std"], rel=6 / value.numel() ** 0.5, abs=1e-9)
        assert value.mean().item() == pytest.approx(0, abs=6 * theirs["std"] / value.numel() ** 0.5 + 1e-12)


def test_what_the_head_computes_and_its_keys() -> None:
    head = _head().double()
    assert list(head.state_dict()) == [f"mlp.{i}.{part}" for i in (0, 2, 4) for part in ("weight", "bias")] + [
        "last_layer.weight"
    ]
    x = torch.randn(2, 5, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    middle = head(x, no_last=True)
    torch.testing.assert_close(middle.norm(dim=-1), torch.ones(2, 5, dtype=torch.float64))
    torch.testing.assert_close(head(x), middle @ head.last_layer.weight.T)
    assert torch.equal(head(x), head(middle, only_last=True))


def test_a_teacher_gets_fine_logits_under_bf16() -> None:
    head = _head()
    with torch.no_grad():
        head.last_layer.weight.mul_(500)  # logits as large as they become in a long run
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        student = head(x)
        with torch.no_grad():
            teacher = head(x)
            exact = head.last_layer.weight.double() @ head(x, no_last=True).double().T
    assert student.dtype == torch.bfloat16
    assert teacher.dtype == torch.float32
    assert (teacher - exact.T).abs().max() < 1e-4 < (student - exact.T).abs().max()
    with torch.no_grad():
        assert head.bfloat16()(x.bfloat16()).dtype == torch.float32


def test_meta_then_empty_then_init_leaves_nothing_unfilled() -> None:
    with torch.device("meta"):
        head = _head()
    head.to_empty(device="cpu")
    for parameter in head.parameters():
        parameter.data.fill_(float("nan"))
    head.init_weights(torch.Generator().manual_seed(0))
    assert all(parameter.isfinite().all() for parameter in head.parameters())
