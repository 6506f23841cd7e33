"""Cost of finding equal scans: `python -m tests.benchmarks.bench_likeness [VOLUMES] [SLICES]`, else 17000 and 228.

First the sign of one slice, in milliseconds and against a SHA-256 of the same pixels. Then `alike` over made-up signs.
Each made-up patient is a smooth path through the 63 coefficients of the code: a path that all patients share, plus one
of its own, both weaker at high frequencies. So neighbouring slices have equal codes, and so have some slices of
different patients, as in real scans. Three volumes in ten are copies of an earlier one: with noise, a part of it
backwards, or every second slice. Needs 1 KB of disk a slice for the thumbnails.
"""

from __future__ import annotations

import hashlib
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_curation import phantom
from data_curation.likeness import CODE_BITS, DOUBTS, SIDE, SURE_BITS, shown, sign
from data_curation.likeness_match import Rules, _proposed, alike

__all__ = ["main"]

WAVES = 8
OWN = 0.5  # amplitude of a patient's own path against the shared one
COPIES = 0.3


def cpu(work: Callable[[], object], rounds: int = 200) -> float:
    """Median CPU milliseconds of a call."""
    taken = []
    for _ in range(rounds):
        start = time.process_time_ns()
        work()
        taken.append(time.process_time_ns() - start)
    return statistics.median(taken) / 1e6


def bench_sign() -> None:
    """One slice of a phantom, its body cut to 350 x 400."""
    hu = phantom.make(1, (1, 512, 512), (5.0, 0.75, 0.75)).hu[0]
    crop = hu[80:430, 56:456]
    ours, sha = cpu(lambda: sign(crop)), cpu(lambda: hashlib.sha256(crop.tobytes()).hexdigest())
    print(f"sign: {ours:.3f} ms for 350 x 400 = {ours / sha:.2f} SHA-256; its crop {cpu(lambda: shown(hu)):.3f} ms")


class Made:
    """Codes in memory and thumbnails on disk, as curation keeps them."""

    def __init__(self, volumes: int, slices: int, path: Path) -> None:
        self.rng = np.random.default_rng(0)
        row, column = np.divmod(np.arange(WAVES**2), WAVES)
        self.order = np.lexsort((row, row**2 + column**2))[1:]
        self.strength = 1 / (1 + np.hypot(row, column)[self.order] ** 1.5)
        waves = np.arange(WAVES)[:, None]
        self.cosines = np.cos(np.pi * waves * (np.arange(SIDE) + 0.5) / SIDE)
        self.shared = self.rng.standard_normal((12, len(self.order)))
        self.codes: list[NDArray[np.uint64]] = []
        self.doubts: list[NDArray[np.uint64]] = []
        self.starts = [0]
        self.file = path
        self.root: list[int] = []  # the volume that each is a copy of, or itself
        kept: dict[int, NDArray[np.float64]] = {}
        with path.open("wb") as file:
            for volume in range(volumes):
                source = int(self.rng.choice(list(kept))) if kept and self.rng.random() < COPIES else None
                values = self.patient(slices) if source is None else self.copy(kept[source], volume % 3)
                self.root.append(volume if source is None else source)
                if source is None and (len(kept) < 400 or self.rng.random() < 0.1):
                    if len(kept) >= 400:  # the originals of copies to come, a few at a time
                        kept.pop(next(iter(kept)))
                    kept[volume] = values
                self.add(values, file.write)

    def path(self, height: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """A smooth curve through the coefficients, [heights, 63]."""
        waves = np.arange(1, len(weights) + 1)
        return np.asarray(np.cos(np.pi * height[:, None] * waves) / waves**0.5 @ weights * self.strength)

    def patient(self, slices: int) -> NDArray[np.float64]:
        """From 60 to 140 % of the usual number of slices over a part of the shared path."""
        low, extent = self.rng.uniform(0, 0.4), self.rng.uniform(0.4, 0.6)
        height = low + extent * np.linspace(0, 1, int(slices * self.rng.uniform(0.6, 1.4)))
        own = OWN * self.rng.standard_normal(self.shared.shape)
        noise = 0.02 * self.rng.standard_normal((len(height), len(self.order))) * self.strength
        return self.path(height, self.shared) + self.path(height, own) + noise

    def copy(self, values: NDArray[np.float64], kind: int) -> NDArray[np.float64]:
        """With noise; a third of it, backwards; every second slice."""
        chosen = (values, values[len(values) // 3 : 2 * len(values) // 3][::-1], values[::2])[kind]
        return chosen + 0.05 * self.rng.standard_normal(chosen.shape) * self.strength

    def add(self, values: NDArray[np.float64], write: Callable[[bytes], object]) -> None:
        bits = np.uint64(1) << np.arange(CODE_BITS, dtype=np.uint64)[::-1]
        self.codes.append(((values > 0) * bits).sum(1, dtype=np.uint64) | np.uint64(1 << CODE_BITS))
        weak = np.argpartition(np.abs(values[:, :SURE_BITS]), DOUBTS, axis=1)[:, :DOUBTS]
        self.doubts.append(bits[weak].sum(1, dtype=np.uint64))
        waves = np.zeros((len(values), WAVES**2))
        waves[:, self.order] = values
        picture = self.cosines.T @ waves.reshape(-1, WAVES, WAVES) @ self.cosines
        scale = 80 / np.maximum(picture.std((1, 2), keepdims=True), 1e-9)
        write(np.clip(128 + scale * picture, 0, 255).astype(np.uint8).tobytes())
        self.starts.append(self.starts[-1] + len(values))

    def thumbs(self, volume: int) -> NDArray[np.uint8]:
        """From disk."""
        start, end = self.starts[volume : volume + 2]
        cells = SIDE * SIDE
        pixels = np.fromfile(self.file, np.uint8, (end - start) * cells, offset=start * cells)
        return pixels.reshape(-1, SIDE, SIDE)


def main() -> None:
    """Prints both."""
    volumes, slices = (int(word) for word in [*sys.argv[1:], *["17000", "228"][len(sys.argv) - 1 :]])
    bench_sign()
    with tempfile.TemporaryDirectory() as folder:
        made = Made(volumes, slices, Path(folder, "thumbs"))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        start = time.process_time()
        proposed = sum(1 for _ in _proposed(made.codes, made.doubts, Rules()))
        looked = time.process_time() - start
        start = time.process_time()
        found = {(one.first, one.second) for one in alike(made.codes, made.doubts, made.thumbs)}
        whole = time.process_time() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    distinct = len(np.unique(np.concatenate(made.codes) >> np.uint64(CODE_BITS - SURE_BITS)))
    print(f"{volumes} volumes, {made.starts[-1]} slices, {distinct} different leading codes")
    print(f"proposed {proposed} pairs in {looked:.0f} s; all of alike {whole:.0f} s of CPU; "
          f"peak {peak:.2f} GiB, {before:.2f} GiB before")  # fmt: skip
    copies = {(root, volume) for volume, root in enumerate(made.root) if root != volume}
    false = sum(made.root[first] != made.root[second] for first, second in found)
    print(f"copies found {len(found & copies)} of {len(copies)}; false pairs {false}")


if __name__ == "__main__":
    main()
