"""YAML in which every value knows the file and line it came from.

PyYAML reads YAML 1.1, where ``1e-4`` is text, ``no`` is false, ``010`` is eight and ``12:30:00`` is 45000. These
documents follow the core schema of YAML 1.2 instead: null, true and false, decimal integers, floats; all else is
text. Writing follows the same rules, so text that looks like a number comes out quoted.
"""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

__all__ = ["Document", "Keys", "SettingsError", "near", "overlay", "override", "parse", "read", "write"]

Keys = tuple[str, ...]

_FLOAT = (
    r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
_SCALARS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "tag:yaml.org,2002:null": ("~|null|Null|NULL|", lambda text: None),
    "tag:yaml.org,2002:bool": ("true|True|TRUE|false|False|FALSE", lambda text: text.lower() == "true"),
    "tag:yaml.org,2002:int": ("[-+]?(0|[1-9][0-9]*)", int),
    "tag:yaml.org,2002:float": (
        _FLOAT,
        lambda text: float(text.lower().replace(".inf", "inf").replace(".nan", "nan")),
    ),
    "tag:yaml.org,2002:str": ("(?!)", str),
}


class SettingsError(ValueError):
    """What is wrong with some settings: one line a mistake, each with the key and the place it was written at."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012 (replaces the YAML 1.1 rules of the parent)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        # Only double quotes keep every kind of line break and control character.
        style = '"' if re.search("[\x00-\x1f\x7f-\x9f\u2028\u2029\ufeff]", data) else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style)

    def represent_sequence(
        self, tag: str, sequence: Iterable[Any], flow_style: bool | None = None
    ) -> yaml.SequenceNode:
        items = list(sequence)
        plain = all(not isinstance(item, dict | list) for item in items)
        return super().represent_sequence(tag, items, flow_style=plain)


for _tag, (_pattern, _) in _SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$(?!\n)"), None)
_Dumper.add_representer(str, lambda dumper, text: dumper.represent_str(text))
_Dumper.add_representer(list, lambda dumper, data: dumper.represent_sequence("tag:yaml.org,2002:seq", data))


@dataclass(frozen=True)
class Document:
    """Plain data, and for each key path in it (``("optim", "betas", "1")``) where it was written, as ``file:line``."""

    data: Any = field(default_factory=dict)
    places: dict[Keys, str] = field(default_factory=dict)

    def place(self, keys: Keys) -> str:
        """Of the value at ``keys``, else of the nearest one around it, else empty."""
        while keys and keys not in self.places:
            keys = keys[:-1]
        return self.places.get(keys, "")


def near(word: str, known: Iterable[str]) -> str:
    """``; did you mean 'lr'?`` for the known word that is spelt most like ``word``, else empty."""
    folded = {name.casefold(): name for name in known}
    found = difflib.get_close_matches(word.casefold(), folded, n=1, cutoff=0.6)
    return f"; did you mean {folded[found[0]]!r}?" if found else ""


def write(data: Any) -> str:
    """Block YAML in the order of ``data``; lists of plain values on one line."""
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    return text


def parse(text: str, source: str, mistakes: list[str]) -> Document:
    """``text`` as a document whose places are ``source:line``; what is wrong is left out and added to ``mistakes``."""
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        mistakes.append(f"not YAML: {error.problem or error.context}  [{source}{line}]")
        return Document(None)
    except yaml.YAMLError as error:
        mistakes.append(f"not YAML: {' '.join(str(error).split())}  [{source}]")
        return Document(None)
    if node is None:
        return Document(None)
    places: dict[Keys, str] = {}
    return Document(_build(node, (), source, places, mistakes, ()), places)


def _build(
    node: yaml.Node, keys: Keys, source: str, places: dict[Keys, str], mistakes: list[str], around: tuple[int, ...]
) -> Any:
    place = f"{source}:{node.start_mark.line + 1}"
    name = ".".join(keys) or "the document"
    places.setdefault(keys, place)
    if id(node) in around:
        mistakes.append(f"{name}: refers to itself  [{place}]")
        return None
    around = (*around, id(node))
    if isinstance(node, yaml.SequenceNode):
        return [_build(item, (*keys, str(i)), source, places, mistakes, around) for i, item in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        made: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key_place = f"{source}:{key_node.start_mark.line + 1}"
            if not isinstance(key_node, yaml.ScalarNode):
                mistakes.append(f"{name}: a key must be a single word  [{key_place}]")
                continue
            key = _scalar(key_node, name, key_place, mistakes)
            inner = (*keys, str(key))
            if key in made:
                first = places[inner].removeprefix(f"{source}:")
                mistakes.append(f"{'.'.join(inner)}: written twice, first in line {first}  [{key_place}]")
                continue
            places[inner] = key_place
            made[key] = _build(value_node, inner, source, places, mistakes, around)
        return made
    assert isinstance(node, yaml.ScalarNode)
    return _scalar(node, name, place, mistakes)


def _scalar(node: yaml.ScalarNode, name: str, place: str, mistakes: list[str]) -> Any:
    if node.tag not in _SCALARS:
        mistakes.append(f"{name}: the YAML tag {node.tag!r} is not allowed here; write the plain value  [{place}]")
        return None
    try:
        return _SCALARS[node.tag][1](node.value)
    except ValueError:
        mistakes.append(f"{name}: {node.value!r} is not a {node.tag.rpartition(':')[2]}  [{place}]")
        return None


def read(
    path: Path, find: Callable[[str, Path], Path], mistakes: list[str], below: tuple[Path, ...] = ()
) -> Document | None:
    """The file at ``path`` laid over the file its ``base:`` names, and that over its own base, and so on.

    None where one of them cannot be read at all. ``find(name, folder)`` says which file the ``base`` of a file in
    ``folder`` is. Every value keeps the place it was written at.
    """
    text = _text(path, mistakes)
    if text is None:
        return None
    unread = len(mistakes)
    document = parse(text, str(path), mistakes)
    if document.data is None:
        return Document() if len(mistakes) == unread else None
    if not isinstance(document.data, dict):
        mistakes.append(f"a settings file holds `key: value` lines, not one {type(document.data).__name__}  [{path}]")
        return None
    if "base" not in document.data:
        return document
    base, place = document.data.pop("base"), document.places.pop(("base",))
    if not isinstance(base, str):
        mistakes.append(f"base: the path of one YAML file is expected, got {base!r}  [{place}]")
        return document
    around = (*below, path.resolve())
    target = find(base, path.parent)
    if target.resolve() in around:
        mistakes.append(f"base: {target} is based on this file, which is based on it  [{place}]")
        return document
    if not target.exists():
        mistakes.append(f"base: no such file {target}  [{place}]")
        return document
    under = read(target, find, mistakes, around)
    return overlay(under, document) if under is not None else None


def _text(path: Path, mistakes: list[str]) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except IsADirectoryError:
        mistakes.append(f"a settings file is expected, this is a folder; did you mean folder={path}?  [{path}]")
    except UnicodeDecodeError as error:
        mistakes.append(f"not UTF-8 text: byte {error.start} is 0x{error.object[error.start]:02x}  [{path}]")
    except OSError as error:
        mistakes.append(f"cannot be read: {error.strerror}  [{path}]")
    return None


def overlay(under: Document, over: Document) -> Document:
    """Mappings merge key by key; anything else replaces, also a mapping of another ``kind``, whose keys differ."""
    places = dict(under.places)
    data = _merge(under.data, over.data, (), places)
    return Document(data, places | over.places)


def _merge(low: Any, high: Any, keys: Keys, places: dict[Keys, str]) -> Any:
    both = isinstance(low, dict) and isinstance(high, dict)
    if not both or ("kind" in low and "kind" in high and low["kind"] != high["kind"]):
        for inner in [known for known in places if known[: len(keys)] == keys]:
            del places[inner]
        return high
    names = {str(name): name for name in low}
    merged = dict(low)
    for key, value in high.items():
        name = names.get(str(key), key)  # `names.1=liver` means the number 1 where the file has a number
        merged[name] = _merge(low.get(name), value, (*keys, str(key)), places)
    return merged


def override(document: Document, text: str, default: Callable[[Any, Keys], Any], mistakes: list[str]) -> Document:
    """``document`` with the words ``a.b.0=3`` laid over it. The value is YAML; a number in the key is an item of a
    list.

    ``default(data, keys)`` is the plain default of a value not written yet, so that one item of a default list can be
    set.
    """
    key, equals, value = text.partition("=")
    place = f"override {text!r}"
    keys = tuple(key.strip().split("."))
    if not equals or not all(keys):
        mistakes.append(f"key=value is expected  [{place}]")
        return document
    wrong: list[str] = []
    given = parse(value, "", wrong)
    if wrong:
        mistakes += [f"{key}: {mistake.rpartition('  [')[0]}  [{place}]" for mistake in wrong]
        return document
    data, places = copy.deepcopy(document.data), dict(document.places)
    here = data
    for depth, part in enumerate(keys):
        name = _name_in(here, part)
        if name is None:
            what = (
                f"has {len(here)} item(s), from 0"
                if isinstance(here, list)
                else f"is {here!r}, not a group of settings"
            )
            mistakes.append(f"{key}: {'.'.join(keys[:depth])} {what}  [{place}]")
            return document
        if depth == len(keys) - 1:
            break
        inner = here.get(name) if isinstance(here, dict) else here[name]
        if inner is None:
            known = default(data, keys[: depth + 1])
            inner = here[name] = known if isinstance(known, dict | list) else {}
            places[keys[: depth + 1]] = place
        here = inner
    if isinstance(here, list):
        here[name] = _merge(here[name], given.data, keys, places)
    else:
        merged = _merge(here, {name: given.data}, keys[:-1], places)
        here.clear()
        here.update(merged)
    return Document(data, places | {(*keys, *inner): place for inner in given.places} | {keys: place})


def _name_in(container: Any, part: str) -> Any:
    """How ``container`` calls its item ``part``: an index, or a key, maybe a number; None where it cannot hold it."""
    if isinstance(container, list):
        return int(part) if part.isdecimal() and int(part) < len(container) else None
    if isinstance(container, dict):
        return {str(name): name for name in container}.get(part, part)
    return None
