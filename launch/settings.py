"""Settings: YAML files and ``key=value`` words in, a frozen pydantic model out; or every mistake at once, each with
its place.

Defaults live in the models only. What is written goes over them in this order: the file named by ``base:``, the file,
the overrides. Mappings merge key by key, also over a default that is itself a group of settings; anything else
replaces. A group of another ``kind`` replaces the whole group, since its keys mean something else.
"""

import importlib.resources
import inspect
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import pydantic
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from launch.documents import Document, Keys, SettingsError, near, override, read, write
from launch.schema import Settings, annotation_of, choice, groups, is_settings, options, plugins

__all__ = [
    "Described",
    "Settings",
    "SettingsError",
    "choice",
    "describe",
    "dump",
    "find",
    "load",
    "names_beside",
    "plugins",
]

S = TypeVar("S", bound="Settings")

CONFIGS = ("pretrain.configs", "downstream.configs", "launch.clusters")


# ----------------------------------------------------------------------------------------------------------- load, dump


def find(name: str, folder: Path = Path()) -> Path:
    """The settings file called ``name``: a path from ``folder``, else a packaged file, else the missing path."""
    path = folder / name
    if path.exists() or Path(name).name != name:
        return path
    for package in CONFIGS:
        try:
            packaged = Path(str(importlib.resources.files(package).joinpath(name)))
        except ModuleNotFoundError:
            continue
        if packaged.is_file():
            return packaged
    return path


