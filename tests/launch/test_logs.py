"""Verb logs: whose lines are shown, how many, and until when."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from launch import logs
from launch.cli import main as axial
from launch.log import Log
from launch.logs import Settings, main
from launch.run import RunError, close_run, note_start
from tests.launch.slurm_programs import Cluster, run_of


def printed(run: Path, text: str, rank: int = 0, kind: str = "out") -> Path:
    path = run / "jobs" / f"17_{rank}_log.{kind}"
    with path.open("a") as file:
        file.write(text)
    return path


def test_the_last_lines_of_a_rank(run: Path, cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.holds(("17", "RUNNING"))
    first = printed(run, "".join(f"line {number}\n" for number in range(100)))
    printed(run, "second rank\nwithout an end", rank=1, kind="err")
    assert axial(["logs", str(run), "lines=2"]) == 0
    assert capsys.readouterr() == ("line 98\nline 99\n", f"{first}:\n")
    main(Settings(folder=run))
    assert capsys.readouterr().out.splitlines() == [f"line {number}" for number in range(60, 100)]
    main(Settings(folder=run.parent, rank=1, kind="err"))
    assert capsys.readouterr().out == "second rank\nwithout an end"
    with pytest.raises(RunError, match="job 17 has no rank 2: it has 0 to 1"):
        main(Settings(folder=run, rank=2))


def test_lines_longer_than_what_is_read_at_a_time(
    run: Path, cluster: Cluster, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "END", 7)
    printed(run, "first\n" + "é" * 20 + "\nlast\n")
    main(Settings(folder=run, lines=2))
    assert capsys.readouterr().out == "é" * 20 + "\nlast\n"
    main(Settings(folder=run, lines=9))
    assert capsys.readouterr().out == "first\n" + "é" * 20 + "\nlast\n"


def test_a_job_that_waits_has_printed_nothing(run: Path, cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.holds(("17", "PENDING", "Dependency"))
    main(Settings(folder=run))
    told = "job 17 (queued) has printed nothing yet. waits for an earlier job to be done (Dependency)\n"
    assert capsys.readouterr() == ("", told)


def test_which_ranks_failed_is_said_the_first_of_them_first(
    run: Path, cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    note_start(run, job="17")
    close_run(run, "failed", error="rank 2: out of memory")
    for rank, text in enumerate(("Traceback: peer gone\n", "a warning\n", "Traceback: memory\n", "Traceback: gone\n")):
        printed(run, "step 1\n", rank)
        printed(run, text, rank, "err")
    assert main(Settings(folder=run)).next == tuple(f"axial logs {run} rank={rank} kind=err" for rank in (2, 0, 3))
    assert capsys.readouterr().err.splitlines()[-1] == "failed: rank 2: out of memory"
    assert main(Settings(folder=run, rank=2, kind="err")).next[0] == f"axial logs {run} rank=0 kind=err"


def test_a_run_without_a_job_shows_its_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of(tmp_path / "run")
    main(Settings(folder=run))
    where = f"process {os.getpid()} on {os.uname().nodename}: its output went to the terminal it was started in"
    assert capsys.readouterr() == ("", f"{where}, and it has written no log.txt\n")
    log = Log(run, tensorboard=False)
    log.event("checkpoint written")
    log.close()
    capsys.readouterr()
    main(Settings(folder=run))
    out, err = capsys.readouterr()
    assert out.endswith("  checkpoint written\n")
    assert err == f"{where}; {run / 'log.txt'}:\n"


def test_the_output_of_jobs_that_do_the_tasks_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of(tmp_path / "corpus")
    array = run / "jobs/array-0123456789ab"
    array.mkdir(parents=True)
    for number, (text, at) in enumerate((("older\n", 100), ("newer\n", 200), ("", 300))):
        path = array / f"30_{number}_0_log.err"
        path.write_text(text)
        os.utime(path, (at, at))
    main(Settings(folder=run, kind="err"))
    assert capsys.readouterr() == ("newer\n", f"{array}/30_1_0_log.err (the newest of 2 jobs of its tasks):\n")


def test_several_runs_are_named(tmp_path: Path) -> None:
    for number in range(22):
        run_of(tmp_path / "runs" / f"{number:02}")
    with pytest.raises(RunError, match=r"22 runs in .*/runs, name one: .*/00, .*/19 and 2 more$"):
        main(Settings(folder=tmp_path / "runs"))
    run_of(tmp_path / "runs/00/fold_0")  # a part of it: the run itself is meant
    main(Settings(folder=tmp_path / "runs/00"))


def test_a_point_of_a_sweep_is_a_folder_and_no_setting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of(tmp_path / "lr=1e-4,seed=0")
    assert axial(["logs", str(run), "lines=3"]) == 0
    assert axial(["status", str(run)]) == 0
    assert str(run) in capsys.readouterr().out


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="there is no folder"):
        main(Settings(folder=tmp_path / "none"))
    with pytest.raises(RunError, match="no run in"):
        main(Settings(folder=tmp_path))


def test_following_ends_with_the_run_and_not_before(
    run: Path, cluster: Cluster, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the queue on, over a failure that is tried again, to the last line."""
    monkeypatch.setattr(logs, "POLL_S", 0.02)
    monkeypatch.setattr(logs, "ASK_S", 0.1)
    cluster.holds(("17", "PENDING", "Priority"))
    follower = threading.Thread(target=main, args=(Settings(folder=run, follow=True),))
    follower.start()
    time.sleep(0.3)
    cluster.holds(("17", "RUNNING"))
    printed(run, "begins\n")
    time.sleep(0.3)
    close_run(run, "failed", error="x")
    cluster.holds(("17", "PENDING", "BeginTime"))
    time.sleep(0.3)
    assert follower.is_alive()
    printed(run, "begins again\n")
    cluster.holds(("17", "RUNNING"))
    time.sleep(0.3)
    assert follower.is_alive()
    printed(run, "last\n")
    close_run(run, "done")
    cluster.holds()
    follower.join(10)
    assert not follower.is_alive()
    assert capsys.readouterr().out == "begins\nbegins again\nlast\n"


def test_ctrl_c_ends_following_and_is_no_failure(run: Path, cluster: Cluster) -> None:
    cluster.holds(("17", "RUNNING"))
    printed(run, "begins\n")
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from launch.cli import main; sys.exit(main(['logs', sys.argv[1], 'follow=true']))"
    )
    command = [sys.executable, "-c", code, str(run)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begins\n"
        time.sleep(0.3)
        process.send_signal(2)
        assert process.wait(20) == 0
