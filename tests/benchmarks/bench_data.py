"""How many slices a second one core reads, decodes and crops: `python tests/benchmarks/bench_data.py [CORPUS]`.

The table is timed in one run, turn about, in CPU time of one thread, so its ratios hold on a busy machine; the loader's
line is wall time. "naive" is
what a pipeline of RGB images does: each of the ten crops windows the whole slice, makes three channels of it, and
resizes those. Without CORPUS a small one is curated from phantoms of 512x512 pixels.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch.nn import functional as F

from data_curation import curate, phantom
from data_curation.corpus import Corpus
from launch.distributed import World
from pretrain.data.corpora import Corpora, order_of
from pretrain.data.crops import draw_crops
from pretrain.data.order import sample_order
from pretrain.data.steps import Steps
from pretrain.data.stream import DataSettings, batches

BATCH, ROUNDS = 32, 5


def made_corpus(folder: Path) -> Path:
    """A corpus of phantoms as large as clinical slices."""
    phantom.write("folder", folder / "source", range(4), shape=(24, 512, 512), spacing=(5.0, 0.7, 0.7))
    settings = curate.Settings.model_validate(
        {"folder": folder / "corpus", "datasets": [{"name": "folder", "root": folder / "source"}], "workers": 1}
    )
    curate.main(settings)
    return settings.folder


def naive(corpus: Corpus, settings: DataSettings, step: int) -> None:
    """The same boxes, sizes and flips, crop by crop from the whole slice in RGB."""
    crops, window = settings.crops, settings.window
    first = step * BATCH
    for sample in range(first, first + BATCH):
        hu = corpus.hu(int(sample_order(torch.tensor([sample]).numpy(), len(corpus), settings.seed)[0]))
        draws = draw_crops(crops, *hu.shape, seed=settings.seed, sample=sample)
        for k, ((top, left, height, width), flip) in enumerate(
            zip(draws.boxes.tolist(), draws.flips.tolist(), strict=True)
        ):
            rgb = torch.from_numpy(hu).float().clamp(window.low, window.high).expand(3, -1, -1).contiguous()
            size = crops.global_size if k < 2 else crops.local_size
            box = rgb[None, :, top : top + height, left : left + width]
            crop = F.interpolate(box, size=(size, size), mode="bicubic", antialias=True)
            (crop.flip(-1) if flip else crop).sub(window.mean).div(window.std)


def main(arguments: list[str]) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(arguments[0]) if arguments else made_corpus(Path(scratch))
        corpus = Corpus(folder, None)
        settings = DataSettings(corpus=folder, split=None, batch_size=BATCH, workers=2)
        on_cpu, on_device = (
            Steps(settings, Corpora([corpus]), order_of(settings, [corpus]), 0, 1, 16, device)
            for device in (False, True)
        )
        paths: dict[str, Callable[[int], object]] = {
            "decode only": lambda step: [corpus.hu(i % len(corpus)) for i in range(step * BATCH, (step + 1) * BATCH)],
            "naive crops (RGB, whole slice each)": lambda step: naive(corpus, settings, step),
            "worker, crops on the CPU": lambda step: on_cpu[step],
            "worker, crops left to the device": lambda step: on_device[step],
        }
        seconds: dict[str, list[float]] = {name: [] for name in paths}
        for step in range(ROUNDS + 1):
            for name, run in paths.items():
                start = time.process_time()
                run(step)
                seconds[name].append(time.process_time() - start)
        rate = {name: BATCH / median(taken[1:]) for name, taken in seconds.items()}
        crops = settings.crops
        print(f"{corpus}; batches of {BATCH}, 2 x {crops.global_size} + {crops.n_local} x {crops.local_size}; one core")
        print(f"{'path':<38}{'slices/s':>9}{'x naive':>9}{'x decode':>10}")
        for name, value in rate.items():
            base, limit = rate["naive crops (RGB, whole slice each)"], rate["decode only"]
            print(f"{name:<38}{value:9.0f}{value / base:9.2f}{value / limit:10.2f}")
        for place in ("workers", "device"):
            if place == "device" and not torch.cuda.is_available():
                continue
            print(f"through the loader, 2 workers, crops on {place}: {wall(settings, place):.0f} slices/s of wall time")


def wall(settings: DataSettings, place: str) -> float:
    """Slices a second that come out of the whole stream."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    stream = batches(
        settings.model_copy(update={"crop_on": place}),
        world=World(rank=0, size=1, local_rank=0, device=device),
        patch_size=16,
        in_channels=1,
        start=0,
    )
    for _ in range(4):
        next(stream)
    start = time.perf_counter()
    for _ in range(10):
        next(stream)
    if device.type == "cuda":
        torch.cuda.synchronize()
    rate = 10 * BATCH / (time.perf_counter() - start)
    stream.close()
    return rate


if __name__ == "__main__":
    main(sys.argv[1:])
