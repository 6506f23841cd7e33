"""One checkpoint on its way to the disk: planned and copied by all ranks together, then written by each in a thread.

The thread talks to no other rank: a collective in it would be taken for one of the training's. What the threads did is
agreed on by the ranks' main threads at a later step boundary (`pending`, `conclude`).
"""

from __future__ import annotations

import errno
import io
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from launch.distributed import World, agree
from pretrain.checkpoint_files import clear_leftovers

__all__ = ["HostCopy", "Trouble", "Writing", "through_lead"]

# What a full or faltering storage says; it may take the next checkpoint.
_PASSING = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE}
_SYNC_BYTES = 256 << 20

T = TypeVar("T")
U = TypeVar("U")


def through_lead(world: World, mine: T, decide: Callable[[list[T]], list[U]]) -> U:
    """Bring every rank's value to rank 0, which answers each with one of its own (a collective; over the CPU)."""
    if world.size == 1:
        return decide([mine])[0]
    values: list[Any] | None = [None] * world.size if world.rank == 0 else None
    dist.gather_object(mine, values)
    answer: list[Any] = [None]
    dist.scatter_object_list(answer, cast(list[Any], decide(values)) if values is not None else None)
    return cast(U, answer[0])


@dataclass(frozen=True)
class Trouble:
    """Why a checkpoint was not written, on which rank; `passing` where the storage may take a later one."""

    rank: int
    host: str
    cause: str
    passing: bool
    remedy: str = "put this right"

    @classmethod
    def of(cls, world: World, error: BaseException) -> Trouble:
        """Describe an error of this rank."""
        passing = isinstance(error, OSError) and error.errno in _PASSING
        return cls(world.rank, socket.gethostname(), f"{type(error).__name__}: {error}", passing)

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}: {self.cause}"


class HostCopy:
    """Host memory that what this rank writes is copied to: pinned beside a GPU, and kept from one save to the next.

    It takes as many bytes as the rank's share of a checkpoint: of sharded tensors its shards, of copied ones about a
    share, since each is written by one rank.
    """

    def __init__(self) -> None:
        self._buffers: dict[MetadataIndex, Tensor] = {}

    def take(self, plan: SavePlan, planner: DefaultSavePlanner) -> dict[MetadataIndex, Tensor | io.BytesIO]:
        """Copy what the plan writes; on return the training may change the tensors."""
        taken: dict[MetadataIndex, Tensor | io.BytesIO] = {}
        device = None
        with torch.no_grad():
            for item in plan.items:
                found = planner.resolve_data(item)
                if isinstance(found, Tensor):
                    device = found.device if found.is_cuda else device
                    found = self._buffer(item.index, found).copy_(found, non_blocking=True)
                taken[item.index] = found
        if device is not None:
            torch.cuda.synchronize(device)
        return taken

    def _buffer(self, index: MetadataIndex, like: Tensor) -> Tensor:
        found = self._buffers.get(index)
        if found is None or (found.shape, found.dtype) != (like.shape, like.dtype):
            found = self._buffers[index] = torch.empty(like.shape, dtype=like.dtype, pin_memory=like.is_cuda)
        return found


class _Planner(DefaultSavePlanner):
    """Plans from the live tensors, writes from the copies where there are some."""

    held: dict[MetadataIndex, Tensor | io.BytesIO] | None = None

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        return super().resolve_data(write_item) if self.held is None else self.held[write_item.index]


class _Stream:
    """A file that remembers a write's error, which torch's own writer replaces by one about positions.

    It brings the bytes to the disk as they come, so that the last flush does not have to wait for all of them.
    """

    def __init__(self, file: io.IOBase, files: _Files) -> None:
        self._file, self._files, self._since = file, files, 0
        self.tell, self.fileno, self.close = file.tell, file.fileno, file.close

    def write(self, data: Any) -> int:
        with self._files.noted():
            written = cast(int, self._file.write(data))
            self._since += written
            if self._since >= _SYNC_BYTES:
                self._since = 0
                self._file.flush()
                os.fdatasync(self._file.fileno())
        self._files.bytes += written
        return written

    def flush(self) -> None:
        with self._files.noted():
            self._file.flush()