def names_beside(path: Path) -> list[str]:
    """Settings files that may have been meant: those of the same folder and the packaged ones."""
    names = [file.name for file in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
    for package in CONFIGS:
        try:
            names += [file.name for file in importlib.resources.files(package).iterdir() if file.name.endswith(".yaml")]
        except ModuleNotFoundError:
            continue
    return names


def load(model: type[S], source: Path | None = None, overrides: Sequence[str] = ()) -> S:
    """The settings written in ``source`` and its bases, then in ``overrides`` (``a.b.0=3``, the value is YAML),
    checked.

    Raises SettingsError with every mistake of all of them.
    """
    mistakes: list[str] = []
    if source is not None and not source.exists():
        raise SettingsError(f"no such settings file {source}{near(source.name, names_beside(source))}")
    document = read(source, find, mistakes) if source is not None else Document()
    if document is None:
        raise SettingsError("\n".join(mistakes))
    # A kind decides what the other keys of its group mean, so it goes in first whatever the order of the words.
    for text in sorted(overrides, key=lambda text: not text.partition("=")[0].endswith("kind")):
        document = override(document, text, partial(_default, model), mistakes)
    try:
        settings = model.model_validate(document.data)
    except pydantic.ValidationError as error:
        mistakes += _explain(model, document, error)
    if mistakes:
        name = model.__name__ if model.__name__ != "Settings" else model.__module__
        raise SettingsError("\n  ".join([f"{len(mistakes)} wrong setting(s) for {name}:", *mistakes]))
    return settings


def dump(settings: Settings) -> str:
    """All settings as YAML of plain types, in the order of the models; ``load`` of it gives equal settings."""
    return write(settings.model_dump(mode="json"))


def _default(model: type[Settings], data: Any, keys: Keys) -> Any:
    """Plain default of the value at ``keys``; None where it has none or the data around it are of another kind."""
    here: Any = model
    for key in keys:
        if isinstance(here, Mapping):
            here = {str(name): value for name, value in here.items()}.get(key)
        elif isinstance(here, list | tuple):
            here = here[int(key)] if key.isdecimal() and int(key) < len(here) else None
        else:
            here = _field_default(here, key)
        data = data.get(key) if isinstance(data, dict) else None
        kind = getattr(here, "kind", None)
        if isinstance(data, dict) and kind is not None and data.get("kind", kind) != kind:
            return None
    return None if isinstance(here, type) else pydantic.TypeAdapter(Any).dump_python(here, mode="json")


def _field_default(here: Any, key: str) -> Any:
    """Of a settings object its value, of a settings class its default, or the class of a group that must be given."""
    if isinstance(here, Settings):
        return getattr(here, key, None)
    if not is_settings(here) or key not in here.model_fields:
        return None
    field: FieldInfo = here.model_fields[key]
    default = field.get_default(call_default_factory=True)
    if default is not PydanticUndefined:
        return default
    return field.annotation if is_settings(field.annotation) else None


# ------------------------------------------------------------------------------------------------------------- messages


def _explain(model: type[Settings], document: Document, error: pydantic.ValidationError) -> list[str]:
    """One line for each wrong key; what several branches of a union say of one key becomes one line."""
    found: dict[Keys, list[str]] = {}
    for mistake in error.errors(include_url=False):
        keys = _keys(model, document.data, mistake["loc"])
        if mistake["type"] == "kind":
            keys = (*keys, "kind")
        text = _text(model, document.data, keys, mistake)
        if text not in found.setdefault(keys, []):
            found[keys].append(text)
    lines = []
    for keys, texts in found.items():
        key = ".".join(keys)
        place = document.place(keys)
        lines.append(f"{key}: " * bool(key) + "; or ".join(texts) + f"  [{place}]" * bool(place))
    return lines


def _keys(model: type[Settings], data: Any, loc: Sequence[int | str]) -> Keys:
    """The key path a user wrote, from pydantic's ``loc``, which also names the branches of unions it tried."""
    keys: Keys = ()
    here = data
    for part in loc:
        names = {str(name): name for name in here} if isinstance(here, dict) else {}
        if str(part) in names:
            here = here[names[str(part)]]
        elif isinstance(here, list) and isinstance(part, int):
            here = here[part] if part < len(here) else None
        elif any(part in group.model_fields for group in groups(model, data, keys)):
            here = None  # not written: missing, or the default itself is wrong
        else:
            continue
        keys = (*keys, str(part))
    return keys


def _text(model: type[Settings], data: Any, keys: Keys, mistake: Any) -> str:
    kind, text, given = mistake["type"], mistake["msg"], mistake["input"]
    if kind == "extra_forbidden":
        names = [name for fields in groups(model, data, keys[:-1]) for name in fields.model_fields]
        hint = near(keys[-1], names)
        if not hint:
            elsewhere = [row.key for row in describe(model) if row.key.rpartition(".")[2] == keys[-1]]
            hint = f"; did you mean {elsewhere[0]!r}?" if elsewhere else f" (there are: {', '.join(names)})"
        return f"no such setting{hint}"
    if kind in ("missing", "group", "kind"):
        return str(text)
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        text = "a group of settings is expected"
    if kind in ("value_error", "assertion_error"):
        text = text.partition(", ")[2]
        if isinstance(given, dict | Settings):
            return str(text)
    return f"{text}, got {_SHORT.repr(given)}"


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


# ------------------------------------------------------------------------------------------------------------- describe


@dataclass(frozen=True)
class Described:
    """One line of a command's help; ``<name>`` and ``<n>`` in a key stand for a key or an index of a user's choice."""

    key: str
    type: str
    default: str
    meaning: str


def describe(model: type[Settings]) -> list[Described]:
    """Every setting of ``model`` with dotted keys; a choice gives its kinds, then the settings of each kind."""
    return list(_describe(model, None, ""))


def _describe(model: type[Settings], values: Settings | None, prefix: str) -> Iterator[Described]:
    for name, field in model.model_fields.items():
        default = getattr(values, name) if values is not None else field.get_default(call_default_factory=True)
        if name == "kind" and get_origin(field.annotation) is Literal:
            continue
        yield from _describe_field(prefix + name, annotation_of(field), default, field.description or "")


def _describe_field(key: str, annotation: Any, default: Any, meaning: str) -> Iterator[Described]:
    inner, path = _nested(annotation, key)
    written = "required" if default is PydanticUndefined else _written(default)
    families = [group for group in inner if "kind" in group.model_fields]
    if not inner:
        yield Described(key, _type(annotation), written, meaning)
        return
    if families or path != key or default is None:
        kinds = " | ".join(str(group.model_fields["kind"].default) for group in families)
        yield Described(path + ".kind" * bool(kinds), kinds or "group", written, meaning)
    for group in inner:
        values = default if isinstance(default, group) else None
        kind = f"[{group.model_fields['kind'].default}]" if group in families and len(inner) > 1 else ""
        yield from _describe(group, values, f"{path}{kind}.")


def _nested(annotation: Any, key: str) -> tuple[list[type[Settings]], str]:
    """The settings classes inside a type, and the key they are written at."""
    alternatives = list(options(annotation, None))
    found = [option for option in alternatives if is_settings(option)]
    for option in alternatives if not found else ():
        arguments = get_args(option)
        if arguments and get_origin(option) is not Literal:
            mapping = inspect.isclass(get_origin(option)) and issubclass(get_origin(option), Mapping)
            found, path = _nested(arguments[-1 if mapping else 0], f"{key}.<name>" if mapping else f"{key}.<n>")
            if found:
                return found, path
    return found, key


def _written(default: Any) -> str:
    if isinstance(default, Settings):
        return str(getattr(default, "kind", ""))
    if isinstance(default, dict) and "kind" in default:
        return str(default["kind"])
    plain = pydantic.TypeAdapter(Any).dump_python(default, mode="json")
    if isinstance(plain, dict):
        return ", ".join(map(str, plain)) or "none"
    return write(plain).removesuffix("...\n").strip()


def _type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
        bounds = [
            f" {sign} {getattr(mark, name)}"
            for mark in annotation.__metadata__
            for name, sign in signs.items()
            if getattr(mark, name, None) is not None
        ]
        # The bounds of `int | None` are those of the number.
        first, *others = (
            _type(arguments[0]).split(" | ") if get_origin(arguments[0]) is not Literal else [_type(arguments[0])]
        )
        return " | ".join([first + ",".join(bounds), *others])
    if origin in (Union, UnionType):
        return " | ".join(_type(argument) for argument in arguments)
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if arguments:
        inner = ", ".join(_type(argument) for argument in arguments if argument is not Ellipsis)
        return f"{'map' if issubclass(origin, Mapping) else 'list'} of {inner}"
    return {Path: "path", str: "text", NoneType: "null"}.get(
        annotation, getattr(annotation, "__name__", str(annotation))
    )
