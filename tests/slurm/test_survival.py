"""What a job survives on a real SLURM of two nodes, and in which state it ends where it cannot."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.attempts import read_attempts
from launch.call import Call, resolve
from launch.run import open_run
from launch.slurm import Slurm
from tests.slurm.conftest import Cluster, tail


def call(folder: Path, **settings: Any) -> Call:
    open_run(folder, resolve("steps_verb:Settings")(folder=folder, **settings), ["axial", "steps"])
    return Call("steps_verb:main", "steps_verb:Settings", folder)


def submitted(folder: Path, slurm: Slurm | None = None, **settings: Any) -> str:
    """Number of the job."""
    asked = slurm or Slurm(hours=0.2)
    return asked.submit([call(folder, **settings)], folder / "jobs", folder.name)[0].id


def undisturbed(steps: int) -> str:
    value = ""
    for step in range(1, steps + 1):
        value = hashlib.sha256(f"{value}{step}".encode()).hexdigest()
    return value


def beaten(folder: Path) -> int:
    """The step that a run is in."""
    try:
        return int(json.loads((folder / "beats/00000.json").read_text())["step"])
    except (FileNotFoundError, ValueError):
        return 0


def processes(folder: Path) -> list[int]:
    """Ranks of a run, that live on this machine as all its nodes do."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"submitit.core._submit" in words and str(folder / "jobs").encode() in words:
            found.append(int(path.name))
    return sorted(found)


def hows(folder: Path) -> list[str]:
    return [attempt.how for attempt in read_attempts(folder)]


