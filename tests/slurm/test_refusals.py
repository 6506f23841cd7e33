"""What cannot work is one clear line: a partition, an option, a controller or a folder that is not there."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.run import RunError
from launch.slurm import Slurm
from tests.slurm.conftest import Cluster, tail
from tests.slurm.test_survival import call, submitted


@pytest.mark.parametrize(
    ("slurm", "message"),
    [
        (Slurm(partition="gpu"), "sbatch refused the job.*[Ii]nvalid partition"),
        (Slurm(extra={"no-such-option": 1}), "sbatch refused the job.*no-such-option"),
    ],
)
def test_what_sbatch_refuses_is_one_clear_line(cluster: Cluster, tmp_path: Path, slurm: Slurm, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        submitted(tmp_path / "run", slurm)
    assert "\n" not in str(caught.value)
    assert cluster.queued() == []


def test_a_controller_that_is_away(cluster: Cluster, tmp_path: Path) -> None:
    cluster.machine.kill("slurmctld", signal.SIGTERM)
    try:
        with pytest.raises(
            RunError, match=r"sbatch refused the job: .*[Uu]nable to contact slurm controller"
        ) as caught:
            submitted(tmp_path / "run")
        assert "\n" not in str(caught.value)
    finally:
        cluster.machine.start("slurmctld")
        cluster.machine.until_idle()


@pytest.fixture
def unshared(cluster: Cluster, tmp_path: Path) -> Iterator[Path]:
    """A folder that only the first node sees: over it the second one has an empty file system of its own."""
    folder = tmp_path / "unshared"
    folder.mkdir()
    cluster.machine.kill("node1", signal.SIGTERM)
    mount = f'mount -t tmpfs none "{folder}" && exec "$@"'
    cluster.machine.start("node1", "unshare", "--mount", "--propagation", "private", "sh", "-c", mount, "sh")
    cluster.machine.until_idle()
    yield folder
    cluster.machine.kill("node1", signal.SIGTERM)
    cluster.machine.start("node1")
    cluster.machine.until_idle()


def test_a_folder_that_one_of_two_nodes_does_not_see(cluster: Cluster, unshared: Path) -> None:
    run = unshared / "run"
    job = submitted(run, Slurm(nodes=2, hours=0.2))
    ended = cluster.ended(run)
    said = f"{run} is not there on node1, a machine of job {job}; put it on a file system that all nodes see"
    assert (ended["state"], ended["error"]) == ("failed", said), tail(run)


def test_a_folder_that_the_only_node_does_not_see(cluster: Cluster, unshared: Path) -> None:
    run = unshared / "run"
    slurm = Slurm(hours=0.2, extra={"nodelist": "node1"})
    [job] = slurm.submit([call(run)], run / "jobs", "run")
    with pytest.raises(RunError, match=rf"left the queue without a word; is {run} seen by its machine\?"):
        slurm.wait_for(run, job)
