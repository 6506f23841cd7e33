"""What a checkpoint costs the training: python tests/benchmarks/bench_checkpoint.py [FOLDER] [key=value ...]

The state of a run (ViT-S by default) is saved in the foreground and in the background, and as many bytes are written
plainly to the same disk in the same run. Printed: the time that the training is held up by a save in the background as
a share of that by one in the foreground, the bytes a second of either against the plain write, and how much slower
small work of the training is while the thread writes: the best of three, since other programs disturb.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from launch.distributed import World
from launch.settings import load
from pretrain.checkpoint import Checkpoints, CheckpointSettings, checkpoint_bytes
from pretrain.loop import Guard
from pretrain.optim import build_optimizer
from pretrain.parallel import fill
from pretrain.settings import Settings
from pretrain.train import build_method, place_method

SMALL = (
    "folder=unused", "steps=100", "precision=fp32", "data.corpus=unused", "data.batch_size=4",
    "model={size: s, in_channels: 1}",
    "method.terms.dino.head.prototypes=8192", "method.terms.ibot.head.prototypes=8192",
)  # fmt: skip


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def plain(folder: Path, size: int) -> None:
    """As many bytes, onto the disk, and away again."""
    block = bytes(64 << 20)
    with (folder / "plain").open("wb", buffering=0) as file:
        for start in range(0, size, len(block)):
            file.write(block[: size - start])
        os.fsync(file.fileno())


def small_work(method: Any) -> int:
    """How many rounds of small operations, which need the interpreter, go into 0.2 s."""
    tensor, rounds, start = torch.zeros(256), 0, time.perf_counter()
    while time.perf_counter() - start < 0.2:
        for _ in range(100):
            tensor.add_(1.0)
        rounds += 1
    return rounds


def main(folder: Path, overrides: tuple[str, ...]) -> None:
    here = World(0, 1, 0, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    settings = load(Settings, None, [*SMALL, *overrides])
    method = build_method(settings, Guard(here.device))
    place_method(method, settings, here)
    for name, parts in method.initial(0, None, lambda text: None).items():
        for part, state in parts.items():
            fill(method.networks[name][part], state)
    optimizer = build_optimizer(method.student, settings.optim)
    for parameter in method.student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    size = checkpoint_bytes(method)
    print(f"{here.device}, {size / 2**20:,.0f} MiB, {torch.get_num_threads()} threads, into {folder}")

    def made(name: str, background: bool) -> Checkpoints:
        kept = CheckpointSettings(every=1, keep=1, background=background)
        return Checkpoints(folder / name, method, optimizer, here, kept, say=lambda text: None)

    front, back = made("front", False), made("back", True)
    first = seconds(lambda: back.maybe_save(1))
    back.wait()
    plains, fronts, blocked, wholes, alone, beside = ([] for _ in range(6))  # type: tuple[list[float], ...]
    for step in range(2, 5):
        plains.append(seconds(lambda: plain(folder, size)))
        fronts.append(seconds(lambda step=step: front.maybe_save(step)))
        front.wait()
        alone.append(small_work(method))
        start = time.perf_counter()
        blocked.append(seconds(lambda step=step: back.maybe_save(step)))
        beside.append(small_work(method))
        back.wait()
        wholes.append(time.perf_counter() - start)
        blocked[-1] += seconds(lambda step=step: back.maybe_save(step))
    rate = [size / 2**20 / min(times) for times in (plains, fronts, wholes)]
    print(f"plain write {rate[0]:,.0f} MiB/s, in the foreground {rate[1]:,.0f}, in the background {rate[2]:,.0f}")
    print(f"training is held up {min(fronts):.3f} s in the foreground, {min(blocked):.3f} s in the background")
    print(f"(the first time, when memory is asked for, {first:.3f} s)")
    print(f"held up, background / foreground: {min(blocked) / min(fronts):.3f}")
    print(f"bytes/s, background / plain: {rate[2] / rate[0]:.2f}, foreground / plain: {rate[1] / rate[0]:.2f}")
    print(f"small work beside the thread / alone: {max(beside) / max(alone):.2f}")


if __name__ == "__main__":
    place = sys.argv[1:2] if sys.argv[1:2] and "=" not in sys.argv[1] else []
    with tempfile.TemporaryDirectory(dir=place[0] if place else None) as scratch:
        main(Path(scratch), tuple(sys.argv[1 + len(place) :]))
