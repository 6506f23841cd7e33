"""How much of the time of a prediction is the network: `python tests/benchmarks/bench_predict.py [key=value ...]`.

The limit is the network's forward pass alone in the same process: as many windows of the same size as the sliding
window cuts, filled with noise and always in full batches. Prints slices/s of both and their ratio; everything but the
network (resampling, window, blending, argmax) is the rest.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from typing import Literal

import torch

from data_curation import phantom
from data_curation.volumes import Volume
from downstream.decoders import pyramid
from downstream.inference import Window, predict_volume
from downstream.model import Header, build
from launch.settings import Settings, load
from pretrain.data.window import HuWindow
from pretrain.models.vit import VitSettings
from pretrain.models.vit import build as build_vit


class Bench(Settings):
    """What is measured."""

    slices: int = 16
    pixels: int = 256
    patch: int = 128
    spacing: float | None = None
    classes: int = 12
    size: str = "ti"
    device: str = "cpu"
    precision: Literal["fp32", "bf16"] = "fp32"
    batch_size: int = 8
    repeats: int = 3


def main(bench: Bench) -> None:
    """Measures and prints."""
    device = torch.device(bench.device)
    decoder = pyramid.Settings()
    vit = VitSettings(size=bench.size, in_channels=1)  # type: ignore[arg-type]
    model = build(build_vit(vit), decoder, bench.classes).eval().to(device)
    values = tuple(range(bench.classes))
    header = Header(
        vit=vit,
        decoder=decoder,
        organs={"x": (1,)},
        values=values,
        window=HuWindow(),
        spacing=bench.spacing,
        patch=bench.patch,
    )
    made = phantom.make(0, (bench.slices, bench.pixels, bench.pixels), fov_mm=380.0)
    volume = Volume(made.hu, made.spacing, "phantom")
    window = Window(batch_size=bench.batch_size, precision=bench.precision)
    size = bench.pixels if bench.spacing is None else max(bench.patch, round(380.0 / bench.spacing))
    windows = bench.slices * (math.ceil(max(0, size - bench.patch) / (bench.patch * (1 - window.overlap))) + 1) ** 2
    batch = torch.randn(bench.batch_size, 1, bench.patch, bench.patch, device=device)
    predict_volume(model, header, Volume(made.hu[:2], made.spacing, "warm-up"), window)
    whole, alone = [], []
    for _ in range(bench.repeats):
        whole.append(_timed(device, lambda: predict_volume(model, header, volume, window)))
        alone.append(_timed(device, lambda: _forward(model, batch, windows, bench)))
    rate, limit = bench.slices / min(whole), bench.slices / min(alone)
    print(
        f"{windows} windows of {bench.patch} px for {bench.slices} slices of {bench.pixels} px, {bench.size}, {device}"
    )
    print(f"predict  {rate:8.2f} slices/s")
    print(f"forward  {limit:8.2f} slices/s (limit)")
    print(f"ratio    {rate / limit:8.2f}")


@torch.no_grad()
def _forward(model: torch.nn.Module, batch: torch.Tensor, windows: int, bench: Bench) -> None:
    with torch.autocast(batch.device.type, torch.bfloat16, enabled=bench.precision == "bf16"):
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
    main(load(Bench, None, sys.argv[1:]))
