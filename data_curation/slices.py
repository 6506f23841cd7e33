"""Volume -> axial slices: which ones are kept, how their HU are stored without loss, what is measured on each.

A slice is stored at its own resolution as a signed 16-bit image of the box around the patient (box.py). The default
codec is HTJ2K (JPEG 2000 Part 15, OpenJPH through imagecodecs); blosc2 is a third larger and twice as fast to decode.
`tests/benchmarks/bench_corpus.py` prints the table that the choice rests on.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from data_curation.box import BODY_HU, Box, body_box, outside
from launch.settings import Settings

__all__ = [
    "CODECS",
    "DEFAULT_CODEC",
    "Codec",
    "Slice",
    "SliceError",
    "SliceRule",
    "checksum",
    "content",
    "cut",
    "decode",
    "encode",
    "sha256",
]

LARGEST = 65535  # rows or columns
_SIZES = 4  # bytes before the pixels of a .b2 slice
CLIP_HU = 1000  # repackaged data sets are often clipped at -1000 or -1024; `content` must not see it
DEFAULT_CODEC = "j2c"


class SliceError(ValueError):
    """Pixels that cannot be stored, or bytes that are not an image of the codec they are said to be."""


@dataclass(frozen=True)
class Codec:
    """A lossless pair: int16 [Y, X] -> bytes -> the same int16 [Y, X]."""

    encode: Callable[[NDArray[np.int16]], bytes]
    decode: Callable[[bytes | memoryview], NDArray[np.int16]]


def _codecs() -> Any:
    """imagecodecs, imported when needed; its own types leave out what it takes, such as views of mapped files."""
    import imagecodecs

    return imagecodecs


def _encode_htj2k(hu: NDArray[np.int16]) -> bytes:
    return bytes(_codecs().htj2k_encode(hu))


def _decode_htj2k(data: bytes | memoryview) -> NDArray[np.int16]:
    hu: NDArray[np.int16] = _codecs().htj2k_decode(data)
    return hu


def _encode_png(hu: NDArray[np.int16]) -> bytes:
    room = 2 * hu.nbytes + 32 * len(hu) + 4096  # imagecodecs' own guess is too small for tall, narrow images
    return bytes(_codecs().png_encode(hu.view(np.uint16) ^ np.uint16(0x8000), level=1, out=room))


def _decode_png(data: bytes | memoryview) -> NDArray[np.int16]:
    stored: NDArray[np.uint16] = _codecs().png_decode(data)
    return (stored ^ np.uint16(0x8000)).view(np.int16)


def _encode_blosc2(hu: NDArray[np.int16]) -> bytes:
    """Rows and columns as little-endian 16 bits each, then a blosc2 chunk of the pixels as little-endian int16."""
    pixels = np.ascontiguousarray(hu, "<i2")
    packed = _codecs().blosc2_encode(pixels, level=1, compressor="zstd", shuffle=1, typesize=2, numthreads=1)
    return struct.pack("<HH", *hu.shape) + bytes(packed)


def _decode_blosc2(data: bytes | memoryview) -> NDArray[np.int16]:
    if len(data) <= _SIZES or 0 in (shape := struct.unpack_from("<HH", data)):
        raise ValueError("no rows and columns at its start")
    hu = np.empty(shape, "<i2")
    pixels = hu.reshape(-1).view(np.uint8)
    filled = len(_codecs().blosc2_decode(memoryview(data)[_SIZES:], out=pixels, numthreads=1))
    if filled != hu.nbytes:
        raise ValueError(f"it holds {filled} bytes of pixels, not {hu.nbytes}")
    return hu


CODECS: Mapping[str, Codec] = MappingProxyType(
    {
        "j2c": Codec(_encode_htj2k, _decode_htj2k),
        "b2": Codec(_encode_blosc2, _decode_blosc2),
        "png": Codec(_encode_png, _decode_png),  # HU + 32768; a third larger and twice as slow, but read by everything
    }
)


def encode(hu: NDArray[np.int16], codec: str = DEFAULT_CODEC) -> bytes:
    """The lossless bytes of one slice, int16 [Y, X]. The same pixels give the same bytes."""
    if hu.dtype != np.int16 or hu.ndim != 2 or hu.size == 0 or max(hu.shape) > LARGEST:
        raise SliceError(f"a slice is int16 [Y, X] of 1 to {LARGEST} rows and columns, got {hu.dtype} {list(hu.shape)}")
    return _codec(codec).encode(np.ascontiguousarray(hu))


def decode(data: bytes | memoryview, codec: str = DEFAULT_CODEC) -> NDArray[np.int16]:
    """The slice, int16 [Y, X], writable.

    Damaged HTJ2K may decode to other pixels without an error, or not end: compare a checksum of the bytes first, as
    `Corpus` does. Raises SliceError for an unknown codec and for bytes it refuses.
    """
    chosen = _codec(codec)
    try:
        hu = chosen.decode(data)
    except (RuntimeError, ValueError) as error:  # imagecodecs' own errors are RuntimeErrors
        raise SliceError(f"{len(data)} bytes are not a .{codec} image: {error}") from None
    if hu.dtype != np.int16 or hu.ndim != 2:
        raise SliceError(f"a .{codec} slice holds {hu.dtype} {list(hu.shape)}, not int16 [Y, X]")
    return hu


def sha256(hu: NDArray[np.int16]) -> str:
    """SHA-256 of the pixels as little-endian int16, row by row."""
    return hashlib.sha256(np.ascontiguousarray(hu, "<i2").data).hexdigest()


def content(hu: NDArray[np.int16]) -> str:
    """Equal for two copies of a slice that differ only by clipping at or beyond +-1000 HU, or by more air around it.

    128 bits of SHA-256 over the stored shape and every fourth row of the clipped pixels (all rows say no more and cost
    twice the hashing); "" if they are uniform, which says nothing about where they come from.
    """
    clipped = np.clip(hu[::4], -CLIP_HU, CLIP_HU).astype("<i2", copy=False)
    if clipped.min() == clipped.max():
        return ""
    digest = hashlib.sha256(repr(hu.shape).encode())
    digest.update(clipped.data)
    return digest.hexdigest()[:32]


def checksum(data: bytes | memoryview) -> int:
    """CRC-32 of stored bytes, by zlib-ng where imagecodecs has it: a seventh of the time of Python's own zlib."""
    codecs = _codecs()
    return int(codecs.zlibng_crc32(data)) if codecs.ZLIBNG.available else zlib.crc32(data)


