"""The run folder: what it records, what it refuses, and what it says when it cannot be written."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field

from launch import run
from launch.jobs import Job, note_job
from launch.run import (
    Outcome,
    RunError,
    Stopped,
    alive,
    close_run,
    command,
    note_start,
    open_run,
    read_json,
    say,
    write_text,
)
from launch.settings import Settings, load
from tests.launch.slurm_programs import Cluster


class Data(Settings):
    seed: int = 7
    workers: int = 2


class Run(Settings):
    folder: Path
    steps: int = Field(10, gt=0)
    lr: float = 1e-3
    data: Data = Data()


def starts(folder: Path) -> list[dict[str, object]]:
    found = json.loads((folder / "run.json").read_text())["starts"]
    assert isinstance(found, list)
    return found


def test_a_new_folder_holds_settings_and_origin(tmp_path: Path) -> None:
    settings = Run(folder=tmp_path / "deep/run")
    assert open_run(settings.folder, settings, ["axial", "toy", "lr=1"]) == settings.folder
    assert load(Run, settings.folder / "settings.yaml") == settings
    [start] = starts(settings.folder)
    assert start["command"] == ["axial", "toy", "lr=1"]
    assert start["seeds"] == {"data.seed": 7}
    assert start["pid"] == os.getpid()
    versions = start["versions"]
    assert isinstance(versions, dict)
    assert versions["python"] == sys.version.split()[0]
    assert versions["pydantic"]
    assert sorted(path.name for path in settings.folder.iterdir()) == ["run.json", "settings.yaml"]


def test_the_same_settings_go_on_and_each_start_is_noted(tmp_path: Path) -> None:
    settings = Run(folder=tmp_path)
    open_run(tmp_path, settings, ["one"])
    close_run(tmp_path, "failed", error="x")
    open_run(tmp_path, settings, ["two"])
    assert [start["command"] for start in starts(tmp_path)] == [["one"], ["two"]]
    assert not (tmp_path / "outcome.json").exists()


def test_a_start_that_made_nothing_does_not_bind_the_folder(tmp_path: Path) -> None:
    """Who mistypes a path and puts it right must not be told to choose another folder."""
    open_run(tmp_path, Run(folder=tmp_path), [])
    close_run(tmp_path, "failed", error="no such data")
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "lock").touch()
    open_run(tmp_path, Run(folder=tmp_path, lr=0.5), [])
    assert "lr: 0.5" in (tmp_path / "settings.yaml").read_text()


def test_other_settings_are_refused_with_the_difference(tmp_path: Path) -> None:
    open_run(tmp_path, Run(folder=tmp_path), [])
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    before = (tmp_path / "settings.yaml").read_text()
    with pytest.raises(RunError) as caught:
        open_run(tmp_path, Run(folder=tmp_path, lr=0.5, steps=20), [], free=["steps"])
    lines = str(caught.value).splitlines()
    assert f"{tmp_path} holds a run with other settings" in lines[0]
    assert "-lr: 0.001" in lines
    assert "+lr: 0.5" in lines
    assert not any("steps" in line for line in lines)
    assert (tmp_path / "settings.yaml").read_text() == before
    assert len(starts(tmp_path)) == 1


def test_a_setting_that_is_new_since_the_folder_was_made_has_its_default(tmp_path: Path) -> None:
    open_run(tmp_path, Run(folder=tmp_path), [])
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    path = tmp_path / "settings.yaml"
    path.write_text(path.read_text().replace("lr: 0.001\n", "").replace("  workers: 2\n", ""))
    before = path.read_text()
    with pytest.raises(RunError, match=r"(?s)-lr: 0\.001.*[+]lr: 0\.5"):
        open_run(tmp_path, Run(folder=tmp_path, lr=0.5), [])
    assert path.read_text() == before
    open_run(tmp_path, Run(folder=tmp_path), [])
    assert load(Run, path) == Run(folder=tmp_path)


def test_a_setting_that_is_no_longer_is_another_setting(tmp_path: Path) -> None:
    open_run(tmp_path, Run(folder=tmp_path), [])
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with (tmp_path / "settings.yaml").open("a") as file:
        file.write("momentum: 0.9\n")
    with pytest.raises(RunError, match=r"-momentum: 0\.9"):
        open_run(tmp_path, Run(folder=tmp_path), [])


def test_a_folder_with_nothing_but_a_cache_takes_other_settings(tmp_path: Path) -> None:
    open_run(tmp_path, Run(folder=tmp_path), [])
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/case").write_text("made ready")
    open_run(tmp_path, Run(folder=tmp_path, lr=0.5), [])
    (tmp_path / "weights").write_text("learnt")
    with pytest.raises(RunError, match="holds a run with other settings"):
        open_run(tmp_path, Run(folder=tmp_path), [])


def test_free_settings_may_change_and_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    open_run(Path("a"), Run(folder=Path("a")), [])
    longer = Run(folder=tmp_path / "a", steps=20, data=Data(workers=8))
    open_run(longer.folder, longer, [], free=["steps", "data.workers"])
    assert load(Run, Path("a/settings.yaml")) == longer


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    settings = Run(folder=tmp_path)
    open_run(tmp_path, settings, [])
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        record = json.loads((tmp_path / "run.json").read_text())
        record["starts"][-1] |= {"pid": other.pid, "ticks": run._ticks(other.pid)}
        (tmp_path / "run.json").write_text(json.dumps(record))
        assert alive(record["starts"][-1])
        with pytest.raises(RunError, match=f"being worked in by process {other.pid}"):
            open_run(tmp_path, settings, [])
        other.communicate(b"\n")
    assert alive(record["starts"][-1]) is False
    open_run(tmp_path, settings, [])
    # Another process that got the same number, and another machine's process.
    assert alive({**record["starts"][-1], "pid": os.getpid(), "ticks": 1}) is False
    assert alive({**record["starts"][-1], "host": "elsewhere"}) is None


def test_of_two_commands_at_once_one_is_refused(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from launch.run import *; "
        "from tests.launch.steps_verb import Settings; folder = Path(sys.argv[1]); sys.stdin.read(1)\n"
        "try: open_run(folder, Settings(folder=folder), ['x'])\n"
        "except RunError as error: print(error, flush=True)\n"
        "else: print('opened', flush=True); sys.stdin.read()"
    )
    for number in range(3):
        command = [sys.executable, "-c", code, str(tmp_path / f"run{number}")]
        pipe: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, **pipe) as one, subprocess.Popen(command, **pipe) as other:
            for process in (one, other):
                process.stdin.write("go")
                process.stdin.flush()
            said = [process.stdout.readline() for process in (one, other)]
        assert sorted("is being worked in by process" in line for line in said) == [False, True], said


@pytest.mark.parametrize(("start", "who"), [({"pid": 7}, "process 7 on node7"), ({"pid": None}, "a job in the queue")])
def test_what_runs_or_waits_elsewhere_keeps_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: dict[str, object], who: str
) -> None:
    """Until its files say that it ended, or the cluster's queue no longer knows it."""
    settings = Run(folder=tmp_path / "run")
    open_run(settings.folder, settings, [])
    record = json.loads((settings.folder / "run.json").read_text())
    record["starts"][-1] |= {"host": "node7", "ticks": None, **start}
    text = json.dumps(record)
    (settings.folder / "run.json").write_text(text)
    cluster = Cluster(tmp_path / "bin").start(monkeypatch)
    with pytest.raises(RunError, match=f"being worked in by {who}.*if it is gone, remove"):
        open_run(settings.folder, settings, [])  # no job is known of it
    note_job(settings.folder, Job("77", "axial-run", "slurm", "", "2100-01-01T00:00:00+00:00"))
    cluster.holds(("77", "RUNNING"))
    with pytest.raises(RunError, match=r"being worked in by job 77 \(RUNNING in the queue\)"):
        open_run(settings.folder, settings, [])
    squeue = (tmp_path / "bin/squeue").read_text()
    cluster.refuses("squeue", "slurm_load_jobs error: Unable to contact slurm controller")
    with pytest.raises(RunError, match=f"being worked in by {who}"):
        open_run(settings.folder, settings, [])
    (tmp_path / "bin/squeue").write_text(squeue)
    cluster.holds()
    open_run(settings.folder, settings, [])
    (settings.folder / "run.json").write_text(text)
    cluster.refuses("squeue", "")
    close_run(settings.folder, "stopped")
    open_run(settings.folder, settings, [])


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file/run"):
        with pytest.raises(RunError, match=r"file is a file, so .* cannot be the run folder; choose another folder="):
            open_run(folder, Run(folder=folder), [])


