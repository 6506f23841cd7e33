"""An array of jobs on a real SLURM of two nodes, on this machine."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from launch.array import Array
from launch.slurm import ArrayRules, Slurm
from tests.launch.crew_tasks import Noted, hear, name
from tests.slurm.conftest import Cluster

TASKS = range(24)


@pytest.fixture(autouse=True)
def _cluster(cluster: Cluster) -> None:
    """All tests here run on it."""


def array(folder: Path) -> Array:
    """Four jobs at a time; a node has two cores."""
    rules = ArrayRules(elements=4)
    return Array(Slurm(hours=0.2, array=rules), folder / "corpus" / "jobs", poll_s=0.2, settle_s=1.0)


def queued() -> list[str]:
    return subprocess.run(["squeue", "-h"], capture_output=True, text=True, check=True).stdout.split()


def until_empty() -> bool:
    for _ in range(150):
        if not queued():
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("trouble", ["lose the element", "lose the node"])
def test_all_results_arrive_when_a_job_or_its_node_dies(tmp_path: Path, trouble: str) -> None:
    noted = Noted(tmp_path, trouble, at=11)
    with array(tmp_path).open() as each:
        assert dict(each(noted, TASKS, name)) == {number: number**2 for number in TASKS}
        assert not list((tmp_path / "corpus" / "jobs").iterdir())
    assert until_empty()
    starts = Counter(noted.starts())
    assert starts[11] == 2
    if trouble == "lose the element":
        assert all(starts[number] == 1 for number in TASKS if number != 11)
        assert set(noted.nodes()) == {"node0", "node1"}
    else:
        lost, *_, last = [node for number, node in zip(noted.starts(), noted.nodes(), strict=True) if number == 11]
        assert last != lost
        subprocess.run(["scontrol", "update", f"nodename={lost}", "state=resume"], check=True)


def started(folder: Path) -> subprocess.Popen[str]:
    code = "import sys; from tests.launch.crew_tasks import main; main(*sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder / "corpus"), "slurm"],
        text=True,
        stderr=subprocess.PIPE,
        preexec_fn=hear,
    )
    (folder / "corpus").mkdir()
    for _ in range(300):
        if (folder / "corpus" / "started").exists() and len(Noted(folder / "corpus").starts()) == 2:
            return process
        time.sleep(0.1)
    process.kill()
    pytest.fail(f"no tasks were started: {process.communicate()}")


def test_ctrl_c_cancels_the_jobs(tmp_path: Path) -> None:
    with started(tmp_path) as process:
        assert queued()
        process.send_signal(signal.SIGINT)
        try:
            process.communicate(timeout=30)
        finally:
            process.kill()
    assert until_empty()


def test_after_kill_9_the_next_command_cancels_what_was_left(tmp_path: Path) -> None:
    with started(tmp_path) as process:
        process.kill()
        process.communicate(timeout=30)
    assert queued()
    with array(tmp_path).open() as each:
        assert dict(each(Noted(tmp_path), [2, 3], name)) == {2: 4, 3: 9}
    assert until_empty()
