"""The families of published backbones as a table: how to tell each, and what its tensors are called here.

To add one, add an entry: the first whose `marks` are all there, and whose `absent` are not, is it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pretrain.models.layers import k_mask
from pretrain.released_files import ReleasedError, Weights

__all__ = ["FAMILIES", "Family", "Named", "name_tensors"]

_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1536: 24, 4096: 32}  # by width, where shapes do not tell
_QKV, _PERIODS, _REGISTERS = "blocks.0.attn.qkv.weight", "rope_embed.periods", "storage_tokens"


@dataclass(frozen=True)
class Family:
    """What is known of one layout of keys. All patterns are regular expressions."""

    name: str
    marks: tuple[str, ...]  # each is a whole key
    absent: tuple[str, ...] = ()
    containers: tuple[str, ...] = ()  # the file's own key that held the tensors; (): any
    prefixes: tuple[str, ...] = ()  # before every key; (): any
    renames: tuple[tuple[str, str], ...] = ()  # applied to each key in this order
    drops: str = ""  # keys that are no part of a backbone
    eps: float = 1e-6  # of the norms, where the file does not say
    heads: Mapping[int, int] = field(default_factory=lambda: _HEADS)
    antialias: bool = False  # how other grids come of `pos_embed`: see PositionSettings
    offset: float = 0.0
    guessed: bool = False  # files of several families look so, and their rules for other grids differ
    config: bool = False  # a config.json tells heads and epsilon


_HF = (
    (r"^embeddings\.patch_embeddings\.(projection\.)?", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.register_tokens$", _REGISTERS),
    (r"^embeddings\.", ""),
    (r"^(model\.|encoder\.)?layers?\.", "blocks."),
    (r"\.attention\.(?:attention\.)?([qkv])(?:uery|ey|alue|_proj)\.", r".attn.\1."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"^layernorm\.", "norm."),
)
_HF_GATED = (
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.gate_proj\.", ".mlp.w1."),
    (r"\.mlp\.up_proj\.", ".mlp.w2."),
    (r"\.mlp\.(down_proj|weights_out)\.", ".mlp.w3."),
)
_HF_PLAIN = ((r"\.mlp\.up_proj\.", ".mlp.fc1."), (r"\.mlp\.down_proj\.", ".mlp.fc2."))
_DINOV2 = ((r"^register_tokens$", _REGISTERS), (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."))  # blocks may be in chunks
_TIMM = (
    (r"^reg_token$", _REGISTERS),
    (r"\.gamma_([12])$", r".ls\1.gamma"),
    (r"\.attn\.([qv])_bias$", r".attn.\1.bias"),
)
_TIMM_GATED = ((r"\.mlp\.fc1_g\.", ".mlp.w1."), (r"\.mlp\.fc1_x\.", ".mlp.w2."), (r"\.mlp\.fc2\.", ".mlp.w3."))
_DINOV3_HEADS = _HEADS | {1280: 20}
_HF_EMBEDDINGS, _HF_SCALE = r"embeddings\.position_embeddings", r"encoder\.layer\.0\.layer_scale1\.lambda1"
_HF_STEM, _HF_LAYER = r"embeddings\.patch_embeddings\.weight", r"(model\.)?layer\.0\."

# Sources: the official repositories at facebookresearch (dinov3 6876159, dinov2 b8931f7, mae, moco-v3), bytedance/ibot,
# ricklisz/MedDINOv3 a2460c2, transformers 5.23, timm aa4b585.
FAMILIES = (
    Family(
        "MedDINOv3 (teacher)", (_PERIODS, _REGISTERS, _QKV), (r"blocks\.0\.attn\.qkv\.bias",), prefixes=("backbone.",)
    ),
    Family("DINOv3 without registers (teacher)", (_PERIODS, _QKV), (_REGISTERS,), prefixes=("backbone.",)),
    Family("DINOv3", (_PERIODS, _QKV), eps=1e-5),
    Family(
        "DINOv3 (Hugging Face), gated", (_HF_STEM, _HF_LAYER + r"mlp\.gate_proj\.weight"),
        renames=(*_HF, *_HF_GATED), eps=1e-5, heads=_DINOV3_HEADS, config=True,
    ),
    Family(
        "DINOv3 (Hugging Face)", (_HF_STEM, _HF_LAYER + r"mlp\.up_proj\.weight"),
        renames=(*_HF, *_HF_PLAIN), eps=1e-5, heads=_DINOV3_HEADS, config=True,
    ),
    Family(
        "DINOv3 (timm), gated", (r"blocks\.0\.gamma_1", _QKV, r"blocks\.0\.mlp\.fc1_g\.weight"), ("pos_embed",),
        renames=(*_TIMM, *_TIMM_GATED), eps=1e-5, heads=_DINOV3_HEADS,
    ),
    Family(
        "DINOv3 (timm)", (r"blocks\.0\.gamma_1", _QKV), ("pos_embed",),
        renames=_TIMM, eps=1e-5, heads=_DINOV3_HEADS,
    ),
    Family(
        "DINOv2 with registers (Hugging Face)", (_HF_EMBEDDINGS, _HF_SCALE, r"embeddings\.register_tokens"),
        renames=(*_HF, *_HF_GATED), antialias=True, config=True,
    ),
    Family("DINOv2 (Hugging Face)", (_HF_EMBEDDINGS, _HF_SCALE), renames=(*_HF, *_HF_GATED), config=True),
    Family(
        "ViT (Hugging Face: MAE, DINO, iBOT)", (_HF_EMBEDDINGS, r"(encoder\.)?layers?\.0\.layernorm_before\.weight"),
        renames=_HF, drops=r"pooler\..*|decoder\..*", eps=1e-12, config=True,
    ),
    Family(
        "DINOv2 with registers", ("pos_embed", "register_tokens", r"blocks\..*\.ls1\.gamma"),
        renames=_DINOV2, antialias=True,
    ),
    Family("DINOv2", ("pos_embed", "mask_token", r"blocks\..*\.ls1\.gamma"), renames=_DINOV2, offset=0.1),
    Family("DINOv2 (timm)", ("pos_embed", r"blocks\.0\.ls1\.gamma", _QKV), renames=_TIMM, antialias=True),
    Family(
        "MAE (with its decoder)", ("pos_embed", r"decoder_embed\.weight", _QKV),
        drops=r"decoder_.*|mask_token",  # the mask token is the decoder's
    ),
    Family("MAE (encoder)", ("pos_embed", _QKV), ("mask_token",), containers=("model",)),
    Family(
        "MoCo v3", ("pos_embed", _QKV), prefixes=("base_encoder.", "momentum_encoder."),
        drops=r"head\..*", heads=_HEADS | {384: 12},
    ),
    Family(
        "iBOT or DINO", ("pos_embed", _QKV), prefixes=("backbone.",), renames=((r"^masked_embed$", "mask_token"),),
        drops=r"head\..*", offset=0.1,
    ),
    Family(
        "iBOT", ("pos_embed", _QKV), ("reg_token",), containers=("state_dict",),
        renames=((r"^masked_embed$", "mask_token"),), offset=0.1,
    ),
    Family(
        "ViT (timm, DINO, iBOT)", ("pos_embed", _QKV),
        renames=(*_TIMM, (r"^masked_embed$", "mask_token")), antialias=True, guessed=True,
    ),
)  # fmt: skip

_WRAPPERS = re.compile(r"^module\.|_orig_mod\.|_checkpoint_wrapped_module\.|_fsdp_wrapped_module\.")
_PREFIXES = ("", "backbone.", "base_encoder.", "dinov2_with_registers.", "dinov2.", "vit.")
# A key of something else -> what the file is, and what to do. The first that occurs decides.
_CLASSIFIER = (
    "; give the file from before that training, or save its tensors without these to start from it all the same"
)
_FOREIGN = {
    r"(.*\.)?fc_norm\..*": "fine-tuned to classify: its last norm is a classifier's" + _CLASSIFIER,
    r"(.*\.)?(head|head_dist|fc|classifier|linear_head)\.(weight|bias)": "a classifier or linear probe" + _CLASSIFIER,
    r"(.*\.)?(downsample_layers\..*|(dwconv|conv_dw|depthwise_conv)\.weight)": "a ConvNeXt; give a ViT's file",
    r"(.*\.)?(conv1|embedder\.embedder\.convolution)\.weight": "a convolutional network (ResNet); give a ViT's file",
    r"(.*\.)?patch_embed\.proj\.0\.weight": "a ViT with a stem of several convolutions (MoCo v3's vit_conv); give one "
    "with a stem of patches",
    r".*relative_position_bias.*": "a Swin or BEiT model with relative positions; give a plain ViT's file",
    r"(.*\.)?(class_embedding|token_embedding\.weight|visual\..*)": "a CLIP model; give a self-supervised ViT's file",
}


@dataclass(frozen=True)
class Named:
    """A backbone's tensors by the names of the released DINOv3 files, with the family they came from."""

    family: Family
    state: dict[str, Tensor]
    heads: dict[str, dict[str, Tensor]]
    prefix: str  # was before every key, wrappers included
    renamed: tuple[str, ...]  # "old -> new"
    dropped: tuple[str, ...]  # old names


