"""The files of checkpoints: which there are, which are whole, what they hold.

CheckpointError(ValueError)    nothing to restore, other settings, a damaged folder, a disk that refuses
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from data_curation.aside import sync

__all__ = [
    "CheckpointError",
    "Progress",
    "clear_leftovers",
    "complete",
    "metadata",
    "newest",
    "read_tensors",
    "reading",
    "steps_of",
]

_NAME = re.compile(r"step_(\d{8})")
_PROGRESS = "progress.json"


class CheckpointError(ValueError):
    """A checkpoint cannot be written, found or used; the text says which, why and what to do."""


@dataclass(frozen=True)
class Progress:
    """`progress.json`: where the run stood, and what is needed to read the weights without its settings."""

    step: int
    samples: int
    fingerprint: str
    ranks: int
    about: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Progress:
        """Read the progress of one checkpoint folder; CheckpointError when it is damaged."""
        try:
            return cls(**json.loads((folder / _PROGRESS).read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{folder}/{_PROGRESS} cannot be read ({error}); use another checkpoint") from error

    def write(self, folder: Path) -> None:
        """Write it into a checkpoint folder, onto the disk."""
        (folder / _PROGRESS).write_text(json.dumps(vars(self), indent=1, sort_keys=True))
        sync(folder / _PROGRESS)
        sync(folder)


def metadata(folder: Path) -> Metadata:
    """Read a checkpoint's table of contents, a pickle."""
    return FileSystemReader(folder).read_metadata()


def complete(folder: Path) -> str:
    """Return "" when every byte that the checkpoint's table of contents names is there, else what is missing."""
    if not (folder / _PROGRESS).is_file():
        return f"no {_PROGRESS}"
    try:
        contents = metadata(folder)
        ends: dict[str, int] = {}
        for part in (contents.storage_data or {}).values():
            ends[part.relative_path] = max(ends.get(part.relative_path, 0), part.offset + part.length)
        for name, end in ends.items():
            size = (folder / name).stat().st_size
            if size < end:
                return f"{name} has {size} of {end} bytes"
    except FileNotFoundError as error:
        return f"no {Path(error.filename or '.metadata').name}"
    except Exception as error:  # a torn pickle raises anything; whatever it is, the folder is not complete
        return f"unreadable table of contents ({type(error).__name__}: {error})"
    return ""


def steps_of(parent: Path) -> dict[int, Path]:
    """Return the checkpoint folders in `parent` by their step, whole or not, in rising order."""
    found = {int(m[1]): path for path in parent.glob("step_*") if (m := _NAME.fullmatch(path.name))}
    return dict(sorted(found.items()))


def clear_leftovers(parent: Path) -> None:
    """Delete what a killed process was writing or deleting in `parent`, as far as it can be deleted."""
    for left in [*parent.glob(".writing_*"), *parent.glob(".deleting_*")]:
        shutil.rmtree(left, ignore_errors=True)


def newest(run: Path, step: int | None = None, say: Callable[[str], None] = print) -> Path | None:
    """Find the newest complete checkpoint of a run folder, or that of one step; names the incomplete ones it passes."""
    parent = run / "checkpoints"
    found = steps_of(parent)
    if step is not None and step not in found:
        raise CheckpointError(f"{parent} holds no checkpoint of step {step}; it holds {sorted(found) or 'none'}")
    for number in [step] if step is not None else sorted(found, reverse=True):
        if not (missing := complete(found[number])):
            return found[number]
        say(f"checkpoint {found[number]} is incomplete ({missing}) and is passed over; it may be deleted")
        if step is not None:
            raise CheckpointError(f"{found[step]} is incomplete: {missing}; choose another step of {sorted(found)}")
    return None


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn what torch.distributed.checkpoint raises (a BaseException holding every rank's error) into one sentence."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise CheckpointError(f"{what}: rank {rank}: {type(cause).__name__}: {cause}") from error
    except OSError as error:
        raise CheckpointError(f"{what}: {error}; see that the folder can be read, then run the same command") from error


def read_tensors(folder: Path, prefix: str) -> dict[str, Tensor]:
    """Read a checkpoint's tensors below `prefix` ("method.teacher."), whole, on the CPU, named without the prefix."""
    if reason := complete(folder):
        raise CheckpointError(f"{folder} is not a complete checkpoint: {reason}")
    contents = metadata(folder).state_dict_metadata
    wanted: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in contents.items()
        if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    with reading(f"cannot read {folder}"):
        load(wanted, storage_reader=FileSystemReader(folder), no_dist=True)
    return {name.removeprefix(prefix): tensor for name, tensor in wanted.items()}