def test_sent_back_by_hand_and_warned_it_goes_on_to_the_same_end(cluster: Cluster, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = submitted(run, steps=120, step_s=0.1)
    cluster.until(lambda: beaten(run) > 7, 60, "the first steps")
    cluster.ask("scontrol", "requeue", job)
    cluster.until(lambda: hows(run), 60, f"a second start {tail(run)}")
    at = beaten(run)
    cluster.until(lambda: beaten(run) > at + 3, 60, "more steps")
    cluster.ask("scancel", "-s", "USR2", job)
    cluster.until(lambda: len(hows(run)) == 2, 60, "the warning")
    ended = cluster.ended(run)
    assert (ended["state"], ended["made"]) == ("done", [undisturbed(120)]), tail(run)
    assert hows(run) == ["warned", "warned"]


def test_the_last_of_an_array_goes_back_alone(cluster: Cluster, tmp_path: Path) -> None:
    """Its number is that of the whole array, too."""
    runs = [tmp_path / "first", tmp_path / "last"]
    calls = [call(run, steps=60, step_s=0.1) for run in runs]
    _, last = Slurm(hours=0.2).submit(calls, tmp_path / "jobs", "both")
    cluster.until(lambda: min(map(beaten, runs)) > 5, 60, "the first steps")
    cluster.ask("scancel", "-s", "USR2", last.id)
    assert [cluster.ended(run)["made"] for run in runs] == [[undisturbed(60)]] * 2
    assert [hows(run) for run in runs] == [[], ["warned"]]


def test_a_killed_rank_ends_the_job_everywhere_and_it_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    run = tmp_path / "run"
    submitted(run, Slurm(hours=0.2, nodes=2), steps=30, trouble="kill", at=12, rank=1, times=1)
    ended = cluster.ended(run)
    assert (ended["state"], ended["made"]) == ("done", [undisturbed(30)]), tail(run)
    [attempt] = read_attempts(run)
    assert (attempt.how, attempt.step) == ("killed", 12)
    assert attempt.reason == "rank 1 on node1: Killed"


def test_what_fails_twice_in_one_step_stops_with_its_samples(cluster: Cluster, tmp_path: Path) -> None:
    run = tmp_path / "run"
    submitted(run, trouble="bug", at=8)
    ended = cluster.ended(run)
    assert ended["state"] == "failed"
    text = str(ended["error"])
    assert (
        "it failed twice in step 8: RuntimeError: the verb is broken. Samples of step 8: slice-8-0, slice-8-1" in text
    )
    assert (run / "samples_of_step_8.txt").read_text().splitlines()[19] == "slice-8-19"
    assert [attempt.step for attempt in read_attempts(run)] == [8, 8]


def test_a_mistake_is_not_tried_again(cluster: Cluster, tmp_path: Path) -> None:
    run = tmp_path / "run"
    submitted(run, trouble="mistake", at=3)
    assert cluster.ended(run)["error"] == "the verb is misused in steps.yaml"
    assert hows(run) == []


def test_cancelled_it_saves_and_the_same_command_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = submitted(run, steps=100, step_s=0.1)
    cluster.until(lambda: beaten(run) > 6, 60, "the first steps")
    cluster.ask("scancel", job)
    ended = cluster.ended(run)
    assert ended["state"] == "stopped"
    assert "SIGTERM" in str(ended["error"])
    assert submitted(run, steps=100, step_s=0.1) != job
    assert cluster.ended(run)["made"] == [undisturbed(100)], tail(run)


def test_a_dead_machine_is_noticed_and_the_job_goes_on_elsewhere(cluster: Cluster, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = submitted(run, steps=200, step_s=0.1)
    cluster.until(lambda: beaten(run) > 6, 60, "the first steps")
    node = cluster.ask("squeue", "-h", "-j", job, "-o", "%N").strip()
    cluster.machine.kill(node)
    for pid in daemons(cluster, job, run):
        os.kill(pid, signal.SIGKILL)
    cluster.until(lambda: hows(run) == ["lost"], 90, f"the node's loss {tail(run)}")
    assert cluster.ask("squeue", "-h", "-j", job, "-o", "%N").strip() not in ("", node)
    cluster.machine.start(node)
    assert cluster.ended(run)["made"] == [undisturbed(200)], tail(run)
    cluster.machine.until_idle()


def daemons(cluster: Cluster, job: str, run: Path) -> list[int]:
    """What a power cut takes besides slurmd: a job's ranks and batch script, and before them the daemons of its steps.

    Known by their folders: another SLURM on this machine has a job of this number too.
    """
    script = f"{cluster.machine.folder}/spool.*/job0*{job}/slurm_script"
    asked = subprocess.run(["pgrep", "-f", script], capture_output=True, text=True, check=False)
    work = [*processes(run), *map(int, asked.stdout.split())]
    parents = [int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) for pid in work]
    names = {pid: Path(f"/proc/{pid}/comm").read_text() for pid in parents}
    return [pid for pid, name in names.items() if name.startswith("slurmstepd")] + work


@pytest.fixture(params=["SIGUSR2", "SIGTERM"])
def preempting(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[str]:
    """By what a job is told that it is pre-empted. SIGUSR2 is something that a cluster must be set up for."""
    conf, own = cluster.machine.conf, cluster.machine.conf.read_text()
    if request.param == "SIGTERM":
        conf.write_text(own.replace("SlurmctldParameters=preempt_send_user_signal\n", ""))
        cluster.ask("scontrol", "reconfigure")
    yield str(request.param)
    conf.write_text(own)
    cluster.ask("scontrol", "reconfigure")


def test_a_preempted_job_saves_and_comes_back(cluster: Cluster, tmp_path: Path, preempting: str) -> None:
    low, high = tmp_path / "low", tmp_path / "high"
    submitted(low, Slurm(hours=0.2, partition="low", extra={"exclusive": True}, nodes=2), steps=120, step_s=0.1)
    cluster.until(lambda: beaten(low) > 6, 60, "the first steps")
    submitted(high, Slurm(hours=0.2, partition="main", extra={"exclusive": True}, nodes=2), steps=5)
    assert cluster.ended(high)["state"] == "done", tail(high)
    [attempt] = read_attempts(low)
    assert attempt.how == "warned"
    assert attempt.reason.startswith(f"stopped by {preempting} after step "), tail(low)
    assert cluster.ended(low)["made"] == [undisturbed(120)], tail(low)
