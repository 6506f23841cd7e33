"""Checkpoints: written aside, renamed when whole, kept by rule, restored at any world size.

A checkpoint is `RUN/checkpoints/step_00000200/`: what torch.distributed.checkpoint wrote, and `progress.json`. It
holds the tensors of `method.state()`, the optimizer's state by parameter name (one format whether the parameters are
sharded or not) and the number of finished steps. It holds no random state: every step seeds itself.

    CheckpointError(ValueError)    nothing to restore, other settings, a damaged folder, a disk that refuses
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from launch.distributed import World, barrier
from launch.settings import Settings

__all__ = ["CheckpointError", "CheckpointSettings", "Checkpoints", "Progress", "complete", "newest", "read_tensors"]

_NAME = re.compile(r"step_(\d{8})")
_PROGRESS = "progress.json"


class CheckpointError(ValueError):
    """A checkpoint cannot be written, found or used; the text says which, why and what to do."""


class CheckpointSettings(Settings):
    """When checkpoints are written and which are kept."""

    every: int = Field(1000, ge=1, description="steps between two checkpoints; the last step is always saved")
    keep: int = Field(3, ge=1, description="newest checkpoints to keep")
    keep_every: int = Field(0, ge=0, description="checkpoints at multiples of this step are kept for good; 0: none are")


class _Trained(Protocol):
    """What a checkpoint needs of a method: its student, for the optimizer's names, and the tensors to hold."""

    @property
    def student(self) -> nn.Module: ...

    def state(self) -> dict[str, Any]: ...


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


def _metadata(folder: Path) -> Metadata:
    return FileSystemReader(folder).read_metadata()


def complete(folder: Path) -> str:
    """Return "" when every byte that the checkpoint's table of contents names is there, else what is missing."""
    if not (folder / _PROGRESS).is_file():
        return f"no {_PROGRESS}"
    try:
        contents = _metadata(folder)
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


def newest(run: Path, step: int | None = None, say: Callable[[str], None] = print) -> Path | None:
    """Find the newest complete checkpoint of a run folder, or that of one step; names the incomplete ones it passes."""
    parent = run / "checkpoints"
    found = {int(m[1]): path for path in parent.glob("step_*") if (m := _NAME.fullmatch(path.name))}
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
def _io(what: str) -> Iterator[None]:
    """Turn what torch.distributed.checkpoint raises (a BaseException holding every rank's error) into one sentence."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise CheckpointError(f"{what}: rank {rank}: {type(cause).__name__}: {cause}") from error
    except OSError as error:
        raise CheckpointError(
            f"{what}: {error}; make room or choose another folder, then run the same command"
        ) from error


def read_tensors(folder: Path, prefix: str) -> dict[str, Tensor]:
    """Read a checkpoint's tensors below `prefix` ("method.teacher."), whole, on the CPU, named without the prefix."""
    if reason := complete(folder):
        raise CheckpointError(f"{folder} is not a complete checkpoint: {reason}")
    contents = _metadata(folder).state_dict_metadata
    wanted: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in contents.items()
        if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    with _io(f"cannot read {folder}"):
        load(wanted, storage_reader=FileSystemReader(folder), no_dist=True)
    return {name.removeprefix(prefix): tensor for name, tensor in wanted.items()}


