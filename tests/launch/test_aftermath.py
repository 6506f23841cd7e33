"""What a batch script is told to do when its processes have ended, and what every process of a job does."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from launch import aftermath, task
from launch.attempts import read_attempts
from launch.beats import Beat, write_beat
from launch.call import Call
from launch.jobs import Job, note_job
from launch.run import Outcome, Stopped, close_run, note_start, open_run, read_json
from launch.task import Task
from tests.launch.steps_verb import Settings

DONE, AGAIN, ENDED = 0, 75, 1
STEPS = "tests.launch.steps_verb"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder whose job 17 runs here for the first time."""
    for name in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
    for name in names:
        monkeypatch.setenv(name, "")  # so that what a job in this process sets is taken back
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    return started(tmp_path / "run")


def started(folder: Path, **settings: Any) -> Path:
    open_run(folder, Settings(folder=folder, **settings), ["axial", "steps"])
    note_job(folder, Job("17", "axial-run", "slurm", str(folder / "jobs"), ""))
    return folder


def ended(*folders: Path, code: int = 0, blind: tuple[str, ...] = (), restarts: int = 3, requeues: int = 2) -> int:
    plan = folders[0] / "jobs" / "plan.json"
    calls = [[f"{STEPS}:main", f"{STEPS}:Settings", str(folder)] for folder in folders]
    plan.write_text(json.dumps({"calls": calls, "restarts": restarts, "requeues": requeues}))
    return aftermath.main(str(plan), str(code), *blind)


def outcome(folder: Path) -> dict[str, Any]:
    return read_json(folder / "outcome.json") or {}


def test_done_is_done(run: Path) -> None:
    close_run(run, "done", Outcome())
    assert ended(run) == DONE
    assert read_attempts(run) == []


