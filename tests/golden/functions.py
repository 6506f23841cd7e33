"""What the single official functions were asked: tables of options, and inputs from seeds."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.golden.trajectory import random

__all__ = ["DINO", "GRAM", "KOLEO", "LENGTH", "SINKHORN", "VITS", "numbers", "v1", "v2", "vit_inputs"]

LENGTH = 30  # steps of every schedule
GRAM = list(product((True, False), (True, False), ("keep", "drop", "drop_teacher")))  # normalized, in image, negatives
KOLEO = [1, 2, 3]  # neighbours
SINKHORN = list(product((0.04, 0.07, 0.1), (1, 2, 3, 5)))  # temperature, iterations
DINO = list(product((1, 2, 3), (2, 3), (True, False)))  # student crops, teacher crops, ignore the diagonal
# Official options of a backbone, and ours.
VITS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"registers": 0, "mask_k_bias": False, "norm_eps": 1e-6, "layerscale": None}),
    (
        {"ffn_layer": "swiglu", "n_storage_tokens": 1, "pos_embed_rope_normalize_coords": "max"},
        {"ffn": "swiglu", "registers": 1, "mask_k_bias": False, "norm_eps": 1e-6, "layerscale": None,
         "rope": {"normalize": "max"}},
    ),
    (
        {"ffn_layer": "swiglu32", "qkv_bias": False, "mask_k_bias": True, "norm_layer": "layernormbf16",
         "layerscale_init": 1e-5, "pos_embed_rope_normalize_coords": "min", "pos_embed_rope_base": 10.0},
        {"ffn": "swiglu32", "registers": 0, "qkv_bias": False, "rope": {"normalize": "min", "base": 10.0}},
    ),
    (
        {"ffn_layer": "swiglu128", "n_storage_tokens": 4, "mask_k_bias": True, "untie_cls_and_patch_norms": True,
         "untie_global_and_local_cls_norm": True, "layerscale_init": 0.1},
        {"ffn": "swiglu128", "untie_cls_and_patch_norms": True, "untie_global_and_local_cls_norm": True,
         "norm_eps": 1e-6, "layerscale": 0.1},
    ),
    (
        {"ffn_layer": "swiglu64", "ffn_ratio": 3.0, "untie_global_and_local_cls_norm": True, "layerscale_init": 0.1,
         "pos_embed_rope_base": None, "pos_embed_rope_min_period": 0.2, "pos_embed_rope_max_period": 7.0},
        {"ffn": "swiglu64", "ffn_ratio": 3.0, "registers": 0, "mask_k_bias": False, "norm_eps": 1e-6,
         "untie_global_and_local_cls_norm": True, "layerscale": 0.1,
         "rope": {"base": None, "min_period": 0.2, "max_period": 7.0}},
    ),
    (
        {"untie_cls_and_patch_norms": True, "ffn_ratio": 2.5, "n_storage_tokens": 2, "mask_k_bias": True},
        {"untie_cls_and_patch_norms": True, "ffn_ratio": 2.5, "registers": 2, "norm_eps": 1e-6, "layerscale": None},
    ),
]  # fmt: skip


def numbers(name: str, *shape: int) -> Tensor:
    """Normal deviates by name."""
    return torch.from_numpy(random("functions", name).standard_normal(shape).astype(np.float32))


def v2(index: int) -> dict[str, Any]:
    """Options of one schedule of the second family."""
    draw = random("v2", index)
    start, peak, end = (float(x) for x in draw.uniform(0.001, 1, 3))
    warmup = int(draw.randint(0, 12))
    cosine = int(draw.randint(0, LENGTH - warmup + 1)) if draw.rand() < 0.7 else None
    return {"start": start, "peak": peak, "end": end, "warmup": warmup, "cosine": cosine}


def v1(index: int) -> dict[str, Any]:
    """Options of one schedule of the first family."""
    draw = random("v1", index)
    start, peak, end = (float(x) for x in draw.uniform(0.001, 1, 3))
    freeze, warmup = int(draw.randint(0, 5)), int(draw.randint(0, 12))
    truncate = float(draw.choice([0.0, 0.0, 0.25, 0.5]))
    return {"start": start, "peak": peak, "end": end, "warmup": warmup, "freeze": freeze, "truncate": truncate}


def vit_inputs() -> tuple[list[Tensor], list[Tensor | None]]:
    """Global crops [2, 3, 24, 40] with masks, local crops [3, 3, 16, 16] without, for patches of 8."""
    masks = torch.from_numpy(random("vit masks").rand(2, 15) < 0.4)
    return [numbers("vit global", 2, 3, 24, 40), numbers("vit local", 3, 3, 16, 16)], [masks, None]
