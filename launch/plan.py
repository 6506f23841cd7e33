"""What runs a command line means: one; a chain, each run taking up what the last one made; the points of a sweep.

All settings are checked before anything is begun, with every mistake of every run at once. What a verb says of several
runs are functions beside its main: ``follow(settings, before)`` gives the words by which a run takes up what the run
with the settings ``before`` made; ``parts(settings, most)`` cuts one run into several, or is empty.
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from launch.call import resolve
from launch.documents import SettingsError
from launch.settings import find, load
from launch.verbs import Verb

__all__ = ["Plan", "Run", "UsageError", "beside", "chain", "one", "parted", "sweep"]

LONGEST = 200  # bytes of a folder's name; file systems take 255, and names of files beside it are longer


class UsageError(ValueError):
    """The words of the command line make no command."""


@dataclass(frozen=True)
class Run:
    """One run: its settings, what it is called among several, and the run folders that must be done before it."""

    settings: Any
    name: str = ""
    needs: tuple[Path, ...] = ()
    part: bool = False  # of the run that needs it, which brings together what its parts made

    @property
    def folder(self) -> Path:
        """Its run folder."""
        folder: Path = self.settings.folder
        return folder


@dataclass(frozen=True)
class Plan:
    """The runs of a command, each after those it needs, and the folder around them all."""

    kind: Literal["one", "chain", "sweep"]
    runs: tuple[Run, ...]
    folder: Path

    @property
    def many(self) -> bool:
        """Is a run one of several, to be told by its name?"""
        return len(self.runs) > 1

    @property
    def whole(self) -> tuple[Run, ...]:
        """The runs that are no parts of others."""
        return tuple(run for run in self.runs if not run.part)


def beside(verb: Verb, name: str) -> Callable[..., Any] | None:
    """The function ``name`` beside the verb's main; None where it has none."""
    found: Callable[..., Any] | None = getattr(importlib.import_module(verb.main.partition(":")[0]), name, None)
    return found


def one(verb: Verb, config: str | None, words: Sequence[str]) -> Plan:
    """A single run. Raises SettingsError."""
    settings: Any = load(resolve(verb.settings), find(config) if config else None, words)
    return Plan("one", (Run(settings),), getattr(settings, "folder", Path()))


# ---------------------------------------------------------------------------------------------------------------- chain


def chain(verb: Verb, configs: Sequence[str], words: Sequence[str]) -> Plan:
    """A run for each of ``configs`` in FOLDER/NAME, its file's name without ending, each after the one before it.

    Words go to every link; ``NAME.key=value`` goes to that link alone. What a link takes up of the one before it is not
    for the other words to say: ``init_from=`` is that of the first link.
    """
    follow, model = beside(verb, "follow"), resolve(verb.settings)
    assert follow is not None, "asked for where the words are taken apart"
    names = [Path(config).stem for config in configs]
    _refuse_alike(names, "links of a chain", "give each settings file a name of its own")
    if not any(word.partition("=")[0] == "folder" for word in words):
        raise UsageError(f"a chain needs folder=, in which its runs get folders of their own: {', '.join(names)}")
    runs: list[Run] = []
    mistakes: list[str] = []
    for name, config in zip(names, configs, strict=True):
        own = [word.removeprefix(f"{name}.") for word in words if _is_of(word, name, model)]
        common = [word for word in words if not any(_is_of(word, link, model) for link in names)]
        try:
            settings = load(model, find(config), [*common, *own])
            taken = follow(settings, runs[-1].settings) if runs else ()
            place = f"folder={_word(settings.folder / name)}"
            settings = load(model, find(config), [*common, *taken, *own, place])
        except SettingsError as error:
            mistakes.append(f"{name}: {error}")
            continue
        runs.append(Run(settings, name, (runs[-1].folder,) if runs else ()))
    if mistakes:
        raise SettingsError("\n".join(mistakes))
    return Plan("chain", tuple(runs), runs[0].folder.parent)


