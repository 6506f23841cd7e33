"""Where a verb runs, as a cluster file says: in this process, in several on this machine, or as a job through submitit.

A new place is one class: its settings and ``run(call) -> Outcome``, or, for jobs that outlive the command and may wait
for one another, ``submit`` and ``wait_for``; and who does the tasks of a verb that shares them out, in ``crew_of``.
Elsewhere than here the settings travel as the settings.yaml of the run folder: what ran is what the folder says.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from launch.array import Array
from launch.call import Call
from launch.crew import Crew, Workers
from launch.documents import SettingsError, near, read
from launch.ranks import run_ranks
from launch.run import Outcome
from launch.settings import Settings, find, load, names_beside
from launch.slurm import Slurm

__all__ = ["EXECUTORS", "Executor", "Here", "Processes", "Slurm", "crew_of", "load_cluster"]


class Here(Settings):
    """This very process: the command calls the verb itself."""

    kind: Literal["here"] = "here"
    ranks: ClassVar[int] = 1


class Processes(Settings):
    """Several processes on this machine, one a GPU, as torchrun starts them."""

    kind: Literal["processes"] = "processes"
    processes: int = Field(ge=1, description="how many; with GPUs one for each")
    grace_s: float = Field(60.0, gt=0, description="seconds they get to save and end after Ctrl-C or SIGTERM")

    @property
    def ranks(self) -> int:
        """Processes of the run."""
        return self.processes

    def run(self, call: Call) -> Outcome:
        return run_ranks((call.main, call.model, str(call.folder)), self.processes, self.grace_s)


Executor = Here | Processes | Slurm
EXECUTORS: dict[str, type[Executor]] = {
    "here": Here,
    "processes": Processes,
    "slurm": Slurm,
}


def crew_of(executor: Executor, folder: Path) -> Crew | None:
    """Who does the tasks of a verb on the run folder ``folder``; None: whom the verb's own settings ask for."""
    match executor:
        case Processes():
            return Workers(executor.processes)
        case Slurm():
            # submitit's debug executor would do the same one by one in this process, without limits.
            return Workers(0) if executor.cluster == "debug" else Array(executor, folder.resolve() / "jobs")
        case _:
            return None


def load_cluster(name: str) -> Executor:
    """The executor that a cluster file describes, a path or one of the packaged files. Raises SettingsError."""
    path = find(name)
    if not path.exists():
        raise SettingsError(f"no such settings file {path}{near(path.name, names_beside(path))}")
    mistakes: list[str] = []
    document = read(path, find, mistakes)
    if document is None:
        raise SettingsError("\n".join(mistakes))
    kind, kinds = document.data.get("kind"), list(EXECUTORS)
    if kind not in kinds:
        hint = f"no such kind {kind!r}{near(str(kind), kinds)}" if kind is not None else "must be named"
        raise SettingsError(f"kind: {hint} (allowed: {', '.join(kinds)})  [{document.place(('kind',)) or path}]")
    return load(EXECUTORS[kind], path)
