"""What a step costs in floating-point operations, and what a device can do of them."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from fvcore.nn import FlopCountAnalysis, flop_count_table
from fvcore.nn.jit_handles import get_shape
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pretrain.data.batch import Batch
from pretrain.data.crops import CropShape
from pretrain.data.masks import target_counts
from pretrain.data.views import TeacherViews
from pretrain.loop import Guard
from pretrain.methods import build_method
from pretrain.models.vit import VisionTransformer, VitSettings, build
from pretrain.settings import Settings

__all__ = ["flops_per_step", "layer_macs", "layer_table", "peak_flops"]

# Dense bfloat16 FLOP/s by a word of the device's name, from the makers' data sheets. Without an entry no MFU is shown.
_PEAKS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "B200": 2250e12}


def peak_flops(device: torch.device, precision: str) -> float:
    """FLOP/s of the device in the run's precision; 0 where it is not known, as for any CPU."""
    if device.type != "cuda" or precision != "bf16":
        return 0.0
    name = torch.cuda.get_device_name(device)
    return next((peak for word, peak in _PEAKS.items() if all(part in name for part in word.split())), 0.0)


def flops_per_step(settings: Settings) -> float:
    """Count the FLOPs of one step of all ranks together, forward and backward, the mean over the mix of crop sizes.

    Counted on tensors without numbers, with attention written out, since the counter takes the CPU's fused kernel for
    nothing. All blocks cost the same and so do all images (but for KoLeo's B x B products, which are nothing beside
    them): models of one and of two blocks on a few images tell the rest. To be called outside of a process group, which
    would wait for the other ranks.
    """
    width, depth, heads = settings.model.shape
    batch = settings.data.batch_size
    few = min(batch, 10)
    total = 0.0
    for shape in settings.data.crops.shapes:
        first, second = (_flops(settings, shape, (width, blocks, heads), few) for blocks in (1, 2))
        total += shape.probability * (first + (depth - 1) * (second - first))
    return total * batch / few


def _flops(settings: Settings, shape: CropShape, size: tuple[int, int, int], images: int) -> int:
    """Count one step of `images` with a backbone of this width, depth and heads."""
    custom = {"size": "custom", **dict(zip(("width", "depth", "heads"), size, strict=True))}
    resized = settings.model_copy(update={"model": settings.model.model_copy(update=custom)})
    side = shape.global_size // settings.model.patch_size
    batch, n_global = settings.data.batch_size, settings.data.crops.n_global
    masked = round(sum(target_counts(settings.data.masks, (side, side), batch, n_global)) * images / batch)
    method = build_method(resized, Guard(torch.device("cpu")))  # may look at files, which must not become fake tensors
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake, sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        for network in method.networks.values():
            network.to_empty(device="cpu")
        method.placed()
        terms = method.loss(_shapes_only(settings, shape, images, masked, method.views(shape.global_size)), 0)
        torch.stack(list(terms.values())).sum().backward()  # type: ignore[no-untyped-call]
        return int(counter.get_total_flops())


def _shapes_only(settings: Settings, shape: CropShape, images: int, masked: int, views: TeacherViews | None) -> Batch:
    """A batch with sizes only."""
    channels, patch = settings.model.in_channels, settings.model.patch_size
    side, crops = shape.global_size // patch, settings.data.crops.n_global * images
    empty, seen = torch.empty, () if views is None else views.of
    read = {} if views is None or views.features is None else views.features.widths
    return Batch(
        global_crops=empty(crops, channels, shape.global_size, shape.global_size),
        local_crops=empty(settings.data.crops.n_local * images, channels, shape.local_size, shape.local_size),
        gram_crops=empty(crops, channels, shape.gram_size, shape.gram_size) if shape.gram_size else None,
        masks=empty(crops, side * side, dtype=torch.bool),
        mask_indices=empty(masked, dtype=torch.long),
        mask_weights=empty(masked),
        keys=("",) * images,
        views=() if read else tuple(empty(crops, view.window.channels, view.size, view.size) for view in seen),
        kept=tuple(empty(crops, view.kept, dtype=torch.long) if view.mask else None for view in seen),
        features=tuple(empty(crops, 1 + view.kept, read[name]) for view, name in zip(seen, read, strict=False)),
    )


def layer_table(settings: Settings, depth: int = 5) -> str:
    """fvcore's table of the backbone on the crops of one slice, forward only: parameters and multiply-adds by layer.

    A multiply-add is two FLOPs. Of the blocks, which are all alike, the first is shown. The crops are those of the
    first shape of the mix.
    """
    shape, n_local = settings.data.crops.shapes[0], settings.data.crops.n_local
    crops = [(settings.data.crops.n_global, shape.global_size)] + ([(n_local, shape.local_size)] if n_local else [])
    table = flop_count_table(layer_macs(settings.model, crops), max_depth=depth, show_param_shapes=False)
    later = tuple(f"blocks.{block}" for block in range(1, settings.model.shape[1]))
    rows = [row for row in table.splitlines() if not row.strip("| ").startswith(later)]
    said = " + ".join(f"{count} x {side}" for count, side in crops)
    return "\n".join([f"the backbone on one slice ({said}), forward; #flops are multiply-adds:", *rows])


def layer_macs(settings: VitSettings, crops: Sequence[tuple[int, int]]) -> FlopCountAnalysis:
    """fvcore's count of the multiply-adds of a pass without gradients; ``crops`` are (count, side in pixels).

    fvcore counts attention as nothing and norms at five operations a number; here attention is counted and norms, like
    all else that is done number by number, are not, so that twice the total is what torch counts. Nothing is computed.
    """
    with torch.device("meta"):
        model = build(settings).eval()  # all of every branch, whatever drop path leaves out
        model.patch_embed.proj = _PatchProduct(model.in_channels, model.dim, model.patch_size)  # type: ignore[assignment]
        inputs = tuple(torch.empty(count, model.in_channels, side, side) for count, side in crops)
    logging.getLogger("fvcore.nn.jit_analysis").setLevel(logging.ERROR)
    counted = FlopCountAnalysis(_Tensors(model), inputs)
    counted.set_op_handle("aten::scaled_dot_product_attention", _attention_macs)
    counted.set_op_handle("aten::layer_norm", None)
    counted.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    with torch.no_grad():
        counted.total()
    return counted


def _attention_macs(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    """q k^T and the product with v."""
    (*batch, length, channels), (*_, keys, _) = get_shape(inputs[0]), get_shape(inputs[1])
    return Counter({"attention": 2 * math.prod(batch) * length * keys * channels})


class _PatchProduct(nn.Linear):
    """The patches' convolution as the matrix product that it is: fvcore cannot trace the former without numbers."""

    def __init__(self, channels: int, dim: int, patch: int) -> None:
        super().__init__(channels * patch * patch, dim)
        self.patch = patch

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, D, h, w]."""
        patches = x.unfold(2, self.patch, self.patch).unfold(3, self.patch, self.patch)
        return super().forward(patches.permute(0, 2, 3, 1, 4, 5).flatten(3)).permute(0, 3, 1, 2)


class _Tensors(nn.Module):
    """A trace wants tensors out."""

    def __init__(self, backbone: VisionTransformer) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, *crops: Tensor) -> tuple[Tensor, ...]:
        return tuple(features.patches for features in self.backbone(list(crops)))
