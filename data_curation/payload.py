"""Voxel bytes out of files: as many as a header promises, never more, whatever the file holds or claims.

A header is believed only as far as the file's size allows: nothing is allocated that its bytes could not fill, a
compressed stream is stopped soon after the promised size, and a file that a header names must lie in its own folder.
"""

from __future__ import annotations

import bz2
import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from data_curation.grid import VolumeError

__all__ = ["MOST_SKIPPED", "after_lines", "beginning", "below", "contents", "gathered", "hexadecimal", "numbers"]

MOST_SKIPPED = 2**26  # bytes between a header and its voxels; what is more is a damaged number
_GZIP = b"\x1f\x8b"
_MOST_RATIO = 1032  # no deflate stream unpacks to more than this many times its size
_SPARE = 1 << 20  # bytes behind the voxels in a compressed stream that are still unpacked, for the checksum's sake
_CHUNK = 1 << 15  # short: of many small members each copies the rest of a chunk
_PIECE = 1 << 20
_MOST_FILES = 100_000
_LONGEST = 64  # characters of one number in a text


def beginning(path: Path, length: int) -> bytes:
    """The first bytes of what a file holds, unpacked where it is gzip. Raises VolumeError: empty, truncated."""
    with path.open("rb", buffering=0) as file:
        raw = file.read(4 * length)
    if not raw:
        raise VolumeError("empty", "the file has 0 bytes: copy or download it again")
    if raw[:2] != _GZIP:
        return bytes(raw[:length])
    try:
        return bytes(zlib.decompressobj(31).decompress(raw, length))
    except zlib.error as error:
        raise VolumeError("truncated", f"the gzip stream is damaged ({error}): download it again") from None


def contents(path: Path, size: int, packing: str = "", start: int = 0, stored: int | None = None) -> NDArray[np.uint8]:
    """The first `size` bytes of what a file holds from byte `start` on, [size]; checksums are proven.

    `packing`: "" (as it is), "gzip", "zlib" or "bzip2"; by the first bytes "auto" is gzip or as it is, and "deflate"
    gzip or zlib. `stored` is the number of compressed bytes; None: up to the end of the file. Raises VolumeError:
    truncated, unreadable.
    """
    there = path.stat().st_size - start
    if there <= 0:
        raise _short(0, size)
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        if packing in ("auto", "deflate"):
            packing = "gzip" if file.read(2) == _GZIP else "zlib" if packing == "deflate" else ""
            file.seek(start)
        if not packing:
            if there < size:
                raise _short(there, size)
            plain = np.empty(size, np.uint8)
            if (got := _read(file, plain)) < size:
                raise _short(got, size)
            return plain
        stored = there if stored is None else stored
        if stored > there:
            raise _short(there, stored, "compressed bytes")
        if packing != "bzip2" and size > _MOST_RATIO * stored:
            text = f"{stored:,} compressed bytes cannot hold the {size:,} that the header promises"
            raise VolumeError("truncated", f"{text}: download it again")
        done = _at_once(file, packing, stored, size)
        if done is not None:
            return done
        file.seek(start)
        return _streamed(file, packing, stored, size)


def _short(there: int, wanted: int, what: str = "bytes of voxels") -> VolumeError:
    share = there / wanted
    text = f"{share:.1%} of the {wanted:,} {what} that the header promises are there: download it again"
    return VolumeError("truncated", text)


def _read(file: Any, target: NDArray[np.uint8]) -> int:
    """Fills `target`; the number of bytes that were there. Not mapped: a file cut meanwhile would end the process."""
    view = target.data
    got = 0
    while got < len(view) and (count := file.readinto(view[got:])):
        got += count
    return got


