"""How many slices a second one core reads, decodes and crops.

    python -m tests.benchmarks.bench_data [CORPUS | --scans FOLDER] [--peer DINOV3 --peer-site DIR] [--steps N]

The table is timed in one run, turn about, in CPU time of one thread, so its ratios hold on a busy machine. "naive" is
what a pipeline of RGB images does: each of the ten crops windows the whole slice, makes three channels of it, and
resizes those. "official" is the official code's augmentation and collation (a folder the user has) on the same slices
as RGB PNGs, at the same crop sizes. Then the same through torch's DataLoader with two workers, all of whose CPU time
counts: workers, main process, shared memory. Without CORPUS a small one is curated, of FOLDER's scans or of phantoms of
512x512 pixels.
"""

from __future__ import annotations

import argparse
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from data_curation import curate, phantom
from data_curation.corpus import Corpus
from launch.distributed import World
from pretrain.data.corpora import Corpora, order_of
from pretrain.data.crops import draw_crops
from pretrain.data.order import sample_order
from pretrain.data.steps import Steps
from pretrain.data.stream import DataSettings, batches
from tests.benchmarks import peer

BATCH, ROUNDS = 32, 5


def made_corpus(folder: Path, scans: Path | None = None) -> Path:
    """A corpus of the scans, or of phantoms as large as clinical slices."""
    if scans is None:
        scans = folder / "source"
        phantom.write("folder", scans, range(4), shape=(24, 512, 512), spacing=(5.0, 0.7, 0.7))
    settings = curate.Settings.model_validate(
        {"folder": folder / "corpus", "datasets": [{"name": "folder", "root": scans}], "workers": 1}
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


class Official(Dataset[Any]):
    """The corpus's slices as PNG files, through the official augmentation, as their collation takes them."""

    def __init__(self, corpus: Corpus, settings: DataSettings, folder: Path) -> None:
        from dinov3.data import DataAugmentationDINO

        crops, window = settings.crops, settings.window
        self.augment = DataAugmentationDINO(
            crops.global_scale, crops.local_scale, crops.n_local,
            global_crops_size=crops.global_size, local_crops_size=crops.local_size,
        )  # fmt: skip
        self.files = []
        for i in range(min(len(corpus), 96)):
            hu = torch.from_numpy(corpus.hu(i)).float().clamp(window.low, window.high)
            gray = ((hu - window.low) / (window.high - window.low) * 255).round().byte().numpy()
            self.files.append(folder / f"{i}.png")
            Image.fromarray(gray).convert("RGB").save(self.files[-1])

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, sample: int) -> tuple[dict[str, Any], tuple[()]]:
        image = Image.open(self.files[sample % len(self.files)]).convert("RGB")
        return self.augment(image), ()


def official_collate(settings: DataSettings) -> Callable[[list[Any]], Any]:
    """Their collation with their masks, in bfloat16."""
    from dinov3.data import MaskingGenerator, collate_data_and_cast

    side = settings.crops.global_size // 16
    masks = MaskingGenerator(input_size=(side, side), max_num_patches=0.5 * side * side)
    return partial(
        collate_data_and_cast, mask_ratio_tuple=settings.masks.ratio, mask_probability=settings.masks.probability,
        dtype=torch.bfloat16, n_tokens=side * side, mask_generator=masks,
    )  # fmt: skip


def through_loader(loader: DataLoader[Any]) -> float:
    """Slices a second of one core: all CPU time of the workers and of this process, from their start to their end."""

    def spent() -> float:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(one.ru_utime + one.ru_stime for one in used)

    before = spent()
    steps = sum(1 for _ in loader)
    del loader
    return steps * BATCH / (spent() - before)


def timed(paths: dict[str, Callable[[int], object]]) -> dict[str, float]:
    """Slices a second of CPU time of each path, by turns; the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in paths}
    for step in range(ROUNDS + 1):
        for name, run in paths.items():
            start = time.process_time()
            run(step)
            seconds[name].append(time.process_time() - start)
    return {name: BATCH / median(taken[1:]) for name, taken in seconds.items()}


def table(rate: dict[str, float], bases: tuple[str, ...]) -> None:
    """One line a path, with its ratio to each base."""
    print(f"{'path':<42}{'slices/s':>9}" + "".join(f"{'x ' + base.split(' ')[0]:>12}" for base in bases))
    for name, value in rate.items():
        print(f"{name:<42}{value:9.0f}" + "".join(f"{value / rate[base]:12.2f}" for base in bases))


def main(arguments: list[str]) -> None:
    """Print both tables."""
    options = argparse.ArgumentParser(allow_abbrev=False)
    options.add_argument("corpus", nargs="?", type=Path)
    options.add_argument("--scans", type=Path)
    options.add_argument("--peer", type=Path)
    options.add_argument("--peer-site", type=Path)
    options.add_argument(
        "--steps", type=int, default=4, help="batches of the official loader; ours makes ten times more"
    )
    given = options.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.corpus or made_corpus(Path(scratch), given.scans)
        corpus = Corpus(folder, None)
        settings = DataSettings(corpus=folder, split=None, batch_size=BATCH, workers=2)
        on_cpu, on_device = (
            Steps(settings, Corpora([corpus]), order_of(settings, [corpus]), 0, 1, 16, device)
            for device in (False, True)
        )
        paths: dict[str, Callable[[int], object]] = {
            "naive crops (RGB, whole slice each)": lambda step: naive(corpus, settings, step),
            "decode only": lambda step: [corpus.hu(i % len(corpus)) for i in range(step * BATCH, (step + 1) * BATCH)],
            "ours, crops in the worker": lambda step: on_cpu[step],
            "ours, crops left to the device": lambda step: on_device[step],
        }
        loaders: dict[str, DataLoader[Any]] = {}
        if given.peer:
            peer.load(given.peer, given.peer_site)
            random.seed(0)
            theirs, collate = Official(corpus, settings, Path(scratch)), official_collate(settings)
            paths["official (PNG, PIL, torchvision)"] = lambda step: collate(
                [theirs[step * BATCH + i] for i in range(BATCH)]
            )
            loaders["official (PNG, PIL, torchvision)"] = DataLoader(
                theirs, batch_size=BATCH, sampler=range(given.steps * BATCH), num_workers=2, collate_fn=collate
            )
        for name, steps in (("ours, crops in the worker", on_cpu), ("ours, crops left to the device", on_device)):
            loaders[name] = DataLoader(steps, batch_size=None, sampler=range(given.steps * 10), num_workers=2)
        crops = settings.crops
        print(f"{corpus}; batches of {BATCH}, 2 x {crops.global_size} + {crops.n_local} x {crops.local_size}; one core")
        official = tuple(name for name in paths if name.startswith("official"))
        table(timed(paths), ("naive crops (RGB, whole slice each)", "decode only", *official))
        print("through torch's DataLoader, two workers, masks and shared memory included:")
        table({name: through_loader(loader) for name, loader in loaders.items()}, official)
        for place in ("workers", "device"):
            if place == "device" and not torch.cuda.is_available():
                continue
            print(f"whole stream, 2 workers, crops on {place}: {wall(settings, place):.0f} slices/s of wall time")


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
