"""Teachers that are sharded over ranks, each with its own images and its own patches left out."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from launch.distributed import world
from launch.settings import plugins
from pretrain.parallel import ParallelSettings, fill, place, shard
from pretrain.teachers import build as build_any
from tests.gloo import run_ranks
from tests.pretrain.test_teachers import KINDS, filled, tokens


def images_of(rank: int, patch: int) -> tuple[Tensor, None, Tensor]:
    draw = torch.Generator().manual_seed(rank)
    kept = torch.stack([torch.randperm(16, generator=draw)[:7] for _ in range(2)])
    return torch.randn(2, 3, 4 * patch, 4 * patch, generator=draw), None, kept


def shared_out(rank: int, size: int, folder: str) -> list[Tensor]:
    """What teachers that are sharded over the ranks make of each rank's own images."""
    found = []
    with world("cpu") as here:
        for kind in ("dinov3", "mae"):
            with torch.device("meta"):
                teacher = build_any(
                    plugins("pretrain.teachers")[kind].Settings(weights=Path(folder) / kind / "weights")
                )
            parts = nn.ModuleDict({"backbone": teacher.network})
            shard(parts, here, ParallelSettings(sharding="full"), frozen=True)
            place(parts, here.device)
            fill(teacher.network, teacher.weights(lambda _: None))
            with torch.no_grad():
                found.append(tokens(parts["backbone"](*images_of(rank, teacher.patch_size))))
    return found


def test_a_sharded_teacher_leaves_patches_out_too(tmp_path: Path) -> None:
    for kind in ("dinov3", "mae"):
        (tmp_path / kind).mkdir()
        KINDS[kind][0](tmp_path / kind)
    found = run_ranks(f"{__file__}:shared_out", 2, tmp_path, folder=str(tmp_path))
    for number, kind in enumerate(("dinov3", "mae")):
        teacher = filled(kind, tmp_path / kind / "weights")
        for rank in (0, 1):
            with torch.no_grad():
                want = tokens(teacher.network(*images_of(rank, teacher.patch_size)))
            torch.testing.assert_close(found[rank][number], want, rtol=1e-5, atol=1e-5)
