"""Small segmentation models with numbers as after training, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from downstream.channels import ZSCORE, Channel, network_channels
from downstream.context import Context
from downstream.decoders import pyramid
from downstream.model import Header, SegmentationModel, build, save_model
from launch.settings import Settings, plugins
from pretrain.data.window import HuWindow
from pretrain.models.vit import VisionTransformer, VitSettings
from pretrain.models.vit import build as build_vit

__all__ = ["CT", "MR", "TUNINGS", "VIT", "WIDE", "backbone", "header", "images", "made", "saved", "trained"]

VIT = VitSettings(size="custom", width=24, depth=4, heads=2, patch_size=8, in_channels=3)
CT = Channel(window=HuWindow())
WIDE = Channel(window=HuWindow(low=(-1000.0, -160.0), high=(1000.0, 240.0)))
MR = Channel(name="MR", kind="zscore", window=ZSCORE)
TUNINGS: dict[str, Settings] = {
    kind: module.Settings(**{"lora": {"rank": 3}, "adapter": {"width": 5}}.get(kind, {}))
    for kind, module in plugins("downstream.tuning").items()
}


def backbone(vit: VitSettings = VIT, seed: int = 0) -> VisionTransformer:
    """No number is 0 or 1, so that one that went missing would show."""
    model = build_vit(vit)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "gamma")) else 0.0
            parameter.copy_(centre + torch.randn(parameter.shape, generator=draw) * 0.2)
    return model


def header(**change: Any) -> Header:
    """Of the model that `made` makes of the same words."""
    given: dict[str, Any] = {
        "vit": VIT,
        "decoder": pyramid.Settings(),
        "organs": {"background": (0,), "liver": (6,), "spleen": (1,)},
        "values": (0, 1, 6),
        "channels": (CT,),
        "spacing": 0.8,
        "patch": 32,
    }
    return Header(**(given | change))


def made(said: Header, tuned: Settings | None = None, seed: int = 0) -> SegmentationModel:
    """The network of a header, of a lively backbone; with `tuned` installed."""
    torch.manual_seed(seed)
    return build(
        backbone(said.vit, seed),
        said.decoder,
        len(said.labels.heads),
        context=said.context,
        channels=network_channels(said.channels),
        tuning=tuned,
    )


def images(said: Header, count: int = 2, size: tuple[int, int] = (32, 40), seed: int = 0) -> Tensor:
    """Normalised, of the form that the model takes."""
    context = (said.context.size,) if said.context.slices else ()
    shape = (count, *context, network_channels(said.channels), *size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def trained(model: SegmentationModel, said: Header, steps: int = 4, lr: float = 0.02) -> SegmentationModel:
    """A few steps of everything that may be trained."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr, momentum=0.9)
    for step in range(steps):
        logits = model.train()(images(said, seed=step))
        target = torch.randint(0, logits.shape[1], logits[:, 0].shape, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits, target).backward()
        optimizer.step()
    return model.eval()


def saved(path: Path, context: Context | None = None, **change: Any) -> Path:
    """A model file with numbers as after training."""
    said = header(context=context or Context(), **change)
    model = made(said, said.adapters)
    save_model(path, model, said)
    return path
