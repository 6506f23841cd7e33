"""The first lines of a job, and where its code comes from."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

import launch.origin
from launch.head import head
from launch.origin import origin
from launch.run import open_run
from tests.launch.slurm_programs import Toy

SMI = """GPU 0: NVIDIA H200 (UUID: GPU-0)
  MIG 1g.18gb     Device  0: (UUID: MIG-1)
GPU 1: NVIDIA H200 (UUID: GPU-1)"""


@pytest.fixture(autouse=True)
def _no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("SLURM_") or name == "WORLD_SIZE":
            monkeypatch.delenv(name)


def rows(text: str) -> dict[str, str]:
    return {line[:9].strip(): line[9:] for line in text.partition("\nsettings\n")[0].splitlines()}


def test_what_a_job_says_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = open_run(tmp_path / "run", Toy(folder=tmp_path / "run"), [])
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n[ $1 = -L ] && cat <<END\n{SMI}\nEND\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    job = {"JOB_ID": "20", "ARRAY_JOB_ID": "17", "ARRAY_TASK_ID": "3", "JOB_NODELIST": "n[1-2]", "RESTART_COUNT": "2"}
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("WORLD_SIZE", "16")
    text = head(run)
    told = rows(text)
    assert told["run"] == str(run)
    assert told["machine"].startswith(os.uname().nodename)
    assert told["cores"] == f"{len(os.sched_getaffinity(0))} of {os.cpu_count()}"
    assert told["GPUs"] == "GPU 0: NVIDIA H200; GPU 1: NVIDIA H200"
    assert told["job"] == "17_3 on n[1-2], started again 2 times"
    assert told["ranks"] == "16"
    assert told["code"].startswith(str(origin()["git"]["sha"] or "not a git checkout"))
    assert "torch 2." in told["versions"]
    assert text.endswith(f"settings\n  folder: {run}")


def test_what_is_not_known_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    text = head(tmp_path / "none")
    told = rows(text)
    assert (told["GPUs"], told["ranks"], told["code"]) == ("none", "1", "not a git checkout")  # no git either
    assert "job" not in told
    assert "settings\n  cannot be read: " in text


def test_commit_of_a_checkout_and_of_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> None:
        subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x@x", *words], cwd=tmp_path, check=True)

    (tmp_path / "launch").mkdir()
    (tmp_path / "launch/run.py").write_text("")
    monkeypatch.setattr(launch.origin, "__file__", str(tmp_path / "launch/run.py"))
    assert origin()["git"] == {"sha": None, "dirty": None}
    git("init", "-q")
    assert origin()["git"] == {"sha": None, "dirty": None}  # a checkout, but not of this code
    git("add", ".")
    git("commit", "-q", "-m", "x")
    clean = origin()["git"]
    assert len(clean["sha"]) == 40
    assert clean["dirty"] is False
    (tmp_path / "launch/run.py").write_text("changed")
    assert origin()["git"] == {"sha": clean["sha"], "dirty": True}
