"""The watchdog: the rank that stands still is named, by files alone, and what merely takes long is left in peace."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import pretrain.watchdog
from launch.beats import Beat, read_beats, standing, write_beat
from launch.distributed import World, world
from launch.status import status_of, told
from pretrain.watchdog import EXIT_CODE, Watchdog, WatchdogSettings
from tests.gloo import RankFailed, run_ranks
from tests.pretrain import test_loop

HERE = World(0, 1, 0, torch.device("cpu"))


def beat(rank: int, step: int = 5, order: int = 1, doing: str = "forward and backward", **other: Any) -> Beat:
    fields = {"size": 4, "host": "n1", "pid": 1, "moves": 9, "idle_s": 0.0, "at": 100.0}
    return Beat(rank=rank, step=step, order=order, doing=doing, **(fields | other))


def test_those_furthest_behind_come_first() -> None:
    beats = [beat(0), beat(1), beat(2, order=0, doing="data", host="n2"), beat(3)]
    assert standing(beats) == "rank 2 on n2 in data at step 5; ranks 0-1, 3 on n1 in forward and backward at step 5"
    said = standing(beats, {3})
    assert said.startswith(
        "rank 3 on n1 without a sign of life (stopped, killed, or the machine is gone), last seen in forw"
    )


def test_signs_of_a_larger_start_and_half_written_ones_are_left_out(tmp_path: Path) -> None:
    for rank in range(3):
        write_beat(tmp_path, beat(rank, size=8, at=1.0))
    write_beat(tmp_path, beat(0, size=2, at=2.0))
    write_beat(tmp_path, beat(1, size=2, at=2.0, doing="x"))
    (tmp_path / "beats" / "00003.json").write_text('{"rank": 3, "si')
    assert [(one.rank, one.at) for one in read_beats(tmp_path)] == [(0, 2.0), (1, 2.0)]
    assert {path.stat().st_size for path in (tmp_path / "beats").glob("0000[012].json")} == {512}


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """In place of the end of this process."""
    codes: list[int] = []
    monkeypatch.setattr(pretrain.watchdog.os, "_exit", codes.append)
    return codes


def test_what_takes_long_is_left_in_peace(tmp_path: Path, ends: list[int]) -> None:
    said: list[str] = []
    with Watchdog(tmp_path, HERE, WatchdogSettings(quiet_s=0.5, first_s=60), said.append) as dog:
        dog.begin(1)
        time.sleep(1.2)  # compilation
        dog.begin(2)
        dog.at("validation")
        time.sleep(1.2)
        dog.at("checkpoint")
        for _ in range(6):
            time.sleep(0.2)
            dog.tick()
    assert not said
    assert not ends
    assert not list((tmp_path / "beats").iterdir())


def test_standing_still_is_said_once_and_then_ended(
    tmp_path: Path, ends: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []
    with Watchdog(tmp_path, HERE, WatchdogSettings(quiet_s=0.5), said.append) as dog:
        dog.begin(6)
        dog.begin(7)
        dog.at("data")
        deadline = time.monotonic() + 30
        while not ends and time.monotonic() < deadline:
            time.sleep(0.05)
    assert ends[0] == EXIT_CODE
    assert said[0].startswith("warning: nothing has moved for ")
    assert "rank 0 on " in said[0]
    assert "in data at step 7" in said[0]
    assert said[1].startswith("error: ")
    assert sum(line.startswith("warning") for line in said) == 1
    assert "test_standing_still_is_said_once" in capsys.readouterr().err, "no stack of the main thread"
    ended = json.loads((tmp_path / "outcome.json").read_text())
    assert ended["state"] == "failed"
    assert "in data at step 7" in ended["error"]
    assert ended["again"], "a job goes back to the queue"


def test_it_can_be_told_to_speak_only_or_be_silent(tmp_path: Path, ends: list[int]) -> None:
    for settings, lines in ((WatchdogSettings(quiet_s=0.3, end=False), 1), (WatchdogSettings(quiet_s=0), 0)):
        said: list[str] = []
        with Watchdog(tmp_path, HERE, settings, said.append) as dog:
            dog.begin(1)
            dog.begin(2)
            time.sleep(1.5)
        assert len(said) == lines
    assert not ends


def hung(rank: int, size: int, folder: Path, how: str) -> None:
    """Rank 1 hangs at step 4: stopped by a signal, or asleep in its data."""

    class Stopping(test_loop.Line):
        def after_step(self, step: int) -> None:
            super().after_step(step)
            if step == 3 and rank == 1 and how == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)

    def sleepy(start: int, spoilt: frozenset[int], rank: int) -> Iterator[test_loop.Numbers]:
        for step, batch in enumerate(honest(start, spoilt, rank), start):
            if step == 3 and rank == 1 and how == "asleep":
                time.sleep(1000)
            yield batch

    honest = test_loop.numbers
    vars(test_loop).update(Line=Stopping, numbers=sleepy)
    with world("cpu") as here:
        test_loop.run(folder, here, steps=100, every=1, watchdog=WatchdogSettings(quiet_s=4.0))


@pytest.mark.parametrize("how", ["asleep", "stopped"])
def test_the_rank_that_hangs_is_named_and_the_run_ends(tmp_path: Path, how: str) -> None:
    with pytest.raises(RankFailed) as failed:
        run_ranks(f"{__file__}:hung", 2, tmp_path, folder=tmp_path, how=how)
    text = str(failed.value)
    assert f"ended with code {EXIT_CODE}" in text
    log = (tmp_path / "log.txt").read_text()
    who = {
        "asleep": "rank 1 on .* in data at step 4",
        "stopped": r"rank 1 on \S+ without a sign of life .* last seen in",
    }
    (warning,) = [line for line in log.splitlines() if "warning: nothing has moved" in line]
    (error,) = [line for line in log.splitlines() if "error: nothing has moved" in line]
    for line in (warning, error):
        assert (found := re.search(who[how], line)), line
        assert found.start() < line.index("rank 0 on"), "the one that is waited for comes first"
    if how == "asleep":
        logs = [path.read_text() for path in tmp_path.glob("ranks_*/1.log")]
        assert "in sleepy" in logs[0], "no stack of the rank that hangs"
    assert (tmp_path / "checkpoints" / "step_00000002").is_dir(), "what was whole is kept"


def test_status_tells_of_a_run_that_stands_still(tmp_path: Path) -> None:
    from launch.run import note_start, open_run
    from launch.settings import Settings

    open_run(tmp_path, Settings(), ["axial", "pretrain"])
    note_start(tmp_path)
    record = json.loads((tmp_path / "run.json").read_text())
    record["starts"][-1]["at"] = "2020-01-01T00:00:00+00:00"
    (tmp_path / "run.json").write_text(json.dumps(record))
    row = {"step": 11, "total": 50, "loss": 3.0, "skipped": 2.0, "at": "2026-11-21T12:00:00+00:00"}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    saved = tmp_path / "checkpoints" / "step_00000010"
    saved.mkdir(parents=True)
    (saved / "progress.json").write_text("{}")
    os.utime(saved / "progress.json", (time.time() - 3600,) * 2)
    now = time.time()
    write_beat(tmp_path, beat(0, size=2, at=now - 1, idle_s=400.0))
    write_beat(tmp_path, beat(1, size=2, at=now - 900, idle_s=2.0, order=0, doing="data"))
    text = told(status_of(tmp_path))
    assert "step 11/50" in text
    assert "2 steps skipped" in text
    assert "last checkpoint: step 10, 60m ago" in text
    assert "nothing has moved for 7m: rank 1 on n1 without a sign of life" in text
    assert "last seen in data at step 5; rank 0 on n1 in forward and backward at step 5" in text
    write_beat(tmp_path, beat(1, size=2, at=now - 1, idle_s=3.0))
    assert "nothing has moved" not in told(status_of(tmp_path))
