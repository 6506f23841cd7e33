"""Files that appear whole or not at all: written aside in the same folder, flushed to the disk, renamed."""

from __future__ import annotations

import glob
import io
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

__all__ = ["aside", "link_or_copy", "sweep", "sync", "write_parquet"]

_ASIDE = ".part"
_DAY_S = 86400.0  # nobody writes one file that long


@contextmanager
def aside(path: Path, lasting: bool = True) -> Iterator[IO[bytes]]:
    """A file that becomes `path` if the block ends without an error: readers never see half of it, kill -9 or not.

    One that is not `lasting` may be lost or damaged if the machine itself fails: for what is proven before it is used
    and can be made again. An OSError (disk full, no permission, quota) names the file and what to do.
    """
    part = _part(path)
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            if lasting:
                os.fsync(file.fileno())
        os.replace(part, path)
        if lasting:
            sync(path.parent)
    except OSError as error:
        part.unlink(missing_ok=True)
        text = f"{error.strerror or error}; make room or allow writing, then run the same command again to go on"
        raise OSError(error.errno, text, str(path)) from error
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def link_or_copy(source: Path, target: Path) -> bool:
    """A file under another name too: as a hard link, or as a copy where there can be none. Was it a link?"""
    part = _part(target)
    try:
        os.link(source.resolve(), part)
        os.replace(part, target)
        return True
    except OSError:  # another file system, or one without links
        pass
    finally:
        part.unlink(missing_ok=True)  # left by a replacement of a file by itself
    with source.open("rb") as file, aside(target) as out:
        shutil.copyfileobj(file, out, 1 << 20)
    return False


def sync(path: Path) -> None:
    """Brings a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep(folder: Path, name: str = "", shared: bool = False) -> list[Path]:
    """Removes what a killed process left aside, of one file or of all. What may still be written stays and is returned.

    Where the folder is `shared`, by processes of any machine, only what has certainly been left is taken away: by a
    process of this machine that is gone, or a day ago. Else nobody but the caller writes there, and nothing stays.
    """
    parts = list(folder.glob(f".{glob.escape(name)}*{_ASIDE}"))
    kept = [part for part in parts if shared and _written(part)]
    for part in set(parts) - set(kept):
        part.unlink(missing_ok=True)
    return kept


def _part(path: Path) -> Path:
    """Where this process writes `path`: two machines may write into one folder under one number of a process."""
    return path.with_name(f".{path.name}.{_host()}.{os.getpid()}{_ASIDE}")


def _host() -> str:
    return socket.gethostname().partition(".")[0]


def _written(part: Path) -> bool:
    """May a process still be at it?"""
    host, pid = part.name.removesuffix(_ASIDE).split(".")[-2:]
    try:
        if host == _host() and pid.isdigit():
            os.kill(int(pid), 0)
        return time.time() - part.stat().st_mtime < _DAY_S
    except (ProcessLookupError, OverflowError, FileNotFoundError):
        return False
    except PermissionError:  # another user's process lives
        return True


def write_parquet(path: Path, table: pa.Table, lasting: bool = True) -> None:
    """The table at `path`, whole or not at all; equal tables give equal bytes."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    with aside(path, lasting) as file:
        file.write(buffer.getbuffer())
