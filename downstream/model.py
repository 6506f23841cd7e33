"""The segmentation network (backbone + decoder), and the one file that holds all of it: weights and how to use them.

ModelError (a ValueError): a file is no segmentation model, or is damaged; the text names the file and the remedy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pydantic
import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from downstream.cases import Labels
from downstream.channels import Channel, network_channels
from downstream.choices import Decoder, Tuning
from downstream.context import Context, Fusion
from downstream.tuning import install, merged
from launch.settings import Settings, plugins
from pretrain.models.vit import VisionTransformer, VitSettings
from pretrain.models.vit import build as build_vit
from pretrain.weights import write_weights

__all__ = ["Header", "ModelError", "SegmentationModel", "build", "load_model", "save_model"]

FORMAT = "axial segmentation 2"


class ModelError(ValueError):
    """A file that is not a usable segmentation model."""


class Header(Settings):
    """Everything beside the weights that prediction needs; stands as JSON in the file's metadata."""

    vit: VitSettings
    decoder: Decoder
    context: Context = Field(Context(), description="which neighbours of a slice are seen with it")
    adapters: Tuning | None = Field(
        None, description="what tuning left in the backbone (`tuning.kept`); null: the plain backbone"
    )
    organs: dict[str, tuple[int, ...]] = Field(description="name -> label values, several for a region")
    values: tuple[int, ...] = Field(description="class index -> label value, 0 first")
    ignore: int | None = Field(None, description="label value that was neither learnt nor scored")
    order: tuple[int, ...] = Field(
        (), description="value written where each organ is found; empty: organs exclude one another"
    )
    channels: tuple[Channel, ...] = Field(description="channels of an image, and stored values -> network input")
    spacing: float | None = Field(description="in-plane mm that slices are brought to; null: as they are")
    patch: int = Field(description="side of the training patch in px, also of the sliding window")
    step: int = Field(0, description="training steps behind these weights")

    @property
    def labels(self) -> Labels:
        """Organs and class values."""
        return Labels(self.organs, self.values, self.ignore, self.order)


