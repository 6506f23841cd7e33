"""What a backbone's tensors say of the model they are for, and how they are made fit to train."""

from __future__ import annotations

import json
from collections.abc import Mapping
from operator import attrgetter
from typing import Any

import pydantic
import torch
from torch import Tensor

from pretrain.models.layers import k_mask
from pretrain.models.positions import PositionSettings
from pretrain.models.vit import SIZES, VitSettings
from pretrain.released_files import ReleasedError, Weights
from pretrain.released_keys import Named

__all__ = ["differences", "doubts", "settings_of", "trainable"]

_DIMENSIONS = {"cls_token": 3, "patch_embed.proj.weight": 4, "blocks.0.attn.qkv.weight": 2, "norm.weight": 1}


def settings_of(weights: Weights, named: Named) -> tuple[VitSettings, tuple[str, ...]]:
    """Model settings from shapes, names and config.json; and the names of those that had to be assumed."""
    state, family = named.state, named.family
    gate = "blocks.0.mlp.w1.weight"
    gated = gate in state
    hidden = state.get(gate if gated else "blocks.0.mlp.fc1.weight")
    odd = [name for name, n in _DIMENSIONS.items() if name not in state or state[name].ndim != n]
    if odd or hidden is None or hidden.ndim != 2:
        raise ReleasedError(
            f"{weights.path} holds no whole vision transformer ({family.name}): {(odd or ['blocks.0.mlp'])[0]} is "
            "missing or has another form; fetch it again"
        )
    config = weights.config if family.config else {}
    width = state["cls_token"].shape[-1]
    blocks = [name.split(".")[1] for name in state if name.startswith("blocks.")]
    depth = 1 + max(int(number) for number in blocks if number.isdecimal())
    heads, assumed = _heads(weights, named, width, config)
    shape = (width, depth, heads)
    size = next((name for name, known in SIZES.items() if known == shape), "custom")
    if "layer_norm_eps" not in config:
        assumed += ("norm_eps",)
    if family.guessed:
        assumed += ("interpolation",)
    try:
        settings = VitSettings.model_validate(
            {
                "size": size,
                **(dict(zip(("width", "depth", "heads"), shape, strict=True)) if size == "custom" else {}),
                "patch_size": state["patch_embed.proj.weight"].shape[-1],
                "in_channels": state["patch_embed.proj.weight"].shape[1],
                "registers": state["storage_tokens"].shape[1] if "storage_tokens" in state else 0,
                "ffn": "swiglu" if gated else "mlp",
                "ffn_ratio": hidden.shape[0] * (1.5 if gated else 1.0) / width,
                "qkv_bias": "blocks.0.attn.qkv.bias" in state,
                "mask_k_bias": "blocks.0.attn.qkv.bias_mask" in state or "blocks.0.attn.qkv.bias" not in state,
                "layerscale": 1e-5 if "blocks.0.ls1.gamma" in state else None,
                "norm_eps": config.get("layer_norm_eps", family.eps),
                "untie_cls_and_patch_norms": "cls_norm.weight" in state,
                "untie_global_and_local_cls_norm": "local_cls_norm.weight" in state,
                "rope": {"base": _base(state, config)},
                "positions": _positions(weights, named),
            }
        )
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(key) for key in first["loc"]) or "shape"
        raise ReleasedError(
            f"{weights.path} ({family.name}) is of a model we cannot build: {place}: {first['msg']}"
        ) from error
    return settings, assumed


