"""DICOM pixels: where they lie in a file, and how each transfer syntax becomes whole numbers, by imagecodecs."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import SEEK_END, BytesIO
from types import MappingProxyType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

__all__ = ["LOSSY", "Pixels", "Unsupported", "frames", "locate"]

_PIXEL_DATA, _ITEM, _DELIMITER = (0x7FE0, 0x0010), (0xFFFE, 0xE000), (0xFFFE, 0xE0DD)
_FLOATS = ((0x7FE0, 0x0008), (0x7FE0, 0x0009))
_UNDEFINED = 0xFFFFFFFF
_NATIVE = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2", "1.2.840.113619.5.2")
_DEFLATED = "1.2.840.10008.1.2.1.99"
_RLE = "1.2.840.10008.1.2.5"
_JPEG, _SOF3, _JPEGLS, _JPEG2K = "jpeg8", "jpegsof3", "jpegls", "jpeg2k"  # functions X_decode of imagecodecs
_CODECS: Mapping[str, str] = MappingProxyType(
    {
        "1.2.840.10008.1.2.4.50": _JPEG,  # baseline
        "1.2.840.10008.1.2.4.51": _JPEG,  # extended, 12 bits
        "1.2.840.10008.1.2.4.57": _SOF3,  # lossless, any predictor
        "1.2.840.10008.1.2.4.70": _SOF3,  # lossless, first predictor
        "1.2.840.10008.1.2.4.80": _JPEGLS,
        "1.2.840.10008.1.2.4.81": _JPEGLS,  # near-lossless
        "1.2.840.10008.1.2.4.90": _JPEG2K,
        "1.2.840.10008.1.2.4.91": _JPEG2K,
        "1.2.840.10008.1.2.4.201": _JPEG2K,  # HTJ2K by OpenJPEG: OpenJPH does not end on some damaged streams
        "1.2.840.10008.1.2.4.202": _JPEG2K,
        "1.2.840.10008.1.2.4.203": _JPEG2K,
    }
)
_FRAMES = (0xC0, 0xC1, 0xC3, 0xF7)  # markers of JPEG baseline, extended, lossless, and JPEG-LS
_MOST_TILES = 4096
LOSSY = ("1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51", "1.2.840.10008.1.2.4.81")


class Unsupported(ValueError):
    """Pixels stored in a way that is not read here."""


@dataclass(frozen=True)
class Pixels:
    """Where the pixels of a file lie, and what their numbers are. `length` is None where they are in fragments."""

    file: BinaryIO
    start: int
    length: int | None
    syntax: str
    order: str  # "<" or ">"
    rows: int
    columns: int
    frames: int
    allocated: int
    stored: int
    high: int
    signed: bool

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the stored words."""
        return np.dtype(f"{self.order}{'i' if self.signed else 'u'}{self.allocated // 8}")

    def number(self, text: str) -> int:
        """A stored number from the header, where its sign is often lost."""
        value = int(text) & ((1 << self.allocated) - 1)
        return value - (1 << self.allocated) if self.signed and value >> (self.allocated - 1) else value


def locate(file: BinaryIO, data: Any, texts: Mapping[str, str]) -> Pixels:
    """The pixels of `data` with the values `texts`, whose file stands at them. No pixel is read.

    Raises Unsupported for a syntax or a word that is not read, EOFError for a file that is cut short, ValueError and
    KeyError for headers that make no sense.
    """
    meta = getattr(data, "file_meta", {})
    syntax = str(meta.get("TransferSyntaxUID", "") or _NATIVE[0])
    implicit, little = data.original_encoding
    if syntax not in (*_NATIVE, _DEFLATED, _RLE, *_CODECS):
        from pydicom.uid import UID

        raise Unsupported(
            f"pixels stored as {UID(syntax).name or syntax}, which is not read: convert the files to a lossless syntax"
        )
    if syntax == _DEFLATED:
        file = _inflated(file)
        start, length = 0, file.getbuffer().nbytes
    else:
        start, length = _element(file, bool(implicit), "<" if little else ">")
    allocated = int(texts["BitsAllocated"])
    if allocated not in (8, 16, 32):
        raise Unsupported(f"pixels of {allocated} bits, which are not read: convert the files to 16 bits")
    stored = int(texts.get("BitsStored") or allocated)
    high = texts.get("HighBit")
    found = Pixels(
        file,
        start,
        None if length == _UNDEFINED else length,
        syntax,
        "<" if little else ">",
        int(texts["Rows"]),
        int(texts["Columns"]),
        max(1, int(texts.get("NumberOfFrames") or 1)),
        allocated,
        stored,
        int(high) if high else stored - 1,
        texts.get("PixelRepresentation") == "1",
    )
    if not (found.rows > 0 and found.columns > 0 and 0 < stored <= found.high + 1 <= allocated):
        raise ValueError("sizes or bits that make no sense")
    _whole(found)
    return found