def name_tensors(weights: Weights, encoder: str = "base") -> Named:
    """Tell the family and rename. Raises ReleasedError for a file of no known family, saying what it is if it can.

    Of a file with the two encoders of MoCo v3 it takes `encoder`, base or momentum.
    """
    raw = {_WRAPPERS.sub("", name): name for name in weights.tensors}
    for pattern, what in _FOREIGN.items():
        if key := _first(pattern, raw):
            raise ReleasedError(f"{weights.path} is {what} (it has {key!r})")
    if raw and all(name.startswith("decoder") for name in raw):
        raise ReleasedError(f"{weights.path} holds a decoder only; give the file with the encoder")
    chosen = f"{encoder}_encoder."
    if encoder != "base" and chosen + "cls_token" not in raw:
        raise ReleasedError(f"{weights.path} has no {encoder} encoder; give MoCo v3's full file, or take its base")
    prefixes = [chosen if p == "base_encoder." else p for p in _PREFIXES]
    prefix = next((p for p in prefixes if {p + "cls_token", p + "embeddings.cls_token"} & raw.keys()), None)
    own = [] if prefix is None else [name.removeprefix(prefix) for name in raw if name.startswith(prefix)]
    family = next((f for f in FAMILIES if prefix is not None and _is(f, own, prefix, weights.container)), None)
    if prefix is None or family is None:
        known = "DINOv3, MedDINOv3, DINOv2, MAE, MoCo v3, iBOT, DINO or axial; as published, by Hugging Face or timm"
        first = ", ".join(list(weights.tensors)[:4]) or "(none)"
        raise ReleasedError(
            f"{weights.path} holds no vision transformer known here ({known}); its first keys are {first}"
        )
    state: dict[str, Tensor] = {}
    heads: dict[str, dict[str, Tensor]] = {}
    renamed, dropped = [], []
    for clean, name in raw.items():
        part, _, rest = clean.partition(".")
        if not clean.startswith(prefix) and part.endswith("_head"):
            heads.setdefault(part, {})[rest] = weights.tensors[name]
        elif not clean.startswith(prefix) or re.fullmatch(family.drops, clean.removeprefix(prefix)):
            dropped.append(name)
        else:
            old = clean.removeprefix(prefix)
            new = _renamed(old, family)
            state[new] = weights.tensors[name]
            if old != new or not name.endswith(old):
                renamed.append(f"{old if name.endswith(old) else name} -> {new}")
    if len(weights.tensors) != len(state) + len(dropped) + sum(map(len, heads.values())):
        raise ReleasedError(f"{weights.path} has several tensors of one name but for a wrapper's; save one of them")
    _join_qkv(weights, state)
    _split_gates(state)
    if state.get("mask_token", torch.empty(0)).ndim == 3:
        state["mask_token"] = state["mask_token"][0]
    start = raw.get(prefix + "cls_token", raw.get(prefix + "embeddings.cls_token", "")).removesuffix("cls_token")
    return Named(family, state, heads, start.removesuffix("embeddings."), tuple(renamed), tuple(dropped))


