"""Weak scaling: what communication costs, measured with two processes here and reckoned for GPUs.

    python -m tests.benchmarks.bench_scaling [--rounds 5] [--step-seconds S] [key=value ...]

Measured: the trainer's own step with a fixed batch a rank, by one process and by two with gloo, each pinned to a core
of its own with one thread. Where one process runs alone, the other core is kept as busy by a second one that runs alone
too, so that what two cores share (memory, cache, clock) is in both and the ratio says what communication costs.

Reckoned: steps of `--step-seconds` (or FLOPs at an assumed MFU) on 8, 64 and 512 GPUs against the bytes that a step
sends, over links whose speeds are assumptions with their sources. No overlap is assumed, then a perfect one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from launch.distributed import World, world
from launch.settings import load
from pretrain.flops import flops_per_step
from pretrain.loop import Guard
from pretrain.methods import build_method
from pretrain.optim import build_optimizer, clip_gradients
from pretrain.parallel import fill
from pretrain.settings import Settings
from pretrain.train import place_method
from tests.benchmarks.bench_step import SAME, make_batch

__all__ = ["Links", "communication", "main", "traffic"]

TINY = (
    "precision=fp32", "model={size: ti, in_channels: 1}", "data.batch_size=4",
    "data.crops={global_size: 96, local_size: 48}", "method.terms.dino.head.prototypes=1024",
    "method.terms.ibot.head.prototypes=1024",
)  # fmt: skip
LARGE = (
    "folder=unused", "steps=100", "data.corpus=unused", "data.batch_size=64", "model.size=l",
    "data.crops={global_size: 256, local_size: 112}",
)  # fmt: skip


@dataclass(frozen=True)
class Links:
    """Bytes a second that one GPU sends while it receives as many: the makers' peaks, none of them measured here."""

    node: int = 8  # GPUs that NVLink joins: HGX H100 and H200
    within: float = 450e9  # NVLink 4: 900 GB/s of both directions (NVIDIA H100 data sheet)
    between: float = 50e9  # one 400 Gb/s InfiniBand NDR port a GPU (NVIDIA DGX H100 user guide)


