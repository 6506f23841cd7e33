"""The README's lines for following another trainer's numbers do follow them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pretrain.loop import Guard
from pretrain.train import build_method
from tests.golden import trajectory
from tests.golden.trajectory import STEPS, VARIANTS, Golden
from tests.pretrain.test_trajectory import settings_of

README = Path(__file__).resolve().parents[2] / "pretrain/README.md"


def test_the_lines_of_the_readme_follow_the_recorded_run(tmp_path: Path) -> None:
    found = re.search(r"```python\n(.*?)```", README.read_text(), re.S)
    assert found is not None
    lines: dict[str, Any] = {}
    exec(found[1], lines)
    settings, golden = settings_of("plain", tmp_path), Golden("plain")

    def collated(step: int) -> dict[str, torch.Tensor]:
        crops, masks = trajectory.crops(VARIANTS["plain"], step), golden.masks(step, 0)
        weights = (1 / masks.sum(1).clamp(min=1))[:, None].expand_as(masks)[masks]
        names = {"global": "global", "local": "local", "gram": "gram_teacher"}
        return {f"collated_{names[kind]}_crops": x for kind, x in crops.items()} | {
            "collated_masks": masks,
            "mask_indices_list": masks.flatten().nonzero().flatten(),
            "masks_weight": weights,
        }

    weights = {}
    for name, network in build_method(settings, Guard(torch.device("cpu")), "cpu").networks.items():
        own = {key: p.shape for key, p in network.named_parameters()}
        whole = {**network.state_dict(), **trajectory.weights(name, own)}
        weights |= {f"{name}.{key}": tensor for key, tensor in whole.items()}
    method = lines["follow"](settings, weights, map(collated, range(STEPS)))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    np.testing.assert_allclose([row["loss"] for row in rows], golden["losses"][:, 0], rtol=1e-5)
    np.testing.assert_allclose([row["grad/backbone"] for row in rows], golden["norms"][:, 0], rtol=1e-5)
    numbers, _ = trajectory.picked("teacher", dict(method.networks["teacher"].named_parameters()))
    np.testing.assert_allclose(numbers, golden["teacher.samples"][-1], rtol=1e-4, atol=1e-6)
