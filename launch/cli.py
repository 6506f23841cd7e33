"""``axial VERB [CONFIG.yaml] [key=value ...] [--on CLUSTER.yaml] [--dry-run]``: from the shell to one function call."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.call import Call, resolve
from launch.documents import near
from launch.executors import Executor, Here, Processes, Slurm, crew_of, load_cluster
from launch.ranks import RankFailed
from launch.run import USER_ERRORS, Outcome, Stopped, close_run, open_run, say
from launch.settings import Settings, describe, dump, find, load
from launch.verbs import FREE, VERBS, Verb

__all__ = ["UsageError", "main"]


OPTIONS = {
    "--on": "cluster file: run elsewhere (packaged: here, two_processes, slurm_example, slurm_array .yaml)",
    "--extend": "curate: add data sets to a finished corpus; its own shards stay as they are",
    "--dry-run": "show the settings in force and what would be done; do nothing",
    "--debug": "show the traceback of a mistake",
    "--help": "this, or the settings of a verb",
    "--version": "the version",
}


class UsageError(ValueError):
    """The words of the command line make no command."""


@dataclass(frozen=True)
class Command:
    """The command line taken apart; nothing is loaded yet."""

    verb: str = ""
    config: str | None = None
    overrides: tuple[str, ...] = ()
    cluster: str | None = None
    flags: frozenset[str] = frozenset()


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code: 0, 1 not ok, 2 a mistake of the user's, 130 interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    what, folder = "axial", None
    try:
        command = _parse(words)
        what = f"axial {command.verb}".rstrip()
        if (text := _told(command)) is not None:
            print(text)
            return 0 if command.flags else 2
        verb = VERBS[command.verb]
        settings: Any = load(
            resolve(verb.settings), find(command.config) if command.config else None, command.overrides
        )
        executor = _executor(command, verb)
        if "--dry-run" in command.flags:
            print(_dry(settings, verb))
            return 0
        target = resolve(verb.main)
        if verb.run and _rank_zero():
            free = FREE + verb.grows if getattr(settings, "extend", False) else FREE
            remedy = "add --extend, " if verb.grows and free is FREE else ""
            folder = open_run(settings.folder, settings, ["axial", *words], free, remedy)
        detached = False
        if isinstance(executor, Here):
            outcome = target(settings)
        elif verb.crew:
            outcome = target(settings, crew_of(executor, settings.folder))
        else:
            outcome = executor.run(Call(verb.main, verb.settings, settings.folder))
            detached = isinstance(executor, Slurm) and executor.detached
        if folder is not None and not detached:
            close_run(folder, "done" if outcome.ok else "failed", outcome)
        return _end(outcome)
    except BaseException as error:
        code = _failed(what, error, folder)
        if code is None or "--debug" in words:
            raise
        return code


def _parse(words: Sequence[str]) -> Command:
    verb, config, cluster = "", None, None
    overrides: list[str] = []
    flags: set[str] = set()
    rest = iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        if word in ("-h", "--help"):
            flags.add("--help")
        elif word in OPTIONS and word != "--on":
            flags.add(word)
        elif name == "--on":
            cluster = value if equals else next(rest, "")
            if not cluster:
                raise UsageError("--on needs the path of a cluster file")
        elif word.startswith("-"):
            raise UsageError(f"no such option {name}{near(name, OPTIONS)} (there are: {', '.join(OPTIONS)})")
        elif not verb:
            verb = word
        elif equals and not os.path.isfile(word):
            overrides.append(word)
        elif config is None:
            config = word
        else:
            raise UsageError(f"one CONFIG is expected, got {config} and {word}; settings are written key=value")
    if verb and verb not in VERBS:
        raise UsageError(f"no such verb {verb!r}{near(verb, VERBS)} (there are: {', '.join(VERBS)})")
    if verb and VERBS[verb].word and config is not None and not _is_file(config):
        overrides.insert(0, f"{VERBS[verb].word}={config}")
        config = None
    if "--extend" in flags and verb:
        if not VERBS[verb].grows:
            raise UsageError(f"{verb} has nothing to extend; --extend is for curate")
        overrides.append("extend=true")
    return Command(verb, config, tuple(overrides), cluster, frozenset(flags))


def _is_file(word: str) -> bool:
    """A settings file, there or meant."""
    return word.endswith((".yaml", ".yml")) or os.path.isfile(word)


def _told(command: Command) -> str | None:
    """What is asked to be told rather than done: the help, the version."""
    if "--version" in command.flags:
        from importlib.metadata import version

        return f"axial {version('axial-ct')}"
    if command.verb and "--help" in command.flags:
        return _verb_help(command.verb)
    if not command.verb:
        return _help()
    return None


def _help() -> str:
    lines = ["axial VERB [CONFIG.yaml] [key=value ...] [--on CLUSTER.yaml] [--dry-run]", ""]
    lines += [f"  {name:<10}{verb.meaning}" for name, verb in VERBS.items()]
    return "\n".join([*lines, "", *(f"  {name:<10} {meaning}" for name, meaning in OPTIONS.items())])


def _verb_help(name: str) -> str:
    verb = VERBS[name]
    rows = describe(resolve(verb.settings))
    wide = min(max((len(row.key) for row in rows), default=0), 44)
    first = f"{verb.word.upper()} | CONFIG.yaml" if verb.word else "CONFIG.yaml"
    lines = [f"axial {name} [{first}] [key=value ...]: {verb.meaning}", ""]
    for row in rows:
        default = row.default if row.default == "required" else f"default {row.default or 'empty'}"
        lines.append(f"  {row.key:<{wide}}  {row.type}, {default}")
        lines += [f"  {'':<{wide}}    {row.meaning}"] if row.meaning else []
    if verb.crew:
        lines += ["", "With --on its tasks are shared out, and this process stays and collects them: call it on a"]
        lines += ["login node or in a small job. Called again after any interruption, it does what is missing."]
    return "\n".join(lines)


def _executor(command: Command, verb: Verb) -> Executor:
    if command.cluster is None:
        return Here()
    if not verb.run:
        runs = ", ".join(name for name, other in VERBS.items() if other.run)
        raise UsageError(f"{command.verb} is quick and runs here; --on is for {runs}")
    executor = load_cluster(command.cluster)
    if verb.crew and isinstance(executor, Processes):
        return executor
    if executor.ranks > 1 and not verb.ranks:
        many = f"{command.cluster} starts {executor.ranks} processes"
        raise UsageError(f"{many}, and {command.verb} is one process (with workers of its own); use a file with one")
    return executor


def _dry(settings: Settings, verb: Verb) -> str:
    """The settings in force, and what the verb says it would do with them where it can say so."""
    dry_run = getattr(importlib.import_module(verb.main.partition(":")[0]), "dry_run", None)
    return dump(settings) + (f"\n{dry_run(settings)}" if dry_run is not None else "")


def _rank_zero() -> bool:
    """Under torchrun every rank comes through here, the first one speaks and writes; asked before torch is there."""
    return os.environ.get("RANK", "0") == "0"


def _end(outcome: Outcome) -> int:
    if _rank_zero():
        for label, lines in (("made", outcome.made), ("next", outcome.next)):
            for line in lines:
                print(f"{label}: {line}")
    return 0 if outcome.ok else 1


def _failed(what: str, error: BaseException, folder: Path | None) -> int | None:
    """Say and note what went wrong; the exit code, or None for an error of ours, whose traceback must be seen."""
    text, code = say(error), None
    if isinstance(error, BrokenPipeError):
        # `axial ... | head`: nobody listens any more, also not to the flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        text, code = "nobody reads the output any more", 141
    elif isinstance(error, KeyboardInterrupt):
        text, code = "interrupted; the same command goes on", 130
    elif isinstance(error, Stopped):
        code = 130
    elif isinstance(error, ModuleNotFoundError):
        text, code = f"needs the Python package {error.name}, which is not installed", 2
    elif isinstance(error, RankFailed):
        print(error.trace.rstrip(), file=sys.stderr)
        code = 1 if error.trace else 2
    elif isinstance(error, USER_ERRORS):
        code = 2
    if folder is not None:
        close_run(folder, "stopped" if code in (130, 141) else "failed", error=text)
    if code is not None:
        print(f"{what}: {text}", file=sys.stderr)
    return code
