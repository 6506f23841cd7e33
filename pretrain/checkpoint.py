"""Checkpoints: written aside in the background, renamed when whole, kept by rule, restored at any world size.

A checkpoint is `RUN/checkpoints/step_00000200/`: what torch.distributed.checkpoint wrote, and `progress.json`. It
holds the tensors of `method.state()`, the optimizer's state by parameter name (one format whether the parameters are
sharded or not) and the number of finished steps. It holds no random state: every step seeds itself.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from data_curation.aside import sync
from launch.distributed import World
from launch.settings import Settings
from pretrain.checkpoint_files import (
    CheckpointError,
    Progress,
    clear_leftovers,
    metadata,
    newest,
    reading,
    steps_of,
)
from pretrain.checkpoint_writer import HostCopy, Trouble, Writing, through_lead

__all__ = ["CheckpointSettings", "Checkpoints", "checkpoint_bytes"]


class CheckpointSettings(Settings):
    """When checkpoints are written and which are kept."""

    every: int = Field(1000, ge=1, description="steps between two checkpoints; the last step is always saved")
    keep: int = Field(3, ge=1, description="newest checkpoints to keep")
    keep_every: int = Field(0, ge=0, description="checkpoints at multiples of this step are kept for good; 0: none are")
    background: bool = Field(
        True, description="write while training goes on, from a copy in host memory (--dry-run says how large)"
    )
    max_failures: int = Field(
        3, ge=1, description="checkpoints in a row that a full or faltering disk may refuse before the run stops"
    )


class _Trained(Protocol):
    """What a checkpoint needs of a method: its student, for the optimizer's names, and the tensors to hold."""

    @property
    def student(self) -> nn.Module: ...

    def state(self) -> dict[str, Any]: ...


def checkpoint_bytes(method: _Trained) -> int:
    """Bytes of a checkpoint of all ranks together with AdamW's two averages; networks may be on the meta device."""

    def of(part: Any) -> int:
        if isinstance(part, Mapping):
            return sum(of(one) for one in part.values())
        return int(part.nbytes) if isinstance(part, Tensor) else 0

    return of(method.state()) + 2 * sum(p.nbytes for p in method.student.parameters() if p.requires_grad)


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


