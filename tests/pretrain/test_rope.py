"""Positions: official tables and rotation, the augmentation, and tables that are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pretrain.models.rope import Rope, RopeSettings, rotate
from pretrain.models.vit import VitSettings, build

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
TINY: dict[str, Any] = {"size": "custom", "width": 64, "depth": 4, "heads": 4}


def _load(path: Path) -> dict[str, Tensor]:
    with np.load(path) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def test_rope_tables_are_official() -> None:
    golden = _load(GOLDEN / "rope.npz")
    for name in ("separate", "min", "max"):
        for dtype in ("fp32", "bf16"):
            rope = Rope(16, RopeSettings(normalize=name, dtype=dtype))
            rope.init_weights()
            for ours, part in zip(rope(6, 10), ("sin", "cos"), strict=True):
                expected = golden[f"D16.{name}.{dtype}.6x10.{part}"]
                torch.testing.assert_close(ours.float(), expected, rtol=0, atol=1e-6 if dtype == "fp32" else 0)
    for dim in (16, 64, 128):
        for dtype in ("fp32", "bf16", "fp64"):
            rope = Rope(dim, RopeSettings(dtype=dtype))
            rope.init_weights()
            torch.testing.assert_close(
                rope.periods.to(golden[f"D{dim}.{dtype}.periods"].dtype), golden[f"D{dim}.{dtype}.periods"]
            )
    rope = Rope(64, RopeSettings(base=None, min_period=0.5, max_period=20))
    rope.init_weights()
    for ours, part in zip((rope.periods, *rope(6, 10)), ("periods", "6x10.sin", "6x10.cos"), strict=True):
        torch.testing.assert_close(ours, golden[f"D64.minmaxperiod_0.5_20.{part}"], rtol=0, atol=2e-6)


def test_rotation_is_official() -> None:
    golden = _load(GOLDEN / "rope.npz")
    q = golden["apply.q"].transpose(1, 2)
    ours = rotate(q, (golden["apply.sin"], golden["apply.cos"])).transpose(1, 2)
    torch.testing.assert_close(ours, golden["apply.q_out"], rtol=0, atol=1e-6)
    coarse = tuple(golden[f"D16.separate.bf16.6x10.{part}"].bfloat16() for part in ("sin", "cos"))
    ours = rotate(q, (coarse[0], coarse[1])).transpose(1, 2)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, golden["apply_bf16.q_out"])


def test_positions_stay_fine_in_a_half_precision_model() -> None:
    fine = build(VitSettings(**TINY))
    table = fine.rope_embed(14, 14)
    half = build(VitSettings(**TINY)).bfloat16()
    assert half.rope_embed.periods.dtype == torch.float32
    for ours, theirs in zip(half.rope_embed(14, 14), table, strict=True):
        assert torch.equal(ours, theirs)
    assert half(torch.zeros(1, 3, 32, 32, dtype=torch.bfloat16)).cls.dtype == torch.bfloat16
    assert fine.double().rope_embed(2, 2)[0].dtype == torch.float64


def test_kept_tables_follow_the_periods() -> None:
    rope = Rope(16, RopeSettings())
    rope.init_weights()
    with torch.inference_mode():
        first = rope(4, 4)
    assert rope(4, 4)[0] is first[0]
    assert not first[0].is_inference()
    state = {name: value * 2 for name, value in rope.state_dict().items()}
    rope.load_state_dict(state)
    assert not torch.equal(rope(4, 4)[0], first[0])
    assert rope.to("meta")(4, 4)[0].is_meta


def test_each_block_and_group_draws_its_own_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(VitSettings(**TINY | {"rope": {"rescale": 2, "shift": 0.2, "jitter": 1.5}}))
    drawn: list[Tensor] = []
    augment = Rope._augment

    def spy(rope: Rope, coordinates: Tensor) -> Tensor:
        drawn.append(augment(rope, coordinates))
        return drawn[-1]

    monkeypatch.setattr(Rope, "_augment", spy)
    crops = [torch.ones(2, 3, 32, 32), torch.ones(2, 3, 32, 32)]
    first = model.train()(crops)
    assert len({tuple(draw.flatten().tolist()) for draw in drawn}) == 4 * 2
    assert not torch.equal(model(crops)[0].cls, first[0].cls)
    drawn.clear()
    assert torch.equal(model.eval()(crops)[0].cls, model(crops)[0].cls)
    assert not drawn


def test_rescale_is_log_uniform_and_shared_by_both_axes() -> None:
    rope = Rope(16, RopeSettings(rescale=2)).train()
    rope.init_weights()
    torch.manual_seed(0)
    plain = rope._coordinates(3, 5)
    factors = torch.stack([(rope._augment(plain) / plain).nan_to_num(nan=1.0)[0] for _ in range(500)])
    torch.testing.assert_close(factors[:, 0], factors[:, 1])
    logs = factors[:, 0].log2()
    assert -1 <= logs.min() < -0.95
    assert 0.95 < logs.max() <= 1
    assert logs.mean().abs() < 0.1
