"""The runs of a plan: which are yet to be done, one after the other, and what came of them."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from launch.call import resolve
from launch.plan import Plan, Run
from launch.ranks import RankFailed
from launch.run import (
    OWN,
    USER_ERRORS,
    Outcome,
    RunError,
    Stopped,
    close_run,
    command,
    open_run,
    read_json,
    refuse_others,
    say,
    without,
)
from launch.settings import SettingsError, load
from launch.verbs import FREE, Verb

__all__ = ["Performance", "judged", "rank_zero"]


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
        self.check_chain()
        wanted = {run.folder for run in self.wanted()} if self.plan.many else set()
        for number, run in enumerate(self.plan.runs, 1):
            if self.failed and self.plan.kind == "chain":
                return
            if self.plan.many and run.folder not in wanted:
                self.say_it(f"{run.name}: done before")
                continue
            if self.plan.many:
                self.say_it(f"{run.name}: {number} of {len(self.plan.runs)}, in {run.folder}")
            if self.opened(run):
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
            self.say_it(f"failed: {', '.join(self.failed)}; {self._how}")
        elif not self.outcomes:
            self.say_it(f"all {len(runs)} runs in {self.plan.folder} are done")
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
        if isinstance(error, RankFailed) and error.trace:
            print(error.trace.rstrip(), file=sys.stderr)
        print(f"{run.name}: {text}", file=sys.stderr)
        self.failed.append(run.name)
        return True

    def say_it(self, text: str) -> None:
        """A line for the user; only the first rank speaks."""
        if rank_zero():
            print(text, flush=True)

    # ------------------------------------------------------------------------------------------ what is to be done

    def wanted(self) -> tuple[Run, ...]:
        """Those not done yet. A run that is asked for alone is begun again: it finds out itself what is missing.

        Its parts are, too, when it was done; as long as it is not, the parts that are done are left to it.
        """
        done = {run.folder for run in self.plan.runs if self._is_done(run)}
        alone = self.plan.kind == "one"
        wanted = {run.folder for run in self.plan.whole if alone or run.folder not in done}
        for run in self.plan.whole:
            if run.folder in wanted:
                wanted |= {part for part in run.needs if run.folder in done or part not in done}
        return tuple(run for run in self.plan.runs if run.folder in wanted)

    def _is_done(self, run: Run) -> bool:
        """Has it been done, as it is asked for now? More steps are to be done, on another device they were."""
        return self.ended_well(run) and self.is_asked(run)

    def ended_well(self, run: Run) -> bool:
        """Did its last start, whatever its settings were?"""
        return (read_json(run.folder / "outcome.json") or {}).get("state") == "done"

    def is_asked(self, run: Run) -> bool:
        """Does its folder hold the settings asked for now, but for those that change nothing of what is made?

        ``steps`` and ``share`` may change when a run goes on, but say how much is made.
        """
        try:
            old: Any = load(resolve(self.verb.settings), run.folder / "settings.yaml")
        except SettingsError:
            return False
        free = {"folder", *FREE} - {"steps", "share"}
        before, asked = (without(one.model_dump(mode="json"), free) for one in (old, run.settings))
        return bool(before == asked)

    def check_chain(self) -> None:
        """Refuse a link that holds what it made of a run which is now done again. Raises RunError."""
        if self.plan.kind != "chain":
            return
        known = {run.folder: run for run in self.plan.runs}
        for run in self.plan.runs:
            begun = _oldest(run.folder)
            for before in (known[folder] for folder in run.needs if begun is not None):
                if not self._is_done(before):
                    refuse_others(before.folder, before.settings, FREE)  # else it is to be done again, and may be
                    raise RunError(
                        f"{run.folder} holds what was made from {before.name}, which is yet to be done, or done again "
                        f"with other settings; move {run.folder} away, or put the settings of {before.name} back"
                    )
                ended = datetime.fromisoformat((read_json(before.folder / "outcome.json") or {})["at"])
                if begun is not None and begun < ended.timestamp() - 1:  # it is noted to the second
                    self.say_it(
                        f"warning: {run.folder} was begun before {before.name} was last done; if its weights have "
                        f"changed since, move {run.folder} away and call again"
                    )

    def opened(self, run: Run) -> bool:
        """Make the folder this run's, with this start; False where it cannot be, and other runs go on without it."""
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


def _oldest(folder: Path) -> float | None:
    """When the oldest file was written of what a run has made; None where it has made nothing."""
    found: list[float] = []
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # just being deleted
            apart = path.relative_to(folder).parts[0] in ("jobs", "cache") or path.name in OWN
            if not apart and path.is_file():
                found.append(path.stat().st_mtime)
    return min(found, default=None)
