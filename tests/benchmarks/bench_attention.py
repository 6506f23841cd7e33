"""Crops of two sizes in one stream of tokens against one forward pass a size: ViT-S, forward and backward.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.bench_attention [images] [rounds]

Prints the median time of each and their ratio; on a machine with a GPU it runs there, under bf16.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from pretrain.models.vit import Features, VisionTransformer, VitSettings, build

__all__ = ["main"]


def _step(forward: Callable[[], list[Features]], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    clock = time.perf_counter if device == "cuda" else time.process_time  # other jobs do not count
    start = clock()
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        loss = torch.stack(
            [features.cls.square().mean() + features.patches.square().mean() for features in forward()]
        ).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def measure(model: VisionTransformer, crops: list[Tensor], rounds: int) -> tuple[float, float]:
    """Median seconds of a step, packed and crop size by crop size; the two take turns, so that load hits both."""
    device = crops[0].device.type
    ways: list[Callable[[], list[Features]]] = [lambda: model(crops), lambda: [model(crop) for crop in crops]]
    for way in ways:
        _step(way, device)
    times = [[_step(way, device) for way in ways] for _ in range(rounds)]
    packed, apart = (statistics.median(column) for column in zip(*times, strict=True))
    return packed, apart


def main() -> None:
    """Runs both ways with 2 x 224 and 8 x 96 pixels an image."""
    images, rounds = (int(word) for word in [*sys.argv[1:], *["1", "5"][len(sys.argv) - 1 :]])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build(VitSettings(size="s")).to(device).train()
    crops = [torch.randn(2 * images, 3, 224, 224, device=device), torch.randn(8 * images, 3, 96, 96, device=device)]
    packed, apart = measure(model, crops, rounds)
    tokens = sum(len(crop) * (5 + (crop.shape[-1] // 16) ** 2) for crop in crops)
    print(
        f"{device}, {images} image(s), {tokens} tokens: packed {packed * 1e3:.0f} ms, size by size {apart * 1e3:.0f} ms"
    )
    print(f"ratio size by size / packed: {apart / packed:.2f}")


if __name__ == "__main__":
    main()
