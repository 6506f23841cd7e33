"""How fast a volume is labelled: `python tests/benchmarks/bench_predict.py [key=value ...] [--peer DIR]`.

Without `--peer` the limit is the network's forward pass alone in the same process: as many windows of the same size as
the sliding window cuts, filled with noise and always in full batches. Everything but the network (resampling, window,
blending, argmax) is the rest.

With `--peer DIR`, a folder that nnunetv2 and what it needs can be imported from, nnU-Net's own resampling, 2D predictor
and export do the same work with the same network, each side in a process of its own, by turns: from HU to labels on the
volume's grid. With `resampled=true` it is given our slices, resampled outside of its clock. DIR is filled by
`pip install --no-deps --target DIR nnunetv2 acvl-utils batchgenerators batchgeneratorsv2 dynamic-network-architectures
scikit-image lazy-loader imageio tifffile`.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from data_curation import phantom
from downstream.channels import Channel
from downstream.decoders import linear, pyramid
from downstream.inference import Window, predict_volume, windows_at_once
from downstream.model import Header, SegmentationModel, build
from launch.settings import Settings, load
from pretrain.data.window import HuWindow
from pretrain.models.vit import VitSettings
from pretrain.models.vit import build as build_vit
from tests.benchmarks.turns import take_turns

REPOSITORY = Path(__file__).resolve().parents[2]


class Bench(Settings):
    """What is measured."""

    slices: int = 16
    pixels: int = 256
    patch: int = 128
    spacing: float | None = None
    classes: int = 12
    size: str = "ti"
    decoder: Literal["pyramid", "linear"] = "pyramid"
    device: str = "cpu"
    threads: int = 2
    window: Window = Window()
    repeats: int = 3
    resampled: bool = False


def build_model(bench: Bench) -> tuple[SegmentationModel, Header]:
    """The network, the same for one seed, and what goes with it."""
    torch.manual_seed(0)
    decoder = pyramid.Settings() if bench.decoder == "pyramid" else linear.Settings()
    vit = VitSettings(size=bench.size, in_channels=1)  # type: ignore[arg-type]
    model = build(build_vit(vit), decoder, bench.classes).eval().to(torch.device(bench.device))
    values = tuple(range(bench.classes))
    header = Header(
        vit=vit,
        decoder=decoder,
        organs={f"organ {i}": (i,) for i in values[1:]},
        values=values,
        channels=(Channel(window=HuWindow()),),
        spacing=bench.spacing,
        patch=bench.patch,
    )
    return model, header


def main(bench: Bench) -> None:
    """Ours beside the network alone: measures and prints."""
    device = torch.device(bench.device)
    torch.set_num_threads(bench.threads)
    model, header = build_model(bench)
    made = phantom.make(0, (bench.slices, bench.pixels, bench.pixels), fov_mm=380.0)
    windows = _windows(bench)
    together = bench.window.batch_size or windows_at_once(bench.patch, device)
    batch = torch.randn(together, 1, bench.patch, bench.patch, device=device)
    predict_volume([model], header, made.hu[None, :2], made.spacing, bench.window)
    whole, alone = [], []
    for _ in range(bench.repeats):
        whole.append(_timed(device, lambda: predict_volume([model], header, made.hu[None], made.spacing, bench.window)))
        alone.append(_timed(device, lambda: _forward(model, batch, windows, bench)))
    rate, limit = bench.slices / min(whole), bench.slices / min(alone)
    print(_what(bench))
    print(f"predict  {rate:8.2f} slices/s")
    print(f"forward  {limit:8.2f} slices/s (limit)")
    print(f"ratio    {rate / limit:8.2f}")


def compare(bench: Bench, peer: Path, words: list[str]) -> None:
    """Ours beside nnU-Net's predictor: slices/s, memory, and how alike the label maps are."""
    with tempfile.TemporaryDirectory() as folder:
        outs = {side: Path(folder) / f"{side}.npy" for side in ("nnunet", "ours")}
        commands = {
            side: [sys.executable, "-m", "tests.benchmarks.predict_side", side, str(peer), str(out), *words]
            for side, out in outs.items()
        }
        environment = {"OMP_NUM_THREADS": str(bench.threads), "PYTHONPATH": str(REPOSITORY)}
        _, answers = take_turns(commands, bench.repeats, environment)
        theirs, ours = (np.load(out) for out in outs.values())
    print(_what(bench))
    walls, times = {}, {}
    for side, several in answers.items():
        walls[side], times[side] = (statistics.median(answer[key] for answer in several) for key in ("wall", "cpu"))
        memory = max(answer["memory"] for answer in several) / 2**30
        gpu = f", {max(a['gpu'] for a in several) / 2**30:.2f} GiB on the GPU" if "gpu" in several[0] else ""
        rate = bench.slices / walls[side]
        print(f"{side:<8} {rate:8.3f} slices/s, {times[side]:7.1f} s of CPU, {memory:.2f} GiB more memory{gpu}")
    print(f"ratio    {walls['nnunet'] / walls['ours']:8.2f} by the clock, {times['nnunet'] / times['ours']:.2f} by CPU")
    same = f"{(theirs == ours).mean():.4%} of the voxels agree"
    print(f"{same}; Dice {_dice(theirs, ours):.5f} over {bench.classes - 1} organs")


def _dice(one: Any, two: Any) -> float:
    """The mean over organs that either map has."""
    found = []
    for value in np.union1d(one, two):
        first, second = one == value, two == value
        if value:
            found.append(2 * np.count_nonzero(first & second) / (np.count_nonzero(first) + np.count_nonzero(second)))
    return float(np.mean(found))


def _windows(bench: Bench) -> int:
    size = bench.pixels if bench.spacing is None else max(bench.patch, round(380.0 / bench.spacing))
    each = math.ceil(max(0, size - bench.patch) / (bench.patch * (1 - bench.window.overlap))) + 1
    return bench.slices * each**2 * (4 if bench.window.mirror else 1)


def _what(bench: Bench) -> str:
    return (
        f"{_windows(bench)} windows of {bench.patch} px for {bench.slices} slices of {bench.pixels} px, "
        f"{bench.classes} classes, ViT-{bench.size} {bench.decoder}, {bench.device}, {bench.threads} thread(s)"
    )


@torch.no_grad()
def _forward(model: torch.nn.Module, batch: torch.Tensor, windows: int, bench: Bench) -> None:
    with torch.autocast(batch.device.type, torch.bfloat16, enabled=bench.window.precision == "bf16"):
        for start in range(0, windows, len(batch)):
            model(batch[: windows - start])


def _timed(device: torch.device, work: Callable[[], object]) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    options = argparse.ArgumentParser(allow_abbrev=False)
    options.add_argument("--peer", type=Path)
    given, rest = options.parse_known_args()
    chosen = load(Bench, None, rest)
    if given.peer:
        compare(chosen, given.peer, rest)
    else:
        main(chosen)
