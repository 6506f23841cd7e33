"""Which of how many processes this is, and on which device: from the environment that torchrun and our executors set.

The only file of the package that imports torch. One process alone makes no process group.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from launch.run import USER_ERRORS

__all__ = ["WAIT_S", "DeviceError", "World", "agree", "barrier", "from_first", "largest", "rank_zero", "world"]

WAIT_S = 30 * 24 * 3600.0  # for `world`, where ranks wait for those whose share of files takes longer

T = TypeVar("T")


class DeviceError(ValueError):
    """The device asked for is not there."""


@dataclass(frozen=True)
class World:
    """This process: ``rank`` of ``size`` over all machines, ``local_rank`` of ``local_size`` on its own, its device."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    local_size: int = 1


@contextmanager
def world(device: str = "auto", timeout_s: float = 1800.0) -> Iterator[World]:
    """The world this process belongs to, joined for the time of the block and left at its end.

    After an error NCCL's part is not left politely: that waits for ranks which stand in a collective, so that the error
    would be told only when they give up. The process is about to end, which they notice.

    ``device``: "auto" (this rank's GPU, or the CPU where there is none), "cpu", "cuda" (this rank's GPU) or "cuda:1". A
    collective that takes longer than ``timeout_s`` raises. Raises DeviceError where torch does not see the GPU.
    """
    rank, size, local_rank, local_size = _ranks()
    chosen = _device(device, local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if size == 1:
        yield World(rank, size, local_rank, chosen, local_size)
        return
    # gloo beside nccl: flags are agreed on and checkpoints are written without a stop of the GPU's queue.
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    dist.init_process_group(backend, rank=rank, world_size=size, timeout=timedelta(seconds=timeout_s))
    try:
        yield World(rank, size, local_rank, chosen, local_size)
    except BaseException:
        if chosen.type != "cuda":
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def _ranks() -> tuple[int, int, int, int]:
    if "RANK" not in os.environ:
        return 0, 1, 0, 1
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return rank, size, int(os.environ.get("LOCAL_RANK", rank)), int(os.environ.get("LOCAL_WORLD_SIZE", size))


def _device(name: str, local_rank: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DeviceError(f"no such device {name!r}; use auto, cpu, cuda or cuda:N") from None
    if device.type != "cuda":
        return device
    index, count = device.index if device.index is not None else local_rank, torch.cuda.device_count()
    if index >= count:
        raise DeviceError(
            f"device {name} means GPU {index}, torch sees {count}; start fewer processes or use device=cpu"
        )
    return torch.device("cuda", index)


def rank_zero() -> bool:
    """Is this the process that speaks and writes for all?"""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"


def agree(flag: bool) -> bool:
    """Does any rank say true? Every rank must call it. Goes over the CPU, so a busy GPU is not waited for."""
    return bool(largest(int(flag)))


def largest(number: int) -> int:
    """The largest number of all ranks. Every rank must call it; it goes over the CPU."""
    if not (dist.is_available() and dist.is_initialized()):
        return number
    votes = torch.tensor([number], dtype=torch.int32)
    dist.all_reduce(votes, dist.ReduceOp.MAX)
    return int(votes.item())


def barrier() -> None:
    """Wait until every rank is here."""
    agree(False)


def from_first(make: Callable[[], T]) -> T:
    """What rank 0 makes, on every rank; the others wait. Every rank must call it.

    What a user can cause is raised on all of them, so that none is left waiting.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return make()
    told: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            told[0] = make()
        except USER_ERRORS as fault:
            told[1] = fault
    dist.broadcast_object_list(told, device=torch.device("cpu"))
    if told[1] is not None:
        raise told[1]
    made: T = told[0]
    return made
