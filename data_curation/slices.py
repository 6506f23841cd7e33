"""Volume -> axial slices: which ones are kept, how their HU are stored without loss, what is measured on each.

A slice is stored at its own resolution as a signed 16-bit image. The default codec is HTJ2K (JPEG 2000 Part 15,
OpenJPH through imagecodecs): about 2.7 times smaller than raw and decoded in under 2 ms at 512 x 512.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from launch.settings import Settings

__all__ = [
    "BODY_HU",
    "CODECS",
    "DEFAULT_CODEC",
    "Codec",
    "Slice",
    "SliceError",
    "SliceRule",
    "checksum",
    "cut",
    "decode",
    "encode",
]

BODY_HU = -500  # above: soft tissue, bone, fat, blood; below: air and most of the lung
CLIP_HU = 1000  # repackaged data sets are often clipped at -1000 or -1024; `Slice.content` must not see it
DEFAULT_CODEC = "j2c"


class SliceError(ValueError):
    """Pixels that cannot be stored, or bytes that are not an image of the codec they are said to be."""


@dataclass(frozen=True)
class Codec:
    """A lossless pair: int16 [Y, X] -> bytes -> the same int16 [Y, X]."""

    encode: Callable[[NDArray[np.int16]], bytes]
    decode: Callable[[bytes], NDArray[np.int16]]


def _encode_htj2k(hu: NDArray[np.int16]) -> bytes:
    import imagecodecs

    return bytes(imagecodecs.htj2k_encode(hu))


def _decode_htj2k(data: bytes) -> NDArray[np.int16]:
    import imagecodecs

    hu: NDArray[np.int16] = imagecodecs.htj2k_decode(data)
    return hu


def _encode_png(hu: NDArray[np.int16]) -> bytes:
    import imagecodecs

    room = 2 * hu.nbytes + 32 * len(hu) + 4096  # imagecodecs' own guess is too small for tall, narrow images
    return bytes(imagecodecs.png_encode(hu.view(np.uint16) ^ np.uint16(0x8000), level=1, out=room))


def _decode_png(data: bytes) -> NDArray[np.int16]:
    import imagecodecs

    stored: NDArray[np.uint16] = imagecodecs.png_decode(data)
    return (stored ^ np.uint16(0x8000)).view(np.int16)


CODECS: Mapping[str, Codec] = MappingProxyType(
    {
        "j2c": Codec(_encode_htj2k, _decode_htj2k),
        "png": Codec(_encode_png, _decode_png),  # HU + 32768; a third larger and twice as slow, but read by everything
    }
)


def encode(hu: NDArray[np.int16], codec: str = DEFAULT_CODEC) -> bytes:
    """The lossless bytes of one slice, int16 [Y, X]. The same pixels give the same bytes."""
    if hu.dtype != np.int16 or hu.ndim != 2 or hu.size == 0:
        raise SliceError(f"a slice is int16 [Y, X] with at least one pixel, got {hu.dtype} {list(hu.shape)}")
    return _codec(codec).encode(np.ascontiguousarray(hu))


def decode(data: bytes, codec: str = DEFAULT_CODEC) -> NDArray[np.int16]:
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


def checksum(data: bytes) -> int:
    """CRC-32 of stored bytes, by zlib-ng where imagecodecs has it: a seventh of the time of Python's own zlib."""
    import imagecodecs

    return int(imagecodecs.zlibng_crc32(data)) if imagecodecs.ZLIBNG.available else zlib.crc32(data)


def _codec(name: str) -> Codec:
    if name not in CODECS:
        raise SliceError(f"no codec for .{name}; there are: {', '.join(CODECS)}")
    return CODECS[name]


class SliceRule(Settings):
    """Which slices of a kept volume enter the corpus. The default keeps every slice that shows any body."""

    every_mm: float = Field(0.0, ge=0, description="keep about one slice every so many mm; 0 keeps all")
    skip_air: bool = Field(True, description="leave out slices that show nothing but air")
    min_body: float = Field(0.001, ge=0, le=1, description=f"a slice with less of its area above {BODY_HU} HU is air")


@dataclass(frozen=True)
class Slice:
    """One axial slice and what was measured on it. `z` counts from the feet; `mean` and `std` are in HU."""

    z: int
    hu: NDArray[np.int16]  # [Y, X], a view of the volume
    body_fraction: float  # share of pixels above BODY_HU

    @property
    def sha256(self) -> str:
        """Of the exact pixels: little-endian int16, row by row."""
        return hashlib.sha256(np.ascontiguousarray(self.hu, "<i2").data).hexdigest()

    @property
    def content(self) -> str:
        """Equal for two copies of a slice that differ only by clipping at or beyond +-1000 HU; "" if it is uniform.

        128 bits of SHA-256 over shape and clipped pixels. A uniform slice says nothing about where it comes from.
        """
        clipped = np.clip(self.hu, -CLIP_HU, CLIP_HU)
        if clipped.min() == clipped.max():
            return ""
        return hashlib.sha256(repr(self.hu.shape).encode() + clipped.astype("<i2", copy=False).tobytes()).hexdigest()[
            :32
        ]

    def statistics(self) -> dict[str, int | float]:
        """hu_min, hu_max, hu_mean, hu_std; the sums are exact in float64 up to 8 million pixels, so in any order."""
        values = self.hu.ravel().astype(np.float64)
        mean = float(values.sum()) / values.size
        variance = max(float(np.square(values).sum()) / values.size - mean * mean, 0.0)
        return {
            "hu_min": int(self.hu.min()),
            "hu_max": int(self.hu.max()),
            "hu_mean": mean,
            "hu_std": variance**0.5,
        }


def cut(hu: NDArray[np.int16], spacing_z: float, rule: SliceRule) -> Iterator[Slice]:
    """The slices of hu [Z, Y, X] that the rule keeps, from the feet up."""
    last = None
    for z, plane in enumerate(hu):
        if rule.every_mm > 0:
            step = int(z * spacing_z / rule.every_mm + 1e-6)
            if step == last:
                continue
            last = step
        body = np.count_nonzero(plane > BODY_HU) / plane.size
        if rule.skip_air and (body == 0 or body < rule.min_body):
            continue
        yield Slice(z, plane, body)