def _heads(weights: Weights, named: Named, width: int, config: Mapping[str, Any]) -> tuple[int, tuple[str, ...]]:
    """Attention heads: from config.json or rotary periods; else what models of this width usually have."""
    if config:
        if config.get("hidden_size") != width:
            raise ReleasedError(
                f"{weights.path}: config.json is of another model: it says hidden_size {config.get('hidden_size')}, "
                f"the tensors {width}"
            )
        if (act := config.get("hidden_act", "gelu")) not in ("gelu", "silu"):
            raise ReleasedError(
                f"{weights.path}: config.json asks for hidden_act {act!r}; only gelu and silu are built"
            )
        return int(config["num_attention_heads"]), ()
    if (periods := named.state.get("rope_embed.periods")) is not None and len(periods):
        return max(width // (4 * len(periods)), 1), ()
    if width not in named.family.heads and width % 64:
        raise ReleasedError(
            f"{weights.path} ({named.family.name}) does not state its heads, and a width of {width} is not usual; "
            "axial reads them from Hugging Face's config.json or an export of its own"
        )
    return named.family.heads.get(width, width // 64), ("heads",)


def _base(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> float:
    if "rope_embed.periods" not in state:
        return float(config.get("rope_theta", 100.0))
    periods = state["rope_embed.periods"].double()
    base = float(periods[-1]) ** (len(periods) / (len(periods) - 1)) if len(periods) > 1 else 100.0
    # Periods stored in bfloat16 give 99 or 101, those in float32 the base with an error in its eighth digit.
    return 100.0 if abs(base - 100) < 2 else float(f"{base:g}")


def _positions(weights: Weights, named: Named) -> dict[str, Any] | None:
    """Settings of a table of positions; that of the class token is zero in fixed ones and in no other."""
    table = named.state.get("pos_embed")
    if table is None:
        return None
    count = table.shape[1] if table.ndim == 3 else 0
    grid = int(count**0.5)
    on_cls = count - grid**2
    if grid < 1 or on_cls not in (0, 1):
        raise ReleasedError(
            f"{weights.path} ({named.family.name}): pos_embed {tuple(table.shape)} is for no square grid of patches; "
            "export the model with a square image size"
        )
    family = named.family
    return {
        "grid": grid,
        "on_cls": bool(on_cls),
        "fixed": bool(on_cls) and not bool(table[:, 0].any()),
        "antialias": family.antialias,
        "offset": family.offset,
    }


def trainable(weights: Weights, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Float32 tensors of the same function, with the architecture's own masks; and what was changed for it.

    What a file's masks hide is moved into the numbers. The released DINOv3 files carry bias masks of zeros: loaded as
    they are, their biases could never train.
    """
    wrong = [name for name, tensor in state.items() if not tensor.is_floating_point() or tensor.layout != torch.strided]
    if wrong:
        raise ReleasedError(
            f"{weights.path} holds {wrong[0]} as {state[wrong[0]].dtype}; give the file in floating point"
        )
    stored = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in state.values()} - {"float32"})
    out, notes = {name: tensor.float() for name, tensor in state.items()}, []
    if stored:
        notes.append(f"stored in {' and '.join(stored)}, taken in float32")
    masks = [name for name in state if name.endswith("attn.qkv.bias_mask")]
    odd = 0
    for name in masks:
        mask, bias = out.pop(name), name.removesuffix("_mask")
        architecture = k_mask(len(mask) // 3)
        odd += not torch.equal(mask, architecture)
        out[bias] = out[bias] * mask.nan_to_num(0) * architecture
        out[name] = architecture
    if odd:
        notes.append(
            f"warning: {odd} of {len(masks)} bias masks are not (1, 0, 1) for (q, k, v); multiplied into the biases, "
            "and reset, so that biases can train"
        )
    if bad := [name for name, tensor in out.items() if not tensor.isfinite().all()]:
        raise ReleasedError(f"{weights.path} has numbers that are not finite in {', '.join(bad[:4])}; fetch it again")
    if "rope_embed.periods" in state and state["rope_embed.periods"].dtype == torch.bfloat16:
        notes.append("the periods of the positions were stored in bfloat16; computed anew in float32")
        del out["rope_embed.periods"]
    return out, notes


def differences(
    own: VitSettings,
    wanted: VitSettings,
    state: Mapping[str, Tensor],
    model: Mapping[str, Tensor],
    ignored: tuple[str, ...],
) -> tuple[list[str], str]:
    """The settings by which a model of `wanted` cannot be the file's, `own`: a line each, and what to write to fit it.

    `state` are the file's tensors, `model` those of the model; settings that are `ignored` may differ.
    """
    theirs, ours = _facts(own), _facts(wanted)
    found = [name for name in theirs if name in ours and theirs[name] != ours[name]]
    for name in ("blocks.0.mlp.fc1.weight", "blocks.0.mlp.w1.weight"):
        if name in state and name in model and len(state[name]) != len(model[name]) and "width" not in found:
            found.append("ffn_ratio")
    biases = [tensor for name, tensor in state.items() if name.endswith("attn.qkv.bias")]
    turned = own.positions is None and wanted.positions is None and wanted.qkv_bias
    if not wanted.qkv_bias and any(bias.any() for bias in biases):
        found.append("qkv_bias")
    # Without rotation a bias of k would add the same to every score of a query: nothing.
    if turned and wanted.mask_k_bias and not own.mask_k_bias and any(bias.chunk(3)[1].any() for bias in biases):
        found.append("mask_k_bias")
    if own.untie_cls_and_patch_norms and not wanted.untie_cls_and_patch_norms:
        found.append("untie_cls_and_patch_norms")
    found = [name for name in found if name not in ignored]
    lines = [f"model.{name} is {_text(wanted, name)}, the file's is {_text(own, name)}" for name in found]
    return lines, _remedy(own, wanted, found) if found else ""


def _facts(s: VitSettings) -> dict[str, Any]:
    """What must be equal, by the names of the settings."""
    facts: dict[str, Any] = dict(zip(("width", "depth", "heads"), s.shape, strict=True))
    facts |= {"patch_size": s.patch_size, "registers": s.registers, "ffn": s.ffn == "mlp"}
    facts |= {"layerscale": s.layerscale is None, "positions": s.positions is None}
    if s.positions is not None:
        return facts | {f"positions.{name}": getattr(s.positions, name) for name in ("grid", "on_cls")}
    return facts | {f"rope.{name}": getattr(s.rope, name) for name in ("base", "min_period", "max_period", "normalize")}


def _text(settings: VitSettings, name: str) -> str:
    """A setting's value as YAML has it."""
    sizes = dict(zip(("width", "depth", "heads"), settings.shape, strict=True))
    value = sizes.get(name) or attrgetter(name)(settings)
    if isinstance(value, PositionSettings):
        given = value.model_dump(mode="json", exclude_defaults=True)
        return "{" + ", ".join(f"{key}: {json.dumps(given[key])}" for key in given) + "}"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def _remedy(own: VitSettings, wanted: VitSettings, found: list[str]) -> str:
    """The overrides after which the model is the file's."""
    sizes, words = ("width", "depth", "heads"), []
    if set(sizes) & set(found):
        words.append(f"model.size={own.size}")
        if "custom" in (own.size, wanted.size):
            words += [f"model.{name}={_text(own, name) if own.size == 'custom' else 'null'}" for name in sizes]
    words += [f"model.{name}={_text(own, name)}" for name in found if name not in sizes]
    text = "\nto fit it, write " + " ".join(f"'{word}'" if " " in word or "{" in word else word for word in words)
    if "registers" in found:
        text += f"\nor init_from.registers=fresh, for {wanted.registers} registers drawn anew"
    return text


def doubts(own: VitSettings, wanted: VitSettings, assumed: tuple[str, ...]) -> list[str]:
    """Warnings of settings by which a model of `wanted` computes not quite what the file's does."""
    soft = ["norm_eps"]
    if own.positions is not None and wanted.positions is not None:
        soft += ["positions.antialias", "positions.offset"]
    lines = [
        f"warning: model.{name} is {_text(wanted, name)}, that of the file {_text(own, name)}: not quite the same"
        for name in soft
        if _text(wanted, name) != _text(own, name)
    ]
    if "heads" in assumed and wanted.shape[2] != own.shape[2]:
        lines.append(
            f"warning: model.heads is {wanted.shape[2]}; the file does not say, its kind has {own.shape[2]}; "
            "with another number the function is another"
        )
    return lines