def _others(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What two tables of tables of a run do not have in common, by its names: " (training.case_7 is new)"."""

    def found(before: Mapping[str, Any], now: Mapping[str, Any], at: str) -> list[str]:
        lines: list[str] = []
        for key in sorted(before.keys() | now.keys()):
            old, new = before.get(key), now.get(key)
            if isinstance(old, Mapping) and isinstance(new, Mapping):
                lines += found(old, new, f"{at}{key}.")
            elif old != new:
                lines.append(f"{at}{key} is {'new' if key not in before else 'gone' if key not in now else 'another'}")
        return lines

    lines = found(before, now, "")
    more = f", and {len(lines) - 8} more" if len(lines) > 8 else ""
    return f" ({', '.join(lines[:8])}{more})" if lines else ""


class Checkpoints:
    """The checkpoints of one run: `restore()` once, then `maybe_save(step)` after every step.

    `step` is always the number of finished steps. Every rank must make the same calls in the same order.

    With `settings.background` a save at a step boundary only copies the tensors into host memory: as many bytes on
    each rank as it writes, allocated at the first save and kept. A thread writes them; the folder gets its name at the
    first later step boundary at which every rank's bytes are on the disk. One save is in flight at a time. A disk that
    is full or falters is said, and tried again at the next due step; other errors stop the run at the next boundary.
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
        self.tick: Callable[[], None] = lambda: None  # called while a save is waited for, as long as it moves
        self._method, self._optimizer, self._world, self._settings = method, optimizer, world, settings
        self._samples, self._fingerprint, self._about = samples_per_step, fingerprint, dict(about or {})
        self._say = say if world.rank == 0 else lambda text: None
        self._copy = HostCopy()
        self._writing: Writing | None = None
        self._clearing: threading.Thread | None = None
        self._failures = 0
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
        def look(ranks: list[None]) -> list[Path | None]:
            clear_leftovers(self.folder)
            return [newest(self.run, say=self._say)] * len(ranks)

        # Rank 0 looks for all: a network's file system may show each of them another list.
        found = through_lead(self._world, None, look)
        if found is None:
            return 0
        progress = Progress.read(found)
        if self._fingerprint and progress.fingerprint not in ("", self._fingerprint):
            raise CheckpointError(
                f"{found} belongs to a run with other settings or data{_others(progress.about, self._about)}; "
                f"give this run another folder, or delete {self.folder} to start afresh"
            )
        self._optimizer.state.clear()
        _make_optimizer_state(self._method.student, self._optimizer, metadata(found))
        with reading(f"cannot restore {found}"):
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
        """Save after `step` finished steps when it is time, or in any case with `last`; True when it did or began to.

        With `last` the checkpoint is on the disk on return, or CheckpointError is raised.
        """
        if self._writing is not None and not self._writing.pending():
            self._conclude(step)
        due = last or step % self._settings.every == 0
        if due and (flying := self._writing) is not None:
            said = f"a checkpoint is due, the one of step {flying.step} still being written"
            self._wait(step, said if flying.step != step else "")
        new = due and step != self._saved
        if new:
            self._begin(step, self._settings.background and not last)
            if last or not self._settings.background:
                self._wait(step, final=last)
        if last:
            self.wait()  # the process may end at once, amid the deletion of older ones
        return new

    def save(self, step: int) -> Path:
        """Write `step_<step>` aside, rename it when every byte is on the disk, then delete what no rule keeps."""
        self.wait()
        self._begin(step, background=False)
        self._wait(step, final=True)
        return self._path(step)

    def wait(self) -> None:
        """Wait for the checkpoint in flight, if there is one, and for the deletion of older ones."""
        if self._writing is not None:
            self._wait(self._writing.step)
        if self._clearing is not None:
            self._clearing.join()

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}"

    def _begin(self, step: int, background: bool) -> None:
        if self._clearing is not None:
            self._clearing.join()
        aside = self.folder / f".writing_{self._path(step).name}"
        self._writing = Writing(step, aside, self._state(), self._world, self._copy if background else None)

    def _wait(self, step: int, why: str = "", final: bool = False) -> None:
        """Wait until every rank has written and conclude; `why` is said with how long it took."""
        assert self._writing is not None, "nothing is being written"
        start = time.monotonic()
        self._writing.wait(self.tick)
        while self._writing.pending():  # on another rank
            time.sleep(0.05)
        if why:
            self._say(f"{why}: waited {time.monotonic() - start:.1f} s (checkpoint.every is short for this disk)")
        self._conclude(step, final)

    def _conclude(self, now: int, final: bool = False) -> None:
        """Finish the save in flight at the boundary after step `now`; every rank raises alike."""
        assert self._writing is not None, "nothing is being written"
        step, writing, self._writing = self._writing.step, self._writing, None
        trouble = writing.conclude(lambda aside: self._publish(step, aside))
        if trouble is None:
            self._saved, self._failures = step, 0
            return
        self._failures += 1
        self._tolerate(step, now, trouble, final)

    def _tolerate(self, step: int, now: int, trouble: Trouble, final: bool) -> None:
        """Say that a checkpoint was not written, or raise: at once where waiting will not mend it."""
        good = f"the newest checkpoint is that of step {self._saved}" if self._saved > 0 else "there is no checkpoint"
        what = f"cannot write {self._path(step)}: {trouble}"
        every, limit = self._settings.every, self._settings.max_failures
        if not trouble.passing:
            raise CheckpointError(f"{what}; {good}; {trouble.remedy}, then run the same command")
        remedy = f"make room in {self.folder} (checkpoint.keep is {self._settings.keep})"
        if final or self._failures >= limit:
            raise CheckpointError(f"{what} ({self._failures} in a row); {good}; {remedy}, then run the same command")
        again = now + (-now % every or every * (step == now))  # one that is due now begins right after this
        self._say(
            f"warning: {what}; {good}; training goes on and tries again at step {again} "
            f"(failure {self._failures} of {limit} in a row, then it stops); {remedy}"
        )

    def _publish(self, step: int, aside: Path) -> None:
        """Give the whole checkpoint its name (on rank 0), then delete what no rule keeps while training goes on."""
        Progress(step, step * self._samples, self._fingerprint, self._world.size, self._about).write(aside)
        final = self._path(step)
        if final.exists():  # only an incomplete one can be here: a complete one would have been restored
            shutil.rmtree(final)
        aside.rename(final)
        sync(self.folder)
        self._say(f"checkpoint {final.name} written")
        # A later one is damaged, or it would have been restored: it must not count in place of the one just written.
        steps = [(number, path) for number, path in steps_of(self.folder).items() if number <= step]
        kept = self._settings.keep_every
        doomed = [path for number, path in steps[: -self._settings.keep] if not (kept and number % kept == 0)]
        self._clearing = threading.Thread(target=self._clear, args=(doomed,), name="old checkpoints")
        self._clearing.start()

    def _clear(self, doomed: list[Path]) -> None:
        for path in doomed:
            try:
                shutil.rmtree(path.rename(self.folder / f".deleting_{path.name}"))
            except OSError as error:
                self._say(f"warning: cannot delete {path}: {error}; delete it by hand")
