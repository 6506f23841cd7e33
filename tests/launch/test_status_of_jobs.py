"""The state of a run that is a job of a cluster: its files alone would lie."""

from __future__ import annotations

import json
import os
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import pytest

from launch.attempts import Attempt, note_attempt
from launch.jobs import Job, note_job, queue
from launch.run import RunError, close_run, note_start, open_run
from launch.status import Settings, main, status_of, told
from tests.launch.slurm_programs import Cluster, Toy, run_of


def begun(run: Path, **start: Any) -> None:
    """As the job does when it starts, on a machine that is not this one."""
    note_start(run, job="17")
    record = json.loads((run / "run.json").read_text())
    record["starts"][-1] |= {"host": "node7", "pid": 5, "ticks": 9, **start}
    (run / "run.json").write_text(json.dumps(record))


def attempt(
    run: Path, how: Literal["failed", "killed", "lost"], step: int | None, reason: str, job: str = "17"
) -> None:
    note_attempt(run, Attempt(job, 0, how, step, None, reason))


def state(run: Path) -> str:
    return status_of(run, queue()).state


def test_from_queue_to_end(run: Path, cluster: Cluster) -> None:
    cluster.holds(("17", "PENDING", "Resources"))
    first, second = told(status_of(run, queue())).splitlines()
    assert first.startswith(f"{run}  pretrain  queued  ")
    assert first.endswith("ago  job 17")
    assert second == "  waits for machines to become free (Resources)"
    cluster.holds(("17", "RUNNING"))
    assert state(run) == "running"
    begun(run)
    status = status_of(run, queue())
    assert (status.state, status.where) == ("running", "job 17 process 5 on node7")
    close_run(run, "done")
    assert state(run) == "done"  # the cluster is only putting the job away
    cluster.holds()
    assert state(run) == "done"


def test_a_job_that_failed_and_waits_to_start_again_is_queued(run: Path, cluster: Cluster) -> None:
    begun(run)
    attempt(run, "killed", 3, "of an earlier job of the run", job="16")
    attempt(run, "failed", 80, "rank 1: out of memory\nmore")
    attempt(run, "lost", None, "")
    attempt(run, "failed", 120, "rank 1: out of memory\nmore")
    close_run(run, "failed", error="rank 1: out of memory; job 17 goes back to the queue", again=True)
    cluster.holds(("17", "PENDING", "BeginTime"))
    lines = told(status_of(run, queue())).splitlines()
    assert lines[0].endswith("  job 17  4th start")
    assert "  queued  " in lines[0]
    assert lines[1:] == [
        "  waits a moment, then starts again (BeginTime)",
        "  last time: failed in step 120: rank 1: out of memory",
    ]
    cluster.holds(("17", "RUNNING"))
    assert state(run) == "running"
    cluster.holds()
    lines = told(status_of(run, queue())).splitlines()
    assert "  failed  " in lines[0]
    assert lines[1:] == [
        "  rank 1: out of memory; job 17 goes back to the queue",
        "  then job 17 left the queue (cancelled, or not taken back); the same command goes on",
    ]
    close_run(run, "failed", error="rank 1: out of memory")
    assert told(status_of(run, queue())).splitlines()[1:] == ["  rank 1: out of memory"]


def test_a_job_that_is_gone_without_a_word(run: Path, cluster: Cluster) -> None:
    begun(run)
    attempt(run, "lost", 40, "node7 is down")
    status = status_of(run, queue())
    assert status.state == "stopped"
    assert told(status).splitlines()[1:] == [
        "  job 17 ended without a word (out of time before it had saved, killed, cancelled, or its machine was lost); "
        "the same command goes on",
        "  last time: lost in step 40: node7 is down",
    ]


def test_a_job_that_left_the_queue_before_it_began(run: Path, cluster: Cluster) -> None:
    status = status_of(run, queue())
    assert status.state == "stopped"
    assert status.error == (
        f"job 17 left the queue before it began (an earlier job failed, it was cancelled, or its machine does not see "
        f"{run}); the same command submits it again"
    )


def test_where_no_queue_answers_the_files_are_believed(run: Path, cluster: Cluster) -> None:
    cluster.refuses("squeue", "Unable to contact slurm controller")
    assert state(run) == "queued"
    begun(run)
    assert state(run) == "running"
    close_run(run, "failed", error="x")
    assert state(run) == "failed"


def test_a_job_of_somebody_else_with_its_number_is_none_of_it(run: Path, cluster: Cluster) -> None:
    cluster.holds(("17", "RUNNING", "None", "interactive"))
    assert state(run) == "stopped"


