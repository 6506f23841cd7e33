"""Reads files of weights: tensors by name, and nothing that would run code.

ReleasedError(ValueError)    not a backbone this model can hold; the text names the file, what it is and what to do
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

__all__ = ["ReleasedError", "Weights", "is_hugging_face", "read_weights"]

# Under which key a file of torch.save holds the network; the first that is there. A teacher is the better network.
_CONTAINERS = ("teacher", "model_ema", "model", "state_dict", "student")
# What a folder of Hugging Face may hold: the weights in one file, or in several with a list of them.
_ONE = ("model.safetensors", "pytorch_model.bin")
_SEVERAL = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


class ReleasedError(ValueError):
    """A file or folder that holds no backbone we can read, or one that does not fit."""


@dataclass(frozen=True)
class Weights:
    """The tensors of a file or folder by the names they have there, and what else tells what they are."""

    path: Path
    tensors: Mapping[str, Tensor]
    container: str = ""  # the key under which they were: "teacher", "model"
    aside: tuple[str, ...] = ()  # what else was there: "optimizer", "epoch"
    metadata: Mapping[str, str] = field(default_factory=dict)  # of a safetensors file
    config: Mapping[str, Any] = field(default_factory=dict)  # config.json, in the folder or beside the file


def is_hugging_face(folder: Path) -> bool:
    """Tell a folder of Hugging Face by its files."""
    return any((folder / name).is_file() for name in ("config.json", *_ONE, *_SEVERAL))


def read_weights(path: Path) -> Weights:
    """Read a .safetensors, a file of torch.save or a folder of Hugging Face. Raises ReleasedError for any other."""
    if path.is_dir():
        config = _json(path / "config.json") if (path / "config.json").is_file() else {}
        for name in _ONE:
            if (path / name).is_file():
                found = _read_file(path / name)
                return Weights(path, found.tensors, found.container, found.aside, found.metadata, config)
        for name in _SEVERAL:
            if (path / name).is_file():
                return Weights(path, _shards(path / name), config=config)
        raise ReleasedError(f"{path} has a config.json but none of {', '.join(_ONE + _SEVERAL)}: download it again")
    found = _read_file(path)
    beside = path.parent / "config.json"
    if path.name in _ONE and beside.is_file():
        return Weights(path, found.tensors, found.container, found.aside, found.metadata, _json(beside))
    return found


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise ReleasedError(f"{path} is no whole JSON file ({error}); fetch it again") from error
    if not isinstance(found, dict):
        raise ReleasedError(f"{path} holds a {type(found).__name__}, not named values; fetch it again")
    return found


def _shards(index: Path) -> dict[str, Tensor]:
    """The tensors of all files that an index names."""
    where = _json(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
        raise ReleasedError(f"{index} has no weight_map that tells the file of each tensor; fetch it again")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(where.values())):
        if Path(name).name != name:
            raise ReleasedError(f"{index} names {name!r}, which is not in its own folder")
        if not (index.parent / name).is_file():
            raise ReleasedError(f"{index} names {name}, which is not there; fetch the whole folder")
        tensors.update(_read_file(index.parent / name).tensors)
    if missing := sorted(where.keys() - tensors.keys()):
        raise ReleasedError(f"{index.parent} lacks {len(missing)} tensors, {missing[0]} first; fetch it again")
    return tensors


def _read_file(path: Path) -> Weights:
    with path.open("rb") as opened:
        start = opened.read(64)
    if start.startswith(b"version https://git-lfs"):
        raise ReleasedError(f"{path} is a Git LFS pointer, not the weights; run `git lfs pull` where it came from")
    if start.lstrip()[:1] == b"<":
        raise ReleasedError(f"{path} is a web page, not weights; a gated download answers so without a login")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if not (zipfile.is_zipfile(path) or start.startswith(b"\x80")):  # the two forms of torch.save
        raise ReleasedError(f"{path} is no file of weights, or not whole; fetch it again")
    found = _unpickled(path)
    if isinstance(found, dict) and "network_weights" in found:
        raise ReleasedError(f"{path} is an nnU-Net checkpoint, not a backbone; give a vision transformer's file")
    for container in _CONTAINERS:
        if isinstance(found, dict) and isinstance(found.get(container), dict):
            aside = tuple(str(key) for key in found if key != container)
            return Weights(path, _tensors(found[container]), container, aside)
    if not isinstance(found, dict):
        raise ReleasedError(f"{path} holds a {type(found).__name__}, not named tensors")
    aside = tuple(str(key) for key, value in found.items() if not isinstance(value, Tensor))
    return Weights(path, _tensors(found), "", aside)


def _tensors(found: Mapping[Any, Any]) -> dict[str, Tensor]:
    return {str(name): value.detach() for name, value in found.items() if isinstance(value, Tensor)}


def _read_safetensors(path: Path) -> Weights:
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
            return Weights(path, tensors, metadata=file.metadata() or {})
    except (SafetensorError, ValueError) as error:
        raise ReleasedError(f"{path} is not a whole safetensors file ({error}); fetch or export it again") from error


def _unpickled(path: Path) -> Any:
    """What torch.save wrote. Of classes beside tensors only MAE's and iBOT's record of a command line is built."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it names {named[1]}" if named else "its pickle has more than torch.save writes for tensors"
        raise ReleasedError(
            f"{path} holds more than tensors, and loading it would run code ({what}); if you "
            "trust it, save its tensors alone: "
            "torch.save({'teacher': torch.load(path, weights_only=False)['teacher']}, new_path)"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise ReleasedError(f"{path} is no file of weights, or not whole ({error}); fetch it again") from error
