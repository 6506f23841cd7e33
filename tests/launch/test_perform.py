"""Several runs by one command: here one after the other, on a cluster as jobs that wait for one another."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from launch import run, submission
from launch.call import Call
from launch.cli import main
from launch.jobs import Job, Queued, note_job
from launch.run import Outcome, RunError, close_run, note_start, now
from launch.slurm import Slurm
from launch.verbs import VERBS, Verb

HERE = Path(__file__).parent


@dataclass
class Cluster:
    """In the place of SLURM: what was submitted, after what; the queue; a job is done when it is told to."""

    sent: list[tuple[list[str], list[str]]] = field(default_factory=list)
    queue: dict[tuple[str, str], Queued] = field(default_factory=dict)
    cancelled: list[str] = field(default_factory=list)
    refuse: str = ""

    def submit(
        self, cluster: Slurm, calls: Sequence[Call], folder: Path, name: str, after: Sequence[str] = ()
    ) -> list[Job]:
        if self.refuse:
            raise RunError(self.refuse)
        number = len(self.sent) + 1
        self.sent.append(([str(call.folder) for call in calls], list(after)))
        jobs = []
        for n, call in enumerate(calls):
            job = Job(f"{number}_{n}" if len(calls) > 1 else str(number), f"axial-{name}", "slurm", str(folder), now())
            note_start(call.folder, waiting=True)
            note_job(call.folder, job)
            self.queue[job.id, job.name] = Queued("PENDING", "Dependency" if after else "Resources")
            jobs.append(job)
        return jobs

    def end(self, folder: str) -> None:
        """The job of a run begins and ends."""
        last = [json.loads(line) for line in Path(folder, "jobs/submitted.jsonl").read_text().splitlines()][-1]
        self.queue.pop((last["id"], last["name"]))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RANK", "0")  # as a rank of a job: the folder stays as it was opened
            Task(Call("linked_verb:main", "linked_verb:Settings", Path(folder)))()


@dataclass
class Task:
    """What a job does with its run folder."""

    call: Call

    def __call__(self) -> None:
        note_start(self.call.folder, job="1")
        try:
            close_run(self.call.folder, "done", self.call.execute())
        except ValueError as error:
            close_run(self.call.folder, "failed", error=str(error))


@pytest.fixture(autouse=True)
def cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cluster:
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), str(HERE.parents[1])]))
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setitem(VERBS, "linked", Verb("linked", "linked_verb:main", "linked_verb:Settings", run=True))
    monkeypatch.chdir(tmp_path)
    for name in "abc":
        Path(f"{name}.yaml").write_text("steps: 1\n")
    Path("slurm.yaml").write_text("kind: slurm\narray: {parts: 9}\n")
    made = Cluster()

    def withdraw(job: Job) -> None:
        made.cancelled.append(job.id)
        del made.queue[job.id, job.name]

    monkeypatch.setattr(Slurm, "check", lambda self: None)
    monkeypatch.setattr(Slurm, "submit", lambda self, *given: made.submit(self, *given))
    for module in (submission, run):
        monkeypatch.setattr(module, "queue", lambda: made.queue)
    monkeypatch.setattr(submission, "_withdraw", withdraw)
    return made


CHAIN = ["linked", "a.yaml", "b.yaml", "c.yaml", "folder=r"]


def state(folder: str) -> str:
    found: dict[str, Any] = json.loads(Path(folder, "outcome.json").read_text())
    return str(found["state"])


def starts(folder: str) -> list[str]:
    path = Path(folder, "starts")
    return path.read_text().splitlines() if path.exists() else []


# ---------------------------------------------------------------------------------------------------------- here: chain


def test_a_chain_goes_link_by_link_and_leaves_what_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(CHAIN) == 0
    out = capsys.readouterr().out
    assert "b: 2 of 3, in r/b\n" in out
    assert out.endswith("made: r/a/weights\nmade: r/b/weights\nmade: r/c/weights\nnext: axial status folder=r\nnext: use it\n")  # fmt: skip  # noqa: E501
    assert [starts(f"r/{name}") for name in "abc"] == [["None 1"], ["r/a 1"], ["r/b 1"]]
    assert main([*CHAIN, "workers=3"]) == 0  # that changes nothing of what was made
    assert "all 3 runs in r are done" in capsys.readouterr().out
    assert [len(starts(f"r/{name}")) for name in "abc"] == [1, 1, 1]


@pytest.mark.parametrize(("mode", "code"), [("mistake", 2), ("not_ok", 1), ("bug", 1), ("stopped", 130)])
def test_a_link_that_fails_ends_the_chain_and_the_same_command_goes_on(
    capsys: pytest.CaptureFixture[str], mode: str, code: int
) -> None:
    words = [*CHAIN, f"b.mode={mode}", "b.mend=mended"]
    assert main(words) == code
    said = capsys.readouterr()
    assert "the same command goes on there, and leaves what is done" in said.out + said.err
    assert "b" in said.err or "failed: b" in said.out
    assert (state("r/a"), Path("r/c").exists()) == ("done", False)
    assert state("r/b") == ("stopped" if mode == "stopped" else "failed")
    Path("mended").touch()
    assert main(words) == 0
    assert [len(starts(f"r/{name}")) for name in "abc"] == [1, 2, 1]


def test_what_was_made_from_a_link_that_is_done_anew_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(CHAIN) == 0
    assert main([*CHAIN, "a.steps=5"]) == 2
    assert "r/b holds what was made from a, which is yet to be done, or done again" in capsys.readouterr().err
    assert len(starts("r/a")) == 1
    assert main([*CHAIN, "b.size=5"]) == 2
    assert (
        "r/b holds a run with other settings; choose another folder=, or put these back:\n" in capsys.readouterr().err
    )
    assert main(["linked", "folder=r/a", "steps=5"]) == 0  # by hand
    os.utime("r/b/starts", (1, 1))
    assert main([*CHAIN, "a.steps=5"]) == 0
    assert "warning: r/b was begun before a was last done" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------- here: sweep


def test_a_point_that_fails_does_not_end_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["linked", "folder=r", "mend=mended", "--sweep", "mode=fine,mistake,dies", "--sweep=steps=1,2"]
    assert main(words) == 1
    said = capsys.readouterr()
    bad = [f"mode={mode},steps={steps}" for mode in ("mistake", "dies") for steps in (1, 2)]
    assert f"failed: {', '.join(bad)}; the same command goes on with these alone" in said.out
    assert "next: axial status folder=r\n" in said.out
    assert f"{bad[0]}: this one fails\n" in said.err
    assert f"{bad[2]}: killed by SIGKILL\n" in said.err
    assert [state(f"r/{name}") for name in bad] == ["failed"] * 4
    Path("mended").touch()
    assert main(words) == 0
    assert [len(starts(f"r/{name}")) for name in bad] == [2] * 4
    assert len(starts("r/mode=fine,steps=1")) == 1


def test_a_mistake_of_ours_shows_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["linked", "folder=r", "--sweep", "mode=bug,fine"]) == 1
    err = capsys.readouterr().err
    assert "in main\n    raise RuntimeError" in err
    assert "mode=bug: RuntimeError: this one is broken\n" in err


def test_a_sweep_that_is_told_to_stop_stops() -> None:
    assert main(["linked", "folder=r", "--sweep", "mode=stopped,fine"]) == 130
    assert not Path("r/mode=fine").exists()


def test_a_point_whose_folder_is_taken_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["linked", "folder=r/steps=1", "size=7"]) == 0
    assert main(["linked", "folder=r", "size=8", "--sweep", "steps=1,2"]) == 1
    assert "steps=1: r/steps=1 holds a run with other settings" in capsys.readouterr().err
    assert state("r/steps=2") == "done"


def test_several_runs_are_not_for_torchrun(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "0")
    assert main(CHAIN) == 2
    assert "torchrun starts one run" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ a cluster


def test_links_are_jobs_that_wait_for_one_another(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*CHAIN, "b.mode=mistake", "b.mend=mended", "--on", "slurm.yaml"]
    assert main(words) == 0
    assert cluster.sent == [(["r/a"], []), (["r/b"], ["1"]), (["r/c"], ["2"])]
    out = capsys.readouterr().out
    assert "made: job 2 for b, its output in r/b/jobs/2_0_log.out\n" in out
    assert out.endswith("next: axial status folder=r\n")
    cluster.end("r/a")
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "a: done before\nb: still at work as job 2\nc: still at work as job 3\n" in out
    assert len(cluster.sent) == 3
    assert main([*words, "c.size=3"]) == 2
    assert "r/c is at work as job 3 with other settings; put them back, or end" in capsys.readouterr().err
    cluster.end("r/b")
    Path("mended").touch()
    assert main(words) == 0  # c's job waits for one that has failed, and would for ever
    assert cluster.cancelled == ["3"]
    assert cluster.sent[3:] == [(["r/b"], []), (["r/c"], ["4"])]
    cluster.end("r/b")
    cluster.end("r/c")
    assert main(words) == 0
    assert "all 3 runs in r are done" in capsys.readouterr().out
    assert len(cluster.sent) == 5


def test_a_run_whose_job_waits_is_left_alone(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["linked", "folder=r", "--on", "slurm.yaml"]
    assert main(words) == 0
    assert capsys.readouterr().out == "made: job 1, its output in r/jobs/1_0_log.out\nnext: axial status folder=r\n"
    assert main(words) == 0
    assert capsys.readouterr().out == "r: still at work as job 1\nnext: axial status folder=r\n"
    assert main([*words, "size=3"]) == 2
    assert "r is at work as job 1 with other settings; put them back, or end that first" in capsys.readouterr().err
    cluster.end("r")
    cluster.queue["1", "axial-r"] = Queued("COMPLETING", "None")
    assert main(words) == 0  # asked for again, while SLURM puts the old job away
    assert cluster.sent == [(["r"], [])] * 2


def test_who_no_longer_waits_for_a_job_is_told_that_it_goes_on(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wait_for(self: Slurm, folder: Path, job: Job) -> Outcome:
        raise KeyboardInterrupt

    monkeypatch.setattr(Slurm, "wait_for", wait_for)
    Path("wait.yaml").write_text("kind: slurm\nwait: true\n")
    for _ in range(2):
        assert main(["linked", "folder=r", "--on", "wait.yaml"]) == 130
        assert "\njob 1 goes on without this command; axial cancel folder=r ends it" in capsys.readouterr().err
    assert len(cluster.sent) == 1


def test_the_points_of_a_sweep_are_one_array(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["linked", "folder=r", "mend=mended", "--sweep", "mode=fine,mistake", "--on", "slurm.yaml"]
    assert main(words) == 0
    assert cluster.sent == [(["r/mode=fine", "r/mode=mistake"], [])]
    assert "made: jobs 1_0 to 1_1, mode=fine to mode=mistake, their output in r/jobs\n" in capsys.readouterr().out
    cluster.end("r/mode=fine")
    cluster.end("r/mode=mistake")
    assert main(words) == 0
    assert cluster.sent[1:] == [(["r/mode=mistake"], [])]


def test_parts_are_an_array_and_a_job_that_gathers(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["linked", "folder=r", "cut=3", "--on", "slurm.yaml"]
    assert main(words) == 0
    parts = ["r/part_0", "r/part_1", "r/part_2"]
    assert cluster.sent == [(parts, []), (["r"], ["1_0", "1_1", "1_2"])]
    cluster.end("r/part_0")
    cluster.end("r/part_2")
    cluster.queue.clear()  # one is lost, so the gatherer left the queue
    assert main(words) == 0
    assert cluster.sent[2:] == [(["r/part_1"], []), (["r"], ["3"])]
    cluster.end("r/part_1")
    cluster.end("r")
    assert Path("r/missing").read_text() == ""
    capsys.readouterr()
    assert main(words) == 0  # asked for again, as a whole: each looks for what is missing
    assert cluster.sent[4:] == [(parts, []), (["r"], ["5_0", "5_1", "5_2"])]


def test_what_sbatch_refuses_is_noted(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.refuse = "sbatch refused the job: no such partition"
    assert main([*CHAIN, "--on", "slurm.yaml"]) == 2
    assert "axial linked: sbatch refused the job: no such partition\n" in capsys.readouterr().err
    assert state("r/a") == "failed"


def test_waiting_tells_what_failed(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wait_for(self: Slurm, folder: Path, job: Job) -> Outcome:
        cluster.end(str(folder))
        ended = json.loads((folder / "outcome.json").read_text())
        if ended["error"]:
            raise ValueError(ended["error"])
        return Outcome(tuple(ended["made"]), tuple(ended["next"]))

    monkeypatch.setattr(Slurm, "wait_for", wait_for)
    Path("wait.yaml").write_text("kind: slurm\nwait: true\n")
    assert main(["linked", "folder=r", "--sweep", "mode=fine,mistake", "--on", "wait.yaml"]) == 1
    said = capsys.readouterr()
    assert "failed: mode=mistake; the same command goes on with these alone" in said.out
    assert main(["linked", "folder=one", "--on", "wait.yaml"]) == 0
    assert capsys.readouterr().out.endswith("made: one/weights\nnext: use it\n")
    Path("local.yaml").write_text("kind: slurm\ncluster: local\nwait: true\n")
    cluster.sent.clear()
    assert main([*CHAIN[:-1], "folder=s", "--on", "local.yaml"]) == 0  # such jobs cannot wait for one another
    assert [state(f"s/{name}") for name in "abc"] == ["done"] * 3


def test_a_dry_run_of_shared_out_tasks_shows_the_array_of_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    Path("scans/patient").mkdir(parents=True)
    Path("scans/patient/ct.nii.gz").touch()
    Path("corpus.yaml").write_text("datasets: [{name: folder, root: scans, licence: CC0}]\n")
    Path("cpu.yaml").write_text("kind: slurm\npartition: cpu\narray: {elements: 40, parallel: 5}\n")
    assert main(["curate", "corpus.yaml", "folder=corpus", "--dry-run", "--on", "cpu.yaml"]) == 0
    script = capsys.readouterr().out.partition("# sbatch is given\n")[2].splitlines()
    assert {"#SBATCH --array=0-39%5", "#SBATCH --job-name=axial-corpus", "#SBATCH --no-requeue"} <= set(script)
    assert not Path("corpus").exists()


def test_a_dry_run_shows_every_link_the_cluster_and_the_script(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*CHAIN, "--dry-run", "--on", "slurm.yaml"]) == 0
    out = capsys.readouterr().out
    assert "# b\nfolder: r/b\nstart: r/a\n" in out
    assert "from r/a, coming r/a" in out
    assert "# the cluster file\nkind: slurm\n" in out
    assert out.count("#!/bin/bash") == 3
    assert "afterok:JOB_OF_a" in out
    assert not Path("r").exists()
    assert main(["linked", "folder=r", "--sweep", "steps=1,2", "--dry-run", "--on", "slurm.yaml"]) == 0
    out = capsys.readouterr().out
    assert "# 2 runs in r:\n#   steps=1\n#   steps=2\n" in out
    assert "#SBATCH --array=0-1" in out
