"""The runs of a plan as jobs that wait for one another; what is done, or in the queue already, is left."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launch.call import Call
from launch.jobs import Job, Queued, held, last_job, queue
from launch.perform import Performance, judged
from launch.plan import Run
from launch.run import Outcome, RunError, close_run, command
from launch.slurm import Slurm

__all__ = ["Submission", "scripts", "submit"]

GONE_S = 60.0  # a cancelled job leaves the queue within seconds


def submit(work: Performance, cluster: Slurm) -> Outcome:
    """Every run to be done as a job, those that wait for the same as one array. Raises RunError.

    With ``wait: true`` in the cluster file it stays until the last of them has ended.
    """
    cluster.check()
    work.check_chain()
    listed = queue()  # before it is asked what is done: in between a job may end
    wanted = work.wanted()
    folders = {run.folder for run in wanted}
    for run in work.plan.whole:
        if run.folder not in folders:
            work.say_it(f"{run.name}: done before")
    return Submission(work, cluster, wanted, listed).made()


@dataclass
class Submission:
    """One command at its jobs: those that it found at work, and those that it sent."""

    work: Performance
    cluster: Slurm
    wanted: Sequence[Run]
    listed: Mapping[tuple[str, str], Queued] | None
    jobs: dict[Path, Job] = field(default_factory=dict)
    sent: set[Path] = field(default_factory=set)
    waited: set[Path] = field(default_factory=set)

    def made(self) -> Outcome:
        """Send what is to be sent, group by group; then say so, or wait for it."""
        work, jobs = self.work, self.jobs
        for group in _groups(self.wanted):
            needs = [run for run in self.wanted if run.folder in group[0].needs]
            if self.cluster.cluster != "slurm":  # where jobs cannot wait for one another
                self._wait(needs)
            if any(run.name in work.failed for run in needs):
                continue
            free = [run for run in group if self._is_free(run) and work.opened(run)]
            if free:
                self._send(free, [jobs[run.folder].id for run in needs if run.folder in jobs])
        told = [_told(group, jobs) for group in _groups([run for run in self.wanted if run.folder in self.sent])]
        if jobs and self.cluster.detached:
            return Outcome(tuple(told), (command("status", f"folder={work.plan.folder}"),), not work.failed)
        for line in told if work.plan.many else ():
            work.say_it(line)
        self._wait(self.wanted)
        return work.ended()

    def _is_free(self, run: Run) -> bool:
        """Is it to be submitted? Its job may still be in the queue, and is left unless it waits for one that failed."""
        job = last_job(run.folder)
        found = held(job, self.listed)
        if job is None or found is None or self.work.ended_well(run):  # then the job is only being put away
            return True
        remedy = f"end that first (axial cancel folder={run.folder})"
        if not self.work.is_asked(run):
            raise RunError(f"{run.folder} is at work as job {job.id} with other settings; put them back, or {remedy}")
        if not self.sent.intersection(run.needs):
            self.work.say_it(f"{run.name or run.folder}: still at work as job {job.id}")
            self.jobs[run.folder] = job
            return False
        if not found.waits:
            raise RunError(f"{run.folder} is at work as job {job.id}, on what is yet to be made; {remedy}")
        _withdraw(job)
        return True

    def _send(self, runs: Sequence[Run], after: Sequence[str]) -> None:
        verb = self.work.verb
        calls = [Call(verb.main, verb.settings, run.folder) for run in runs]
        around = runs[0].folder if len(runs) == 1 else self.work.plan.folder
        try:
            jobs = self.cluster.submit(calls, around / "jobs", around.resolve().name, after)
        except BaseException as error:
            for run in runs:
                close_run(run.folder, "failed", error=judged(error)[0])
            raise
        self.jobs |= {run.folder: job for run, job in zip(runs, jobs, strict=True)}
        self.sent |= {run.folder for run in runs}

    def _wait(self, runs: Sequence[Run]) -> None:
        """Until the jobs of these runs have ended; once for each."""
        for run in runs:
            if run.folder in self.jobs and run.folder not in self.waited:
                self.waited.add(run.folder)
                with self.work.noted(run, job=True):
                    self.work.outcomes.append(self._ended(run))

    def _ended(self, run: Run) -> Outcome:
        try:
            return self.cluster.wait_for(run.folder, self.jobs[run.folder])
        except KeyboardInterrupt as error:
            remedy = f"axial cancel folder={self.work.plan.folder} ends it, the same command waits again"
            error.add_note(f"job {self.jobs[run.folder].id} goes on without this command; {remedy}")
            raise


def scripts(work: Performance, cluster: Slurm) -> Iterator[str]:
    """What sbatch would be given for each of the jobs of a command."""
    for group in _groups(work.plan.runs):
        around = group[0].folder if len(group) == 1 else work.plan.folder
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


def _told(runs: Sequence[Run], jobs: Mapping[Path, Job]) -> str:
    first, last = jobs[runs[0].folder], jobs[runs[-1].folder]
    if len(runs) > 1:
        return f"jobs {first.id} to {last.id}, {runs[0].name} to {runs[-1].name}, their output in {first.output}"
    name = f" for {runs[0].name}" if runs[0].name else ""
    return f"job {first.id}{name}, its output in {first.log()}"
