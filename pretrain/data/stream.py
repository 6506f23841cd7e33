"""An endless, resumable stream of batches from a corpus.

The whole state is one number. Step s reads the samples s*batch_size ... of a global order that (seed, epoch) fixes,
and everything drawn for a sample or a step is keyed by its number, so any step can be made again on its own: by any
number of workers, after a restart, or on another number of ranks.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data_curation.corpus import Corpus, CorpusError
from launch.settings import Settings
from pretrain.data.batch import Batch, sample_order
from pretrain.data.crops import CropDraws, Crops, CropSettings, CropShape, HuWindow, crop_batch, crop_slice, draw_crops
from pretrain.data.masks import MaskSettings, draw_masks

__all__ = ["Batches", "DataSettings", "Slices", "StreamError", "WorldLike", "batches", "check"]

LOG = logging.getLogger(__name__)


class StreamError(ValueError):
    """The corpus or the settings cannot give the batches that were asked for."""


class WorldLike(Protocol):
    """What the stream needs of `launch.distributed.World`."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def device(self) -> torch.device: ...


class Slices(Protocol):
    """What the stream needs of `data_curation.corpus.Corpus`."""

    def __len__(self) -> int: ...
    def hu(self, i: int, /) -> NDArray[np.int16]: ...
    def key(self, i: int, /) -> str: ...


class DataSettings(Settings):
    """Which slices a run sees, in which order, and what it makes of them."""

    corpus: Path = Field(description="folder that `axial curate` wrote")
    split: str | None = Field("train", description="split of the corpus to read; null: all of it")
    batch_size: int = Field(gt=0, description="slices a step over all ranks; the number of ranks must divide it")
    seed: int = Field(0, ge=0, description="of the order, the crops, the masks and the mix of sizes")
    workers: int = Field(
        4, ge=0, description="reading processes of a rank, at most one a CPU; 0: read in the training process"
    )
    prefetch: int = Field(
        2,
        gt=0,
        description="batches that each worker holds ready in shared memory; 0.5 to 1 MB a slice where crops are made "
        "on the device, else the size of its crops",
    )
    start_method: Literal["fork", "spawn", "forkserver"] | None = Field(
        None, description="how workers are started; null: the platform's default"
    )
    crop_on: Literal["auto", "workers", "device"] = Field(
        "auto", description="where crops are made; auto: on the device when it is a GPU, else in the workers"
    )
    max_unreadable: int = Field(
        16, ge=0, description="unreadable slices in a row that are replaced before the run stops"
    )
    crops: CropSettings = Field(CropSettings(), description="the crops of a slice")
    masks: MaskSettings = Field(MaskSettings(), description="the masks of the student's global crops")
    window: HuWindow = Field(HuWindow(), description="HU window and normalisation")


def batches(
    settings: DataSettings,
    *,
    world: WorldLike,
    patch_size: int,
    in_channels: int,
    start: int,
    corpus: Slices | None = None,
) -> Batches:
    """This rank's batches, without end; element k is that of step start + k and lies on the rank's device.

    `corpus` replaces the one that the settings name. With another world size the global order goes on where it was; the
    masks are the same too when `masks.group` is set. A corpus smaller than a batch repeats slices within the batch.

    Raises StreamError for settings that do not fit each other, the world or the corpus.
    """
    check(settings, world.size, patch_size)
    if in_channels not in (1, 3):
        raise StreamError(f"in_channels: {in_channels}; a slice has one channel, which can be repeated to 3")
    slices = Corpus(settings.corpus, settings.split, mapped=False) if corpus is None else corpus
    if not len(slices):
        raise StreamError(f"data.corpus: {settings.corpus} has no slice in split {settings.split!r}")
    if len(slices) < settings.batch_size and world.rank == 0:
        LOG.warning(
            "%s has %d slices, fewer than the %d of a batch: batches repeat slices (other crops of them)",
            settings.corpus,
            len(slices),
            settings.batch_size,
        )
    return Batches(settings, slices, world, patch_size, in_channels, start)


