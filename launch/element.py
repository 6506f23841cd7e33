"""One job of an array of `launch.array`: works off its share of the tasks and writes every result as it comes."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from launch.crew import Workers

__all__ = ["Element", "Record", "read_records"]

Record = tuple[str, Any]  # begun: host; result: (number, result); raised: exception; ended: None

FRAME = struct.Struct("<QI")  # length and CRC32 of the pickle that follows
SYNC_S = 5.0


@dataclass(frozen=True)
class Element:
    """What submitit pickles and calls: ``tasks`` with their numbers and names; ``file`` must not exist yet."""

    function: Callable[[Any], Any]
    tasks: tuple[tuple[int, str, Any], ...]
    workers: Workers
    file: Path

    def __call__(self) -> None:
        # Cancelled or out of time: what is not written by then is done elsewhere, so there is nothing to save. The
        # warning before that is left alone: the time until the end is for the tasks in work.
        signal.signal(signal.SIGTERM, lambda *_: os._exit(128 + signal.SIGTERM))
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        with self.file.open("xb", buffering=0) as file:
            synced = _put(file, ("begun", socket.gethostname()), 0.0)
            try:
                with self.workers.open() as each:
                    for (number, _, _), result in each(_Unpacked(self.function), self.tasks, lambda task: task[1]):
                        synced = _put(file, ("result", (number, result)), synced)
                        if not self.file.exists():
                            return  # the command that waited for it is gone, and a later one has cleaned up
            except Exception as error:  # it is raised where the command waits
                _put(file, ("raised", error), 0.0)
            else:
                _put(file, ("ended", None), 0.0)


@dataclass(frozen=True)
class _Unpacked:
    function: Callable[[Any], Any]

    def __call__(self, task: tuple[int, str, Any]) -> Any:
        return self.function(task[2])


def _put(file: BinaryIO, record: Record, synced: float) -> float:
    """Append the record; when the file was last forced to the disk, which is also when other machines see it."""
    packed = pickle.dumps(record)
    data = FRAME.pack(len(packed), zlib.crc32(packed)) + packed
    while data:
        data = data[file.write(data) :]
    now = time.monotonic()
    if now - synced < SYNC_S:
        return synced
    os.fsync(file.fileno())
    return now


def read_records(file: Path, offset: int) -> Iterator[tuple[Record, int]]:
    """The whole records from ``offset`` on, each with the offset behind it; none while there is no file."""
    try:
        with file.open("rb") as opened:
            opened.seek(offset)
            while len(head := opened.read(FRAME.size)) == FRAME.size:
                length, checksum = FRAME.unpack(head)
                packed = opened.read(length)
                if not packed or len(packed) < length or zlib.crc32(packed) != checksum:
                    return
                offset += FRAME.size + length
                yield pickle.loads(packed), offset
    except FileNotFoundError:
        return