def test_a_warned_job_goes_back_so_often_and_a_cancelled_one_does_not(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    close_run(run, "stopped", error="stopped by SIGUSR2 after step 3")
    assert ended(run) == AGAIN
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert ended(run) == ENDED
    assert outcome(run)["error"] == "stopped by SIGUSR2 after step 3; it was in the queue 3 times (requeues: 2)"
    close_run(run, "stopped", error="stopped by SIGTERM after step 3")
    assert ended(run) == ENDED
    assert outcome(run)["error"] == "stopped by SIGTERM after step 3"


def test_a_job_that_is_preempted_by_sigterm_goes_back(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    close_run(run, "stopped", error="stopped by SIGTERM after step 3")
    monkeypatch.setenv("AXIAL_JOB", "JobId=17 JobState=RUNNING PreemptTime=None Reason=None")
    assert ended(run) == ENDED
    monkeypatch.setenv("AXIAL_JOB", "JobId=17 JobState=RUNNING PreemptTime=2026-11-22T09:17:32 Reason=None")
    assert ended(run) == AGAIN
    assert [attempt.how for attempt in read_attempts(run)] == ["warned"]


def test_an_error_that_may_pass_is_tried_again_and_a_mistake_is_not(run: Path) -> None:
    close_run(run, "failed", error="ValueError: no")
    assert ended(run, code=1) == ENDED
    assert read_attempts(run) == []
    close_run(run, "failed", error="RuntimeError: NCCL", again=True)
    assert ended(run, code=1) == AGAIN
    assert outcome(run)["error"] == "RuntimeError: NCCL; job 17 goes back to the queue"
    close_run(run, "failed", error="RuntimeError: NCCL", again=True)
    assert ended(run, code=1, restarts=1) == ENDED
    assert outcome(run)["error"].startswith("job 17 is not tried again: it failed 2 times in a row")


def errors(run: Path, *lines: str) -> None:
    """What the batch script and srun wrote of an earlier start, and of this one."""
    before = ("axial: start 0 of job 17 on a", "srun: error: a: task 0: Killed", "axial: start 1 of job 17 on a,b")
    (run / "jobs/17_0_log.err").write_text("\n".join((*before, *lines, "")))


KILLED = "srun: error: b: tasks 4-7: Killed"
STEP_ENDS = ("srun: launch/slurm: _step_signal: Terminating StepId=17.1", "srun: error: a: task 0: Killed")


@pytest.mark.parametrize("left", ["", "SIGTERM", "error"])
def test_who_was_killed_is_told_by_srun(run: Path, left: str) -> None:
    """srun ends the others when one is gone: that they saved, or lost their peer, is not what happened."""
    if left == "SIGTERM":
        close_run(run, "stopped", error="stopped by SIGTERM after step 3")
    if left == "error":
        close_run(run, "failed", error="RuntimeError: Connection closed by peer", again=True)
    errors(run, KILLED, *STEP_ENDS)
    assert ended(run, code=137) == AGAIN
    [attempt] = read_attempts(run)
    assert attempt.how == ("failed" if left == "error" else "killed")
    killed = "rank 4-7 on b: Killed"
    assert attempt.reason == (f"RuntimeError: Connection closed by peer ({killed})" if left == "error" else killed)


@pytest.mark.parametrize("how", ["Segmentation fault", "Out Of Memory", "Exited with exit code 75", "Aborted"])
def test_a_rank_that_goes_without_a_word_is_the_cause_not_the_signal_to_the_others(run: Path, how: str) -> None:
    close_run(run, "stopped", error="stopped by SIGTERM after step 3")
    errors(run, f"srun: error: b: task 1: {how}", *STEP_ENDS)
    assert ended(run, code=1) == AGAIN
    assert read_attempts(run)[0].reason == f"rank 1 on b: {how}"
    assert outcome(run)["state"] == "failed"


def test_a_rank_with_an_error_is_told_by_that(run: Path) -> None:
    close_run(run, "failed", error="rank 1 on b: RuntimeError: no", again=True)
    errors(run, "srun: error: b: task 1: Exited with exit code 1", *STEP_ENDS)
    assert ended(run, code=1) == AGAIN
    assert read_attempts(run)[0].reason == "rank 1 on b: RuntimeError: no"


def test_a_step_that_srun_cannot_begin_is_told_in_its_words(run: Path) -> None:
    errors(run, "srun: error: Unable to create step for job 17: Invalid generic resource (gres) specification")
    assert ended(run, code=1) == AGAIN
    assert read_attempts(run)[0].reason.startswith("Unable to create step for job 17: Invalid generic resource")


def test_a_warned_job_was_warned_however_its_processes_went(run: Path) -> None:
    close_run(run, "stopped", error="stopped by SIGUSR2 after step 3")
    errors(run, "srun: error: b: task 1: Exited with exit code 1", *STEP_ENDS)
    assert ended(run, code=1) == AGAIN
    assert [attempt.how for attempt in read_attempts(run)] == ["warned"]


def test_a_cancelled_job_was_not_killed(run: Path) -> None:
    close_run(run, "stopped", error="stopped by SIGTERM after step 3")
    errors(run, "slurmstepd: error: *** STEP 17.0 ON a CANCELLED AT 2026 ***", "srun: error: a: task 0: Killed")
    assert ended(run, code=137) == ENDED
    assert read_attempts(run) == []


def test_a_full_disk_does_not_hide_why_a_job_is_given_up(run: Path) -> None:
    (run / "samples_of_step_3.txt").mkdir()
    note_start(run, job="17")
    write_beat(run, Beat(0, 1, "a", 1, 3, 0, "data", 3, 0.0, time.time()))
    for code in (AGAIN, ENDED):
        close_run(run, "failed", error="RuntimeError: no", again=True)
        assert ended(run, code=1) == code
    assert "it failed twice in step 3: RuntimeError: no. Samples of step 3: slice-3-0" in outcome(run)["error"]


def test_without_a_word_the_code_is_told(run: Path) -> None:
    assert ended(run, code=75) == AGAIN
    assert read_attempts(run)[0].reason == "its processes ended with code 75"


def test_a_folder_that_a_machine_does_not_see(run: Path) -> None:
    assert ended(run, blind=("n3", "n4")) == ENDED
    assert "is not there on n3, n4, a machine of job 17; put it on a file system" in outcome(run)["error"]


def test_an_element_of_an_array_is_its_own_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = started(run.parent / "other")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "20")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    close_run(run, "done")
    assert ended(run, other, code=9) == AGAIN
    assert [attempt.job for attempt in read_attempts(other)] == ["20_1"]


def test_a_start_that_was_lost_is_noted_by_the_next_one(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = {number: signal.getsignal(number) for number in (signal.SIGUSR2, signal.SIGTERM)}
    try:
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        asked = Call(f"{STEPS}:main", f"{STEPS}:Settings", run)
        assert Task(asked)() is not None
        assert [attempt.how for attempt in read_attempts(run)] == ["lost"]
        assert outcome(run)["state"] == "done"
        monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
        Task(asked, restarts=1)()
        monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
        with pytest.raises(SystemExit) as ends:  # with 0 the other ranks would wait for it
            Task(asked, restarts=1)()
        assert ends.value.code == 1
        assert outcome(run)["state"] == "failed"
        assert "job 17 is not tried again: it failed 2 times in a row" in outcome(run)["error"]
        with pytest.raises(Stopped, match="SIGUSR2"):
            signal.raise_signal(signal.SIGUSR2)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def test_a_start_that_saved_as_it_was_sent_back_was_not_lost(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for restart in range(1, 5):
        close_run(run, "stopped", error="stopped by SIGTERM after step 0")
        assert task._lost(Task(Call("", "", run), restarts=1), "17") == ""
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
    assert [attempt.how for attempt in read_attempts(run)] == ["warned"] * 3


def test_the_rank_that_fails_first_is_told(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_CPUS_PER_TASK": "3"}
    for variable, value in place.items():
        monkeypatch.setenv(variable, value)
    old = {number: signal.getsignal(number) for number in (signal.SIGUSR2, signal.SIGTERM)}
    try:
        folder = started(run.parent / "failing", trouble="bug", at=2, rank=1)
        with pytest.raises(RuntimeError, match="the verb is broken"):
            Task(Call(f"{STEPS}:main", f"{STEPS}:Settings", folder))()
        told = outcome(folder)
        assert told["error"].startswith("rank 1 on ")
        assert told["error"].endswith(": RuntimeError: the verb is broken")
        assert told["again"]
        assert [os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "OMP_NUM_THREADS")] == [*"1123"]
        close_run(folder, "failed", error="rank 0 was first")
        with pytest.raises(RuntimeError):
            Task(Call(f"{STEPS}:main", f"{STEPS}:Settings", folder))()
        assert outcome(folder)["error"] == "rank 0 was first"
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@pytest.mark.parametrize(
    ("number", "told"), [(signal.SIGTERM, "rank 1 on b: RuntimeError: no"), (signal.SIGUSR2, "stopped by SIGUSR2; ")]
)
def test_a_rank_that_is_ended_because_another_failed_does_not_hide_why(
    run: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, told: str
) -> None:
    """srun ends the others by SIGTERM; SIGUSR2 is the cluster's warning, and others may fail as this one leaves."""
    old = {number: signal.getsignal(number) for number in (signal.SIGUSR2, signal.SIGTERM)}

    def end(call: Call) -> Outcome:
        close_run(run, "failed", error="rank 1 on b: RuntimeError: no", again=True)
        signal.raise_signal(number)
        return Outcome()

    monkeypatch.setattr(Call, "execute", end)
    try:
        Task(Call(f"{STEPS}:main", f"{STEPS}:Settings", run))()
    finally:
        for each, handler in old.items():
            signal.signal(each, handler)
    assert outcome(run)["error"].startswith(told)
