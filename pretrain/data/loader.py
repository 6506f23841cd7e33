"""Batches by worker processes: what they make of a step, how it gets to the device, what happens when one dies."""

from __future__ import annotations

import atexit
import logging
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from multiprocessing.connection import wait
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from pretrain.data.batch import Batch
from pretrain.data.crops import Crops, crop_batch
from pretrain.data.settings import DataSettings, StreamError
from pretrain.data.steps import Fault, Steps

__all__ = ["Batches", "WorldLike"]

LOG = logging.getLogger(__name__)
DYING = 2.0  # seconds that a process may still count as alive when its connection is gone
RECENT = 1000  # steps within which deaths of workers are counted together
CAUSES = {
    signal.SIGKILL: ("SIGKILL", "most likely memory ran out and the system ended the largest process"),
    signal.SIGBUS: ("SIGBUS", "/dev/shm is full, or the storage failed"),
    signal.SIGTERM: ("SIGTERM", "somebody, or the cluster, ended it"),
    signal.SIGSEGV: ("SIGSEGV", "a library crashed"),
    signal.SIGABRT: ("SIGABRT", "a library gave up"),
}


class WorldLike(Protocol):
    """What the stream needs of `launch.distributed.World`."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def device(self) -> torch.device: ...


class Batches(Iterator[Batch]):
    """The iterator that `batches` returns.

    `unreadable` counts, by shard, the slices that had to be replaced; `deaths` the workers that died, each a line. The
    loader is begun again at the step that a death lost; since a step is a function of its number, nothing changes.
    """

    def __init__(self, settings: DataSettings, steps: Steps, world: WorldLike, in_channels: int, start: int) -> None:
        self.unreadable: Counter[str] = Counter()
        self.deaths: list[str] = []
        self._settings, self._steps, self._device, self._in_channels = settings, steps, world.device, in_channels
        self._rank, self._start, self._next = world.rank, start, start
        self._recent: deque[int] = deque()
        self._closed = False
        cuda = world.device.type == "cuda"
        self._side = torch.cuda.Stream(world.device) if cuda else None  # type: ignore[no-untyped-call]
        self._ahead: Batch | None = None
        self._loaded: Iterator[Any] = self._begin()
        atexit.register(self.close)  # else Python's exit sends each worker the one SIGTERM that it overlooks, and waits

    def __next__(self) -> Batch:
        if self._side is None:
            return self._make()
        ready = self._ahead if self._ahead is not None else self._make_aside(self._side)
        stream = torch.cuda.current_stream(self._device)
        stream.wait_stream(self._side)
        for tensor in ready.tensors().values():
            tensor.record_stream(stream)
        self._ahead = self._make_aside(self._side)
        return ready

    def close(self) -> None:
        """Ends the workers and says what went wrong on the way; the iterator is of no use afterwards."""
        atexit.unregister(self.close)
        self._ahead = None
        self._end()
        if (said := self.summary()) and not self._closed:
            LOG.warning("%s", said)
        self._closed = True

    def summary(self) -> str:
        """One line on slices that were replaced and workers that died; '' if there were none."""
        parts = []
        if self.unreadable:
            seen = (self._next - self._start) * self._steps.images
            parts.append(f"{self.unreadable.total():,} of {seen:,} slices were replaced: {self._shards()}")
        if self.deaths:
            parts.append(f"{len(self.deaths)} reading processes died: {'; '.join(self.deaths[-10:])}")
        return f"data of rank {self._rank}: {'. '.join(parts)}" if parts else ""

    def _begin(self) -> Iterator[Any]:
        """A loader from the next step on."""
        settings, cuda = self._settings, self._device.type == "cuda"
        workers = min(settings.workers, _processors())
        loader: DataLoader[Any] = DataLoader(
            self._steps,
            batch_size=None,
            sampler=count(self._next),
            collate_fn=_as_is,
            num_workers=workers,
            prefetch_factor=settings.prefetch if workers else None,
            multiprocessing_context=settings.start_method if workers else None,
            worker_init_fn=_start_worker if workers else None,
            pin_memory=cuda,
            generator=torch.Generator(),  # torch's own is not touched
        )
        before = signal.getsignal(signal.SIGCHLD)
        begun = iter(loader)
        if threading.current_thread() is threading.main_thread():
            # torch answers a death by an error in whatever line the trainer is at; we look for the dead ourselves.
            torchs = getattr(before, "__module__", "").startswith("torch.")
            signal.signal(signal.SIGCHLD, signal.SIG_DFL if torchs or before is None else before)
        return begun

    def _end(self) -> None:
        """Ends the workers."""
        workers = getattr(self._loaded, "_workers", ())
        # torch does so once its iterator is dropped, but the traceback of a worker's error holds that.
        getattr(self._loaded, "_shutdown_workers", tuple)()
        for worker in workers:
            if worker.is_alive():  # waits for a lock that a dead one held
                worker.kill()
        self._loaded = iter(())

    def _make_aside(self, side: torch.cuda.Stream) -> Batch:
        """The next batch, copied and cropped on a stream of its own while the trainer computes."""
        with torch.cuda.stream(side):
            return self._make()

    def _make(self) -> Batch:
        loaded = self._load()
        self._next += 1
        if isinstance(loaded, StreamError):
            raise loaded
        self._count(loaded.faults)
        loaded = loaded.to(self._device, non_blocking=True)
        batch: Batch = loaded.batch
        crops = Crops(batch.global_crops, batch.local_crops, batch.gram_crops, batch.views)
        if loaded.hu is not None:
            settings, views = self._settings, self._steps.pictured
            crops = crop_batch(loaded.hu, loaded.draws, settings.crops, loaded.shape, settings.window, views)
        gram = None if crops.gram is None else self._channels(crops.gram)
        return replace(
            batch,
            global_crops=self._channels(crops.globals_),
            local_crops=self._channels(crops.locals_),
            gram_crops=gram,
            views=crops.views,
        )

    def _load(self) -> Any:
        """What the workers have made of the next step; begins them again as long as deaths are few."""
        while True:
            failed: Exception | None = None
            dead = self._dead(0)
            if not dead:
                try:
                    return next(self._loaded)
                except (RuntimeError, OSError, EOFError) as error:  # whatever a broken connection is told as
                    dead = self._dead(DYING)
                    if not dead:
                        raise  # raised by a worker, which lives
                    failed = error
            self._bury(dead, failed)
            self._end()
            self._loaded = self._begin()

    def _dead(self, seconds: float) -> list[Any]:
        """Workers that are dead, or end within this time."""
        workers = {worker.sentinel: worker for worker in getattr(self._loaded, "_workers", ())}
        ended = [workers[sentinel] for sentinel in wait(list(workers), seconds)] if workers else []
        for worker in ended:
            worker.join(DYING)  # a moment passes before it has an exit code
        return [worker for worker in ended if worker.exitcode is not None]

    def _bury(self, dead: list[Any], error: Exception | None) -> None:
        """Says who died, when and why; raises StreamError when it happens too often."""
        for worker in dead:
            code = worker.exitcode
            name, cause = CAUSES.get(-code, (f"signal {-code}" if code < 0 else f"exit code {code}", "cause unknown"))
            self.deaths.append(f"pid {worker.pid} at step {self._next} by {name}: {cause}")
            self._recent.append(self._next)
            LOG.warning("a reading process died: %s; begun again at that step", self.deaths[-1])
        while self._recent[0] <= self._next - RECENT:
            self._recent.popleft()
        if len(self._recent) > self._settings.max_worker_deaths:
            raise StreamError(
                f"{len(self._recent)} reading processes died within {RECENT} steps, the last: {self.deaths[-1]}. "
                f"Lower data.workers={self._settings.workers} or data.prefetch={self._settings.prefetch}, ask for more "
                "memory, or raise data.max_worker_deaths; the same command continues"
            ) from error

    def _count(self, faults: tuple[Fault, ...]) -> None:
        """Counts slices that were replaced; raises StreamError once they are too large a share of all."""
        for fault in faults:
            if fault.shard not in self.unreadable:
                LOG.warning("%s; replaced by the next slice (said once a shard)", fault.text)
            self.unreadable[fault.shard] += 1
        total, seen = self.unreadable.total(), (self._next - self._start) * self._steps.images
        limit = max(self._settings.max_unreadable, self._settings.max_unreadable_share * seen)
        if faults and total > limit:
            raise StreamError(
                f"{total:,} of {seen:,} slices could not be read, more than data.max_unreadable_share="
                f"{self._settings.max_unreadable_share:g} allows: {self._shards()}. Copy these shards again, or run "
                "`axial verify` on the corpus and then the same `axial curate`"
            )

    def _shards(self) -> str:
        """The shards with unreadable slices, the worst first."""
        worst = [f"{shard} ({number})" for shard, number in self.unreadable.most_common(20)]
        return ", ".join(worst) + f" and {len(self.unreadable) - 20} more" * (len(self.unreadable) > 20)

    def _channels(self, crops: Tensor) -> Tensor:
        """[N, C, S, S] with one channel repeated to as many as the model has."""
        return crops.repeat(1, self._in_channels, 1, 1) if crops.shape[1] < self._in_channels else crops


def _processors() -> int:
    """CPUs this process may run on; a worker more would only wait."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _as_is(loaded: Any) -> Any:
    return loaded


def _start_worker(worker: int) -> None:
    """Workers end with their trainer: a Ctrl-C or a cluster's warning signal to the whole group is not for them.

    Of SIGTERM they overlook one, since the loader itself sends another to a worker that will not end.
    A spawned one leaves without the libraries' clean-up, whose threads can abort it, which torch reports as a death.
    """
    for name in ("SIGINT", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _overlook_one)
    atexit.register(os._exit, 0)


def _overlook_one(number: int, frame: FrameType | None) -> None:
    """The next signal of this kind ends the process."""
    signal.signal(number, signal.SIG_DFL)
