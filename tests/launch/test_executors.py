"""Running elsewhere: several processes that live and die together, and jobs through submitit on this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launch.call import Call, resolve
from launch.executors import EXECUTORS, Processes, Slurm, load_cluster
from launch.ranks import RankFailed
from launch.run import Outcome, RunError, Stopped, open_run
from launch.settings import SettingsError

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def _toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), str(HERE.parents[1])]))  # not an installed copy
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that what a job in this process sets is taken back
        monkeypatch.delenv(name)


def call(folder: Path, **settings: Any) -> Call:
    model = resolve("toy_verb:Settings")
    open_run(folder, model(folder=folder, **settings), ["axial", "toy"])
    return Call("toy_verb:main", "toy_verb:Settings", folder)


def waited_for(slurm: Slurm, asked: Call) -> Outcome:
    """What becomes of a job."""
    [job] = slurm.submit([asked], asked.folder / "jobs", "toy")
    return slurm.wait_for(asked.folder, job)


def gone(folder: Path) -> bool:
    """Have all processes that were here ended?"""
    pids = [int(path.read_text()) for path in folder.glob("was_here_*")]
    assert pids
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


def outcome(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "outcome.json").read_text())
    return found


def test_each_process_has_its_rank(tmp_path: Path) -> None:
    got = Processes(processes=2).run(call(tmp_path))
    assert got == Outcome(made=("a toy",), next=("play with it",))
    assert sorted(path.name for path in tmp_path.glob("was_here_*")) == ["was_here_0", "was_here_1"]


def test_two_processes_form_a_group(tmp_path: Path) -> None:
    assert Processes(processes=2).run(call(tmp_path, mode="group")).ok


@pytest.mark.parametrize(
    ("mode", "rank", "text", "trace"),
    [
        ("bug", 1, "rank 1 of 2: RuntimeError: the toy is broken", "in main\n    raise RuntimeError"),
        ("mistake", 1, "rank 1 of 2: the toy is misused in toy.yaml", ""),
        ("disk", 0, "rank 0 of 2: No space left on device: shard.tar", ""),
        ("dies", 1, "rank 1 of 2: killed by SIGKILL", ""),
        ("dies", 0, "rank 0 of 2: killed by SIGKILL", ""),
    ],
)
def test_when_one_fails_it_is_named_and_all_end(tmp_path: Path, mode: str, rank: int, text: str, trace: str) -> None:
    start = time.monotonic()
    with pytest.raises(RankFailed) as caught:
        Processes(processes=2).run(call(tmp_path, mode=mode, rank=rank))
    assert str(caught.value) == text
    assert trace in caught.value.trace
    assert time.monotonic() - start < 20
    assert gone(tmp_path)


def test_an_outcome_that_is_not_ok_comes_back(tmp_path: Path) -> None:
    assert not Processes(processes=1).run(call(tmp_path, mode="not_ok")).ok


def _started(tmp_path: Path) -> subprocess.Popen[str]:
    job = call(tmp_path, mode="stoppable")
    code = (
        "import sys; from pathlib import Path; from launch.call import *; from launch.executors import *\n"
        f"try: Processes(processes=2).run(Call({job.main!r}, {job.model!r}, Path({str(tmp_path)!r})))\n"
        "except BaseException as error: print(type(error).__name__, error)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "rank 0 is ready\n"
    for _ in range(500):
        if (tmp_path / "was_here_1").exists():
            break
        time.sleep(0.02)
    time.sleep(0.2)
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_passed_on(tmp_path: Path, number: signal.Signals) -> None:
    with _started(tmp_path) as process:
        process.send_signal(number)
        out, _ = process.communicate(timeout=30)
    assert out == f"Stopped stopped by {number.name} after step 3\n"
    assert gone(tmp_path)


def test_nobody_is_left_when_the_first_process_is_killed(tmp_path: Path) -> None:
    with _started(tmp_path) as process:
        process.kill()
        process.wait(10)
        assert process.stdout is not None
        process.stdout.close()
    for _ in range(200):
        if gone(tmp_path):
            break
        time.sleep(0.05)
    assert gone(tmp_path)


# submitit lets go of the process that it started.
@pytest.mark.filterwarnings("ignore:subprocess:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_local_job_forms_a_group_and_notes_its_end(tmp_path: Path) -> None:
    got = waited_for(Slurm(cluster="local", processes_per_node=2, hours=0.2), call(tmp_path, mode="group"))
    assert got == Outcome(made=("a toy",), next=("play with it",))
    assert outcome(tmp_path)["state"] == "done"
    [start] = json.loads((tmp_path / "run.json").read_text())["starts"]
    assert start["job"]
    assert start["pid"] != os.getpid()
    assert sorted(path.name for path in tmp_path.glob("was_here_*")) == ["was_here_0", "was_here_1"]


@pytest.mark.filterwarnings("ignore:subprocess:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_local_job_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match=r"job .* failed") as caught:
        waited_for(Slurm(cluster="local", hours=0.2), call(tmp_path, mode="bug"))
    assert "RuntimeError: the toy is broken" in caught.value.trace
    assert (outcome(tmp_path)["state"], outcome(tmp_path)["error"]) == ("failed", "RuntimeError: the toy is broken")


@pytest.mark.filterwarnings("ignore:subprocess:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_job_one_does_not_wait_for(tmp_path: Path) -> None:
    executor = Slurm(cluster="local", hours=0.2)
    assert executor.detached
    executor.submit([call(tmp_path)], tmp_path / "jobs", "toy")
    for _ in range(400):
        if (tmp_path / "outcome.json").exists():
            break
        time.sleep(0.05)
    assert outcome(tmp_path)["state"] == "done"


# submitit leaves its two log files open.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_debug_job_runs_in_this_process(tmp_path: Path) -> None:
    assert waited_for(Slurm(cluster="debug"), call(tmp_path)).ok
    assert (tmp_path / "was_here_0").read_text() == str(os.getpid())


# submitit leaves its two log files open.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_job_that_was_stopped_is_not_done(tmp_path: Path) -> None:
    with pytest.raises(Stopped, match="stopped by SIGTERM"):
        waited_for(Slurm(cluster="debug"), call(tmp_path, mode="stopped", signal="SIGTERM"))
    assert outcome(tmp_path)["state"] == "stopped"


def test_a_folder_with_any_name_travels(tmp_path: Path) -> None:
    assert call(tmp_path / "c😀 ü: 'x'").execute().ok


def test_without_slurm_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RunError, match="no sbatch on this machine"):
        waited_for(Slurm(), call(tmp_path))


@pytest.mark.parametrize("name", ["here.yaml", "two_processes.yaml", "slurm_array.yaml", "slurm_example.yaml"])
def test_packaged_cluster_files_are_valid(name: str) -> None:
    executor = load_cluster(name)
    assert type(executor) in EXECUTORS.values()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind: slrum\n", r"kind: no such kind 'slrum'; did you mean 'slurm'\? \(allowed: here, .*\)  \[.*c.yaml:1\]"),
        ("processes: 2\n", r"kind: must be named \(allowed: here, processes, slurm\)  \[.*c.yaml:1\]"),
        ("kind: slurm\npartitoin: x\n", r"partitoin: no such setting; did you mean 'partition'\?  \[.*c.yaml:2\]"),
        ("kind: processes\n", "processes: Field required"),
        ("kind: slurm\n  bad: [1\n", r"c.yaml:2\]"),
    ],
)
def test_a_wrong_cluster_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(SettingsError, match=message):
        load_cluster(str(tmp_path / "c.yaml"))
    with pytest.raises(SettingsError, match="no such settings file"):
        load_cluster(str(tmp_path / "none.yaml"))
