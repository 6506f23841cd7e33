"""What the watch of a run keeps in its folder, so that a continued run is compared with the same things."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from pretrain.weights import write_weights

__all__ = ["First", "earlier_colours", "keep_colours", "read_first", "write_first"]

_FIRST, _COLOURS = "first.safetensors", "colours.safetensors"


@dataclass(frozen=True)
class First:
    """The teacher's patches at the first look."""

    step: int
    keys: tuple[str, ...]  # of the slices
    patches: Tensor  # float32 [P, N, D]


def read_first(folder: Path, keys: tuple[str, ...], shape: tuple[int, int, int]) -> First | None:
    """What an earlier start wrote, if it is of these slices and of this shape [P, N, D]; else None."""
    found = _read(folder / _FIRST)
    if found is None or "patches" not in found[0]:
        return None
    tensors, about = found
    first = First(int(about["step"]), tuple(json.loads(about["keys"])), tensors["patches"])
    return first if first.keys == keys and tuple(first.patches.shape) == shape else None


def write_first(folder: Path, first: First) -> None:
    """Appears whole or not at all."""
    about = {"step": str(first.step), "keys": json.dumps(first.keys)}
    write_weights(folder / _FIRST, {"patches": first.patches}, about)


def earlier_colours(folder: Path, step: int, like: Tensor) -> Tensor | None:
    """The scores [P, N, 3] of the last picture before `step`, if they are of the shape of `like`."""
    found = _read(folder / _COLOURS)
    steps = [int(name) for name in (found[0] if found is not None else {}) if int(name) < step]
    if found is None or not steps:
        return None
    scores = found[0][str(max(steps))]
    return scores.to(like.dtype) if scores.shape == like.shape else None


def keep_colours(folder: Path, step: int, scores: Tensor) -> None:
    """Add the scores of a picture; those of later steps, which a killed run had made, go."""
    found = _read(folder / _COLOURS)
    kept = {name: tensor for name, tensor in (found[0] if found is not None else {}).items() if int(name) < step}
    write_weights(folder / _COLOURS, {**kept, str(step): scores.float()}, {})


def _read(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str]] | None:
    """Tensors and header; None where there is no whole file."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None