def _element(file: BinaryIO, implicit: bool, order: str) -> tuple[int, int]:
    """Start and length of the pixel data, whose tag comes next."""
    at = file.tell()
    head = file.read(12)
    if len(head) < 12:
        raise EOFError("no pixels")
    tag = struct.unpack_from(order + "HH", head)
    if tag in _FLOATS:
        raise Unsupported("pixels stored as floating-point numbers, which are not read: convert the files to 16 bits")
    if tag != _PIXEL_DATA:
        raise EOFError("no pixels")
    if implicit:
        return at + 8, struct.unpack_from(order + "I", head, 4)[0]
    return at + 12, struct.unpack_from(order + "I", head, 8)[0]


def _inflated(file: BinaryIO) -> BytesIO:
    """The pixels of a file that is deflated as a whole."""
    from pydicom import dcmread

    file.seek(0)
    data = dcmread(file, specific_tags=["PixelData"])
    if "PixelData" not in data:
        raise EOFError("no pixels")
    return BytesIO(data.PixelData)


def _whole(pixels: Pixels) -> None:
    """Raises EOFError where the file ends before its pixels do."""
    end = pixels.file.seek(0, SEEK_END)
    if pixels.length is None:
        for start, length in _fragments(pixels):
            if start + length > end:
                raise EOFError("the last fragment is cut short")
    elif pixels.start + max(pixels.length, _size(pixels) * pixels.frames) > end:
        raise EOFError("the pixels are cut short")


def _size(pixels: Pixels) -> int:
    """Bytes of a frame that is not compressed."""
    return pixels.rows * pixels.columns * pixels.allocated // 8 if pixels.length is not None else 0


def _fragments(pixels: Pixels) -> Iterator[tuple[int, int]]:
    """Start and length of each fragment, the table of offsets first."""
    at = pixels.start
    while True:
        pixels.file.seek(at)
        head = pixels.file.read(8)
        if len(head) < 8:
            return  # some writers leave the delimiter out
        group, element, length = struct.unpack("<HHI", head)
        if (group, element) == _DELIMITER:
            return
        if (group, element) != _ITEM or length == _UNDEFINED:
            raise EOFError("fragments that are none")
        yield at + 8, length
        at += 8 + length


def frames(pixels: Pixels, data: Any, wanted: Sequence[int]) -> Iterator[NDArray[Any]]:
    """The stored numbers [rows, columns] of each wanted frame, signed as the header says; to be used one by one.

    Raises EOFError, ValueError or RuntimeError for damaged pixels.
    """
    if pixels.length is not None and pixels.syntax not in (_RLE, *_CODECS):
        yield from (_native(pixels, index) for index in wanted)
        return
    from pydicom.encaps import generate_frames

    pixels.file.seek(pixels.start)
    raw = pixels.file.read()
    table = None
    if "ExtendedOffsetTable" in data and "ExtendedOffsetTableLengths" in data:
        table = (data.ExtendedOffsetTable, data.ExtendedOffsetTableLengths)
    parts = list(generate_frames(raw, number_of_frames=pixels.frames, extended_offsets=table))
    if len(parts) != pixels.frames:
        raise EOFError(f"{len(parts)} of {pixels.frames} frames are there")
    for index in wanted:
        yield _signed(_decoded(parts[index], pixels), pixels, pixels.stored - 1)


def _native(pixels: Pixels, index: int) -> NDArray[Any]:
    found = np.empty((pixels.rows, pixels.columns), pixels.dtype)
    pixels.file.seek(pixels.start + index * found.nbytes)
    if pixels.file.readinto(found.view(np.uint8).reshape(-1)) != found.nbytes:  # type: ignore[attr-defined]
        raise EOFError("the pixels are cut short")
    return _signed(found.astype(found.dtype.newbyteorder("="), copy=False), pixels, pixels.high)


