"""One training step against the arithmetic it contains, and against the official code's.

    python -m tests.benchmarks.bench_step [CONFIG.yaml] [key=value ...]
    OMP_NUM_THREADS=1 python -m tests.benchmarks.bench_step --peer DINOV3 [--peer-site DIR] [key=value ...]

The FLOPs of a step are counted, the machine's matrix product is timed in the same run and with the same threads, and
the ratio of the two times is printed: 1.0 would be a step that does nothing but multiply matrices at full speed. With
it, where the time goes. No data is read: the batch is made once.

With --peer the official DINOv3 code (a folder the user has) makes the same steps from the same weights on the same
batch, by turns with ours, each in a process of its own. First the losses of three steps of both must agree; then time
and memory are compared, ours also with compiled blocks. Everything random of the step is drawn alike by both.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from launch.distributed import World
from launch.settings import load
from pretrain.data.batch import Batch
from pretrain.data.masks import draw_masks
from pretrain.flops import flops_per_step, peak_flops
from pretrain.loop import Guard
from pretrain.methods import Trainable, build_method
from pretrain.optim import build_optimizer, clip_gradients
from pretrain.parallel import fill
from pretrain.settings import Settings
from pretrain.train import place_method
from tests.benchmarks.turns import take_turns

SMALL = (
    "folder=unused", "steps=100", "precision=fp32", "data.corpus=unused", "data.batch_size=4",
    "model={size: s, in_channels: 1}", "data.crops={global_size: 224, local_size: 96}",
    "method.terms.dino.head.prototypes=8192", "method.terms.ibot.head.prototypes=8192",
)  # fmt: skip

SAME = (  # a step that the official code has too, with nothing that changes from step to step
    "folder=unused", "steps=100", "data.corpus=unused", "optim.lr={peak: 1e-4, warmup: 0}", "optim.lr_rule=none",
    "model.drop_path=0.3",
)  # fmt: skip
ON_CPU = ("precision=fp32", "model.size=s", "data.batch_size=4", "data.crops={global_size: 224, local_size: 96}")
ON_GPU = ("precision=bf16", "model.size=b", "data.batch_size=64", "data.crops={global_size: 256, local_size: 112}")


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
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.loop.precision == "bf16"):
            return torch.stack(list(method.loss(batch, 0).values()))

    def timed(part: str, work: Callable[[], object]) -> None:
        times.setdefault(part, []).append(seconds(work, device))

    def alone() -> None:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=settings.loop.precision == "bf16"):
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


def compare(given: argparse.Namespace, words: list[str]) -> None:
    """Official step against ours: that it is the same step, then seconds, slices/s and peak memory of each side."""
    cuda = torch.cuda.is_available()
    words = [*SAME, *(ON_GPU if cuda else ON_CPU), *words]
    settings = load(Settings, None, words)
    batch = settings.data.batch_size
    sides = _sides(given, words, tuple(given.sides.split(",")))
    ready, answers = take_turns(sides, given.rounds)
    print(f"{'GPU' if cuda else 'CPU'}, {settings.precision}, ViT-{settings.model.size}, {batch} slices, "
          f"{ready['ours']['masked']} masked patches; {given.rounds} rounds by turns, medians")  # fmt: skip
    _print_losses({name: said["losses"] for name, said in ready.items()}, settings.precision)
    rows = {name: Row.of(batch, answers[name]) for name in sides}
    _print_rows(rows, flops_per_step(settings), settings, cuda)
    if not cuda:
        print("bf16 ViT-B at batch 64, the largest batch, MFU, wait on data: not measured (no GPU)")
        return
    free, _ = torch.cuda.mem_get_info()
    for name in ("official", "ours", "ours compiled"):  # each alone with the GPU, at the most that it can hold
        largest = int(0.9 * free / rows[name].memory * batch) // 32 * 32
        bigger = [*words, f"data.batch_size={largest}"]
        _, found = take_turns(_sides(given, bigger, (name,)), 2)
        print(f"{name} at the largest batch that fits:")
        _print_rows({name: Row.of(largest, found[name])}, flops_per_step(load(Settings, None, bigger)), settings, cuda)
    whole_run(given.workers)


@dataclass(frozen=True)
class Row:
    """Medians of one side."""

    batch: int
    wall: float  # seconds a step
    cpu: float  # of processor time, which other jobs on the machine lengthen less
    memory: float  # bytes at the peak of a step, above those of Python and torch

    @classmethod
    def of(cls, batch: int, answers: list[dict[str, Any]]) -> Row:
        """From the answers of the rounds."""
        return cls(batch, *(median(answer[name] for answer in answers) for name in ("wall", "cpu", "memory")))


def _sides(given: argparse.Namespace, words: list[str], names: tuple[str, ...]) -> dict[str, list[str]]:
    """The command of each side."""
    paths = [f"--peer={given.peer}", *([f"--peer-site={given.peer_site}"] if given.peer_site else [])]
    commands = {}
    for name in names:
        side, _, how = name.partition(" ")
        command = [sys.executable, "-m", "tests.benchmarks.step_side", side, *paths, f"--repeats={given.repeats}"]
        more = ["--eager"] if how == "eager" else []
        commands[name] = [*command, *more, *words, *(["parallel.compile=true"] if how == "compiled" else [])]
    return commands


def _print_losses(losses: dict[str, list[dict[str, float]]], precision: str) -> None:
    """The first steps of both; in float32 and without compilation their losses must agree to 1e-4 of the value.

    KoLeo must to 5e-2, and the gradient norm is only shown: at the start all class tokens lie within 1e-5 of each
    other, so that the last digit decides which are neighbours.
    """
    for step, (theirs, ours) in enumerate(zip(losses["official eager"], losses["ours"], strict=True)):
        for name, terms in (("official", theirs), ("ours", ours)):
            print(f"  step {step} {name:<9}" + "  ".join(f"{term} {value:.6f}" for term, value in terms.items()))
        apart = {name: abs(ours[name] / value - 1) for name, value in theirs.items() if name != "norm"}
        print("         relative differences  " + "  ".join(f"{name} {value:.1e}" for name, value in apart.items()))
        if precision == "fp32" and any(value > (5e-2 if name == "koleo" else 1e-4) for name, value in apart.items()):
            raise AssertionError("these are not the same steps; no comparison of their speed would mean anything")


def _print_rows(rows: dict[str, Row], flops: float, settings: Settings, cuda: bool) -> None:
    peak = peak_flops(torch.device("cuda" if cuda else "cpu"), settings.precision)
    base = next(iter(rows.values()))
    print(f"  {'':<16}{'s/step':>9}{'slices/s':>10}{'CPU s':>9}{'GiB':>8}{'MFU':>7}   speed and memory of the first")
    for name, row in rows.items():
        took, theirs = (row.wall, base.wall) if cuda else (row.cpu, base.cpu)
        mfu = f"{flops / row.wall / peak:7.1%}" if peak else f"{'-':>7}"
        print(f"  {name:<16}{row.wall:9.3f}{row.batch / row.wall:10.2f}{row.cpu:9.3f}{row.memory / 2**30:8.2f}{mfu}   "
              f"{theirs / took:.2f}x{row.memory / base.memory:8.2f}x")  # fmt: skip


def whole_run(workers: int, *more: str) -> None:
    """A run of the trainer itself, data from phantoms through the real loader: what its own log says of speed."""
    from pretrain.train import main as pretrain
    from tests.benchmarks.bench_data import made_corpus

    with tempfile.TemporaryDirectory() as scratch:
        corpus, folder = made_corpus(Path(scratch)), Path(scratch, "run")
        folder.mkdir()
        pretrain(load(Settings, None, [
            f"folder={folder}", f"data.corpus={corpus}", "steps=60", "log.every=20", "log.tensorboard=false",
            f"data.workers={workers}", "parallel.compile=true", "model.in_channels=1", "data.split=null",
            "checkpoint.every=60", *ON_GPU, *more,
        ]))  # fmt: skip
        last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    seen = {name: last[name] for name in ("slices_per_s", "wait", "mfu", "memory_gib") if name in last}
    print("a whole run, data included: " + ", ".join(f"{name} {value:.3g}" for name, value in seen.items()))


def main(words: list[str]) -> float:
    """Print the table; the ratio of arithmetic to step time (0 where the official code is what ours is held to)."""
    options = argparse.ArgumentParser(allow_abbrev=False)
    options.add_argument("--peer", type=Path)
    options.add_argument("--peer-site", type=Path)
    options.add_argument("--sides", default="official,official eager,ours,ours compiled")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--repeats", type=int, default=None, help="steps a turn")
    options.add_argument("--workers", type=int, default=8)
    given, words = options.parse_known_args(words)
    if given.peer:
        given.repeats = given.repeats or (10 if torch.cuda.is_available() else 1)
        compare(given, words)
        return 0.0
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