def _is_of(word: str, link: str, model: Any) -> bool:
    """Is the word one for this link alone? A setting that is called like a link is the setting."""
    return word.startswith(f"{link}.") and link.partition(".")[0] not in model.model_fields


# ---------------------------------------------------------------------------------------------------------------- sweep


def sweep(verb: Verb, config: str | None, words: Sequence[str], swept: Sequence[str]) -> Plan:
    """A run for each combination of the values in ``swept`` ("key=a,b"), in FOLDER/key=a,key2=c."""
    axes = [_axis(text) for text in swept]
    _refuse_alike([key for key, _ in axes], "--sweep", "write all values of a setting into one --sweep")
    model, path = resolve(verb.settings), find(config) if config else None
    points = [
        [f"{key}={value}" for (key, _), value in zip(axes, values, strict=True)]
        for values in itertools.product(*(values for _, values in axes))
    ]
    names = [_folder_name(point) for point in points]
    _refuse_alike(names, "points of a sweep", "a folder can be called by letters, digits and ._+- only")
    runs: list[Run] = []
    mistakes: list[str] = []
    for name, point in zip(names, points, strict=True):
        try:
            settings: Any = load(model, path, [*words, *point])
            place = f"folder={_word(settings.folder / name)}"
            runs.append(Run(load(model, path, [*words, *point, place]), name))
        except SettingsError as error:
            mistakes.append(f"{name}: {error}")
    if mistakes:
        raise SettingsError("\n".join(mistakes))
    return Plan("sweep", tuple(runs), runs[0].folder.parent)


def _axis(text: str) -> tuple[str, list[str]]:
    key, equals, values = text.partition("=")
    found = _split(values)
    if not equals or not key or not all(found):
        raise UsageError(f"--sweep takes key=value,value, ..., got {text!r}")
    if key == "folder":
        raise UsageError("--sweep of folder: every point has a folder of its own in folder= already")
    return key, found


def _split(text: str) -> list[str]:
    """The values between commas, but not those inside brackets or quotes."""
    values, depth, quote = [""], 0, ""
    for sign in text:
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "\"'":
            quote = sign
        else:
            depth += (sign in "[{") - (sign in "]}")
        if sign == "," and not depth and not quote:
            values.append("")
        else:
            values[-1] += sign
    return [value.strip() for value in values]


def _folder_name(point: Sequence[str]) -> str:
    """``key=a,key2=c`` in signs that mean nothing to a shell or a file system; what is too long ends in a hash."""
    name = ",".join(re.sub(r"[^\w.+=-]+", "-", word).strip("-") for word in point)
    if len(name.encode()) <= LONGEST:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return name.encode()[: LONGEST - 9].decode(errors="ignore") + f"-{digest}"


def _refuse_alike(names: Sequence[str], what: str, remedy: str) -> None:
    double = sorted({name for name in names if names.count(name) > 1})
    if double:
        raise UsageError(f"two {what} are called {', '.join(double)}; {remedy}")


def _word(folder: Path) -> str:
    """A path as the value of a word, whatever stands in it."""
    return json.dumps(str(folder), ensure_ascii=False)


# ---------------------------------------------------------------------------------------------------------------- parts


def parted(plan: Plan, verb: Verb, most: int) -> Plan:
    """The same with every run cut into parts, ``most`` at most where it is not for the verb alone to say."""
    parts = beside(verb, "parts")
    if parts is None or plan.kind == "chain":
        return plan
    runs: list[Run] = []
    for run in plan.runs:
        cut = [Run(part, _below(part.folder, plan.folder), part=True) for part in parts(run.settings, most)]
        runs += [*cut, replace(run, name=run.name or "all", needs=tuple(part.folder for part in cut)) if cut else run]
    return replace(plan, runs=tuple(runs))


def _below(folder: Path, around: Path) -> str:
    return folder.relative_to(around).as_posix()
