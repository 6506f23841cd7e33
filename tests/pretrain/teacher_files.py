"""Files of weights made up on the spot, for tests of teachers."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from pretrain.data.window import HuWindow
from pretrain.models.vit import VitSettings, build
from pretrain.weights import write_weights

__all__ = ["write_export"]


def write_export(path: Path, model: VitSettings, seed: int) -> Path:
    """An export of ours with random weights, and norms that are not the identity."""
    torch.manual_seed(seed)
    backbone = build(model)
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if parameter.ndim > 1 and "blocks" in name:
                parameter.mul_(4)  # far enough from zero that tokens differ
            if "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    header = {
        "axial": "0",
        "model": model.model_dump(mode="json"),
        "window": HuWindow().model_dump(mode="json"),
        "step": 1,
    }
    write_weights(path, dict(backbone.state_dict()), {"format": "pt", "axial": json.dumps(header)})
    return path
