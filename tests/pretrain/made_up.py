"""Slices and ranks made up on the spot, for tests of the stream; a module, so that spawned workers find them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from data_curation.corpus import CorpusError
from pretrain.data.batch import Batch
from pretrain.data.crops import CropSettings
from pretrain.data.stream import Batches, DataSettings, Slices, batches

__all__ = ["CROPS", "Phantoms", "World", "settings", "stream", "take"]

CROPS = CropSettings(global_size=32, local_size=16, n_local=2)


@dataclass(frozen=True)
class World:
    """One rank as the stream sees it."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


@dataclass(frozen=True)
class Phantoms:
    """Slices of various sizes whose first pixel is their number; those in `bad` cannot be read."""

    length: int
    bad: frozenset[int] = frozenset()
    slow: float = 0.0
    deadly: int = -1  # the slice that ends a worker which reads it

    def __len__(self) -> int:
        return self.length

    def hu(self, i: int, /) -> NDArray[np.int16]:
        if self.slow:
            time.sleep(self.slow * (i % 3))  # workers finish out of order
        if i in self.bad:
            raise CorpusError(f"shard-{i // 10:06d}.tar, sample slice-{i}: checksum differs")
        if i == self.deadly and multiprocessing.parent_process() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        hu = np.random.default_rng(i).integers(-1000, 1000, (20 + i % 7, 30 - i % 5), dtype=np.int16)
        hu[0, 0] = i
        return hu

    def key(self, i: int, /) -> str:
        return f"slice-{i}"


def settings(**changes: object) -> DataSettings:
    values: dict[str, object] = {"corpus": Path("corpus"), "batch_size": 4, "workers": 0, "crops": CROPS, "seed": 3}
    return DataSettings.model_validate(values | changes)


def stream(corpus: Slices, data: DataSettings, start: int = 0, world: World = World(), channels: int = 1) -> Batches:
    return batches(data, world=world, patch_size=16, in_channels=channels, start=start, corpus=corpus)


def take(corpus: Slices, data: DataSettings, n: int, start: int = 0, world: World = World()) -> list[Batch]:
    made = stream(corpus, data, start, world)
    try:
        return [next(made) for _ in range(n)]
    finally:
        made.close()
