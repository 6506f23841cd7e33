"""The runs of a plan one after the other, or as jobs that wait for one another; what is done or at work is left."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import traceback
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from launch.call import Call, resolve
from launch.jobs import Job, Queued, held, last_job, queue
from launch.plan import Plan, Run
from launch.ranks import RankFailed
from launch.run import OWN, USER_ERRORS, Outcome, RunError, Stopped, close_run, command, open_run, read_json, say
from launch.settings import SettingsError, load
from launch.slurm import Slurm
from launch.verbs import FREE, Verb

__all__ = ["Performance", "judged", "rank_zero"]

GONE_S = 60.0  # a cancelled job leaves the queue within seconds


def rank_zero() -> bool:
    """Under torchrun every rank comes through here, the first one speaks and writes; asked before torch is there."""
    return os.environ.get("RANK", "0") == "0"


def judged(error: BaseException) -> tuple[str, int | None]:
    """An error as the line a user reads, and its exit code: None for one of ours, whose traceback must be seen."""
    match error:
        case BrokenPipeError():
            return "nobody reads the output any more", 141
        case KeyboardInterrupt():
            return "interrupted; the same command goes on", 130
        case Stopped():
            return say(error), 130
        case ModuleNotFoundError():
            return f"needs the Python package {error.name}, which is not installed", 2
        case RankFailed():
            return say(error), 1 if error.trace else 2
        case _:
            return say(error), 2 if isinstance(error, USER_ERRORS) else None


@dataclass
class Performance:
    """One command at its runs: what it opened, what came of it, and what of it failed."""

    plan: Plan
    verb: Verb
    words: Sequence[str]
    failed: list[str] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)

    def todo(self) -> Iterator[Run]:
        """The runs to be done in or beside this process, each opened when its turn has come; ends where a chain does.

        Raises RunError for a folder that cannot be used; in a sweep only that point is left out.
        """
        self._check_chain()
        wanted = self._wanted()
        for number, run in enumerate(self.plan.runs, 1):
            if self.failed and self.plan.kind == "chain":
                return
            if run not in wanted:
                self._say(f"{run.name}: done before")
                continue
            if self.plan.many:
                self._say(f"{run.name}: {number} of {len(self.plan.runs)}, in {run.folder}")
            if self._opened(run):
                yield run

    @contextmanager
    def noted(self, run: Run, job: bool = False) -> Iterator[None]:
        """While a run is at work: notes its end in its folder (a ``job`` does so itself), and passes its error on.

        What fails in a sweep does not end the others; what fails in a chain does.
        """
        before = len(self.outcomes)
        own = self.verb.run and rank_zero() and not job
        try:
            yield
            outcome = self.outcomes[-1] if len(self.outcomes) > before else Outcome()
            if own:
                close_run(run.folder, "done" if outcome.ok else "failed", outcome)
            if not outcome.ok:
                self.failed.append(run.name)
        except BaseException as error:
            text, code = judged(error)
            if own:
                close_run(run.folder, "stopped" if code in (130, 141) else "failed", error=text)
            if not self._goes_on(run, error):
                raise

    def ended(self) -> Outcome:
        """What came of it all."""
        runs, kind = self.plan.whole, self.plan.kind
        if kind == "one":
            return self.outcomes[-1] if self.outcomes else Outcome(ok=not self.failed)
        if self.failed:
            self._say(f"failed: {', '.join(self.failed)}; {self._how}")
        elif not self.outcomes:
            self._say(f"all {len(runs)} runs in {self.plan.folder} are done")
        looked = command("status", f"folder={self.plan.folder}")
        last = self.outcomes[-1].next if kind == "chain" and self.outcomes and not self.failed else ()
        made = tuple(line for outcome in self.outcomes for line in outcome.made)
        return Outcome(made, (looked, *last), not self.failed)

    @property
    def _how(self) -> str:
        going = "the same command goes on"
        return f"{going} there, and leaves what is done" if self.plan.kind == "chain" else f"{going} with these alone"

    def _goes_on(self, run: Run, error: BaseException) -> bool:
        """Whether other runs are done although this one has failed; says so of it."""
        text, code = judged(error)
        if self.plan.kind != "sweep" or code in (130, 141):
            if self.plan.many:
                error.add_note(f"that was {run.name}, one of {len(self.plan.runs)} runs; {self._how}")
            return False
        if code is None:
            traceback.print_exception(error)
        print(f"{run.name}: {text}", file=sys.stderr)
        self.failed.append(run.name)
        return True

    def _say(self, text: str) -> None:
        if rank_zero():
            print(text, flush=True)

    # ------------------------------------------------------------------------------------------ what is to be done

    def _wanted(self) -> tuple[Run, ...]:
        """Those not done yet. A run that is asked for alone is begun again: it finds out itself what is missing.

        Its parts are, too, when it was done; as long as it is not, the parts that are done are left to it.
        """
        if not self.verb.run:
            return self.plan.runs
        done = {run.folder for run in self.plan.runs if self._is_done(run)}
        alone = self.plan.kind == "one"
        wanted = {run.folder for run in self.plan.whole if alone or run.folder not in done}
        for run in self.plan.whole:
            if run.folder in wanted:
                wanted |= {part for part in run.needs if run.folder in done or part not in done}
        return tuple(run for run in self.plan.runs if run.folder in wanted)

    def _is_done(self, run: Run) -> bool:
        """Has it been done, as it is asked for now? More steps are to be done, on another device they were."""
        if (read_json(run.folder / "outcome.json") or {}).get("state") != "done":
            return False
        try:
            old: Any = load(resolve(self.verb.settings), run.folder / "settings.yaml")
        except SettingsError:
            return False
        free = {"folder", *FREE} - {"steps"}
        before, asked = (_without(one.model_dump(mode="json"), free) for one in (old, run.settings))
        return bool(before == asked)

    def _check_chain(self) -> None:
        """Refuse a link that holds what it made of a run which is now done again. Raises RunError."""
        known = {run.folder: run for run in self.plan.runs}
        for run in self.plan.runs if self.plan.kind == "chain" else ():
            begun = _oldest(run.folder)
            for before in (known[folder] for folder in run.needs if begun is not None):
                if not self._is_done(before):
                    raise RunError(
                        f"{run.folder} holds what was made from {before.name}, which is yet to be done, or done again "
                        f"with other settings; move {run.folder} away, or put the settings of {before.name} back"
                    )
                ended = datetime.fromisoformat((read_json(before.folder / "outcome.json") or {})["at"])
                if begun is not None and begun < ended.timestamp() - 1:  # it is noted to the second
                    self._say(
                        f"warning: {run.folder} was begun before {before.name} was last done; if its weights have "
                        f"changed since, move {run.folder} away and call again"
                    )

    def _opened(self, run: Run) -> bool:
        if not self.verb.run or not rank_zero():
            return True
        free = FREE + self.verb.grows if getattr(run.settings, "extend", False) else FREE
        remedy = "add --extend, " if self.verb.grows and free is FREE else ""
        try:
            open_run(run.folder, run.settings, self.words, free, remedy)
        except RunError as error:
            if not self._goes_on(run, error):
                raise
            return False
        return True

    # --------------------------------------------------------------------------------------------------------- jobs

    def submit(self, cluster: Slurm) -> Outcome:
        """Every run to be done as a job, those that wait for the same as one array. Raises RunError.

        With ``wait: true`` in the cluster file it stays until the last of them has ended.
        """
        cluster.check()
        self._check_chain()
        jobs: dict[Path, Job] = {}
        fresh: set[Path] = set()
        waited: set[Path] = set()
        listed = queue() if self.plan.many else None  # before it is asked what is done: in between a job may end
        wanted = self._wanted()
        for run in self.plan.runs:
            if run not in wanted and not run.part:
                self._say(f"{run.name}: done before")
        for group in _groups(wanted):
            needs = group[0].needs
            if cluster.cluster != "slurm":  # where jobs cannot wait for one another
                waited |= self._wait(cluster, [run for run in wanted if run.folder in needs], jobs)
            if any(run.name in self.failed for run in wanted if run.folder in needs):
                continue
            opened = [run for run in group if self._is_free(run, jobs, fresh, listed) and self._opened(run)]
            if not opened:
                continue
            jobs |= self._send(cluster, opened, [jobs[folder].id for folder in needs if folder in jobs])
            fresh |= {run.folder for run in opened}
        new = _groups([run for run in wanted if run.folder in fresh])
        sent = [line for group in new for line in _told(group, jobs)]
        if jobs and cluster.detached:
            looked = command("status", f"folder={self.plan.folder}")
            return Outcome(tuple(sent), (looked,), not self.failed)
        for line in sent if self.plan.many else ():
            self._say(line)
        self._wait(cluster, [run for run in wanted if run.folder not in waited], jobs)
        return self.ended()

    def _is_free(
        self, run: Run, jobs: dict[Path, Job], fresh: set[Path], listed: Mapping[tuple[str, str], Queued] | None
    ) -> bool:
        """Is it to be submitted? Its job may still be in the queue, and is left unless it waits for one that failed."""
        job = last_job(run.folder)
        found = held(job, listed)  # a run that is asked for alone is refused by its folder
        if job is None or found is None:
            return True
        if not fresh.intersection(run.needs):
            self._say(f"{run.name}: still at work as job {job.id}")
            jobs[run.folder] = job
            return False
        if not found.waits:
            raise RunError(f"{run.folder} is at work as job {job.id}, on what is yet to be made; cancel that job first")
        _withdraw(job)
        return True

    def _send(self, cluster: Slurm, runs: Sequence[Run], after: Sequence[str]) -> dict[Path, Job]:
        calls = [Call(self.verb.main, self.verb.settings, run.folder) for run in runs]
        around = runs[0].folder if len(runs) == 1 else self.plan.folder
        try:
            jobs = cluster.submit(calls, around / "jobs", around.resolve().name, after)
        except BaseException as error:
            for run in runs:
                close_run(run.folder, "failed", error=judged(error)[0])
            raise
        return {run.folder: job for run, job in zip(runs, jobs, strict=True)}

    def _wait(self, cluster: Slurm, runs: Sequence[Run], jobs: Mapping[Path, Job]) -> set[Path]:
        """Until the jobs of these runs have ended; the folders of those that had one."""
        waited = [run for run in runs if run.folder in jobs]
        for run in waited:
            with self.noted(run, job=True):
                self.outcomes.append(cluster.wait_for(run.folder, jobs[run.folder]))
        return {run.folder for run in waited}

    def scripts(self, cluster: Slurm) -> Iterator[str]:
        """What sbatch would be given for each of the jobs."""
        for group in _groups(self.plan.runs):
            around = group[0].folder if len(group) == 1 else self.plan.folder
            after = [f"JOB_OF_{folder.name}" for folder in group[0].needs]
            yield cluster.script(around.resolve().name, len(group), around / "jobs", after)


def _withdraw(job: Job) -> None:
    """Cancel a job that waits, and wait until the queue no longer holds it."""
    subprocess.run(["scancel", job.id], capture_output=True, check=False)
    end = time.monotonic() + GONE_S
    while held(job, queue()) is not None and time.monotonic() < end:
        time.sleep(0.5)


def _groups(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs that wait for the same, together."""
    found: dict[tuple[Path, ...], list[Run]] = {}
    for run in runs:
        found.setdefault(run.needs, []).append(run)
    return list(found.values())


def _told(runs: Sequence[Run], jobs: Mapping[Path, Job]) -> list[str]:
    first, last = jobs[runs[0].folder], jobs[runs[-1].folder]
    if len(runs) > 1:
        return [f"jobs {first.id} to {last.id}, {runs[0].name} to {runs[-1].name}, their output in {first.output}"]
    name = f" for {runs[0].name}" if runs[0].name else ""
    return [f"job {first.id}{name}, its output in {first.log()}"]


def _oldest(folder: Path) -> float | None:
    """When the oldest file was written of what a run has made; None where it has made nothing."""
    found: list[float] = []
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # just being deleted
            apart = path.relative_to(folder).parts[0] in ("jobs", "cache") or path.name in OWN
            if not apart and path.is_file():
                found.append(path.stat().st_mtime)
    return min(found, default=None)


def _without(data: Any, free: Collection[str], key: str = "") -> Any:
    """Plain settings without those at the dotted keys in ``free``."""
    if not isinstance(data, dict):
        return data
    inner = {name: f"{key}.{name}".lstrip(".") for name in data}
    return {name: _without(value, free, inner[name]) for name, value in data.items() if inner[name] not in free}
