"""One training step against the arithmetic it contains: python tests/benchmarks/bench_step.py [key=value ...]

The FLOPs of a step are counted, the machine's matrix product is timed in the same run and with the same threads, and
the ratio of the two times is printed: 1.0 would be a step that does nothing but multiply matrices at full speed. With
it, where the time goes. No data is read: the batch is made once.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from launch.distributed import World
from launch.settings import load
from pretrain.data.batch import Batch
from pretrain.data.masks import draw_masks
from pretrain.flops import flops_per_step
from pretrain.loop import Guard
from pretrain.methods import Trainable, build_method
from pretrain.optim import build_optimizer, clip_gradients
from pretrain.parallel import fill
from pretrain.settings import Settings
from pretrain.train import place_method

SMALL = (
    "folder=unused", "steps=100", "precision=fp32", "data.corpus=unused", "data.batch_size=4",
    "model={size: s, in_channels: 1}", "data.crops={global_size: 224, local_size: 96}",
    "method.terms.dino.head.prototypes=8192", "method.terms.ibot.head.prototypes=8192",
)  # fmt: skip


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square product, the best of several."""
    side = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return max(2 * side**3 / seconds(lambda: a @ b, device) for _ in range(5))


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call, the device's queue emptied before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def make_batch(settings: Settings, device: torch.device) -> Batch:
    """Noise in the shapes of the settings."""
    (shape, *_), images, channels = settings.data.crops.shapes, settings.data.batch_size, settings.model.in_channels
    side = shape.global_size // settings.model.patch_size
    masks = draw_masks(settings.data.masks, (side, side), images, seed=0, step=0, rank=0)
    gram = torch.randn(2 * images, channels, shape.gram_size, shape.gram_size) if shape.gram_size else None
    return Batch(
        torch.randn(2 * images, channels, shape.global_size, shape.global_size),
        torch.randn(settings.data.crops.n_local * images, channels, shape.local_size, shape.local_size),
        gram, masks.masks, masks.indices, masks.weights, ("",) * images,
    ).to(device)  # fmt: skip


def make_method(settings: Settings, guard: Guard, device: torch.device) -> Trainable:
    """The networks of the settings on the device, with fresh weights."""
    method = build_method(settings, guard)
    place_method(method, settings, World(0, 1, 0, device))
    for name, parts in method.initial(0, None, lambda text: None).items():
        for part, state in parts.items():
            fill(method.networks[name][part], state)
    return method


def profile(settings: Settings, device: torch.device, rounds: int = 5) -> dict[str, float]:
    """Median seconds of each part of a step."""
    guard = Guard(device)
    method = make_method(settings, guard, device)
    optimizer, batch = build_optimizer(method.student, settings.optim), make_batch(settings, device)
    teacher = method.networks["teacher"]["backbone"]
    times: dict[str, list[float]] = {}

    def losses() -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
            return torch.stack(list(method.loss(batch, 0).values()))

    def timed(part: str, work: Callable[[], object]) -> None:
        times.setdefault(part, []).append(seconds(work, device))

    def alone() -> None:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
            teacher(batch.global_crops)

    for _ in range(rounds + 2):
        held: list[torch.Tensor] = []
        timed("(teacher's backbone)", alone)
        timed("forward", lambda held=held: held.append(losses()))
        timed("backward", lambda held=held: held[0].sum().backward())
        timed("clip", lambda: clip_gradients(method.student, settings.clip))
        timed("optimizer", lambda: guard.step(optimizer))
        timed("average", lambda: method.after_step(0))
        optimizer.zero_grad(set_to_none=True)
    return {part: median(all_[2:]) for part, all_ in times.items()}


def main(words: list[str]) -> float:
    """Print the table; the ratio of arithmetic to step time."""
    settings = load(Settings, Path(words.pop(0)) if words and words[0].endswith(".yaml") else None, [*SMALL, *words])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    flops = flops_per_step(settings)
    peak = matmul_peak(device, torch.bfloat16 if settings.precision == "bf16" else torch.float32)
    parts = profile(settings, device)
    step = sum(took for part, took in parts.items() if not part.startswith("("))
    ideal = flops / peak
    print(f"{flops / 1e9:.1f} GFLOP a step at {peak / 1e9:.1f} GFLOP/s (a matrix product here and now): {ideal:.3f} s")
    for part, took in parts.items():
        print(f"  {part:<22}{took:8.4f} s  {took / step:5.1%}")
    print(f"step {step:.3f} s, {settings.data.batch_size / step:.1f} slices/s, arithmetic / step = {ideal / step:.2f}")
    return ideal / step


if __name__ == "__main__":
    main(sys.argv[1:])
