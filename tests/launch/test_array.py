"""Arrays of jobs: results cross through files, a lost job costs what was in work in it, and nothing is left behind."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.array import Array
from launch.crew import Lost, Workers
from launch.element import Element, read_records
from launch.executors import Here, Processes, crew_of
from launch.run import RunError
from launch.slurm import ArrayRules, Slurm
from tests.launch.crew_tasks import Noted, call, end, fail, name, square

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))  # a job is another command


def local(folder: Path, jobs: int, retries: int = 2, **more: Any) -> Array:
    """Jobs of this machine, one worker each."""
    slurm = Slurm(cluster="local", hours=0.2, array=ArrayRules(parallel=jobs, retries=retries))
    return Array(slurm, folder / "jobs", poll_s=0.1, settle_s=0.2, **more)


def test_results_cross_and_the_folder_is_removed(tmp_path: Path) -> None:
    with local(tmp_path, 2).open() as each:
        assert dict(each(square, range(7), name)) == {number: number**2 for number in range(7)}
        assert list(each(square, [], name)) == []
        assert not list((tmp_path / "jobs").iterdir())
    assert not list(tmp_path.iterdir())


def test_a_crash_and_a_task_that_hangs_are_the_business_of_the_job(tmp_path: Path) -> None:
    noted = Noted(tmp_path, "hang", at=1, times=9)
    with local(tmp_path, 1).limited(0.5, None).open() as each:
        assert dict(each(noted, range(3), name)) == {
            0: 0, 1: Lost("timeout", "took longer than 0.5 s and was ended"), 2: 4,
        }  # fmt: skip
        found = dict(each(call, [(end, 3), (square, 2)], name))
    assert found == {(end, 3): Lost("crashed", "ended with code 3 twice"), (square, 2): 4}


def test_a_lost_job_costs_what_was_in_work_and_the_rest_goes_on_elsewhere(tmp_path: Path) -> None:
    noted = Noted(tmp_path, "lose the element", at=2)
    with local(tmp_path, 1).open() as each:
        assert dict(each(noted, range(6), name)) == {number: number**2 for number in range(6)}
    assert Counter(noted.starts()) == {0: 1, 1: 1, 2: 2, 3: 1, 4: 1, 5: 1}


def test_a_task_that_takes_every_job_with_it_is_lost_alone(tmp_path: Path) -> None:
    noted = Noted(tmp_path, "lose the element", at=1, times=9)
    with local(tmp_path, 1, retries=1).open() as each:
        found = dict(each(noted, range(4), name))
    lost = found.pop(1)
    assert found == {0: 0, 2: 4, 3: 9}
    assert Counter(noted.starts()) == {0: 1, 1: 2, 2: 1, 3: 1}
    assert isinstance(lost, Lost)
    assert lost.reason == "node"
    assert lost.detail.startswith("in work in 2 jobs that were lost; last job ")
    assert Path(lost.detail.rpartition(": ")[2]).exists()  # its output is kept


def test_jobs_that_never_begin_are_not_tried_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "submitit.py").write_text("raise SystemExit('no such environment')")
    with local(tmp_path, 2, retries=1).open() as each:
        found = [result for _, result in each(square, range(4), name)]
    assert len(found) == 4
    for lost in found:
        assert isinstance(lost, Lost)
        assert "in work in 2 jobs that were lost" in lost.detail
        assert "before it began" in lost.detail


def test_an_error_is_raised_as_it_was_and_ends_the_others(tmp_path: Path) -> None:
    with (
        local(tmp_path, 2).open() as each,
        pytest.raises(FileNotFoundError, match="/no/such/file") as caught,
    ):
        list(each(Noted(tmp_path, "fail", at=1), [1, *range(2, 9)], name))
    assert caught.value.__notes__[-1].startswith("at task 1")


def test_what_an_earlier_command_left_is_cancelled_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = tmp_path / "corpus" / "jobs" / "array-0123456789ab"
    left.mkdir(parents=True)
    (left / "jobs").write_text("77\n78\n")
    (left / "0-0.results").write_bytes(b"of somebody else")
    for command in ("scancel", "sbatch"):
        (tmp_path / command).write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/asked\n')
        (tmp_path / command).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with Array(Slurm(), left.parent).open():
        assert not left.exists()
    assert (tmp_path / "asked").read_text() == "--name=axial-corpus 77 78\n"


def test_without_slurm_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RunError, match="no sbatch on this machine"), Array(Slurm(), tmp_path / "jobs").open():
        pass


def test_a_job_stops_when_its_folder_is_gone(tmp_path: Path) -> None:
    done: list[int] = []
    file = tmp_path / "results"

    def remove(number: int) -> None:
        done.append(number)
        file.unlink()

    Element(remove, tuple((number, str(number), number) for number in range(3)), Workers(0), file)()
    assert done == [0]


def test_an_error_is_among_the_records_of_a_job(tmp_path: Path) -> None:
    file = tmp_path / "results"
    Element(fail, ((5, "five", "/no/such/file"),), Workers(0), file)()
    kinds = [record[0] for record, _ in read_records(file, 0)]
    assert kinds == ["begun", "raised"]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    file = tmp_path_factory.mktemp("element") / "results"
    Element(square, tuple((number, str(number), number) for number in range(5)), Workers(0), file)()
    return file.read_bytes()


@given(data=st.data())
def test_of_a_torn_or_spoilt_file_only_whole_records_are_read(
    tmp_path_factory: pytest.TempPathFactory, written: bytes, data: st.DataObject
) -> None:
    cut = data.draw(st.integers(0, len(written)))
    zeros = data.draw(st.integers(0, 40))  # what a dead machine leaves of a block
    file = tmp_path_factory.mktemp("torn") / "results"
    file.write_bytes(written)
    whole = list(read_records(file, 0))
    file.write_bytes(written[:cut] + bytes(zeros))
    read = list(read_records(file, 0))
    assert read == whole[: len(read)]
    assert len(read) >= sum(offset <= cut for _, offset in whole)
    file.write_bytes(written)
    start = read[-1][1] if read else 0
    assert read + list(read_records(file, start)) == whole


def test_no_file_no_records(tmp_path: Path) -> None:
    assert list(read_records(tmp_path / "none", 0)) == []


def test_which_crew_a_cluster_file_means(tmp_path: Path) -> None:
    assert crew_of(Here(), tmp_path) is None
    assert crew_of(Processes(processes=3), tmp_path) == Workers(3)
    assert crew_of(Slurm(cluster="debug"), tmp_path) == Workers(0)
    assert crew_of(Slurm(), tmp_path) == Array(Slurm(), tmp_path / "jobs")
    crew = crew_of(Slurm(), tmp_path)
    assert crew is not None
    assert crew.limited(5.0, 2.0) == Array(Slurm(), tmp_path / "jobs", 5.0, 2.0)
