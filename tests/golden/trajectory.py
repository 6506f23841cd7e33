"""What the recorded trajectories are made of: pixels and weights from seeds, and each run's settings on both sides.

`make_trajectory.py` gives them to the official code and writes the numbers; tests/pretrain/test_trajectory.py gives
them to ours. Random numbers come from numpy's RandomState, whose stream is frozen for all time.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["VARIANTS", "Golden", "Variant", "crops", "packed", "picked", "random", "step_of", "weight", "weights"]

STEPS, IMAGES, LOCALS = 9, 4, 3
SAMPLES = 12  # numbers kept of each tensor after each step, besides its norm
WIDTH, DEPTH, HEADS = 64, 4, 4
HEAD = {"prototypes": 96, "hidden": 48, "bottleneck": 32}


@dataclass(frozen=True)
class Variant:
    """One recorded run: the official settings (over the default YAML) and what `pretrain.settings` calls the same."""

    theirs: Mapping[str, Any]
    ours: Mapping[str, Any]
    rope_dtype: str = "fp32"  # the official builder leaves it at bf16 whatever the YAML says; the generator sets it
    ranks: int = 1
    gram_crops: int | None = 96
    draws: bool = False  # whether the run draws random numbers: the generator then seeds as our loop does
    tolerance: float = 1e-5  # of every comparison, relative


def _settings(**changes: Any) -> dict[str, Any]:
    """Our settings by dotted name, over those that all runs share."""
    base: dict[str, Any] = {
        "model.size": "custom",
        "model.width": WIDTH,
        "model.depth": DEPTH,
        "model.heads": HEADS,
        "method.terms.dino.head": HEAD,
        "method.terms.ibot.head": HEAD,
    }
    return base | {name.replace("__", "."): value for name, value in changes.items()}


def _warm(start: float, peak: float, end: float, warmup: int, **more: Any) -> dict[str, Any]:
    """An official schedule, whose epochs are single steps here."""
    return {"start": start, "peak": peak, "end": end, "warmup_epochs": warmup, **more}


def _ours(start: float, peak: float, end: float, warmup: int, **more: Any) -> dict[str, Any]:
    return {"start": start, "peak": peak, "end": end, "warmup": warmup, **more}


_RELEASED = {"n_storage_tokens": 4, "mask_k_bias": True, "norm_layer": "layernormbf16", "drop_path_rate": 0.0}
_GRAM = {"use_loss": True, "ckpt": "recorded", "img_level": True}
_V2 = {
    "lr": _warm(0.0, 8e-3, 2e-3, 3, freeze_last_layer_epochs=2),
    "weight_decay": _warm(0.04, 0.04, 0.2, 0),
    "momentum": _warm(0.9, 0.9, 0.99, 0),
    "teacher_temp": _warm(0.04, 0.07, 0.07, 4),
}
_V2_OURS: dict[str, Any] = {
    "optim__lr": _ours(0.0, 8e-3, 2e-3, 3),
    "optim__weight_decay": _ours(0.04, 0.04, 0.2, 0),
    "optim__freeze_last_layer": 2,
    "method__momentum": _ours(0.9, 0.9, 0.99, 0),
    **{f"method__terms__{name}__teacher_temperature": _ours(0.04, 0.07, 0.07, 4) for name in ("dino", "ibot")},
}
# The released models' architecture; a Gram teacher from the start, renewed once in mid-run.
_PLAIN = Variant(
    theirs={
        "student": _RELEASED,
        "gram": {**_GRAM, "loss_weight": 2.0, "it_first_update": 4, "update_frequency": 3, "max_updates": 1},
        "optim": {"clip_grad": 3.0, "layerwise_decay": 0.9, "patch_embed_lr_mult": 0.2},
        "schedules": _V2,
    },
    ours=_settings(
        **_V2_OURS,
        method__terms__gram__weight=2.0,
        method__gram_teacher={"path": "recorded", "update_every": 3, "first_update": 4, "max_updates": 1},
        clip=3.0,
    ),
)
# The 7B's: gated feed-forward, no q, k, v biases, an own norm for local crops, late weights, every Gram renewal.
_GIANT = Variant(
    theirs={
        "student": {
            **_RELEASED,
            "ffn_layer": "swiglu64",
            "qkv_bias": False,
            "untie_global_and_local_cls_norm": True,
            "pos_embed_rope_base": None,
            "pos_embed_rope_min_period": 0.5,
            "pos_embed_rope_max_period": 20.0,
            "pos_embed_rope_normalize_coords": "max",
        },
        "dino": {
            "reweight_dino_local_loss": True,
            "local_loss_weight_schedule": _warm(1.0, 1.0, 0.5, 3, cosine_epochs=3),
            "koleo_loss_distributed": True,
            "koleo_topk": 2,
            "koleo_loss_weight": 0.2,
        },
        "ibot": {"loss_weight": 0.7},
        "gram": {
            **_GRAM,
            "img_level": False,
            "tokens_used": "unmasked",
            "remove_only_teacher_neg": True,
            "loss_weight_schedule": _warm(0.0, 0.0, 1.5, 3, cosine_epochs=3),
            "update_frequency": 2,
            "global_teacher_resize_antialias": True,
        },
        "optim": {"clip_grad": 30.0, "layerwise_decay": 0.98, "adamw_beta2": 0.99, "scaling_rule": "none"},
        "schedules": _V2 | {"lr": _warm(0.0, 2e-3, 2e-3, 3, freeze_last_layer_epochs=0)},
    },
    ours=_settings(
        **_V2_OURS
        | {
            "optim__lr": _ours(0.0, 2e-3, 2e-3, 3),
            "optim__lr_rule": "none",
            "optim__freeze_last_layer": 0,
            "optim__layer_decay": 0.98,
            "optim__betas": (0.9, 0.99),
        },
        model__ffn="swiglu64",
        model__qkv_bias=False,
        model__untie_global_and_local_cls_norm=True,
        model__rope={"base": None, "min_period": 0.5, "max_period": 20.0, "normalize": "max"},
        method__terms__dino__local_weight=_ours(1.0, 1.0, 0.5, 3, cosine=3),
        method__terms__koleo={"weight": 0.2, "neighbours": 2, "group": 99},
        method__terms__ibot__weight=0.7,
        method__terms__gram={
            "weight": _ours(0.0, 0.0, 1.5, 3, cosine=3),
            "within_image": False,
            "tokens": "unmasked",
            "negatives": "drop_teacher",
            "antialias": True,
        },
        method__gram_teacher={"path": "recorded", "update_every": 2},
        clip=30.0,
    ),
)
# ImageNet's ViT-L: first family of schedules, no registers, a k bias; the EMA teacher is its own Gram teacher.
_EARLY = Variant(
    theirs={
        "student": {
            "drop_path_rate": 0.0,
            "untie_cls_and_patch_norms": True,
            "pos_embed_rope_normalize_coords": "min",
        },
        "dino": {"global_ignore_diagonal": False, "loss_weight": 1.3},
        "gram": {
            "use_loss": True, "ema_teacher": True, "rep_update": False, "it_load_ema_teacher": 0, "loss_weight": 1e-3,
            "tokens_used": "masked", "img_level": False, "remove_neg": True, "normalized": False,
        },
        "teacher": {
            "momentum_teacher": 0.9, "final_momentum_teacher": 1.0, "warmup_teacher_temp_epochs": 4,
            "warmup_teacher_temp": 0.04, "teacher_temp": 0.07,
        },
        "optim": {
            "lr": 8e-3, "min_lr": 1e-4, "warmup_epochs": 3, "freeze_last_layer_epochs": 1, "clip_grad": 0.0,
            "weight_decay": 0.04, "weight_decay_end": 0.4,
        },
    },
    ours=_settings(
        model__registers=0,
        model__mask_k_bias=False,
        model__norm_eps=1e-6,
        model__untie_cls_and_patch_norms=True,
        model__rope={"normalize": "min"},
        method__momentum={"peak": 0.9, "end": 1.0, "form": "v1"},
        method__terms__dino__weight=1.3,
        method__terms__dino__ignore_diagonal=False,
        **{
            f"method__terms__{name}__teacher_temperature": {"start": 0.04, "peak": 0.07, "warmup": 4, "form": "v1"}
            for name in ("dino", "ibot")
        },
        method__terms__gram={
            "weight": 1e-3, "within_image": False, "tokens": "masked", "negatives": "drop", "normalized": False,
        },
        method__gram_teacher={"live": True},
        optim__lr={"peak": 8e-3, "end": 1e-4, "warmup": 3, "form": "v1"},
        optim__weight_decay={"peak": 0.04, "end": 0.4, "form": "v1"},
        optim__freeze_last_layer=1,
        clip=None,
    ),
    gram_crops=None,
)  # fmt: skip
_ROPE = {"shift": 0.2, "jitter": 1.3, "rescale": 2.0}
# Everything that draws random numbers within a step; the EMA teacher is copied into the Gram teacher in mid-run.
_DRAWN = Variant(
    theirs={
        "student": {**_RELEASED, "drop_path_rate": 0.4, **{f"pos_embed_rope_{k}_coords": v for k, v in _ROPE.items()}},
        "gram": {**_GRAM, "rep_update": False, "it_load_ema_teacher": 4},
        "schedules": _V2,
    },
    ours=_settings(
        **_V2_OURS,
        model__drop_path=0.4,
        model__rope=_ROPE,
        method__terms__gram__weight=1.0,
        method__gram_teacher={"path": "recorded", "copy_at": 4},
        clip=3.0,
    ),
    draws=True,
)
# As `build_model` really leaves it: positions in bf16, where a last bit of a query may fall on either side.
_COARSE = Variant(
    theirs={"student": _RELEASED, "schedules": _V2},
    ours=_settings(**_V2_OURS, model__rope={"dtype": "bf16"}, clip=3.0),
    rope_dtype="bf16",
    gram_crops=None,
    tolerance=1e-3,
)
# Two processes, each with half of the images, which seek their KoLeo neighbours together.
_PAIR = Variant(
    theirs={**_PLAIN.theirs, "dino": {"koleo_loss_distributed": True, "koleo_distributed_loss_group_size": 4}},
    ours={**_PLAIN.ours, "method.terms.koleo": {"group": 4}},
    ranks=2,
)
VARIANTS = {
    "plain": _PLAIN, "giant": _GIANT, "early": _EARLY, "drawn": _DRAWN, "coarse": _COARSE, "pair": _PAIR,
}  # fmt: skip


def random(*words: object) -> np.random.RandomState:
    """The generator of these words."""
    return np.random.RandomState(zlib.crc32("/".join(map(str, words)).encode()))


def crops(variant: Variant, step: int, rank: int = 0) -> dict[str, Tensor]:
    """Pixels of one step and rank, crop by crop: global [2B, 3, 64, 64], local [3B, 3, 32, 32], gram [2B, 3, 96, 96].

    Each image has colours of its own in large blocks, with noise on them.
    """
    found, images = {}, IMAGES // variant.ranks
    sizes = {"global": (2, 64), "local": (LOCALS, 32)} | ({"gram": (2, 96)} if variant.gram_crops else {})
    for kind, (count, side) in sizes.items():
        each = []
        for crop in range(count):
            for image in range(rank * images, (rank + 1) * images):
                draw = random(kind, step, crop, image)
                blocks = draw.randint(-200, 200, (3, side // 16, side // 16)).repeat(16, 1).repeat(16, 2)
                each.append(blocks + draw.randint(-60, 60, (3, side, side)))
        found[kind] = torch.from_numpy(np.stack(each).astype(np.float32) / 128)
    return found


def weight(network: str, name: str, shape: Iterable[int]) -> Tensor:
    """A tensor of a network by its official name, such as "student", "backbone.norm.weight"; nothing in it is 0 or 1.

    Teacher and Gram teacher lie near the student. Buffers are not weights: each side makes its own.
    """
    shape = tuple(shape)
    x = random(name).standard_normal(shape)
    if network != "student":
        x = 0.9 * x + 0.3 * random(network, name).standard_normal(shape)
    if "gamma" in name:
        x = 0.6 + 0.1 * x
    elif "norm" in name and name.endswith("weight"):
        x = 1 + 0.1 * x
    elif name.endswith("bias"):
        x = 0.1 * x
    elif "last_layer" in name:
        x = 0.2 * x
    elif "token" in name:
        x = 0.5 * x
    else:
        x = x / np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(x.astype(np.float32))


def weights(network: str, shapes: Mapping[str, Iterable[int]]) -> dict[str, Tensor]:
    """All tensors of a network by name."""
    return {name: weight(network, name, shape) for name, shape in shapes.items()}


def picked(network: str, tensors: Mapping[str, Tensor]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """What is kept of a network after a step: a few numbers [T, SAMPLES] of each tensor, by name, and norms [T]."""
    numbers, norms = [], []
    for name, tensor in sorted(tensors.items()):
        flat = tensor.detach().double().cpu().flatten()
        numbers.append(flat[torch.from_numpy(random("picked", name).randint(0, len(flat), SAMPLES))].numpy())
        norms.append(float(flat.norm()))
    return np.stack(numbers).astype(np.float32), np.array(norms, dtype=np.float32)


def packed(masks: Tensor) -> NDArray[np.uint8]:
    """Masks [2B, N], eight a byte."""
    return np.packbits(masks.numpy(), axis=1)


def step_of(step: int) -> int:
    """The seed of a step's random draws, in the official run and in ours."""
    return 7000 + step


class Golden:
    """One recorded run, as `make_trajectory.py` wrote it."""

    def __init__(self, name: str) -> None:
        with np.load(Path(__file__).resolve().parent / f"trajectory_{name}.npz") as file:
            self._arrays = {key: file[key] for key in file.files}
        self.names: dict[str, list[str]] = json.loads(str(self._arrays["names"]))

    def __getitem__(self, key: str) -> NDArray[Any]:
        return self._arrays[key]

    def masks(self, step: int, rank: int) -> Tensor:
        """The recorded masks [2B, 16] of a step and rank."""
        return torch.from_numpy(np.unpackbits(self._arrays["masks"][step, rank], axis=1).astype(bool))
