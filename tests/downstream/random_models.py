"""Segmentation models with random weights that take milliseconds, for the tests of prediction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from downstream.channels import Channel, network_channels
from downstream.context import Context
from downstream.decoders import linear
from downstream.model import Header, SegmentationModel, build, save_model
from pretrain.data.window import HuWindow
from pretrain.models.vit import VitSettings
from pretrain.models.vit import build as build_vit

__all__ = ["CT", "made", "saved"]

CT = Channel(window=HuWindow(low=-160, high=240, mean=40, std=100))


def made(seed: int = 0, channels: tuple[Channel, ...] = (CT,), **header: Any) -> tuple[SegmentationModel, Header]:
    """A model of 24 dimensions and two blocks that tells `liver` 1 and `spleen` 5 apart, or what `header` says."""
    torch.manual_seed(seed)
    vit = VitSettings.model_validate(
        {"size": "custom", "width": 24, "depth": 2, "heads": 2, "patch_size": 8, "in_channels": 1, "layerscale": None}
    )
    given: dict[str, Any] = {
        "vit": vit,
        "decoder": linear.Settings(taps=2),
        "organs": {"liver": (1,), "spleen": (5,)},
        "values": (0, 1, 5),
        "channels": channels,
        "spacing": None,
        "patch": 32,
        "context": Context(),
    }
    about = Header.model_validate(given | header)
    heads = len(about.labels.heads)
    model = build(
        build_vit(vit), about.decoder, heads, context=about.context, channels=network_channels(about.channels)
    )
    with torch.no_grad():
        for parameter in model.parameters():  # biases and what starts at nothing, too
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval(), about


def saved(path: Path, seed: int = 0, **header: Any) -> Path:
    """The same in a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_model(path, *made(seed, **header))
    return path