def test_a_job_of_another_user_is_not_gone_because_this_ones_queue_does_not_have_it(
    run: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun(run)
    monkeypatch.setattr(os, "getuid", lambda: 4711)
    assert state(run) == "running"
    with pytest.raises(RunError, match="being worked in by process 5 on node7"):
        open_run(run, Toy(folder=run), [])
    close_run(run, "failed", error="x")
    assert state(run) == "failed"


def test_a_submission_that_was_killed_says_what_to_do(tmp_path: Path, cluster: Cluster) -> None:
    run = run_of(tmp_path / "torn")
    note_start(run, waiting=True)
    *_, last = told(status_of(run, queue())).splitlines()
    assert last == f"  no job is noted; if the queue has none for it (squeue), remove {run / 'run.json'}"


def test_an_earlier_job_is_none_of_a_later_start(run: Path, cluster: Cluster) -> None:
    begun(run, at="2020-01-01T00:00:00+00:00")
    path = run / "jobs/submitted.jsonl"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"at": "2020-01-01T00:00:00+00:00"}) + "\n")
    open_run(run, Toy(folder=run), ["axial", "pretrain"])  # in this very process
    status = status_of(run, queue())
    assert (status.state, status.where) == ("running", f"process {os.getpid()} on {os.uname().nodename}")
    note_start(run, waiting=True)  # just being submitted: its number is not noted yet
    assert state(run) == "queued"


def test_a_job_of_this_machine_is_in_no_queue(tmp_path: Path, cluster: Cluster) -> None:
    run = run_of(tmp_path / "local", job="17", cluster="local")
    assert state(run) == "queued"
    note_start(run, job="17")
    assert state(run) == "running"


def test_many_runs_are_told_in_the_order_they_were_submitted_and_the_queue_is_asked_once(
    tmp_path: Path, cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    at = datetime.now().astimezone() - timedelta(hours=1)
    for number, name in ((1, "stage1"), (2, "gram"), (3, "hires"), (4, "a_last")):
        run_of(tmp_path / "runs" / name, job=f"9_{number}" if number < 4 else "10", at=at.isoformat())
    close_run(tmp_path / "runs/stage1", "done")
    cluster.holds(("9_2", "RUNNING"), ("9_3", "PENDING", "Dependency"), ("10", "PENDING", "Priority"))
    main(Settings(folder=tmp_path / "runs"))
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == "4 runs: 2 queued, 1 running, 1 done"
    names = [line.partition("  ")[0].rpartition("/")[2] for line in lines if not line.startswith(" ")]
    assert names == ["stage1", "gram", "hires", "a_last"]
    assert cluster.asked == 1


def test_the_parts_of_a_run_are_told_with_it(
    tmp_path: Path, cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_of(tmp_path / "run", job="20")
    for number, name in enumerate(("fold_0", "parts/000")):
        run_of(folder / name, job=f"19_{number}")
    cluster.holds(("20", "PENDING", "Dependency"), ("19_0", "RUNNING"), ("19_1", "RUNNING"))
    main(Settings(folder=folder))
    assert capsys.readouterr().out.startswith("3 runs: 1 queued, 2 running\n")


def test_a_run_whose_job_waits_to_start_again_is_busy(run: Path, cluster: Cluster) -> None:
    begun(run)
    close_run(run, "failed", error="out of memory")
    cluster.holds(("17", "PENDING", "BeginTime"))
    with pytest.raises(RunError, match=r"being worked in by job 17 \(PENDING in the queue\).*axial cancel"):
        open_run(run, Toy(folder=run), [])
    close_run(run, "done")
    open_run(run, Toy(folder=run), [])
    note_start(run, waiting=True)
    note_job(run, Job("18", "axial-run", "slurm", str(run), "2100-01-01T00:00:00+00:00"))
    cluster.holds(("18", "RUNNING"))
    with pytest.raises(RunError, match="being worked in by job 18"):
        open_run(run, Toy(folder=run), [])
    cluster.holds()
    open_run(run, Toy(folder=run), [])


def test_a_run_whose_job_may_wait_to_start_again_is_not_begun_while_the_queue_is_silent(
    run: Path, cluster: Cluster
) -> None:
    begun(run)
    close_run(run, "stopped", error="stopped by SIGUSR2 after step 3")
    cluster.refuses("squeue", "Unable to contact slurm controller")
    with pytest.raises(RunError, match=f"squeue does not answer, .* job 17 of {run} waits to start again"):
        open_run(run, Toy(folder=run), [])
    (cluster.folder / "squeue").write_text("#!/bin/sh\n")
    open_run(run, Toy(folder=run), [])