def _at_once(file: Any, packing: str, stored: int, size: int) -> NDArray[np.uint8] | None:
    """libdeflate's one call where the size is known; None where the stream has to tell more.

    Into an array: NumPy asks for huge pages, which makes a fresh volume a fifth cheaper than bytes would be.
    """
    if packing == "bzip2" or stored > size + size // 64 + _SPARE:
        return None
    raw = np.empty(stored, np.uint8)
    if _read(file, raw) < stored:
        return None
    if packing == "gzip" and int.from_bytes(raw[-4:].tobytes(), "little") != size % 2**32:
        return None  # several members, padding, or more than was promised
    import imagecodecs

    decode: Any = imagecodecs.gzip_decode if packing == "gzip" else imagecodecs.deflate_decode
    target = np.empty(size, np.uint8)
    try:
        return target if len(decode(raw, out=target)) == size else None
    except (RuntimeError, ValueError):
        return None


def _streamed(file: Any, packing: str, stored: int, size: int) -> NDArray[np.uint8]:
    """Piece by piece, in memory that grows with what is really there."""
    whole = bytearray()
    extra = 0
    for piece in _pieces(file, packing, stored):
        room = size - len(whole)
        whole += piece[:room] if len(piece) > room else piece
        extra += max(0, len(piece) - room)
        if extra > _SPARE:
            text = f"the {packing} stream holds more than the {size:,} bytes that the header promises"
            raise VolumeError("unreadable", f"{text}: the header is damaged, download it again")
    if len(whole) < size:
        raise _short(len(whole), size)
    return np.frombuffer(whole, np.uint8)


def _pieces(file: Any, packing: str, stored: int) -> Iterator[bytes]:
    """Unpacked pieces, member by member, of at most `_PIECE` bytes; zeros behind a member are padding."""
    waiting = b""
    unpacker: Any = None
    hungry, members, left = True, 0, stored
    while waiting or not hungry or left > 0:
        if not waiting and hungry:
            waiting = file.read(min(_CHUNK, left))
            left = left - len(waiting) if waiting else 0
        if unpacker is None:
            waiting = waiting.lstrip(b"\0") if members else waiting
            if not waiting:
                continue
            if members and packing == "zlib":
                return  # has one member
            unpacker = bz2.BZ2Decompressor() if packing == "bzip2" else zlib.decompressobj(_BITS[packing])
        try:
            yield unpacker.decompress(waiting, _PIECE)
        except (zlib.error, OSError, ValueError) as error:
            text = f"the {packing} stream of {stored:,} bytes is cut short or damaged ({error}): download it again"
            raise VolumeError("truncated", text) from None
        hungry = unpacker.needs_input if packing == "bzip2" and not unpacker.eof else True
        waiting = unpacker.unused_data if unpacker.eof else b"" if packing == "bzip2" else unpacker.unconsumed_tail
        if unpacker.eof:
            members, unpacker = members + 1, None
    if unpacker is not None or not members:
        text = f"the {packing} stream of {stored:,} bytes is cut short (no end of the stream): download it again"
        raise VolumeError("truncated", text)


_BITS = {"gzip": 31, "zlib": 15}


def below(header: Path, names: Iterable[str]) -> tuple[Path, ...]:
    """The files that a header names, which must be files in the header's folder or below. Raises unreadable."""
    listed = list(itertools.islice(names, _MOST_FILES + 1))
    if not 0 < len(listed) <= _MOST_FILES:
        text = f"its header names no files of voxels, or more than {_MOST_FILES:,}: copy it again"
        raise VolumeError("unreadable", text)
    return tuple(_below(header, name) for name in listed)


def _below(header: Path, name: str) -> Path:
    parts = name.replace("\\", "/").split("/")
    shown = name[:80] or "none"
    if not name or "\0" in name or max(map(len, parts)) > 255 or len(name) > 1024:
        raise VolumeError(
            "unreadable", f"the voxels that its header names ({shown}) are missing: copy both files again"
        )
    if not parts[0] or ".." in parts or ":" in parts[0]:
        text = f"its header takes the voxels from {shown}, outside its own folder, which is not followed"
        raise VolumeError("unreadable", f"{text}: copy them beside it and name them without a path")
    path = header.parent.joinpath(*parts)
    if not path.is_file():
        raise VolumeError(
            "unreadable", f"the voxels that its header names ({shown}) are missing: copy both files again"
        )
    return path


