"""The segmentation network (backbone + decoder), and the one file that holds all of it: weights and how to use them.

ModelError (a ValueError): a file is no segmentation model, or is damaged; the text names the file and the remedy.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pydantic
import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from downstream.cases import Labels
from launch.settings import Settings, choice, plugins
from pretrain.data.window import HuWindow
from pretrain.models.vit import VisionTransformer, VitSettings
from pretrain.models.vit import build as build_vit
from pretrain.weights import write_weights

__all__ = ["Header", "ModelError", "SegmentationModel", "build", "load_model", "save_model"]

FORMAT = "axial segmentation 1"

if TYPE_CHECKING:
    Decoder = Settings
else:
    Decoder = choice("downstream.decoders")


class ModelError(ValueError):
    """A file that is not a usable segmentation model."""


class Header(Settings):
    """Everything beside the weights that prediction needs; stands as JSON in the file's metadata."""

    vit: VitSettings
    decoder: Decoder
    organs: dict[str, tuple[int, ...]] = Field(description="name -> label values, several for a region")
    values: tuple[int, ...] = Field(description="class index -> label value, 0 first")
    window: HuWindow = Field(description="HU -> network input")
    spacing: float | None = Field(description="in-plane mm that slices are brought to; null: as they are")
    patch: int = Field(description="side of the training patch in px, also of the sliding window")
    step: int = Field(0, description="training steps behind these weights")

    @property
    def labels(self) -> Labels:
        """Organs and class values."""
        return Labels(self.organs, self.values)


class SegmentationModel(nn.Module):
    """A backbone, and a decoder over maps of some of its blocks."""

    def __init__(self, backbone: VisionTransformer, decoder: nn.Module, blocks: tuple[int, ...]) -> None:
        super().__init__()
        self.backbone = backbone
        self.decoder = decoder
        self.blocks = blocks
        self.frozen = False  # True: the backbone is read without gradients

    def forward(self, image: Tensor) -> Tensor:
        """Normalised slices [B, C, H, W] of any size, C = 1 or the backbone's -> logits [B, classes, H, W].

        Sizes that are no multiple of the patch are filled up by repeating the border, and cut back.
        """
        height, width = image.shape[-2:]
        patch = self.backbone.patch_size
        fill = (0, -width % patch, 0, -height % patch)
        if any(fill):
            image = functional.pad(image, fill, mode="replicate")
        image = image.expand(-1, self.backbone.in_channels, -1, -1)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            maps = self.backbone.intermediate(image, self.blocks, norm=True, reshape=True)
        logits: Tensor = self.decoder(maps)
        return logits[..., :height, :width]


def build(backbone: VisionTransformer, decoder: Settings, classes: int) -> SegmentationModel:
    """A model with a fresh decoder; ValueError if the decoder reads blocks that the backbone does not have."""
    blocks = decoder.chosen(len(backbone.blocks))  # type: ignore[attr-defined]
    kind = decoder.kind  # type: ignore[attr-defined]
    made = plugins("downstream.decoders")[kind].build(decoder, backbone.dim, classes, len(blocks), backbone.patch_size)
    return SegmentationModel(backbone, made, blocks)


def save_model(path: Path, model: nn.Module, header: Header, write: bool = True) -> None:
    """Writes weights (fp32, CPU) and header; the file appears whole or not at all.

    With a model spread over ranks all must call this, one of them with `write`.
    """
    weights = {name: _plain(tensor) for name, tensor in model.state_dict().items()}
    if not write:
        return
    write_weights(path, weights, {"format": FORMAT, "header": header.model_dump_json()})


def load_model(path: Path, device: torch.device | str = "cpu") -> tuple[SegmentationModel, Header]:
    """The model, in evaluation mode on `device`, and its header. Only tensors and JSON are read, no code."""
    if not path.is_file():
        raise ModelError(f"{path}: no such file; `axial finetune` writes model.safetensors into its run folder")
    try:
        with safe_open(path, framework="pt") as file:
            described = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - the handle is no mapping
    except SafetensorError as fault:
        raise ModelError(f"{path}: not a whole safetensors file ({fault}); copy or export it again") from None
    if described.get("format") != FORMAT:
        kind = "a backbone without a decoder?" if "vit" in str(described)[:2000] else "not written by `axial finetune`"
        raise ModelError(f"{path}: no segmentation model ({kind}); give the model.safetensors of a finetune run")
    try:
        header = Header.model_validate_json(described["header"])
    except pydantic.ValidationError as fault:
        raise ModelError(f"{path}: its header does not fit this version of axial: {fault}") from None
    with torch.device("meta"):
        model = build(build_vit(header.vit), header.decoder, len(header.values))
    model = model.to_empty(device=device)
    expected = model.state_dict()
    wrong = sorted(set(weights) ^ set(expected)) or [n for n, t in weights.items() if t.shape != expected[n].shape]
    if wrong:
        raise ModelError(f"{path}: weights and header do not agree on {wrong[:5]}; export the model again")
    model.load_state_dict(weights)
    return model.eval(), header


def _plain(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    tensor = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()
    return (tensor.float() if tensor.is_floating_point() else tensor).contiguous().clone()