def _codec(name: str) -> Codec:
    if name not in CODECS:
        raise SliceError(f"no codec for .{name}; there are: {', '.join(CODECS)}")
    return CODECS[name]


class SliceRule(Settings):
    """Which slices of a kept volume enter the corpus, and how much of each. The default keeps all that shows a body."""

    every_mm: float = Field(0.0, ge=0, description="keep about one slice every so many mm; 0 keeps all")
    skip_air: bool = Field(True, description="leave out slices that show nothing but air")
    min_body: float = Field(0.001, ge=0, le=1, description=f"a slice with less of its area above {BODY_HU} HU is air")
    box: Literal["body", "none"] = Field("body", description="body: store the part around the patient; none: all of it")
    margin_mm: float = Field(6.0, ge=0, description="kept around the patient on each side, where box is body")

    @property
    def stored(self) -> str:
        """In words, what part of a slice is stored."""
        if self.box == "none":
            return "whole slice"
        return f"parts of the patient above {BODY_HU} HU and {self.margin_mm:g} mm around them"


@dataclass(frozen=True)
class Slice:
    """One axial slice and what was measured on it. `z` counts from the feet."""

    z: int
    hu: NDArray[np.int16]  # [Y, X] of the box, C-contiguous
    body: NDArray[np.int16]  # [Y, X] of the box around the large parts of the patient, a view
    box: Box  # where in the frame
    frame: tuple[int, int]  # rows and columns of the scan
    body_fraction: float  # share of the frame above BODY_HU
    outside_max: int = -32768  # highest HU of the frame outside the box
    outside_body: float = 0.0  # share of the frame that is above BODY_HU and outside the box

    def statistics(self) -> dict[str, int | float]:
        """hu_min, hu_max, hu_mean, hu_std of the stored pixels; the sums are exact in float64, so in any order."""
        values = self.hu.ravel().astype(np.float64)
        mean = float(values.sum()) / values.size
        variance = max(float(values @ values) / values.size - mean * mean, 0.0)
        return {
            "hu_min": int(self.hu.min()),
            "hu_max": int(self.hu.max()),
            "hu_mean": mean,
            "hu_std": variance**0.5,
        }


def cut(
    hu: NDArray[np.int16], spacing: tuple[float, float, float], rule: SliceRule, left_out: dict[int, str]
) -> Iterator[Slice]:
    """The slices of hu [Z, Y, X] with `spacing` (z, y, x) mm that the rule keeps, from the feet up.

    `left_out` gets the number of every other slice, and why: "between" (every_mm) or "air".
    """
    last = None
    for z, plane in enumerate(hu):
        if rule.every_mm > 0:
            step = int(z * spacing[0] / rule.every_mm + 1e-6)
            if step == last:
                left_out[z] = "between"
                continue
            last = step
        around, trunk = body_box(plane, spacing[1:], rule.margin_mm)
        shown = np.ascontiguousarray(around.of(plane))
        highest, missed = outside(plane, around)
        body = (np.count_nonzero(shown > BODY_HU) + missed) / plane.size
        if rule.skip_air and (body == 0 or body < rule.min_body):
            left_out[z] = "air"
            continue
        height, width = plane.shape
        if rule.box == "body":
            yield Slice(z, shown, trunk.of(plane), around, (height, width), body, highest, missed / plane.size)
        else:
            yield Slice(
                z, np.ascontiguousarray(plane), trunk.of(plane), Box(0, 0, height, width), (height, width), body
            )