def _renamed(name: str, family: Family) -> str:
    for pattern, replacement in family.renames:
        name = re.sub(pattern, replacement, name)
    return name


def _first(pattern: str, names: Iterable[str]) -> str | None:
    return next((name for name in names if re.fullmatch(pattern, name)), None)


def _is(family: Family, own: Iterable[str], prefix: str, container: str) -> bool:
    return (
        all(_first(mark, own) for mark in family.marks)
        and not any(_first(mark, own) for mark in family.absent)
        and (not family.prefixes or prefix in family.prefixes)
        and (not family.containers or container in family.containers)
    )


def _join_qkv(weights: Weights, state: dict[str, Tensor]) -> None:
    """Make one projection of three, and one bias of those there are: a k without one has none to learn."""
    blocks = {name.rsplit("attn.", 1)[0] + "attn." for name in state if re.search(r"\.attn\.[qkv]\.", name)}
    for block in sorted(blocks):
        parts = {kind: [state.pop(f"{block}{part}.{kind}", None) for part in "qkv"] for kind in ("weight", "bias")}
        three = [tensor for tensor in parts["weight"] if tensor is not None]
        if three:
            if len(three) < 3:
                raise ReleasedError(
                    f"{weights.path} lacks one of q, k and v of {block.removesuffix('.')}; fetch it again"
                )
            state[f"{block}qkv.weight"] = torch.cat(three)
        query, key, value = parts["bias"]
        if query is not None and value is not None:
            key_or_none = torch.zeros_like(query) if key is None else key
            state[f"{block}qkv.bias"] = torch.cat([query, key_or_none, value])
            if key is None:
                state[f"{block}qkv.bias_mask"] = k_mask(len(query))
        elif query is not None or key is not None or value is not None:
            raise ReleasedError(f"{weights.path} has biases of some of q, k and v of {block.removesuffix('.')} only")


def _split_gates(state: dict[str, Tensor]) -> None:
    """A gated feed-forward that packs its gate and its value in one matrix, the gate first, gets two."""
    for name in [name for name in state if re.search(r"\.mlp\.w12\.", name)]:
        state[name.replace(".w12.", ".w1.")], state[name.replace(".w12.", ".w2.")] = state.pop(name).chunk(2)
    for name in [name for name in state if name.endswith(".mlp.fc1.weight")]:
        block, after = name.removesuffix("fc1.weight"), state.get(name.replace(".fc1.", ".fc2."))
        if after is None or after.ndim != 2 or len(state[name]) != 2 * after.shape[1]:
            continue
        for kind in ("weight", "bias"):
            state[f"{block}w1.{kind}"], state[f"{block}w2.{kind}"] = state.pop(f"{block}fc1.{kind}").chunk(2)
            state[f"{block}w3.{kind}"] = state.pop(f"{block}fc2.{kind}")