class _Files(FileSystem):
    """The file system of one save: how many bytes it took, and the first error."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.error = 0, cast("OSError | None", None)

    @contextmanager
    def noted(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.error = self.error or error
            raise

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        with super().create_stream(path, mode) as stream:
            yield cast(io.IOBase, _Stream(stream, self)) if mode == "wb" else stream


class Writing:
    """The checkpoint of one step while it is written into the folder `aside`.

    Every rank makes the same calls in the same order: this constructor (a collective), `pending` (a collective) until
    it is False, or `wait`; then `conclude` (a collective). With `copy` the tensors may be changed as soon as the
    constructor has returned, without it after `wait`.
    """

    def __init__(self, step: int, aside: Path, state: dict[str, Any], world: World, copy: HostCopy | None) -> None:
        self.step = step
        self._aside, self._world = aside, world
        self._files = _Files()
        self._writer = FileSystemWriter(aside, sync_files=True, per_thread_copy_ahead=0)
        self._writer.fs = self._files
        self._planner = _Planner()
        self._contents: Metadata | None = None
        self._mine: list[WriteResult] | Trouble = []
        self._thread: threading.Thread | None = None
        plan = self._plan(state)
        if isinstance(plan, Trouble):
            self._mine = plan
            return
        try:
            if copy is not None:
                self._planner.held = copy.take(plan, self._planner)
            elif world.device.type == "cuda":
                torch.cuda.synchronize(world.device)  # the thread has a stream of its own
        except Exception as error:  # too little memory, on this rank alone; the others learn of it in `conclude`
            self._mine = replace(
                Trouble.of(world, error), remedy="set checkpoint.background=false to do without a copy"
            )
            return
        self._thread = threading.Thread(target=self._write, args=(plan,), name="checkpoint", daemon=True)
        self._thread.start()

    def _plan(self, state: dict[str, Any]) -> SavePlan | Trouble:
        """Agree on who writes what; rank 0 makes the folder, and clears away what an earlier save has left."""
        lead = self._world.rank == 0
        self._planner.set_up_planner(state, self._writer.storage_meta(), lead)
        self._writer.set_up_storage_writer(lead)

        def decide(plans: list[SavePlan | Trouble]) -> list[SavePlan | Trouble]:
            if found := next((one for one in plans if isinstance(one, Trouble)), None):
                return [found] * len(plans)
            try:
                parent = self._aside.parent
                parent.mkdir(parents=True, exist_ok=True)
                clear_leftovers(parent)
                self._aside.mkdir()
                whole = [one for one in plans if not isinstance(one, Trouble)]
                agreed, self._contents = self._planner.create_global_plan(whole)
                return list(self._writer.prepare_global_plan(agreed))
            except Exception as error:  # every rank must hear of it, or they would wait
                return [Trouble.of(self._world, error)] * len(plans)

        mine: SavePlan | Trouble
        try:
            mine = self._planner.create_local_plan()
        except Exception as error:  # every rank must hear of it, or they would wait
            mine = Trouble.of(self._world, error)
        plan = through_lead(self._world, mine, decide)
        return plan if isinstance(plan, Trouble) else self._planner.finish_plan(plan)

    def _write(self, plan: SavePlan) -> None:
        try:
            self._mine = self._writer.write_data(plan, self._planner).value()
        except Exception as error:  # told to all ranks in `conclude`
            self._mine = Trouble.of(self._world, self._files.error or error)

    def pending(self) -> bool:
        """Is a rank still writing (a collective)?"""
        return agree(self._thread is not None and self._thread.is_alive())

    def wait(self, tick: Callable[[], None]) -> None:
        """Wait until this rank has written; `tick` is called as long as bytes reach the disk."""
        written = -1
        while self._thread is not None and self._thread.is_alive():
            self._thread.join(0.2)
            if written != self._files.bytes:
                written = self._files.bytes
                tick()

    def conclude(self, publish: Callable[[Path], None]) -> Trouble | None:
        """Finish once no rank writes any more: rank 0 adds the table of contents and calls `publish(aside)`.

        Returns the first trouble, the same on every rank (a collective); then nothing is left of the checkpoint.
        """

        def decide(all_of_them: list[list[WriteResult] | Trouble]) -> list[Trouble | None]:
            found = next((one for one in all_of_them if isinstance(one, Trouble)), None)
            if found is None:
                try:
                    assert self._contents is not None, "no plan"
                    results = [one for one in all_of_them if not isinstance(one, Trouble)]
                    self._writer.finish(self._contents, results)
                    publish(self._aside)
                except Exception as error:  # every rank must hear of it, or they would wait
                    found = Trouble.of(self._world, error)
            if found is not None:
                shutil.rmtree(self._aside, ignore_errors=True)
            return [found] * len(all_of_them)

        if self._thread is not None:
            self._thread.join()
        return through_lead(self._world, self._mine, decide)
