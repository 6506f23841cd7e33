"""The runner of several ranks that other tests stand on."""

from __future__ import annotations

import importlib.util
import os
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def _gloo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gloo", Path(__file__).parent.parent / "gloo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def say(rank: int, size: int, word: str) -> list[Any]:
    return [rank, size, word, os.environ["LOCAL_RANK"]]


def one_raises(rank: int, size: int) -> None:
    if rank == 1:
        raise ValueError("the second is at fault")
    time.sleep(60)


def one_dies(rank: int, size: int) -> None:
    if rank == 1:
        print("last words", flush=True)
        os._exit(7)
    time.sleep(60)


def never_ends(rank: int, size: int) -> None:
    time.sleep(60)


def test_each_rank_is_called_with_the_arguments(tmp_path: Path) -> None:
    assert _gloo().run_ranks(f"{__file__}:say", 2, tmp_path, word="a") == [[0, 2, "a", "0"], [1, 2, "a", "1"]]


@pytest.mark.parametrize(
    ("function", "text"),
    [("one_raises", "rank 1 .*the second is at fault"), ("one_dies", "rank 1 .*code 7.*last words")],
)
def test_the_failing_rank_is_named(tmp_path: Path, function: str, text: str) -> None:
    gloo = _gloo()
    start = time.monotonic()
    with pytest.raises(gloo.RankFailed, match=f"(?s){text}"):
        gloo.run_ranks(f"{__file__}:{function}", 2, tmp_path)
    assert time.monotonic() - start < 30


def test_a_rank_that_hangs_is_stopped(tmp_path: Path) -> None:
    gloo = _gloo()
    with pytest.raises(gloo.RankFailed, match="time ran out"):
        gloo.run_ranks(f"{__file__}:never_ends", 2, tmp_path, time_limit=1.0)
