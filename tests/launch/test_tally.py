"""How far shared out tasks are: a file that is there while they are in work, and shown only then."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch import tally
from launch.crew import Lost
from launch.run import close_run
from launch.status import status_of, told
from launch.tally import Tally, read_tally
from tests.launch.crew_tasks import Noted, name
from tests.launch.slurm_programs import run_of
from tests.launch.test_array import REPOSITORY, local


def test_status_shows_them_while_the_run_is_at_it(tmp_path: Path) -> None:
    run = run_of(tmp_path / "corpus")
    assert status_of(run).tasks is None
    (run / "jobs").mkdir()
    Tally("write shard", 4000).now(run / "jobs", 1200, 2, 12)
    assert "\n  write shard: 1,200/4,000 tasks done, 2 lost, 12 jobs" in told(status_of(run))
    close_run(run, "stopped", error="interrupted")
    assert "write shard" not in told(status_of(run))  # it was killed, so the file is still there
    Tally().over(run / "jobs")
    assert read_tally(run) is None
    Tally().over(run / "jobs")


def test_it_is_written_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "jobs").mkdir()
    told = Tally("scan", 3).now(tmp_path / "jobs", 1, 0, 1).now(tmp_path / "jobs", 2, 0, 1)
    assert str(told) == "scan: 2/3 tasks done, 1 job"
    assert read_tally(tmp_path) == Tally("scan", 3, 1, 0, 1)
    monkeypatch.setattr(tally, "EVERY_S", 0.0)
    told.now(tmp_path / "jobs", 2, 0, 1)
    assert read_tally(tmp_path) == Tally("scan", 3, 2, 0, 1)
    told.now(tmp_path / "none", 3, 0, 0)  # a full disk does not end the work
    (tmp_path / "jobs/tasks.json").write_text('{"done"')
    assert read_tally(tmp_path) is None


def test_an_array_counts_its_tasks_and_takes_the_file_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setattr(tally, "EVERY_S", 0.0)
    noted = Noted(tmp_path, "lose the element", at=1, times=9)
    seen = []
    with local(tmp_path, 1, retries=0).open() as each:
        for _, result in each(noted, range(3), name):
            found = read_tally(tmp_path)
            assert found is not None
            seen.append((found.done, found.lost))
            assert found.lost or not isinstance(result, Lost)
        assert read_tally(tmp_path) is None
    assert seen[-1] == (3, 1)
    assert found is not None
    assert (found.what, found.total) == ("Noted", 3)
