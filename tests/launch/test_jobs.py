"""The record of a run's jobs, and what the queue says of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.jobs import Job, Queued, held, last_job, note_job, queue
from tests.launch.slurm_programs import Cluster


def job(number: str = "17", at: str = "2026-01-01T12:00:00+01:00") -> Job:
    return Job(number, "axial-run", "slurm", "out", at)


def test_the_newest_submission_is_the_job_of_a_run(tmp_path: Path) -> None:
    assert last_job(tmp_path) is None
    note_job(tmp_path, job("17"))
    note_job(tmp_path, job("18_3"))
    assert last_job(tmp_path) == job("18_3")
    with (tmp_path / "jobs/submitted.jsonl").open("a") as file:
        file.write('{"id": "19", "na')
    assert last_job(tmp_path) == job("18_3")


def test_where_a_job_prints_and_how_jobs_are_sorted() -> None:
    assert job("18_3").log(2, "err") == Path("out/18_3_2_log.err")
    assert sorted([job("18_10"), job("9"), job("18_9")], key=lambda one: one.order) == [
        job("9"), job("18_9"), job("18_10"),
    ]  # fmt: skip


def test_of_which_start_a_job_is_whatever_the_offset_of_the_clock() -> None:
    assert job(at="2026-01-01T12:00:00+01:00").since("2026-01-01T11:00:00+00:00")
    assert not job(at="2026-01-01T12:00:00+01:00").since("2026-01-01T11:00:01+00:00")


def test_the_queue_knows_a_job_by_number_and_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(tmp_path / "bin").start(monkeypatch)
    cluster.holds(("17", "PENDING", "Priority"), ("18_3", "RUNNING"), ("19", "PENDING", "None", "a|b"))
    jobs = queue()
    assert held(job("17"), jobs) == Queued("PENDING", "Priority")
    assert held(job("18_3"), jobs) == Queued("RUNNING", "None")
    assert held(Job("19", "a|b", "slurm", "out", ""), jobs) is not None
    assert held(Job("17", "axial-other", "slurm", "out", ""), jobs) is None  # the cluster counts from 1 again
    assert held(None, jobs) is None
    cluster.refuses("squeue", "Unable to contact slurm controller")
    assert queue() is None
    assert held(job("17"), None) is None


def test_the_queue_is_all_of_it_whatever_the_users_own_view(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that is not seen would be taken for gone, and submitted a second time."""
    Cluster(tmp_path / "bin").start(monkeypatch)
    monkeypatch.setenv("SQUEUE_STATES", "RUNNING")
    squeue = '#!/bin/sh\n[ -n "$SQUEUE_STATES" ] || case " $* " in *" -a "*) echo "17|PENDING|None|axial-run";; esac\n'
    (tmp_path / "bin/squeue").write_text(squeue)
    assert held(job("17"), queue()) == Queued("PENDING", "None")


@pytest.mark.parametrize(
    ("state", "reason", "waits", "why"),
    [
        ("PENDING", "None", True, ""),
        ("PENDING", "Dependency", True, "waits for an earlier job to be done (Dependency)"),
        ("PENDING", "BeginTime", True, "waits a moment, then starts again (BeginTime)"),
        ("PENDING", "QOSMaxJobsPerUserLimit", True, "waits for a limit of its quality of service (QOSMaxJobs"),
        ("PENDING", "AssocGrpGRES", True, "waits for a limit of its account (AssocGrpGRES)"),
        ("PENDING", "ReqNodeNotAvail, UnavailableNodes:n[1-2]", True, "waits for machines that are down or reserved"),
        ("PENDING", "DependencyNeverSatisfied", True, "waits for an earlier job that has failed, so for ever"),
        ("PENDING", "launch failed requeued held", True, "waits because its start failed on the machine; scontrol rel"),
        ("PENDING", "SomethingNew", True, "waits (SomethingNew)"),
        ("REQUEUE_HOLD", "JobHeldUser", True, "waits because it is held"),
        ("RUNNING", "None", False, ""),
        ("COMPLETING", "None", False, "its job is ending"),
        ("SUSPENDED", "None", False, "suspended by the cluster"),
    ],
)
def test_what_is_said_of_a_job_in_the_queue(state: str, reason: str, waits: bool, why: str) -> None:
    queued = Queued(state, reason)
    assert queued.waits is waits
    assert queued.why.startswith(why)
    assert bool(queued.why) == bool(why)
