"""The FLOPs of a step and of a layer: two counters and the closed formula agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from launch.settings import load
from pretrain.flops import layer_macs, layer_table, peak_flops
from pretrain.models.vit import VitSettings, build
from pretrain.settings import Settings
from pretrain.train import dry_run

Crops = list[tuple[int, int]]


def torchs(settings: VitSettings, crops: Crops) -> int:
    """Of the same pass, by torch's own counter."""
    with FakeTensorMode(), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        build(settings)([torch.empty(count, settings.in_channels, side, side) for count, side in crops])
    return counter.get_total_flops()


def by_hand(settings: VitSettings, crops: Crops) -> int:
    """Four matrices of attention and two or three of the feed-forward, attention itself, and the patches."""
    width, depth, _ = settings.shape
    hidden = int(width * settings.ffn_ratio)
    feed = 2 * hidden if settings.ffn == "mlp" else 3 * (-(-int(hidden * 2 / 3) // 8) * 8)
    total = 0
    for count, side in crops:
        patches = (side // settings.patch_size) ** 2
        tokens = patches + 1 + settings.registers
        block = 2 * tokens * width * (4 * width + feed) + 4 * tokens * tokens * width
        total += count * (depth * block + 2 * patches * settings.in_channels * settings.patch_size**2 * width)
    return total


@pytest.mark.parametrize("crops", [[(2, 224), (8, 96)], [(2, 256), (8, 112)]], ids=["224/96", "256/112"])
@pytest.mark.parametrize("more", [{}, {"ffn": "swiglu", "in_channels": 1}], ids=["mlp", "swiglu"])
def test_fvcore_torch_and_the_formula_agree_to_a_percent(more: dict[str, Any], crops: Crops) -> None:
    settings = VitSettings.model_validate({"size": "s", **more})
    macs, flops, formula = layer_macs(settings, crops), torchs(settings, crops), by_hand(settings, crops)
    assert 2 * macs.total() == pytest.approx(flops, rel=0.01)
    assert flops == pytest.approx(formula, rel=0.01)
    (_, attention) = max((name, count) for name, count in macs.by_operator().items() if name == "attention")
    assert attention, "fvcore took attention for nothing"


def test_a_dry_run_prints_the_work_of_each_layer(tmp_path: Path) -> None:
    settings = load(
        Settings,
        None,
        [
            f"folder={tmp_path}",
            "steps=2",
            "data.corpus=made-up",
            "data.batch_size=2",
            "model={size: custom, width: 32, depth: 3, heads: 2}",
        ],
    )
    said = dry_run(settings)
    assert layer_table(settings) in said
    assert "one slice (2 x 256 + 8 x 112)" in said
    for layer in ("patch_embed.proj", "blocks.0.attn.qkv", "blocks.0.mlp.fc1"):
        row = next(line for line in said.splitlines() if f" {layer} " in line)
        assert row.split("|")[3].strip(), f"no work for {layer}"
    assert "blocks.1.attn" not in said, "blocks that are alike are shown once"
    assert "warning: made-up holds no corpus" in said


def test_a_processor_has_no_known_peak() -> None:
    assert peak_flops(torch.device("cpu"), "bf16") == 0
