"""A backbone as a folder that transformers' DINOv3ViTModel loads: model.safetensors, config.json and how CT is shown.

ExportError(ValueError)    that model has no place for something of this backbone; the text says for what
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_curation.aside import aside
from pretrain.data.window import HuWindow
from pretrain.models.vit import VitSettings
from pretrain.released import Released
from pretrain.weights import write_weights

__all__ = ["ExportError", "config", "preprocessor", "tensors", "write_folder"]

_NAMES = {
    "cls_token": "embeddings.cls_token",
    "storage_tokens": "embeddings.register_tokens",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.bias",
    "norm.weight": "norm.weight",
    "norm.bias": "norm.bias",
}
_IN_BLOCK = {
    "attn.proj.": "attention.o_proj.",
    "mlp.fc1.": "mlp.up_proj.",
    "mlp.fc2.": "mlp.down_proj.",
    "mlp.w1.": "mlp.gate_proj.",
    "mlp.w2.": "mlp.up_proj.",
    "mlp.w3.": "mlp.down_proj.",
    "norm1.": "norm1.",
    "norm2.": "norm2.",
}
_SCALES = {"ls1.gamma": "layer_scale1.lambda1", "ls2.gamma": "layer_scale2.lambda1"}
_MADE_ANEW = ("rope_embed.", "local_cls_norm.")  # positions follow from config.json; local crops are for training only


class ExportError(ValueError):
    """A backbone of which DINOv3ViTModel cannot be made."""


def write_folder(released: Released, folder: Path) -> list[Path]:
    """Writes the three files, each whole or not at all; weights last. Raises ExportError before any is written."""
    described, weights = config(released), tensors(released)
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for name, content in (("config.json", described), ("preprocessor_config.json", preprocessor(released.window))):
        made.append(folder / name)
        with aside(made[-1]) as file:
            file.write((json.dumps(content, indent=2) + "\n").encode())
    made.append(folder / "model.safetensors")
    write_weights(made[-1], weights, {"format": "pt"})
    return made


def config(released: Released) -> dict[str, Any]:
    """What config.json says; `hu_window` in it is ours, and read back. Raises ExportError."""
    s, state = released.settings, released.backbone
    _check(released)
    width, depth, heads = s.shape
    gated = s.ffn != "mlp"
    has_bias = "blocks.0.attn.qkv.bias" in state
    return {
        "architectures": ["DINOv3ViTModel"],
        "model_type": "dinov3_vit",
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "intermediate_size": len(state["blocks.0.mlp.w1.weight" if gated else "blocks.0.mlp.fc1.weight"]),
        "use_gated_mlp": gated,
        "hidden_act": "silu" if gated else "gelu",
        "patch_size": s.patch_size,
        "num_channels": 3,
        "num_register_tokens": s.registers,
        "layer_norm_eps": s.norm_eps,
        "layerscale_value": 1.0 if s.layerscale is None else s.layerscale,
        "drop_path_rate": 0.0,
        "query_bias": has_bias,
        "key_bias": has_bias and _has_key_bias(state),
        "value_bias": has_bias,
        "proj_bias": True,
        "mlp_bias": True,
        "rope_theta": s.rope.base,
        "pos_embed_shift": s.rope.shift,
        "pos_embed_jitter": s.rope.jitter,
        "pos_embed_rescale": s.rope.rescale,
        "dtype": "float32",
        "hu_window": released.window.model_dump(mode="json"),
    }


def tensors(released: Released) -> dict[str, Tensor]:
    """Float32 tensors by the names of the files on the hub; exact, but for a grey stem, whose thirds are rounded."""
    state, found = dict(released.backbone), dict[str, Tensor]()
    width, depth, _ = released.settings.shape
    stem = state["patch_embed.proj.weight"]
    if stem.shape[1] == 1:
        state["patch_embed.proj.weight"] = stem.expand(-1, 3, -1, -1) / 3
    found["embeddings.mask_token"] = state.pop("mask_token", torch.zeros(1, width)).reshape(1, 1, -1)
    for name in [name for name in state if name in _NAMES]:
        found[_NAMES[name]] = state.pop(name)
    found.setdefault("embeddings.register_tokens", torch.empty(1, 0, width))
    for i in range(depth):
        own = {name: state.pop(name) for name in list(state) if name.startswith(f"blocks.{i}.")}
        block = _block({name.split(".", 2)[2]: tensor for name, tensor in own.items()}, width)
        found |= {f"layer.{i}.{name}": tensor for name, tensor in block.items()}
    left = [name for name in state if not name.startswith(_MADE_ANEW)]
    if left:
        raise ExportError(f"{released.path}: DINOv3ViTModel has no place for {', '.join(sorted(left)[:5])}")
    return {name: tensor.float().contiguous().clone() for name, tensor in found.items()}


def _block(own: dict[str, Tensor], width: int) -> dict[str, Tensor]:
    found = {new: own.pop(old, torch.ones(width)) for old, new in _SCALES.items()}
    mask = own.pop("attn.qkv.bias_mask", torch.ones(3 * width))
    for kind in ("weight", "bias"):
        if (joined := own.pop(f"attn.qkv.{kind}", None)) is None:
            continue
        joined = joined * mask if kind == "bias" else joined
        for part, tensor in zip("qkv", joined.chunk(3), strict=True):
            if kind == "weight" or part != "k" or mask[width : 2 * width].any():
                found[f"attention.{part}_proj.{kind}"] = tensor
    for name, tensor in own.items():
        old = next((old for old in _IN_BLOCK if name.startswith(old)), None)
        if old is None:
            raise ExportError(f"DINOv3ViTModel has no place for blocks.*.{name}")
        found[name.replace(old, _IN_BLOCK[old])] = tensor
    return found


def _has_key_bias(state: Mapping[str, Tensor]) -> bool:
    mask = state.get("blocks.0.attn.qkv.bias_mask")
    return mask is None or bool(mask.chunk(3)[1].any())


def preprocessor(window: HuWindow) -> dict[str, Any]:
    """How an image is shown: HU from low to high are the shades 0 to 1, which are normalised; nothing is resized."""
    rows = [window.model_dump() for window in window.parts] * (3 if window.channels == 1 else 1)
    return {
        "image_processor_type": "DINOv3ViTImageProcessor",
        "do_resize": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [(row["mean"] - row["low"]) / (row["high"] - row["low"]) for row in rows],
        "image_std": [row["std"] / (row["high"] - row["low"]) for row in rows],
        "hu_window": window.model_dump(mode="json"),
    }


def _check(released: Released) -> None:
    """Raises ExportError, with all that stands in the way."""
    s = released.settings
    wrong = _positions(s)
    if s.untie_cls_and_patch_norms:
        wrong.append("untie_cls_and_patch_norms: it has one final norm")
    if released.window.channels not in (1, 3):
        wrong.append(f"{released.window.channels} HU windows: it is written with three channels")
    if wrong:
        lines = "\n  ".join(wrong)
        raise ExportError(
            f"{released.path} cannot be a DINOv3ViTModel, which computes otherwise:\n  {lines}\n"
            "export it with format=axial or format=pth"
        )


def _positions(s: VitSettings) -> list[str]:
    if s.positions is not None:
        return ["positions: it turns q and k (rope), and adds no table to the tokens"]
    wrong = []
    if s.rope.base is None:
        wrong.append("rope.min_period, rope.max_period: it knows a base only")
    if s.rope.normalize != "separate":
        wrong.append(f"rope.normalize: {s.rope.normalize}: it divides each axis by its own side")
    if s.rope.dtype == "bf16":
        wrong.append("rope.dtype: bf16: its angles are float32")
    return wrong