def test_a_folder_that_cannot_be_made() -> None:
    with pytest.raises(RunError, match="cannot make the run folder /proc/none/run: No such file"):
        open_run(Path("/proc/none/run"), Run(folder=Path("x")), [])


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_disk_that_takes_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(number: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(RunError, match=f"cannot write .*settings.yaml: {os.strerror(code)}$"):
        open_run(tmp_path, Run(folder=tmp_path), [])
    assert list(tmp_path.iterdir()) == []
    close_run(tmp_path, "failed", error="the real one")  # says nothing of its own: it must not hide the real one
    with pytest.raises(RunError, match=r"outcome\.json"):
        close_run(tmp_path, "done")


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is not JSON"), ("[]", "does not hold a JSON object"), ("{}", "not a record of starts")],
)
def test_a_spoilt_record_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(RunError, match=f"run.json.* ?{message}.*move it away"):
        open_run(tmp_path, Run(folder=tmp_path), [])


def test_a_job_of_a_cluster_is_noted(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no start to note"):
        note_start(tmp_path, job="12")
    open_run(tmp_path, Run(folder=tmp_path), [])
    note_start(tmp_path, job="12", waiting=True)
    assert (starts(tmp_path)[-1]["job"], starts(tmp_path)[-1]["pid"]) == ("12", None)
    note_start(tmp_path, job="12")
    assert (starts(tmp_path)[-1]["job"], starts(tmp_path)[-1]["pid"]) == ("12", os.getpid())


def test_outcome_is_noted(tmp_path: Path) -> None:
    close_run(tmp_path, "done", Outcome(made=("a",), next=("b", "c")))
    found = read_json(tmp_path / "outcome.json")
    assert found is not None
    assert {key: found[key] for key in ("state", "made", "next", "error")} == {
        "state": "done", "made": ["a"], "next": ["b", "c"], "error": "",
    }  # fmt: skip


def test_write_text_leaves_the_old_file_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "a", "old")
    monkeypatch.setattr(os, "fsync", lambda number: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    with pytest.raises(RunError, match="No space left"):
        write_text(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("wrong"), "wrong"),
        (FileNotFoundError(2, "No such file or directory", "x.nii"), "No such file or directory: x.nii"),
        (OSError("plain"), "plain"),
        (MemoryError(), "out of memory"),
        (MemoryError("8 GiB"), "out of memory. 8 GiB"),
        (ValueError(), "ValueError"),
        (RuntimeError("boom"), "RuntimeError: boom"),
        (Stopped("stopped by SIGTERM after step 3"), "stopped by SIGTERM after step 3"),
    ],
)
def test_errors_are_said_in_one_line(error: BaseException, text: str) -> None:
    assert say(error) == text


def test_stopped_knows_its_signal() -> None:
    assert Stopped("stopped by SIGUSR2 after step 3").signal == "SIGUSR2"
    assert Stopped("stopped by another rank").signal == ""


def test_a_command_can_be_pasted_whatever_the_paths_hold() -> None:
    words = ["folder=a b;c", "model=[x,'y']", "images=IMAGES"]
    assert command("predict", words[2]) == "axial predict images=IMAGES"
    done = subprocess.run(
        ["bash", "-c", f'axial() {{ printf "%s\\n" "$@"; }}; {command("predict", *words)}'],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == ["predict", *words]