def gathered(paths: Sequence[Path], size: int, read: Callable[[Path, int], NDArray[Any]]) -> NDArray[Any]:
    """`size` bytes, or numbers, in equal parts from `paths`, one behind the other: bytes, unless it is one file.

    Raises unreadable where they do not divide.
    """
    if len(paths) == 1:
        return read(paths[0], size)
    if size % len(paths):
        raise VolumeError("unreadable", f"the voxels do not divide among the {len(paths):,} files that are named")
    whole = bytearray()
    for path in paths:
        whole += read(path, size // len(paths)).data
    return np.frombuffer(whole, np.uint8)


def after_lines(path: Path, start: int, count: int) -> int:
    """The byte behind `count` more lines. Raises truncated."""
    with path.open("rb") as file:
        file.seek(start)
        while count > 0:
            part = file.readline(_PIECE)
            if not part:
                raise VolumeError("truncated", f"the file ends {count:,} lines before its voxels: download it again")
            count -= part.endswith(b"\n")
        return file.tell()


def hexadecimal(path: Path, size: int, start: int = 0) -> NDArray[np.uint8]:
    """`size` bytes written as pairs of hexadecimal digits with white space anywhere. Raises truncated, unreadable."""
    if (there := path.stat().st_size - start) < 2 * size:
        raise _short(max(there, 0) // 2, size)
    whole = bytearray()
    odd = b""
    with path.open("rb") as file:
        file.seek(start)
        while len(whole) < size and (chunk := file.read(_PIECE)):
            digits = odd + chunk.translate(None, b" \t\r\n\v\f")
            even = len(digits) // 2 * 2
            odd = digits[even:]
            try:
                whole += bytes.fromhex(digits[:even].decode("ascii"))
            except ValueError:
                raise VolumeError("unreadable", "the voxels are not hexadecimal digits: download it again") from None
    if len(whole) < size:
        raise _short(len(whole), size)
    return np.frombuffer(whole, np.uint8, size)


def numbers(path: Path, count: int, dtype: np.dtype[Any], start: int = 0) -> NDArray[Any]:
    """`count` numbers written as text, between white space or commas, [count]. Raises truncated, unreadable."""
    if (there := path.stat().st_size - start + 1) < 2 * count:
        raise _short(max(there, 0) // 2, count, "voxels")
    values = np.empty(count, dtype.newbyteorder("="))
    filled = 0
    with path.open("rb") as file:
        file.seek(start)
        for tokens in _tokens(file):
            taken = tokens[: count - filled]
            values[filled : filled + len(taken)] = _parsed(taken, values.dtype)
            filled += len(taken)
            if filled == count:
                return values
    raise _short(filled, count, "voxels")


def _tokens(file: BinaryIO) -> Iterator[list[bytes]]:
    rest = b""
    while True:
        chunk = file.read(_PIECE)
        tokens = (rest + chunk).replace(b",", b" ").split()
        open_ended = bool(chunk) and not chunk[-1:].isspace() and chunk[-1:] != b","
        rest = tokens.pop() if open_ended and tokens else b""
        if max(map(len, [*tokens, rest])) > _LONGEST:
            raise VolumeError("unreadable", "the voxels are not numbers in text: download it again")
        if tokens:
            yield tokens
        if not chunk:
            return


def _parsed(tokens: list[bytes], dtype: np.dtype[Any]) -> NDArray[Any]:
    try:
        values = np.array(tokens).astype(np.float64)
    except ValueError as error:
        raise VolumeError("unreadable", f"the voxels are not numbers in text ({error}): download it again") from None
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        fits = (values >= limits.min) & (values <= limits.max) & (values == np.rint(values))
        if not fits.all():
            worst = tokens[int(np.argmin(fits))].decode("ascii", "replace")
            raise VolumeError("unreadable", f"the voxel {worst} is no {dtype.name}, as the header says: correct it")
    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(dtype)
