"""A shard's tar, member by member, in a way that misses nothing.

Tar readers take a header of zeros for the end of the archive: one lost disk block, and they deliver part of a shard
without an error. Here such a header is told, and the walk goes on where the next member is known to start.
"""

from __future__ import annotations

import os
import tarfile
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from data_curation.shards import BLOCK, OWNER

__all__ = ["Broken", "Member", "blocks", "walk"]

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Member:
    """A member whose header begins at byte `at`. `plain`: a file of the owner, time and mode that shards have."""

    at: int
    name: str
    data: bytes
    plain: bool
    padded: bool  # with zeros, up to the next block


@dataclass(frozen=True)
class Broken:
    """What is wrong with the tar at byte `at`."""

    at: int
    what: str


def blocks(size: int) -> int:
    """Bytes that `size` bytes of data fill in a tar."""
    return -(-size // BLOCK) * BLOCK


def walk(descriptor: int, length: int, starts: Sequence[int]) -> Iterator[Member | Broken]:
    """All members of a tar of `length` bytes, and all that is wrong with it. One member is in memory at a time.

    `starts` are the bytes, ascending, where headers are known to begin; the walk goes on there after a broken one.
    """
    at = 0
    while at + BLOCK <= length:
        header = os.pread(descriptor, BLOCK, at)
        if header.count(0) == BLOCK:
            if _zeros(descriptor, at, length):
                if length - at < 2 * BLOCK:
                    yield Broken(at, "the end of the shard is cut off")
                return
            yield Broken(at, "a header is overwritten by zeros, and plain tar readers stop there without an error")
        else:
            try:
                info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
            except tarfile.HeaderError as error:
                yield Broken(at, f"a header is damaged ({error})")
            else:
                data = os.pread(descriptor, blocks(info.size), at + BLOCK) if info.size >= 0 else b""
                if len(data) < info.size or info.size < 0:
                    end = at + BLOCK + info.size
                    yield Broken(at, f"the shard is cut short: {end:,} bytes needed, {length:,} there")
                    return
                rest = data[info.size :]
                yield Member(at, info.name, data[: info.size], _canonical(info) == header, not any(rest))
                at += BLOCK + blocks(info.size)
                continue
        later = bisect_right(starts, at)
        if later == len(starts):
            return
        at = starts[later]
    yield Broken(at, f"the shard is cut short: it ends after {length:,} bytes without an end mark")


def _zeros(descriptor: int, at: int, length: int) -> bool:
    while at < length:
        data = os.pread(descriptor, _CHUNK, at)
        if not data or data.count(0) != len(data):
            return False
        at += len(data)
    return True


def _canonical(info: tarfile.TarInfo) -> bytes:
    """The header that a shard's writer gives a file of this name and size."""
    wanted = tarfile.TarInfo(info.name)
    wanted.size, wanted.mode, wanted.mtime = info.size, 0o644, 0
    wanted.uname = wanted.gname = OWNER
    try:
        return wanted.tobuf(tarfile.USTAR_FORMAT)
    except ValueError:  # a name that does not fit
        return b""