def traffic(parameters: float, frozen: float, gpus: int, sharding: str, node: int = 8) -> tuple[float, float]:
    """Bytes that one GPU sends in a step: (to GPUs of its own node, to other nodes).

    A ring of n sends (n - 1) / n of the data a rank for an all-gather or a reduce-scatter, twice that for an
    all-reduce. Gradients and gathered weights travel in float32, as our FSDP2 has them. `full` gathers the trained
    weights for the forward and for the backward pass, the frozen ones once, and scatters the gradients; `hybrid` does
    so within a node and then all-reduces its shard of the gradients over nodes; `replicate` all-reduces them all. A
    ring over several nodes is as fast as its slowest link, so what crosses nodes is counted as sent between them.
    """
    ours, theirs = 4.0 * parameters, 4.0 * frozen

    def ring(n: int) -> float:
        return (n - 1) / n

    if sharding == "hybrid":
        inside = min(gpus, node)
        return (3 * ours + theirs) * ring(inside), 2 * ours / inside * ring(max(gpus // node, 1))
    sent = 2 * ours * ring(gpus) if sharding == "replicate" else (3 * ours + theirs) * ring(gpus)
    return (sent, 0.0) if gpus <= node else (0.0, sent)


def communication(sent: tuple[float, float], links: Links) -> float:
    """Seconds to send that, one link after the other."""
    return sent[0] / links.within + sent[1] / links.between


def paper(words: list[str], mfu: float, seconds: float | None) -> None:
    """Print the table for GPUs."""
    settings = load(Settings, None, [*LARGE, *words])
    method = build_method(settings, Guard(torch.device("cpu")))
    counts = {name: sum(p.numel() for p in net.parameters()) for name, net in method.networks.items()}
    trained, frozen = counts["student"], sum(counts.values()) - counts["student"]
    links, flops = Links(), flops_per_step(settings)
    step = seconds or flops / (mfu * 989e12)
    source = "as given" if seconds else f"{flops / 1e12:.1f} TFLOP at an ASSUMED MFU of {mfu:.0%} of 989 TFLOP/s"
    print(f"\nReckoned, nothing measured: ViT-{settings.model.size}, {settings.data.batch_size} slices a GPU, "
          f"{trained / 1e6:.0f} M trained and {frozen / 1e6:.0f} M frozen parameters")  # fmt: skip
    print(f"  a step {step * 1e3:.0f} ms ({source}); NVLink {links.within / 1e9:.0f} GB/s, "
          f"InfiniBand {links.between / 1e9:.0f} GB/s, a direction and GPU, {links.node} GPUs a node")  # fmt: skip
    print(f"  {'GPUs':>5}  {'sharding':<10}{'in node':>9}{'between':>9}{'ms':>8}{'no overlap':>12}{'overlapped':>12}")
    for gpus in (8, 64, 512):
        for sharding in ("replicate", "full", "hybrid"):
            sent = traffic(trained, frozen, gpus, sharding, links.node)
            took = communication(sent, links)
            print(f"  {gpus:>5}  {sharding:<10}{sent[0] / 1e9:8.2f}G{sent[1] / 1e9:8.2f}G{took * 1e3:8.1f}"
                  f"{step / (step + took):12.0%}{step / max(step, took):12.0%}")  # fmt: skip


def measure(words: list[str], rounds: int) -> None:
    """Print the table of one and two processes on this machine."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        print("weak scaling on this machine: not measured (it needs two cores)")
        return
    print("measured, one core and one thread a process; median of the rounds, by turns")
    print(f"  {'sharding':<10}{'1 process':>12}{'2 processes':>13}{'CPU':>8}   weak scaling (wall, CPU)")
    for sharding in ("replicate", "full"):
        alone, together = [], []
        for _ in range(rounds):
            alone += _run(words, sharding, cores, joined=False)
            together += _run(words, sharding, cores, joined=True)
        one, two = ([median(row[i] for row in rows) for i in (0, 1)] for rows in (alone, together))
        kept = f"{one[0] / two[0]:.0%}, {one[1] / two[1]:.0%}"
        print(f"  {sharding:<10}{one[0]:10.3f} s{two[0]:11.3f} s{two[1]:7.3f}s   {kept}", flush=True)


def _run(words: list[str], sharding: str, cores: list[int], joined: bool) -> list[tuple[float, float]]:
    """Wall and CPU seconds a step of two processes, which are one world or a world each."""
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for rank, core in enumerate(cores):
            place = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)} if joined else {}
            common = {
                "OMP_NUM_THREADS": "1",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(20000 + os.getpid() % 20000),
            }
            command = [
                sys.executable,
                "-m",
                "tests.benchmarks.bench_scaling",
                f"--core={core}",
                f"--answer={folder}/{rank}",
            ]
            started.append(
                subprocess.Popen([*command, *words, f"parallel.sharding={sharding}"], env=os.environ | common | place)
            )
        ended = [process.wait() for process in started]
        if any(ended):
            raise RuntimeError("a process failed; what it said stands above")
        return [tuple(json.loads(Path(folder, str(rank)).read_text())) for rank in range(len(cores))]


def side(words: list[str], steps: int = 6) -> tuple[float, float]:
    """Median wall and CPU seconds of a step of this process, in the world its environment tells."""
    torch.set_num_threads(1)
    with world("cpu") as here:
        settings = load(Settings, None, [*SAME, *TINY, *words])
        step = _step(settings, here)
        walls, cpus = [], []
        for _ in range(steps):
            wall, cpu = time.perf_counter(), time.process_time()
            step()
            walls.append(time.perf_counter() - wall)
            cpus.append(time.process_time() - cpu)
    return median(walls[1:]), median(cpus[1:])


def _step(settings: Settings, here: World) -> Callable[[], None]:
    guard = Guard(here.device)
    method = build_method(settings, guard)
    place_method(method, settings, here)
    for name, parts in method.initial(0, None, lambda text: None).items():
        for part, state in parts.items():
            fill(method.networks[name][part], state)
    optimizer, batch = build_optimizer(method.student, settings.optim), make_batch(settings, here.device)
    settings.optim.schedules(settings.steps, settings.data.batch_size).apply(optimizer, 0)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        losses = torch.stack(list(method.loss(batch, 0).values()))
        losses.sum().backward()
        norms = torch.stack(list(clip_gradients(method.student, settings.clip).values()))
        guard.judge(torch.cat([losses.detach(), norms]))
        guard.step(optimizer)
        method.after_step(0)

    return step


def main(words: list[str]) -> None:
    """Print both tables."""
    options = argparse.ArgumentParser(allow_abbrev=False)
    options.add_argument("--rounds", type=int, default=5, help="0: only the table for GPUs")
    options.add_argument("--mfu", type=float, default=0.45)
    options.add_argument("--step-seconds", type=float)
    options.add_argument("--core", type=int)
    options.add_argument("--answer", type=Path)
    given, words = options.parse_known_args(words)
    if given.answer:
        os.sched_setaffinity(0, {given.core})
        given.answer.write_text(json.dumps(side(words)))
        return
    if given.rounds:
        measure(words, given.rounds)
    paper(words, given.mfu, given.step_seconds)


if __name__ == "__main__":
    main(sys.argv[1:])
