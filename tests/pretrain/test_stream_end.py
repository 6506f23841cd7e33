"""A process whose stream has workers ends: after an error in one of them, and without having closed the stream."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from launch.distributed import World
from pretrain.data.stream import DataSettings, batches

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Slices:
    broken: bool

    def __len__(self) -> int:
        return 30

    def hu(self, i: int, /) -> NDArray[np.int16]:
        if self.broken:
            raise RuntimeError("no such shape")
        return np.zeros((32, 32), np.int16)

    def key(self, i: int, /) -> str:
        return f"slice-{i}"


@pytest.mark.parametrize("word", ["error", "unclosed"])
def test_the_process_ends(word: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-P", __file__, word],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        timeout=120,  # a worker that nobody ends keeps its parent for ever
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == (word == "error"), ended.stderr
    assert ("RuntimeError: no such shape" in ended.stderr) == (word == "error")


def main(word: str) -> None:
    crops = {"global_size": 32, "local_size": 16, "n_local": 1}
    settings = {"corpus": "corpus", "batch_size": 2, "workers": 1, "start_method": "fork", "crops": crops}
    made = batches(
        DataSettings.model_validate(settings),
        world=World(0, 1, 0, torch.device("cpu")),
        patch_size=16,
        in_channels=1,
        start=0,
        corpus=Slices(word == "error"),
    )
    globals()["held"] = made
    try:
        next(made)
    finally:
        if word == "error":
            made.close()


if __name__ == "__main__":
    main(sys.argv[1])
