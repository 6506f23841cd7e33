"""What a run says: the step line, metrics.jsonl over a resume, TensorBoard without torch."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch.log import Log, step_line

VALUES = {"loss": 8.412, "grad": 0.83, "lr": 2e-4}


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_step_line() -> None:
    speed = {"slices_per_s": 1840.0, "wait": 0.03, "memory_gib": 41.2, "mfu": 0.47, "seconds_left": 14.2 * 3600}
    assert step_line(1200, 50000, VALUES, {"dino": 6.1, "ibot": 2.21, "koleo": 0.1}, speed) == (
        "step 1200/50000  loss 8.412 (dino 6.10 ibot 2.21 koleo 0.10)  grad 0.83  lr 2.0e-4  1,840 slices/s  "
        "wait 3%  41.2 GiB  mfu 47%  14h left"
    )
    assert step_line(1, 2, {"loss": math.nan}, {}, {}) == "step 1/2  loss nan"
    assert step_line(2, 2, {"loss": 0.001, "dice": 0.0}, {}, {"slices_per_s": 3.21, "seconds_left": 0.0}) == (
        "step 2/2  loss 1.0e-3  dice 0.00  3.21 slices/s"
    )


def test_a_step_is_written_everywhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([100.0, 102.0, 106.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock, 106.0))
    log = Log(tmp_path, every=4)
    log.step(4, 100, VALUES, terms={"dino": 6.1}, slices_per_step=32, wait=0.5, memory_gib=None, mfu=None)
    log.step(8, 100, {"loss": math.inf}, slices_per_step=32)
    log.event("checkpoint at step 8")
    log.close()
    log.close()
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "step 4/100  loss 8.412 (dino 6.10)  grad 0.83  lr 2.0e-4  64 slices/s  wait 50%  48s left"
    assert out[2] == "checkpoint at step 8"
    assert [line.partition("  ")[2] for line in (tmp_path / "log.txt").read_text().splitlines()] == out
    first, second = rows(tmp_path)
    assert (first["step"], first["loss"], first["term/dino"], first["slices_per_s"]) == (4, 8.412, 6.1, 64.0)
    assert second["loss"] is None  # JSON has no infinity
    assert second["slices_per_s"] == 32.0


def test_which_steps_are_due(tmp_path: Path) -> None:
    log = Log(tmp_path, every=10, active=False)
    assert [step for step in range(26) if log.due(step, 25)] == [0, 10, 20, 25]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_costs_lines_and_not_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = Log(tmp_path)
    log.step(1, 9, VALUES, slices_per_step=1)
    assert log._metrics is not None
    assert log._board is not None
    honest = log._metrics._file
    log._board._writer._async_writer._worker.exception = OSError(28, "No space left on device")
    with Path("/dev/full").open("ab", buffering=0) as log._metrics._file:
        for step in (2, 3):
            log.step(step, 9, VALUES, slices_per_step=1)
    log._metrics._file = honest
    log.step(4, 9, VALUES, slices_per_step=1)
    log.close()
    said = capsys.readouterr().out
    assert said.count("metrics.jsonl: No space left on device; its lines are lost until there is room") == 1
    assert said.count("TensorBoard's file cannot be written: No space left on device") == 1
    assert [row["step"] for row in rows(tmp_path)] == [1, 4]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_console_on_a_full_disk_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def write(self, text: str) -> int:
            return os.write(full, text.encode())

        def flush(self) -> None: ...

    full = os.open("/dev/full", os.O_WRONLY)
    try:
        log = Log(tmp_path, tensorboard=False)
        monkeypatch.setattr(sys, "stdout", Full())
        log.event("a checkpoint")
        log.close()
    finally:
        os.close(full)
    assert "a checkpoint" in (tmp_path / "log.txt").read_text()


def test_other_ranks_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = Log(tmp_path, active=False)
    log.step(1, 2, VALUES, slices_per_step=1)
    log.event("x")
    log.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    log = Log(tmp_path)
    for step in (10, 20, 30):
        log.step(step, 100, {"loss": float(step)}, slices_per_step=1)
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 35, "lo')  # killed while writing
    log = Log(tmp_path, resume_step=20)
    log.step(20, 100, {"loss": 0.5}, slices_per_step=1)
    log.close()
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [(10, 10.0), (20, 0.5)]
    Log(tmp_path).close()
    assert rows(tmp_path) == []


def test_tensorboard_holds_the_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start in (0, 20):
        log = Log(tmp_path, resume_step=start)
        for step in range(start + 10, start + 31, 10):
            log.step(step, 100, {"loss": float(step + start)}, terms={"dino": 1.0}, slices_per_step=1)
        log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [
        (10, 10.0), (30, 50.0), (40, 60.0), (50, 70.0),
    ]  # fmt: skip
    assert "term/dino" in events.Tags()["scalars"]


def test_no_torch_comes_in(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom launch.log import Log\n"
        f"log = Log(Path({str(tmp_path)!r}))\nlog.step(1, 2, {{'loss': 1.0}}, slices_per_step=1)\nlog.close()\n"
        "assert not {'torch', 'tensorflow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=60)
