"""The header of an image made into the header of its label map: the bytes of its geometry stay as they are.

Type, scale and packing become those of a label map; free text, which may name a patient, is left out. ITK would write
NIfTI's rotation anew in single precision, NRRD's with other last digits, and neither a shear nor NIfTI's units.
"""

from __future__ import annotations

import itertools
import re
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_curation.payload import beginning

__all__ = ["label_header", "sform_header", "with_voxels"]

_GZIP = 31  # zlib's number for a stream with the header of gzip
_NRRD_DROPPED = (
    b"#",  # a comment
    *b"type encoding endian byteskip lineskip datafile content blocksize min max oldmin oldmax sampleunits".split(),
)
_META_KEPT = (
    *b"NDims DimSize TransformMatrix Rotation Orientation Offset Position Origin CenterOfRotation".split(),
    *b"ElementSpacing ElementSize DistanceUnits AnatomicalOrientation".split(),
)


def label_header(like: Path, kind: str) -> bytes | None:
    """All that comes before the voxels, uint8, in a file of this kind; None where `like` is of another kind.

    A header with its voxels in other files becomes one that is followed by them.
    """
    head = beginning(like, 4096)
    if kind == "nifti":
        return _nifti(head)
    if head.startswith(b"NRRD"):
        return _nrrd(like) if kind == "nrrd" else None
    return _metaimage(like) if kind == "metaimage" and _nifti(head) is None else None


def with_voxels(header: bytes, kind: str, array: NDArray[np.uint8], packed: bool = True) -> Iterator[bytes]:
    """Such a file, piece by piece; `packed` is asked of NIfTI alone."""
    if kind == "metaimage":
        pieces = [*_deflated(_pieces(array), zlib.MAX_WBITS)]  # its header says how many bytes they are
        start, end = header.split(b"ElementType", 1)
        header = start + b"CompressedDataSize = %d\nElementType" % sum(map(len, pieces)) + end
        yield from itertools.chain([header], pieces)
    elif kind == "nrrd":
        yield from itertools.chain([header], _deflated(_pieces(array), _GZIP))
    else:
        whole = itertools.chain([header], _pieces(array))
        yield from _deflated(whole, _GZIP) if packed else whole


def _pieces(array: NDArray[np.uint8]) -> Iterator[bytes]:
    """The voxels a few slices at a time: `array` may be a turned view, of which no copy is made as a whole."""
    for start in range(0, len(array), 16):
        yield array[start : start + 16].tobytes()


def _deflated(pieces: Iterable[bytes], bits: int) -> Iterator[bytes]:
    """The same bytes at any time, unlike the gzip module's."""
    packer = zlib.compressobj(6, wbits=bits)
    for piece in pieces:
        yield packer.compress(piece)
    yield packer.flush()


def _nifti(head: bytes) -> bytes | None:
    texts: tuple[tuple[int, int], ...]
    for order in "<>":
        size = struct.unpack_from(f"{order}i", head)[0] if len(head) >= 348 else 0
        new = bytearray(head[:size])
        if size == 348 and head[344:347] in (b"n+1", b"ni1"):
            struct.pack_into(f"{order}3h", new, 68, 0, 2, 8)  # intent none, uint8, 8 bits
            struct.pack_into(f"{order}3f", new, 108, 352.0, 1.0, 0.0)  # offset of the data, scale, shift
            struct.pack_into(f"{order}2f", new, 124, 0.0, 0.0)  # no display range
            magic, texts = slice(344, 348), ((14, 32), (148, 252), (328, 344))
        elif size == 540 and len(head) >= 540 and head[4:7] in (b"n+2", b"ni2"):
            struct.pack_into(f"{order}2h", new, 12, 2, 8)
            struct.pack_into(f"{order}q2d", new, 168, 544, 1.0, 0.0)
            struct.pack_into(f"{order}2d", new, 192, 0.0, 0.0)
            struct.pack_into(f"{order}i", new, 504, 0)
            magic, texts = slice(4, 8), ((240, 344), (508, 524))
        else:
            continue
        new[magic] = b"n+" + bytes(head[magic][2:3]) + b"\0"
        for start, end in texts:
            new[start:end] = bytes(end - start)
        return bytes(new) + bytes(4)  # no extension
    return None


def _nrrd(like: Path) -> bytes:
    with like.open("rb") as file:
        kept = [file.readline().rstrip(b"\r\n"), b"type: unsigned char"]
        while line := file.readline().rstrip(b"\r\n"):
            name = line.partition(b":")[0].lower().replace(b" ", b"")
            if name == b"datafile" and line.partition(b":")[2].split()[:1] == [b"LIST"]:
                break
            if name not in _NRRD_DROPPED and not line.startswith(b"#") and b":=" not in line:
                kept.append(line)
    return b"\n".join([*kept, b"encoding: gzip"]) + b"\n\n"


def _metaimage(like: Path) -> bytes:
    kept = [b"ObjectType = Image"]
    with like.open("rb") as file:
        while (parts := re.split(rb"[=:]", file.readline(1 << 16), maxsplit=1))[0].strip() != b"ElementDataFile":
            if len(parts) < 2:
                break
            if (name := parts[0].strip()) in _META_KEPT:
                kept.append(name + b" = " + parts[1].strip())
    kept += [b"BinaryData = True", b"BinaryDataByteOrderMSB = False", b"CompressedData = True"]
    return b"\n".join([*kept, b"ElementType = MET_UCHAR", b"ElementDataFile = LOCAL", b""])


def sform_header(size: tuple[int, int, int], affine: NDArray[np.float64]) -> bytes:
    """Of a NIfTI-1 whose affine [3, 4], LPS in mm, may be sheared: an sform may be, a qform cannot."""
    new = bytearray(348)
    struct.pack_into("<i", new, 0, 348)
    struct.pack_into("<8h", new, 40, 3, *size, 1, 1, 1, 1)
    struct.pack_into("<2h", new, 70, 2, 8)
    struct.pack_into("<4f", new, 76, 1.0, *np.linalg.norm(affine[:, :3], axis=0))
    struct.pack_into("<3f", new, 108, 352.0, 1.0, 0.0)
    new[123] = 2  # mm
    struct.pack_into("<2h", new, 252, 0, 1)  # no qform; an sform in the scanner's coordinates
    struct.pack_into("<12f", new, 280, *(np.diag([-1.0, -1.0, 1.0]) @ affine).ravel())
    new[344:348] = b"n+1\0"
    return bytes(new) + bytes(4)
