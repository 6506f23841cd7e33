"""``axial VERB [CONFIG.yaml ...] [key=value ...] [--on CLUSTER.yaml]``: from the shell to one function call."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from launch.array import Array
from launch.call import Call, resolve
from launch.documents import near
from launch.executors import Executor, Here, Processes, Slurm, crew_of, load_cluster
from launch.perform import Performance, judged, rank_zero
from launch.plan import Plan, UsageError, beside, chain, one, parted, sweep
from launch.ranks import RankFailed
from launch.run import Outcome
from launch.settings import describe, dump
from launch.submission import scripts, submit
from launch.verbs import VERBS, Verb

__all__ = ["UsageError", "main"]


OPTIONS = {
    "--on": "cluster file: run elsewhere, such as slurm_one_gpu.yaml; launch/CLUSTERS.md shows which for what",
    "--sweep": "key=a,b: a run for each value, in a folder of its own; several: for each combination",
    "--extend": "curate: add data sets to a finished corpus; its own shards stay as they are",
    "--dry-run": "show the settings in force and what would be done; do nothing",
    "--debug": "show the traceback of a mistake",
    "--help": "this, or the settings of a verb",
    "--version": "the version",
}


@dataclass(frozen=True)
class Command:
    """The command line taken apart; nothing is loaded yet."""

    verb: str = ""
    configs: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    swept: tuple[str, ...] = ()
    cluster: str | None = None
    flags: frozenset[str] = frozenset()


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code: 0, 1 not ok, 2 a mistake of the user's, 130 interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    what = "axial"
    try:
        command = _parse(words)
        what = f"axial {command.verb}".rstrip()
        if (text := _told(command)) is not None:
            print(text)
            return 0 if command.flags else 2
        verb = VERBS[command.verb]
        executor = _executor(command, verb)
        plan = _plan(command, verb, executor)
        work = Performance(plan, verb, ["axial", *words])
        if "--dry-run" in command.flags:
            print(_dry(work, executor))
            return 0
        if isinstance(executor, Slurm) and not verb.crew:
            return _end(submit(work, executor))
        if isinstance(executor, Here) and plan.many:
            executor = Processes(processes=1)  # so that nothing of a run stays with the next, nor ends it
        target = resolve(verb.main)
        for run in work.todo():
            with work.noted(run):
                if isinstance(executor, Here):
                    outcome = target(run.settings)
                elif isinstance(executor, Processes) and not verb.crew:
                    outcome = executor.run(Call(verb.main, verb.settings, run.folder))
                else:
                    outcome = target(run.settings, crew_of(executor, run.folder))
                work.outcomes.append(outcome)
        return _end(work.ended())
    except BaseException as error:
        code = _failed(what, error)
        if code is None or "--debug" in words:
            raise
        return code


def _parse(words: Sequence[str]) -> Command:
    verb = ""
    configs: list[str] = []
    overrides: list[str] = []
    flags: set[str] = set()
    given: dict[str, list[str]] = {"--on": [], "--sweep": []}
    rest = iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        if word in ("-h", "--help"):
            flags.add("--help")
        elif name in given:
            given[name].append(value if equals else next(rest, ""))
            if not given[name][-1]:
                raise UsageError(f"{name} needs {'the path of a cluster file' if name == '--on' else 'key=a,b'}")
        elif word in OPTIONS:
            flags.add(word)
        elif word.startswith("-"):
            raise UsageError(f"no such option {name}{near(name, OPTIONS)} (there are: {', '.join(OPTIONS)})")
        elif not verb:
            verb = word
        elif equals and not _is_path(word, VERBS.get(verb)):
            overrides.append(word)
        else:
            configs.append(word)
    if verb and verb not in VERBS:
        raise UsageError(f"no such verb {verb!r}{near(verb, VERBS)} (there are: {', '.join(VERBS)})")
    if verb and VERBS[verb].word and len(configs) == 1 and not _is_file(configs[0]):
        overrides.insert(0, f"{VERBS[verb].word}={json.dumps(configs.pop(), ensure_ascii=False)}")  # 2025 is text, too
    if "--extend" in flags and verb:
        if not VERBS[verb].grows:
            raise UsageError(f"{verb} has nothing to extend; --extend is for curate")
        overrides.append("extend=true")
    _check_several(verb, configs, given["--sweep"])
    cluster = given["--on"][-1] if given["--on"] else None
    return Command(verb, tuple(configs), tuple(overrides), tuple(given["--sweep"]), cluster, frozenset(flags))


def _check_several(verb: str, configs: Sequence[str], swept: Sequence[str]) -> None:
    """Refuse several runs of a verb that has none, and a chain that is swept."""
    if len(configs) > 1 and (not verb or beside(VERBS[verb], "follow") is None):
        several = " and ".join(configs)
        raise UsageError(
            f"one CONFIG is expected, got {several}; settings are written key=value (pretrain takes several: a chain)"
        )
    if not swept or not verb:
        return
    if not VERBS[verb].run or VERBS[verb].crew:
        runs = ", ".join(name for name, other in VERBS.items() if other.run and not other.crew)
        raise UsageError(f"{verb} has no runs to sweep; --sweep is for {runs}")
    if len(configs) > 1:
        raise UsageError("a chain is not swept; sweep one of its links, or write a command for each value")


def _is_path(word: str, verb: Verb | None) -> bool:
    """Of a word with "=" in it: is it all the same a settings file, or such a folder as a sweep makes?"""
    return os.path.isfile(word) or (verb is not None and verb.word == "folder" and os.path.isdir(word))


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
    lines = ["axial VERB [CONFIG.yaml ...] [key=value ...] [--on CLUSTER.yaml] [--sweep key=a,b] [--dry-run]", ""]
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


def _plan(command: Command, verb: Verb, executor: Executor) -> Plan:
    """The runs that are asked for, their settings checked."""
    config = command.configs[0] if command.configs else None
    if len(command.configs) > 1:
        plan = chain(verb, command.configs, command.overrides)
    elif command.swept:
        plan = sweep(verb, config, command.overrides, command.swept)
    else:
        plan = one(verb, config, command.overrides)
    if isinstance(executor, Slurm) and executor.cluster != "debug" and not verb.crew:
        plan = parted(plan, verb, executor.array.parts)
    if plan.many and "RANK" in os.environ:
        raise UsageError("torchrun starts one run; for several by one command take --on with kind: processes")
    return plan


def _dry(work: Performance, executor: Executor) -> str:
    """The settings in force, what the verb says it would do with them where it can, and what sbatch would be given.

    Of a sweep the first point stands for all: the others differ in what their folders are called by.
    """
    plan, dry_run = work.plan, beside(work.verb, "dry_run")
    told: list[str] = []
    for run in plan.whole[:1] if plan.kind == "sweep" else plan.whole:
        told += [f"# {run.name}"] if plan.many else []
        told.append(dump(run.settings).rstrip("\n"))
        if dry_run is not None:
            told.append(dry_run(run.settings, run.needs) if plan.kind == "chain" else dry_run(run.settings))
    if plan.kind == "sweep" or any(run.part for run in plan.runs):
        told += [f"# {len(plan.runs)} runs in {plan.folder}:", *(f"#   {run.name}" for run in plan.runs)]
    if isinstance(executor, Slurm):
        told += ["# the cluster file", dump(executor).rstrip("\n")]
        told += [f"# sbatch is given\n{script}" for script in _scripts(work, executor)]
    return "\n".join(told)


def _scripts(work: Performance, executor: Slurm) -> Iterator[str]:
    """Of a verb that shares its tasks out, that of one step with as many jobs as there may be."""
    if not work.verb.crew:
        yield from scripts(work, executor)
    elif isinstance(crew := crew_of(executor, work.plan.folder), Array):
        yield crew.script()


def _end(outcome: Outcome) -> int:
    if rank_zero():
        for label, lines in (("made", outcome.made), ("next", outcome.next)):
            for line in lines:
                print(f"{label}: {line}")
    return 0 if outcome.ok else 1


def _failed(what: str, error: BaseException) -> int | None:
    """Say what went wrong; the exit code, or None for an error of ours, whose traceback must be seen."""
    text, code = judged(error)
    if isinstance(error, BrokenPipeError):
        # `axial ... | head`: nobody listens any more, also not to the flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if isinstance(error, RankFailed):
        print(error.trace.rstrip(), file=sys.stderr)
    if code is not None:
        print("\n".join([f"{what}: {text}", *getattr(error, "__notes__", ())]), file=sys.stderr)
    return code