class SegmentationModel(nn.Module):
    """A backbone, and a decoder over maps of some of its blocks. Made by `build`.

    `stem` brings an image's channels to the backbone's where these are other numbers; `fusion` (one a map) joins the
    maps of a slice and its neighbours where there is a context.
    """

    def __init__(
        self, backbone: VisionTransformer, decoder: nn.Module, blocks: tuple[int, ...], context: Context, channels: int
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.decoder = decoder
        self.blocks = blocks
        self.context = context
        self.channels = channels
        self.stem = _stem(channels, backbone.in_channels)
        self.fusion = nn.ModuleList(Fusion(backbone.dim, context) for _ in blocks if context.slices)

    @property
    def added(self) -> list[nn.Parameter]:
        """All that is no part of the backbone and starts fresh: decoder, fusion, stem."""
        own = {id(parameter) for parameter in self.backbone.parameters()}
        return [parameter for parameter in self.parameters() if id(parameter) not in own]

    def forward(self, image: Tensor) -> Tensor:
        """Normalised slices [B, n, H, W] of any size -> logits [B, heads, H, W]; with a context [B, S, n, H, W].

        n is the network's channels (`channels.network_channels`), S the context's `size`, the slice in the middle.
        Sizes that are no multiple of the patch are filled up by repeating the border, and cut back.
        """
        size = (image.shape[-2], image.shape[-1])
        if not self.context.slices:
            return self.decode(self.encode(image), size)
        maps = self.encode(image.flatten(0, 1))
        return self.decode([torch.unflatten(each, 0, image.shape[:2]) for each in maps], size)

    def encode(self, images: Tensor) -> list[Tensor]:
        """Normalised slices [N, n, H, W], each by itself -> the maps that `decode` reads, each [N, D, h, w]."""
        assert images.ndim == 4 and images.shape[1] == self.channels, f"{tuple(images.shape)}, {self.channels} channels"
        height, width = images.shape[-2:]
        patch = self.backbone.patch_size
        fill = (0, -width % patch, 0, -height % patch)
        if any(fill):
            images = functional.pad(images, fill, mode="replicate")
        trained = any(p.requires_grad for part in (self.stem, self.backbone) if part for p in part.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and trained):
            if self.stem is not None:
                images = self.stem(images)
            images = images.expand(-1, self.backbone.in_channels, -1, -1)
            return self.backbone.intermediate(images, self.blocks, norm=True, reshape=True)

    def decode(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Maps of B slices, each [B, D, h, w], or [B, S, D, h, w] with a context -> logits [B, heads, H, W]."""
        if self.context.slices:
            maps = [fuse(each) for fuse, each in zip(self.fusion, maps, strict=True)]
        logits: Tensor = self.decoder(list(maps))
        return logits[..., : size[0], : size[1]]


def _stem(channels: int, wanted: int) -> nn.Conv2d | None:
    """A 1x1 convolution, row r of which starts as channel r % channels, and as the mean if there is one row only."""
    if channels in (1, wanted):
        return None
    stem = nn.Conv2d(channels, wanted, kernel_size=1)
    assert stem.bias is not None
    with torch.no_grad():
        stem.bias.zero_()
        stem.weight.fill_(1 / channels if wanted == 1 else 0.0)
        for row in range(wanted if wanted > 1 else 0):
            stem.weight[row, row % channels] = 1.0
    return stem


def build(
    backbone: VisionTransformer,
    decoder: Settings,
    heads: int,
    *,
    context: Context | None = None,
    channels: int = 1,
    tuning: Settings | None = None,
) -> SegmentationModel:
    """A model with a fresh decoder, and all that `tuning` installs, if it is given.

    ValueError if the decoder reads blocks that the backbone does not have, or the backbone cannot be tuned so.
    """
    blocks = decoder.chosen(len(backbone.blocks))  # type: ignore[attr-defined]
    kind = decoder.kind  # type: ignore[attr-defined]
    made = plugins("downstream.decoders")[kind].build(decoder, backbone.dim, heads, len(blocks), backbone.patch_size)
    model = SegmentationModel(backbone, made, blocks, context or Context(), channels)
    if tuning is not None:
        install(tuning, model)
    return model


def save_model(path: Path, model: SegmentationModel, header: Header, write: bool = True) -> None:
    """Writes weights (at least fp32, CPU; LoRA's folded in) and header; the file appears whole or not at all.

    With a model spread over ranks all must call this, one of them with `write`.
    """
    weights = {name: _plain(tensor) for name, tensor in model.state_dict().items()}
    if not write:
        return
    weights = merged(weights)
    wrong = _disagree(weights, _skeleton(header).state_dict())
    assert not wrong, f"the header builds another network than was trained: {wrong[:5]}"
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
        kind = "a backbone without a decoder?" if "axial" in described else "not written by `axial finetune`"
        raise ModelError(f"{path}: no segmentation model ({kind}); give the model.safetensors of a finetune run")
    try:
        header = Header.model_validate_json(described["header"])
    except pydantic.ValidationError as fault:
        raise ModelError(f"{path}: its header does not fit this version of axial: {fault}") from None
    try:
        model = _skeleton(header)
    except ValueError as fault:
        raise ModelError(f"{path}: its header describes no network: {fault}") from None
    if wrong := _disagree(weights, model.state_dict()):
        raise ModelError(f"{path}: weights and header do not agree on {wrong[:5]}; export the model again")
    model = model.to_empty(device=device)
    model.load_state_dict(weights)
    return model.eval(), header


def _skeleton(header: Header) -> SegmentationModel:
    """The network of a header, without memory for its weights."""
    with torch.device("meta"):
        return build(
            build_vit(header.vit),
            header.decoder,
            len(header.labels.heads),
            context=header.context,
            channels=network_channels(header.channels),
            tuning=header.adapters,
        )


def _disagree(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """Names that one of them lacks; or else those of other shapes."""
    return sorted(weights.keys() ^ expected.keys()) or [n for n, t in weights.items() if t.shape != expected[n].shape]


def _plain(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    tensor = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()
    coarse = tensor.is_floating_point() and tensor.dtype.itemsize < 4  # positions may be in float64, and stay so
    return (tensor.float() if coarse else tensor).contiguous().clone()