def _optimizer_state(student: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """Return the optimizer's state by parameter name: the live tensors, which a load fills in place."""
    return {
        name: {key: value for key, value in optimizer.state[parameter].items() if isinstance(value, Tensor)}
        for name, parameter in student.named_parameters()
        if parameter in optimizer.state
    }


def _make_optimizer_state(student: nn.Module, optimizer: torch.optim.Optimizer, contents: Metadata) -> None:
    """Give the optimizer empty state like the checkpoint's, sharded as its parameters are, for the load to fill."""
    parameters = dict(student.named_parameters())
    for flat, path in (contents.planner_data or {}).items():
        if path[0] != "optimizer":
            continue
        _, name, key = path
        if name not in parameters:
            raise CheckpointError(f"the checkpoint holds optimizer state for {name!r}, which this model has not")
        parameter, entry = parameters[name], contents.state_dict_metadata[flat]
        assert isinstance(entry, TensorStorageMetadata), f"{flat} is no tensor"
        dtype = entry.properties.dtype
        whole = tuple(entry.size) == tuple(parameter.shape) and len(entry.size) > 0
        empty = torch.zeros_like(parameter, dtype=dtype) if whole else torch.zeros(entry.size, dtype=dtype)
        fused = optimizer.defaults.get("fused")
        optimizer.state[parameter][key] = empty.detach() if whole or not fused else empty.to(parameter.device)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Checkpoints:
    """The checkpoints of one run: `restore()` once, then `maybe_save(step)` after every step.

    `step` is always the number of finished steps. Every rank must make the same calls in the same order.
    """

    def __init__(
        self,
        folder: Path,
        method: _Trained,
        optimizer: torch.optim.Optimizer,
        world: World,
        settings: CheckpointSettings,
        *,
        samples_per_step: int = 0,
        fingerprint: str = "",
        about: Mapping[str, Any] | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        """`about` (JSON values) is kept beside the weights; another `fingerprint` is refused at `restore`."""
        self.run, self.folder = folder, folder / "checkpoints"
        self._method, self._optimizer, self._world, self._settings = method, optimizer, world, settings
        self._samples, self._fingerprint, self._about = samples_per_step, fingerprint, dict(about or {})
        self._say = say if world.rank == 0 else lambda text: None
        self._saved = -1
        self._restored: int | None = None

    def _state(self) -> dict[str, Any]:
        return {"method": self._method.state(), "optimizer": _optimizer_state(self._method.student, self._optimizer)}

    def restore(self) -> int:
        """Fill method and optimizer from the newest complete checkpoint; return the number of finished steps (0: none).

        A second call reads nothing and returns the same.
        """
        if self._restored is None:
            self._restored = self._restore()
        return self._restored

    def _restore(self) -> int:
        barrier()
        found = newest(self.run, say=self._say)
        if found is None:
            return 0
        progress = Progress.read(found)
        if self._fingerprint and progress.fingerprint not in ("", self._fingerprint):
            raise CheckpointError(
                f"{found} belongs to a run with other settings; "
                f"give this run another folder, or delete {self.folder} to start afresh"
            )
        self._optimizer.state.clear()
        _make_optimizer_state(self._method.student, self._optimizer, _metadata(found))
        with _io(f"cannot restore {found}"):
            load(self._state(), storage_reader=FileSystemReader(found), no_dist=self._world.size == 1)
        other = (
            f" (saved by {progress.ranks} ranks, now {self._world.size})" if progress.ranks != self._world.size else ""
        )
        if progress.about.get("corpus") != self._about.get("corpus"):
            self._say("warning: the corpus is not the one that this run began with; the order of its slices is another")
        self._say(f"continuing from {found.name}, {progress.samples:,} samples seen{other}")
        self._saved = progress.step
        return progress.step

    def maybe_save(self, step: int, last: bool = False) -> bool:
        """Save after `step` finished steps when it is time, or in any case with `last`; True when it did."""
        if step == self._saved or not (last or step % self._settings.every == 0):
            return False
        self.save(step)
        return True

    def save(self, step: int) -> Path:
        """Write `step_<step>` aside, rename it when every byte is on the disk, then delete what no rule keeps."""
        final = self.folder / f"step_{step:08d}"
        aside = self.folder / f".writing_{final.name}"
        lead = self._world.rank == 0
        with _io(f"cannot write {final}"):
            if lead:
                self.folder.mkdir(parents=True, exist_ok=True)
                for left in [*self.folder.glob(".writing_*"), *self.folder.glob(".deleting_*")]:
                    shutil.rmtree(left)
                aside.mkdir()
            barrier()
            writer = FileSystemWriter(aside, sync_files=True)
            save(self._state(), storage_writer=writer, no_dist=self._world.size == 1)
            if lead:
                self._finish(step, aside, final)
            barrier()
        self._saved = step
        return final

    def _finish(self, step: int, aside: Path, final: Path) -> None:
        progress = Progress(step, step * self._samples, self._fingerprint, self._world.size, self._about)
        (aside / _PROGRESS).write_text(json.dumps(vars(progress), indent=1, sort_keys=True))
        _sync(aside / _PROGRESS)
        _sync(aside)
        if final.exists():  # only an incomplete one can be here: a complete one would have been restored
            shutil.rmtree(final)
        aside.rename(final)
        _sync(self.folder)
        self._say(f"checkpoint {final.name} written")
        steps = sorted((int(m[1]), path) for path in self.folder.iterdir() if (m := _NAME.fullmatch(path.name)))
        # A later one is damaged, or it would have been restored: it must not count in place of the one just written.
        steps = [(number, path) for number, path in steps if number <= step]
        for number, path in steps[: -self._settings.keep]:
            if not (self._settings.keep_every and number % self._settings.keep_every == 0):
                doomed = path.rename(self.folder / f".deleting_{path.name}")
                shutil.rmtree(doomed)
