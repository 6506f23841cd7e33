"""What kept features save: python -m tests.benchmarks.bench_features [FOLDER] [--rounds N] [--steps N] [key=value ...]

Three ViT-S with random weights teach a ViT-Ti on slices of phantoms, live and from a cache, turn about in one process;
adapters are trained, so that nothing is fitted first. Printed: slices a second of both trainings (a median over steps,
the first two of each left out), what it takes to make the cache, its bytes a crop; and how fast its entries are read in
random order, checksums compared, against the same bytes read front to back in one go, which is as fast as the disk or
the page cache can be. Settings that are given hold for both sides, such as device=cuda precision=bf16.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np

from data_curation import curate, phantom
from launch.crew import Workers
from launch.settings import load
from pretrain import features, train
from pretrain.data.cached import Kept
from pretrain.models.vit import VitSettings
from pretrain.settings import Settings
from tests.pretrain.teacher_files import write_export

NAMES = ("one", "two", "three")
BLOCK = 1 << 22


def prepare(root: Path) -> None:
    """Corpus and teachers, where they are not there yet."""
    if not (root / "corpus" / "index.parquet").exists():
        phantom.write("folder", root / "scans", range(8), shape=(32, 160, 160), spacing=(5.0, 2.0, 2.0))
        given = {"folder": root / "corpus", "datasets": [{"name": "folder", "root": root / "scans"}]}
        curate.main(curate.Settings.model_validate(given | {"split": {"train": 1, "val": 0}}), Workers(0))
    for seed, name in enumerate(NAMES):
        if not (root / f"{name}.safetensors").exists():
            write_export(root / f"{name}.safetensors", VitSettings(size="s", in_channels=1), seed)


def settings(root: Path, folder: Path, *more: str) -> Settings:
    folder.mkdir(parents=True, exist_ok=True)
    words = [f"method.teachers.{name}={{kind: axial, weights: {root / name}.safetensors, mask: 0}}" for name in NAMES]
    return load(
        Settings,
        None,
        [
            f"folder={folder}", "steps=1", "precision=fp32", "log={every: 1, tensorboard: false}",
            "watch={every: 0, images_every: 0}", "checkpoint.every=100000", f"data.corpus={root / 'corpus'}",
            "data.batch_size=8", "data.workers=0", "model={size: ti, in_channels: 1}", "method.kind=multi_teacher",
            "data.crops={global_size: 128, n_global: 1, n_local: 0, fixed: 1}", "method.adapter.kind=joint",
            "optim.lr_rule=none", *words, *more,
        ],
    )  # fmt: skip


def trained(root: Path, name: str, *more: str) -> list[float]:
    """Slices a second of every step but the first two."""
    folder = root / "runs" / f"{name}_{time.time_ns()}"
    train.main(settings(root, folder, *more))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["slices_per_s"] for row in rows if "loss" in row][2:]


def forget(paths: list[Path]) -> None:
    """Put the files out of the page cache, as far as the system lets us."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_plainly(paths: list[Path]) -> float:
    """Seconds to read all shards front to back."""
    block, start = bytearray(BLOCK), time.perf_counter()
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(block):
                pass
    return time.perf_counter() - start


def read_entries(cache: Path, batch: int) -> float:
    """Seconds to read every entry once, in random order and batches, as a worker does."""
    kept = Kept(cache, NAMES)
    kept.load()
    order = np.random.default_rng(0).permutation(kept.header["entries"])
    start = time.perf_counter()
    for first in range(0, len(order), batch):
        kept.read(order[first : first + batch].tolist(), [None] * len(NAMES))
    return time.perf_counter() - start


def main() -> None:
    """Make what is not there, run both sides, print the figures."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", nargs="?", type=Path)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--steps", type=int, default=6)
    given, more = options.parse_known_args()
    root = given.folder or Path(tempfile.mkdtemp(prefix="axial-features-"))
    root.mkdir(parents=True, exist_ok=True)
    prepare(root)
    cache, start = root / "cache", time.perf_counter()
    new = not cache.exists()
    features.main(settings(root, cache, *more))
    making = time.perf_counter() - start
    sides: dict[str, list[float]] = {"live": [], "cached": []}
    for _ in range(given.rounds):
        for name, words in (("live", ()), ("cached", (f"method.cache={cache}",))):
            sides[name] += trained(root, name, *more, *words, f"steps={given.steps}")
    header, paths = Kept(cache, NAMES).header, sorted((cache / "shards").iterdir())
    size = sum(path.stat().st_size for path in paths)
    times: dict[str, list[tuple[float, float]]] = {"from the disk": [], "from the page cache": []}
    for _ in range(given.rounds):
        for where, rows in times.items():
            if where == "from the disk":
                forget(paths)
            plain = read_plainly(paths)
            if where == "from the disk":
                forget(paths)
            rows.append((plain, read_entries(cache, 32)))
    live, cached = (median(values) for values in sides.values())
    crops = header["entries"]
    print(f"\n{crops} crops of {header['corpus']['slices']} slices; three ViT-S teach a ViT-Ti")
    if new:
        print(f"making the cache: {crops / making:.1f} crops/s, start included")
    print(f"training live:       {live:8.1f} slices/s")
    print(f"training from it:    {cached:8.1f} slices/s, {cached / live:.1f} times")
    print(f"stored:              {header['entry_bytes']:8,} bytes a crop of numbers, {size / crops:,.0f} with all else")
    for where, rows in times.items():
        plain, ours = (median(column) for column in zip(*rows, strict=True))
        print(
            f"read {where}: {size / ours / 2**20:,.0f} MiB/s in random order ({crops / ours:,.0f} crops/s), "
            f"{size / plain / 2**20:,.0f} MiB/s front to back: {plain / ours:.0%}"
        )


if __name__ == "__main__":
    main()