def _decoded(part: bytes, pixels: Pixels) -> NDArray[Any]:
    import imagecodecs

    if pixels.syntax == _RLE:
        return _run_lengths(part, pixels)
    codec = _CODECS[pixels.syntax]
    wanted = (pixels.rows, pixels.columns)
    # A damaged size would have a decoder fill gigabytes; one that is asked for the right size cannot.
    if (_jpeg2k_size(part) if codec == _JPEG2K else _jpeg_size(part)) != wanted:
        raise ValueError("an image of another size, or none")
    if codec in (_JPEG, _JPEGLS) and b"\xff\xd9" not in part[-16:]:
        raise EOFError("no end of the image")  # libjpeg makes up what is missing, CharLS may look for it for ever
    found: NDArray[Any] = getattr(imagecodecs, f"{codec}_decode")(part)
    if found.shape != wanted or found.dtype.kind not in "iu":
        raise ValueError(f"{found.dtype} {found.shape} instead of {wanted} pixels")
    return found


def _run_lengths(part: bytes, pixels: Pixels) -> NDArray[Any]:
    """DICOM's RLE: a table of offsets, then each byte of the words by itself, the highest first, as PackBits."""
    import imagecodecs

    count, *offsets = struct.unpack_from("<16I", part)
    width, size = pixels.allocated // 8, pixels.rows * pixels.columns
    if count != width:
        raise ValueError(f"{count} segments for {width} bytes a pixel")
    ends = [*offsets[1:count], len(part)]
    planes = np.empty((size, width), np.uint8)
    for index, (start, end) in enumerate(zip(offsets, ends, strict=False)):
        plane = np.frombuffer(imagecodecs.packbits_decode(part[start:end]), np.uint8)
        if not 0 <= plane.size - size <= 1:  # an odd number of bytes is padded
            raise EOFError("a segment is cut short")
        planes[:, width - 1 - index] = plane[:size]
    found: NDArray[Any] = planes.view(np.dtype(f"<u{width}")).reshape(pixels.rows, pixels.columns)
    return found


def _jpeg_size(part: bytes) -> tuple[int, int]:
    """Rows and columns that a JPEG or JPEG-LS stream of one component states; (0, 0) where it states none."""
    at = 2
    while part[at : at + 1] == b"\xff" and at + 12 < len(part):
        marker, length = part[at + 1], int.from_bytes(part[at + 2 : at + 4], "big")
        if marker == 0xFF:  # a fill byte
            at += 1
        elif marker in _FRAMES:
            rows, columns, components = struct.unpack_from(">HHB", part, at + 5)
            return (rows, columns) if components == 1 else (0, 0)
        else:
            at += 2 + length
    return 0, 0


def _jpeg2k_size(part: bytes) -> tuple[int, int]:
    """The same of a JPEG 2000 codestream, in a file of its own or bare; tiles are few."""
    at = part.find(b"\xff\x4f\xff\x51")
    if at < 0 or len(part) < at + 44:
        return 0, 0
    right, bottom, left, top, tile_width, tile_height = struct.unpack_from(">6I", part, at + 8)
    rows, columns, components = bottom - top, right - left, struct.unpack_from(">H", part, at + 40)[0]
    tiles = (columns / max(tile_width, 1)) * (rows / max(tile_height, 1))
    return (rows, columns) if components == 1 and tiles <= _MOST_TILES else (0, 0)


def _signed(found: NDArray[Any], pixels: Pixels, high: int) -> NDArray[Any]:
    """The numbers that the stored bits mean: bits above `high` (old overlays) and below the lowest are left out.

    Compressed pixels come with the sign of their own stream, which need not be that of the header.
    """
    bits = 8 * found.dtype.itemsize
    if found.dtype.kind == "i" and pixels.signed and pixels.syntax in _CODECS:
        return found
    words = found.view(f"{'i' if pixels.signed else 'u'}{found.dtype.itemsize}")
    if pixels.stored >= bits:
        return words
    half = 1 << (pixels.stored - 1)
    low, top = (-half, half - 1) if pixels.signed else (0, 2 * half - 1)
    if high == pixels.stored - 1 and words.min() >= low and words.max() <= top:
        return words
    shifted: NDArray[Any] = (words << (bits - 1 - high)) >> (bits - pixels.stored)
    return shifted
