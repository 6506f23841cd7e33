"""Stand-ins of SLURM's programs, first on the PATH: a queue that holds what a test puts there."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from launch.jobs import Job, note_job
from launch.run import note_start, now, open_run
from launch.settings import Settings as Base

__all__ = ["Cluster", "Toy", "run_of"]


class Toy(Base):
    """Settings of a run that nobody runs."""

    folder: Path


@dataclass(frozen=True)
class Cluster:
    """squeue tells what `holds` put there; scancel notes what it was asked, and takes it out of the queue."""

    folder: Path

    def start(self, monkeypatch: pytest.MonkeyPatch) -> Cluster:
        """Put the programs on the PATH."""
        self.folder.mkdir()
        queue, asked, cancelled = (self.folder / name for name in ("queue", "asked", "cancelled"))
        for path in (queue, asked, cancelled):
            path.touch()
        scripts = {
            "squeue": f'echo "$*" >> {asked}\ncat {queue}',
            "scancel": f'echo "$*" >> {cancelled}\nshift\nfor id; do sed -i "/^$id[|_]/d" {queue}; done',
        }
        for name, text in scripts.items():
            (self.folder / name).write_text(f"#!/bin/sh\n{text}\n")
            (self.folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{self.folder}:{os.environ['PATH']}")
        return self

    def holds(self, *jobs: tuple[str, str] | tuple[str, str, str] | tuple[str, str, str, str]) -> None:
        """Exactly these: id, state, reason (None) and name (axial-run)."""
        full = [(*job, *("None", "axial-run")[len(job) - 2 :]) for job in jobs]
        (self.folder / "queue").write_text("".join(f"{'|'.join(job)}\n" for job in full))

    def refuses(self, program: str, text: str) -> None:
        """From now on the program fails with this text."""
        (self.folder / program).write_text(f'#!/bin/sh\necho "{text}" >&2\nexit 1\n')

    @property
    def asked(self) -> int:
        """How often the queue was asked."""
        return len((self.folder / "asked").read_text().splitlines())

    @property
    def cancelled(self) -> Sequence[str]:
        """The words of each call of scancel."""
        return (self.folder / "cancelled").read_text().splitlines()


def run_of(folder: Path, job: str = "", name: str = "axial-run", cluster: str = "slurm", **start: Any) -> Path:
    """A run folder, submitted as ``job`` where one is named; ``start`` is put into its entry in run.json."""
    open_run(folder, Toy(folder=folder), ["axial", "pretrain", "x.yaml"])
    if job:
        note_start(folder, waiting=True)
        note_job(folder, Job(job, name, cluster, str(folder / "jobs"), now()))
    record = json.loads((folder / "run.json").read_text())
    record["starts"][-1] |= start
    (folder / "run.json").write_text(json.dumps(record))
    return folder
