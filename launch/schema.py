"""The settings model, the families of plug-ins a setting may choose from, and a walk through the types of a model."""

import importlib
import inspect
import os
import pkgutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pydantic
from pydantic import GetCoreSchemaHandler
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from launch.documents import Keys, near

__all__ = ["Settings", "annotation_of", "choice", "groups", "is_settings", "options", "plugins"]


class Settings(pydantic.BaseModel):
    """Base of every settings class: frozen, unknown keys refused, defaults checked too, ``"3"`` taken as a number."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=True)

    @pydantic.field_validator("*")
    @classmethod
    def _at_home(cls, value: Any) -> Any:
        """``~`` in a path: a shell leaves it alone in ``key=~/path``, and YAML always does."""
        return Path(os.path.expanduser(value)) if isinstance(value, Path) else value

    @pydantic.model_validator(mode="before")
    @classmethod
    def _fill_groups(cls, data: Any) -> Any:
        """A group given in part keeps the rest of the group that is the field's default, not of the group's class."""
        if not isinstance(data, dict):
            return data
        filled = dict(data)
        for name, field in cls.model_fields.items():
            if isinstance(data.get(name), dict):
                filled[name] = _over(field.get_default(call_default_factory=True), data[name])
        return filled


def _over(default: Any, given: Any) -> Any:
    if not isinstance(given, dict):
        return given
    if isinstance(default, Settings):
        values = {name: getattr(default, name) for name in type(default).model_fields}
    elif isinstance(default, dict) and "kind" in default:  # the default of a choice, written as in a file
        values = default
    else:
        return given
    if "kind" in given and given["kind"] != values.get("kind"):
        return given
    return values | {key: _over(values.get(key), value) for key, value in given.items()}


# ------------------------------------------------------------------------------------------------------------- plug-ins


@cache
def plugins(package: str) -> dict[str, ModuleType]:
    """By kind, every module of ``package`` with a ``Settings`` class that has a ``kind``; names with _ left out."""
    found: dict[str, ModuleType] = {}
    for info in pkgutil.iter_modules(importlib.import_module(package).__path__):
        if info.name.startswith("_"):
            continue
        module = importlib.import_module(f"{package}.{info.name}")
        kind = getattr(getattr(module, "Settings", None), "model_fields", {}).get("kind")
        if kind is not None and module.Settings.__module__ == module.__name__:
            assert kind.default not in found, f"kind {kind.default!r} is in {found[kind.default]} and in {module}"
            found[kind.default] = module
    return found


@dataclass(frozen=True)
class _Choice:
    """Annotation that makes a field take the settings of any plug-in of a package, picked by ``kind``."""

    package: str

    def model(self, kind: Any) -> type[Settings] | None:
        module = plugins(self.package).get(kind) if isinstance(kind, str) else None
        return module.Settings if module else None

    def models(self) -> list[type[Settings]]:
        return [module.Settings for module in plugins(self.package).values()]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            self._validate,
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda value, info: value.model_dump(mode=info.mode), info_arg=True
            ),
        )

    def _validate(self, value: Any) -> Settings:
        if any(isinstance(value, model) for model in self.models()):
            return value  # type: ignore[no-any-return]
        kinds = list(plugins(self.package))
        if not isinstance(value, Mapping):
            raise PydanticCustomError(
                "group", "a group with its kind is expected, one of {kinds}", {"kinds": ", ".join(kinds)}
            )
        model = self.model(value.get("kind"))
        if model is None:
            raise PydanticCustomError("kind", "{text}", {"text": _unknown_kind(value, kinds), "key": "kind"})
        return model.model_validate(dict(value))


def _unknown_kind(value: Mapping[str, Any], kinds: list[str]) -> str:
    allowed = f"allowed: {', '.join(kinds)}" if kinds else "there are none"
    if "kind" not in value:
        return f"must be named; {allowed}"
    return f"no such kind {value['kind']!r}{near(str(value['kind']), kinds)} ({allowed})"


def choice(package: str) -> Any:
    """Type of a field that holds the settings of one plug-in of ``package``, imported when a value is checked."""
    return Annotated[Settings, _Choice(package)]


def is_settings(thing: Any) -> bool:
    """Is ``thing`` a settings class, and not a settings object or another type?"""
    return isinstance(thing, type) and issubclass(thing, Settings)


def groups(model: type[Settings], data: Any, keys: Keys) -> list[type[Settings]]:
    """The settings classes that the value at ``keys`` may be, of several the one its ``kind`` names."""
    types: list[Any] = [model]
    for key in keys:
        types = [inner for annotation in types for inner in _inside(annotation, data, key)]
        data = _child(data, key)
    return [option for annotation in types for option in options(annotation, data) if is_settings(option)]


def _child(data: Any, key: str) -> Any:
    if isinstance(data, dict):
        return {str(name): value for name, value in data.items()}.get(key)
    return data[int(key)] if isinstance(data, list) and key.isdecimal() and int(key) < len(data) else None


def options(annotation: Any, data: Any) -> Iterator[Any]:
    """The alternatives of a type, without annotations; of a choice only the class that ``data`` picks, if it does."""
    origin = get_origin(annotation)
    if origin is Annotated:
        marks = [mark for mark in annotation.__metadata__ if isinstance(mark, _Choice)]
        if not marks:
            yield from options(get_args(annotation)[0], data)
        elif isinstance(data, dict) and (picked := marks[0].model(data.get("kind"))):
            yield picked
        else:
            yield from marks[0].models()
    elif origin in (Union, UnionType):
        alternatives = [option for inner in get_args(annotation) for option in options(inner, data)]
        yield from _named(alternatives, data) or alternatives
    else:
        yield annotation


def _named(alternatives: list[Any], data: Any) -> list[Any]:
    """Of a union of settings classes the one whose kind stands in ``data``."""
    if not isinstance(data, dict) or "kind" not in data:
        return []
    return [
        option
        for option in alternatives
        if is_settings(option) and "kind" in option.model_fields and option.model_fields["kind"].default == data["kind"]
    ]


def _inside(annotation: Any, data: Any, key: str) -> Iterator[Any]:
    for option in options(annotation, data):
        arguments = get_args(option)
        if is_settings(option):
            if key in option.model_fields:
                yield annotation_of(option.model_fields[key])
        elif len(arguments) == 2 and inspect.isclass(get_origin(option)) and issubclass(get_origin(option), Mapping):
            yield arguments[1]
        elif arguments and get_origin(option) is not Literal:
            yield from (argument for argument in arguments if argument is not Ellipsis)


def annotation_of(field: FieldInfo) -> Any:
    """pydantic takes the outermost ``Annotated`` apart; put it together again."""
    return Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
