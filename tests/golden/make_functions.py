"""Asks the official DINOv3 functions for their values over tables of options: tests/golden/functions.npz.

    python -m tests.golden.make_functions --peer DIR [--site DIR]

The folders are those of make_trajectory.py. Keys: `gram.i`, `koleo.i`, `dino.i` (a loss, then `.grad`), `sinkhorn.i`,
`v1.i` and `v2.i` (schedules), `vit.i.*` (features of a list of masked global and local crops in training, and of their
weighted sum the gradient's samples and norms); i counts through the tables of functions.py.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from tests.golden import functions, trajectory
from tests.golden.functions import numbers
from tests.golden.make_trajectory import reach

SCHEDULES = 40


def _differentiated(loss: Callable[[Tensor], Tensor], x: Tensor, key: str) -> dict[str, Any]:
    x = x.clone().requires_grad_()
    value = loss(x)
    (gradient,) = torch.autograd.grad(value, x)
    return {key: value.item(), f"{key}.grad": gradient.numpy()}


def losses() -> dict[str, Any]:
    """Gram, KoLeo, DINO and Sinkhorn."""
    from dinov3.loss import DINOLoss, GramLoss, KoLeoLossDistributed

    found: dict[str, Any] = {}
    for i, (normalized, within, negatives) in enumerate(functions.GRAM):
        loss = GramLoss(normalized, within, negatives == "drop", negatives == "drop_teacher")
        teacher = numbers("gram teacher", 3, 6, 8)
        found |= _differentiated(lambda x: loss(x, teacher, img_level=within), numbers("gram", 3, 6, 8), f"gram.{i}")  # noqa: B023
    for i, neighbours in enumerate(functions.KOLEO):
        found |= _differentiated(KoLeoLossDistributed(neighbours), numbers("koleo", 7, 5), f"koleo.{i}")
    dino = DINOLoss(16)
    for i, (temperature, iterations) in enumerate(functions.SINKHORN):
        logits = numbers("sinkhorn", 10, 16)
        found[f"sinkhorn.{i}"] = dino.sinkhorn_knopp_teacher(logits, temperature, iterations).numpy()
    for i, (crops, views, ignore) in enumerate(functions.DINO):
        targets = numbers("targets", views, 4, 16).softmax(-1)
        found |= _differentiated(lambda x: dino(x, targets, ignore), numbers("dino", crops, 4, 16), f"dino.{i}")  # noqa: B023
    return found


def schedules() -> dict[str, Any]:
    """Both families."""
    from dinov3.train.cosine_lr_scheduler import CosineScheduler, linear_warmup_cosine_decay

    found: dict[str, Any] = {}
    for i in range(SCHEDULES):
        o = functions.v2(i)
        found[f"v2.{i}"] = linear_warmup_cosine_decay(
            o["start"], o["peak"], o["end"], o["warmup"], functions.LENGTH, o["cosine"]
        )
        o = functions.v1(i)
        found[f"v1.{i}"] = CosineScheduler(
            o["peak"], o["end"], functions.LENGTH, o["warmup"], o["start"], o["freeze"], o["truncate"]
        ).schedule
    return found


def vits() -> dict[str, Any]:
    """Whole backbones."""
    from dinov3.models.vision_transformer import DinoVisionTransformer

    found: dict[str, Any] = {}
    images, masks = functions.vit_inputs()
    for i, (theirs, _) in enumerate(functions.VITS):
        sizes = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8, "pos_embed_rope_dtype": "fp32"}
        model = DinoVisionTransformer(**sizes, **theirs)
        model.init_weights()
        model.load_state_dict(trajectory.weights("student", _shapes(model)), strict=False)
        total = torch.zeros(())
        for kind, out in zip(("global", "local"), model(images, masks=masks, is_training=True), strict=True):
            for key in ("x_norm_clstoken", "x_storage_tokens", "x_norm_patchtokens"):
                found[f"vit.{i}.{kind}.{key}"] = out[key].detach().numpy()
                total = total + (out[key] * numbers(f"{kind} {key}", *out[key].shape)).sum()
        total.backward()  # type: ignore[no-untyped-call]
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found[f"vit.{i}.grad"], found[f"vit.{i}.norms"] = trajectory.picked("student", gradients)
        found[f"vit.{i}.names"] = json.dumps(sorted(gradients))
    return found


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, required=True, help="folder that holds the official package dinov3")
    parser.add_argument("--site", type=Path, help="folder with the packages it needs, where they are not installed")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent, help="where the file goes")
    arguments = parser.parse_args()
    reach(arguments.peer, arguments.site)
    torch.set_num_threads(1)
    with mock.patch.object(nn.Module, "compile"):
        arrays = {**losses(), **schedules(), **vits()}
    path = arguments.out / "functions.npz"
    np.savez_compressed(path, **arrays)
    print(f"{path}: {path.stat().st_size:,} bytes, {len(arrays)} arrays")


if __name__ == "__main__":
    main()