def check(settings: DataSettings, ranks: int, patch_size: int) -> None:
    """Refuses settings that cannot work on this many ranks or with this patch size; reads nothing."""
    if settings.batch_size % ranks:
        near = max(1, settings.batch_size // ranks) * ranks
        raise StreamError(f"data.batch_size: {settings.batch_size} cannot be divided over {ranks} ranks; {near} can")
    images = settings.batch_size // ranks
    if settings.masks.group and images % settings.masks.group:
        raise StreamError(
            f"data.masks.group: {settings.masks.group} does not divide the {images} images of a rank "
            f"(batch_size {settings.batch_size} over {ranks} ranks)"
        )
    try:
        settings.crops.check_patches(patch_size)
    except ValueError as error:
        raise StreamError(f"data.{error}") from None


@dataclass(frozen=True)
class _Fault:
    """A slice that could not be read, and its shard: what a CorpusError's text says before the sample's name."""

    shard: str
    text: str


@dataclass(frozen=True)
class _Loaded:
    """What a worker makes of a step: a batch with its crops, or without them and the slices to crop on the device."""

    batch: Batch
    shape: CropShape
    faults: tuple[_Fault, ...]
    hu: Tensor | None = None  # int16 [B, Y, X], padded at the bottom and right
    draws: CropDraws | None = None

    def pin_memory(self) -> _Loaded:
        return self._each(Tensor.pin_memory)

    def to(self, device: torch.device, non_blocking: bool) -> _Loaded:
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def _each(self, move: Callable[[Tensor], Tensor]) -> _Loaded:
        batch = self.batch.each(move)
        if self.hu is None or self.draws is None:
            return replace(self, batch=batch)
        return replace(self, batch=batch, hu=move(self.hu), draws=CropDraws(*map(move, self.draws.tensors())))


class _Steps(Dataset[Any]):
    """Step -> what this rank loads for it, or the StreamError that stops the run; picklable, opens nothing itself."""

    def __init__(
        self, settings: DataSettings, slices: Slices, rank: int, ranks: int, patch_size: int, device: bool
    ) -> None:
        self.settings, self.slices, self.rank, self.patch_size = settings, slices, rank, patch_size
        self.images, self.on_device = settings.batch_size // ranks, device

    def __getitem__(self, step: int) -> _Loaded | StreamError:
        settings, first = self.settings, step * self.settings.batch_size + self.rank * self.images
        shape = settings.crops.shape_at(settings.seed, step)
        candidates = np.arange(first, first + self.images + settings.max_unreadable)
        order = sample_order(candidates, len(self.slices), settings.seed)
        faults: list[_Fault] = []
        slices, keys, draws, crops = [], [], [], []
        try:
            for i in range(self.images):
                hu, key = self._read(order[i : i + settings.max_unreadable + 1].tolist(), faults)
                keys.append(key)
                draws.append(draw_crops(settings.crops, *hu.shape, seed=settings.seed, sample=first + i))
                if self.on_device:
                    slices.append(hu)
                else:
                    crops.append(crop_slice(hu, draws[-1], settings.crops, shape, settings.window))
        except StreamError as error:
            return error
        grid = shape.global_size // self.patch_size
        masks = draw_masks(settings.masks, (grid, grid), self.images, seed=settings.seed, step=step, rank=self.rank)
        made = _gather(crops) if crops else Crops(torch.empty(0), torch.empty(0), None)
        replaced = tuple(fault.text for fault in faults)
        batch = Batch(*made.tensors(), masks.masks, masks.indices, masks.weights, tuple(keys), replaced)
        if not self.on_device:
            return _Loaded(batch, shape, tuple(faults))
        return _Loaded(batch, shape, tuple(faults), _pad(slices), CropDraws.stack(draws))

    def _read(self, candidates: list[int], faults: list[_Fault]) -> tuple[NDArray[np.int16], str]:
        """The first slice of these that can be read: the sample's own, or one of those that follow it in the order."""
        for index in candidates:
            try:
                return self.slices.hu(index), self.slices.key(index)
            except CorpusError as error:
                faults.append(_Fault(str(error).partition(", sample ")[0], str(error)))
        raise StreamError(
            f"{len(candidates)} slices in a row cannot be read; the last one: {faults[-1].text}. "
            f"Run `axial curate` on {self.settings.corpus} again, or raise data.max_unreadable"
        )


def _gather(crops: list[Crops]) -> Crops:
    """The crops of slices as those of a batch: crop 0 of all, then crop 1 of all, and so on."""
    gram = [crop.gram for crop in crops if crop.gram is not None]
    return Crops(
        torch.stack([crop.globals_ for crop in crops], 1).flatten(0, 1),
        torch.stack([crop.locals_ for crop in crops], 1).flatten(0, 1),
        torch.stack(gram, 1).flatten(0, 1) if gram else None,
    )


def _pad(slices: list[NDArray[np.int16]]) -> Tensor:
    """Slices of any sizes as one [B, Y, X]; what is added is never looked at."""
    padded = np.zeros((len(slices), max(s.shape[0] for s in slices), max(s.shape[1] for s in slices)), np.int16)
    for out, hu in zip(padded, slices, strict=True):
        out[: hu.shape[0], : hu.shape[1]] = hu
    return torch.from_numpy(padded)


class Batches(Iterator[Batch]):
    """The iterator that `batches` returns. `unreadable` counts, by shard, the slices that had to be replaced."""

    def __init__(
        self, settings: DataSettings, slices: Slices, world: WorldLike, patch_size: int, in_channels: int, start: int
    ) -> None:
        self.unreadable: Counter[str] = Counter()
        self._settings, self._device, self._in_channels = settings, world.device, in_channels
        cuda = world.device.type == "cuda"
        on_device = settings.crop_on == "device" or (settings.crop_on == "auto" and cuda)
        workers = min(settings.workers, _processors())
        loader: DataLoader[Any] = DataLoader(
            _Steps(settings, slices, world.rank, world.size, patch_size, on_device),
            batch_size=None,
            sampler=count(start),
            collate_fn=_as_is,
            num_workers=workers,
            prefetch_factor=settings.prefetch if workers else None,
            multiprocessing_context=settings.start_method if workers else None,
            worker_init_fn=_start_worker if workers else None,
            pin_memory=cuda,
            generator=torch.Generator(),  # torch's own is not touched
        )
        self._loaded: Iterator[Any] = iter(loader)
        self._side = torch.cuda.Stream(world.device) if cuda else None  # type: ignore[no-untyped-call]
        self._ahead: Batch | None = None
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
        """Ends the workers; the iterator is of no use afterwards."""
        atexit.unregister(self.close)
        self._ahead = None
        # torch does so once its iterator is dropped, but the traceback of a worker's error holds that.
        getattr(self._loaded, "_shutdown_workers", tuple)()
        self._loaded = iter(())

    def _make_aside(self, side: torch.cuda.Stream) -> Batch:
        """The next batch, copied and cropped on a stream of its own while the trainer computes."""
        with torch.cuda.stream(side):
            return self._make()

    def _make(self) -> Batch:
        try:
            loaded = next(self._loaded)
        except RuntimeError as error:  # torch's word for a worker that is gone
            if "DataLoader worker (pid" not in str(error):
                raise  # raised by a worker, which lives
            raise StreamError(
                f"a reading process died ({str(error).splitlines()[0]}): most likely memory or /dev/shm ran out; "
                f"lower data.workers={self._settings.workers} or data.prefetch={self._settings.prefetch}"
            ) from error
        if isinstance(loaded, StreamError):
            raise loaded
        for fault in loaded.faults:
            if fault.shard not in self.unreadable:
                LOG.warning("%s; replaced by the next slice (said once a shard)", fault.text)
            self.unreadable[fault.shard] += 1
        loaded = loaded.to(self._device, non_blocking=True)
        batch: Batch = loaded.batch
        crops = Crops(batch.global_crops, batch.local_crops, batch.gram_crops)
        if loaded.hu is not None:
            crops = crop_batch(loaded.hu, loaded.draws, self._settings.crops, loaded.shape, self._settings.window)
        gram = None if crops.gram is None else self._channels(crops.gram)
        return replace(
            batch,
            global_crops=self._channels(crops.globals_),
            local_crops=self._channels(crops.locals_),
            gram_crops=gram,
        )

    def _channels(self, crops: Tensor) -> Tensor:
        """[N, S, S] -> [N, C, S, S], the one channel repeated."""
        return crops[:, None].repeat(1, self._in_channels, 1, 1) if self._in_channels > 1 else crops[:, None]


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
