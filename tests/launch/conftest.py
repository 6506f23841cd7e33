"""A cluster that is not there, and a run that was submitted to it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch.slurm_programs import Cluster, run_of


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """Stand-ins of SLURM's programs, first on the PATH."""
    return Cluster(tmp_path / "bin").start(monkeypatch)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder that waits as job 17."""
    return run_of(tmp_path / "run", job="17")
