"""Verb cancel: what is ended of a run, wherever it waits or runs, and what is said of it afterwards."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launch.cancel import Settings, main
from launch.cli import main as axial
from launch.jobs import queue
from launch.run import RunError, _ticks, close_run, note_start
from launch.status import status_of
from tests.launch.slurm_programs import Cluster, run_of


def state(run: Path) -> tuple[str, str]:
    status = status_of(run, queue())
    return status.state, status.error


def test_a_job_that_never_began_is_stopped_and_says_so(
    tmp_path: Path, cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(tmp_path / "run", job="17")
    cluster.holds(("17", "PENDING", "Priority"), ("18", "RUNNING", "None", "axial-other"))
    assert axial(["cancel", str(run)]) == 0
    assert capsys.readouterr().out == f"{run}  job 17 cancelled before it began\n"
    assert cluster.cancelled == ["--name=axial-run 17"]
    assert state(run) == ("stopped", "cancelled before it began; the same command submits it again")


def test_a_job_that_runs_is_told_and_keeps_its_own_word(
    tmp_path: Path, cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(tmp_path / "run", job="17")
    note_start(run, job="17")
    cluster.holds(("17", "RUNNING"))
    main(Settings(folder=run))
    assert capsys.readouterr().out == f"{run}  job 17 is told to end; it saves first\n"
    assert cluster.cancelled == ["--name=axial-run 17"]
    assert not (run / "outcome.json").exists()
    close_run(run, "stopped", error="stopped by SIGTERM after step 3")  # as the job does
    assert state(run) == ("stopped", "stopped by SIGTERM after step 3")


def test_a_job_that_waits_to_start_again_is_no_failure_then(tmp_path: Path, cluster: Cluster) -> None:
    run = run_of(tmp_path / "run", job="17", pid=7, host="node7")
    close_run(run, "failed", error="a rank was lost")
    cluster.holds(("17", "PENDING", "BeginTime"))
    main(Settings(folder=run))
    assert state(run) == ("stopped", "cancelled while it waited; the same command goes on")


def test_all_runs_beneath_a_folder_those_that_wait_first_and_names_are_asked_for_once(
    tmp_path: Path, cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [run_of(tmp_path / "runs" / name, job=f"9_{number}") for number, name in enumerate("abcd")]
    close_run(runs[3], "failed", error="as it was")
    part = run_of(runs[0] / "fold_0", job="11", name="axial-fold")
    cluster.holds(
        ("9_0", "RUNNING"), ("9_1", "PENDING"), ("9_2", "PENDING"), ("11", "PENDING", "None", "axial-fold"),
    )  # fmt: skip
    main(Settings(folder=tmp_path / "runs"))
    assert cluster.cancelled == ["--name=axial-fold 11", "--name=axial-run 9_1 9_2", "--name=axial-run 9_0"]
    assert capsys.readouterr().out.splitlines()[-1] == f"{runs[0]}  job 9_0 is told to end; it saves first"
    assert state(runs[3]) == ("failed", "as it was")
    assert state(part)[0] == "stopped"
    assert cluster.asked == 3  # two of them by this test
    main(Settings(folder=tmp_path / "runs/d"))
    assert capsys.readouterr().out == f"nothing in {tmp_path / 'runs/d'} waits or runs\n"


def test_a_process_here_is_told_to_end_one_elsewhere_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        here = run_of(tmp_path / "here", pid=process.pid, ticks=_ticks(process.pid))
        there = run_of(tmp_path / "there", pid=process.pid, host="node7")
        main(Settings(folder=tmp_path))
        assert process.wait(10) == -signal.SIGTERM
    pid = process.pid
    assert capsys.readouterr().out.splitlines() == [
        f"{here}  process {pid} is told to end; it saves first",
        f"{there}  is process {pid} on node7, by its files: end it there (axial cancel, or kill {pid})",
    ]
    assert state(here)[0] == "stopped"


def test_the_jobs_that_do_the_tasks_of_a_run_end_behind_the_process_that_collects_them(
    tmp_path: Path, cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        run = run_of(tmp_path / "corpus", pid=process.pid, ticks=_ticks(process.pid))
        (run / "jobs/array-0123456789ab").mkdir(parents=True)
        (run / "jobs/array-0123456789ab/jobs").write_text("30\n31\n")
        name = "axial-corpus"
        cluster.holds(("30_0", "RUNNING", "None", name), ("30_1", "PENDING", "None", name), ("31_0", "RUNNING"))
        main(Settings(folder=run))
        assert process.wait(10) == -signal.SIGTERM
    assert capsys.readouterr().out.splitlines()[1:] == [f"{run}  jobs 30 of its tasks cancelled"]
    assert cluster.cancelled == ["--name=axial-corpus 30"]  # 31 bears another name: it is somebody else's


def test_what_stands_against_it_is_said(tmp_path: Path, cluster: Cluster) -> None:
    with pytest.raises(RunError, match="there is no folder"):
        main(Settings(folder=tmp_path / "none"))
    with pytest.raises(RunError, match="no run in"):
        main(Settings(folder=tmp_path / "bin"))
    run = run_of(tmp_path / "run", job="17")
    cluster.holds(("17", "PENDING"))
    cluster.refuses("scancel", "scancel: error: Access/permission denied")
    with pytest.raises(RunError, match="cannot cancel job 17: scancel: error: Access/permission denied"):
        main(Settings(folder=run))
    assert state(run)[0] == "queued"


def test_without_a_queue_that_answers_nothing_is_claimed(
    tmp_path: Path, cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(tmp_path / "run", job="17")
    cluster.refuses("squeue", "Unable to contact slurm controller")
    main(Settings(folder=run))
    assert "is not in the queue that answers here" in capsys.readouterr().out
    assert cluster.cancelled == []
