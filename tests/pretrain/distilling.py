"""A small distillation: settings, batches that do not depend on the number of ranks, the method with its weights."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from launch.distributed import World
from pretrain.data.batch import Batch
from pretrain.data.views import batch_regions
from pretrain.loop import Guard
from pretrain.methods.multi_teacher import MultiTeacher, Settings, build
from pretrain.models.vit import VitSettings
from pretrain.parallel import ParallelSettings, fill, make_mesh, place, shard

__all__ = ["ADAPTER", "CROP", "GRID", "HERE", "VIT", "B", "batch", "given", "make"]

HERE = World(0, 1, 0, torch.device("cpu"))
VIT = VitSettings(size="custom", width=32, depth=2, heads=2, in_channels=1, layerscale=None, norm_eps=1e-5)
B, CROP = 4, 64
GRID = CROP // 16
ADAPTER = {"slices": 48, "tokens": 16}


def given(files: dict[str, Path], **more: Any) -> Settings:
    teachers = {name: {"kind": "axial", "weights": path} for name, path in files.items()}
    for name, change in more.pop("teachers", {}).items():
        teachers[name] |= change
    return Settings.model_validate({"teachers": teachers, "adapter": ADAPTER, **more})


def batch(method: MultiTeacher, step: int, rank: int = 0, size: int = 1, whole: bool = False) -> Batch:
    """The images [rank * B / size ...] of the global batch of 4: the same pixels and masks for any number of ranks."""
    draw = torch.Generator().manual_seed(step)
    images = F.interpolate(torch.randn(B, 1, 8, 8, generator=draw), size=(CROP, CROP), mode="bicubic")
    views = method.views(CROP, whole)
    each = B // size
    mine = range(rank * each, (rank + 1) * each)
    masks, kept = batch_regions(views, GRID, 1, seed=0, samples=[step * B + image for image in mine])
    seen = tuple(F.interpolate(images[list(mine)], size=(view.size, view.size), mode="bicubic") for view in views.of)
    own = images[list(mine)]
    keys = tuple(f"{step}.{image}" for image in mine)
    hidden = (masks.masks, masks.indices, masks.weights)
    return Batch(own, torch.empty(0), None, *hidden, keys, masked=masks.counts, views=seen, kept=kept)


def make(
    settings: Settings, here: World = HERE, seed: int = 0, sharding: Any = "replicate", model: VitSettings = VIT
) -> MultiTeacher:
    with torch.device("meta"):
        method = build(settings, model=model, steps=10, guard=Guard(here.device))
    parallel = ParallelSettings(sharding=sharding)
    mesh = make_mesh(here, parallel)
    for name, network in method.networks.items():
        if name == "student" or sharding == "full":
            shard(network, here, parallel, frozen=name != "student", mesh=mesh)
        for part in network.values():
            place(part, here.device)
    method.placed()
    for states in (method.fixed(lambda text: None), method.initial(seed, None, lambda text: None)):
        for name, parts in states.items():
            for part, state in parts.items():
                fill(method.networks[name][part], state)
    batches = (batch(method, step, here.rank, here.size, whole=True) for step in range(1000, 2000))
    method.calibrate(lambda: nullcontext(batches), lambda text: None)
    return method
