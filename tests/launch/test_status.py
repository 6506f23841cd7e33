"""The state of runs, from the files they leave."""

from __future__ import annotations

import json
import os
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from launch.beats import Beat, write_beat
from launch.jobs import Job, note_job
from launch.log import Log
from launch.run import Outcome, RunError, close_run, note_start, now, open_run
from launch.settings import Settings as Base
from launch.status import Settings, main, runs_beneath, status_of, told


class Toy(Base):
    folder: Path


def started(folder: Path, **changes: Any) -> Path:
    open_run(folder, Toy(folder=folder), ["axial", "pretrain", "x.yaml"])
    record = json.loads((folder / "run.json").read_text())
    record["starts"][-1] |= changes
    (folder / "run.json").write_text(json.dumps(record))
    return folder


def test_a_run_from_queue_to_end(tmp_path: Path) -> None:
    started(tmp_path)
    assert status_of(tmp_path).state == "running"
    note_start(tmp_path, waiting=True)
    assert (status_of(tmp_path).state, status_of(tmp_path).where) == ("queued", "")
    note_job(tmp_path, Job("12", "axial-x", "slurm", str(tmp_path / "jobs"), now()))
    assert (status_of(tmp_path).state, status_of(tmp_path).where) == ("queued", "job 12")
    note_start(tmp_path, job="12")
    assert status_of(tmp_path).state == "running"
    assert status_of(tmp_path).where.startswith(f"job 12 process {os.getpid()} on ")
    close_run(tmp_path, "done", Outcome())
    assert (status_of(tmp_path).state, status_of(tmp_path).where, status_of(tmp_path).verb) == ("done", "", "pretrain")


def test_a_process_that_has_gone_was_stopped(tmp_path: Path) -> None:
    started(tmp_path, ticks=1)
    assert status_of(tmp_path).state == "stopped"


def test_another_machines_process_is_believed(tmp_path: Path) -> None:
    started(tmp_path, host="node7", pid=1, job="12")
    status = status_of(tmp_path)
    assert (status.state, status.where) == ("running", "job 12 process 1 on node7")


def test_what_is_told_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    started(tmp_path, at="2020-01-01T00:00:00+00:00")
    row = {
        "step": 120, "total": 500, "loss": 8.4123, "slices_per_s": 1840.0, "seconds_left": 7200.0,
        "at": (datetime.now().astimezone() - timedelta(seconds=40)).isoformat(),
    }  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + '\n{"step": 13')
    first, second = told(status_of(tmp_path)).splitlines()
    assert first.startswith(f"{tmp_path}  pretrain  running  4")
    assert "s ago  process " in first
    assert second == "  step 120/500  loss 8.412  1,840 slices/s  2h left"
    close_run(tmp_path, "failed", error="the disk is full")
    lines = told(status_of(tmp_path)).splitlines()
    assert "  pretrain  failed  " in lines[0]
    assert lines[1:] == ["  step 120/500  loss 8.412  1,840 slices/s", "  the disk is full"]


def test_the_log_is_what_status_reads(tmp_path: Path) -> None:
    started(tmp_path)
    assert status_of(tmp_path).metrics == {}
    log = Log(tmp_path, tensorboard=False)
    log.step(10, 20, {"loss": float("nan")}, slices_per_step=4)
    log.close()
    assert "step 10/20" in told(status_of(tmp_path))
    assert "loss" not in told(status_of(tmp_path))


def test_numbers_of_a_step_do_not_hide_its_loss(tmp_path: Path) -> None:
    started(tmp_path)
    log = Log(tmp_path, tensorboard=False)
    log.step(10, 20, {"loss": 3.0}, slices_per_step=4)
    log.numbers(12, 20, {"watch/rank": 7.0})
    log.close()
    assert "step 12/20  loss 3.000" in told(status_of(tmp_path))


def test_signs_of_life_of_an_earlier_start_are_none_of_this_one(tmp_path: Path) -> None:
    now = datetime.now().timestamp()
    for number, (rank, at) in enumerate([(0, now - 1000), (1, now - 500)]):
        write_beat(tmp_path, Beat(rank, 2, "n1", 7, 5, number, "data", 9, 0.0, at))
    started(tmp_path, at=(datetime.now().astimezone() - timedelta(seconds=600)).isoformat())
    assert [beat.rank for beat in status_of(tmp_path).beats] == [1]


def test_all_runs_beneath_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("x/one", "x/one/inside", "x/one/too/deep", "two", ".hidden/run", "a/b/c/d/e"):
        started(tmp_path / name)
    close_run(tmp_path / "two", "stopped", error="interrupted")
    found = [path.relative_to(tmp_path) for path in runs_beneath(tmp_path, 4)]
    assert found == [Path("two"), Path("x/one/inside"), Path("x/one")]
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/run.json").write_text("{")
    assert main(Settings(folder=tmp_path)) == Outcome()
    out = capsys.readouterr().out
    assert f"{tmp_path}/bad  unreadable\n  {tmp_path}/bad/run.json is not JSON" in out
    assert "two  pretrain  stopped" in out
    assert "  interrupted\n" in out


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="there is no folder"):
        main(Settings(folder=tmp_path / "none"))
    with pytest.raises(RunError, match="no run in"):
        main(Settings(folder=tmp_path))
