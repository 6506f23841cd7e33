"""NRRD, `.nrrd` and `.nhdr` with its voxels in other files, read strictly.

ITK's reader may allocate whatever the header claims; here the header is believed as far as the files' sizes allow.
Format: Teem's "Definition of NRRD File Format", NRRD0001 to NRRD0005.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from data_curation import payload
from data_curation.extent import place, volume_shape
from data_curation.grid import Grid, VolumeError
from data_curation.rules.max_voxels import MAX_VOXELS

__all__ = ["load", "parts"]

_TYPES = {
    name: code
    for code, names in {
        "i1": "signed char, int8, int8_t",
        "u1": "uchar, unsigned char, uint8, uint8_t",
        "i2": "short, short int, signed short, signed short int, int16, int16_t",
        "u2": "ushort, unsigned short, unsigned short int, uint16, uint16_t",
        "i4": "int, signed int, int32, int32_t",
        "u4": "uint, unsigned int, uint32, uint32_t",
        "i8": "longlong, long long, long long int, signed long long, signed long long int, int64, int64_t",
        "u8": "ulonglong, unsigned long long, unsigned long long int, uint64, uint64_t",
        "f4": "float",
        "f8": "double",
    }.items()
    for name in names.split(", ")
}
_PACKINGS = {"raw": "", "gzip": "gzip", "gz": "gzip", "bzip2": "bzip2", "bz2": "bzip2"}
_TEXTS = {"txt": "text", "text": "text", "ascii": "text", "hex": "hex"}
_SPACES = {  # to LPS
    "left-posterior-superior": (1.0, 1.0, 1.0),
    "right-anterior-superior": (-1.0, -1.0, 1.0),
    "left-anterior-superior": (1.0, -1.0, 1.0),
}
_SHORT_SPACES = {"lps": "left-posterior-superior", "ras": "right-anterior-superior", "las": "left-anterior-superior"}
_ALONG_SPACE = ("domain", "space", "time", "???", "none", "")  # kinds of axes that do not hold several values a voxel
_MOST_HEADER = 1 << 22


@dataclass(frozen=True)
class _Header:
    fields: dict[str, str]  # names in lower case without spaces
    files: tuple[Path, ...]  # of the voxels
    start: int  # their first byte, where they follow the header
    segmentation: bool


def load(path: Path, max_voxels: int = MAX_VOXELS, fewest: int = 2, labels: bool = False) -> Grid:
    """Voxels as stored, of `fewest` slices. `space` must say where left, back and head are: LPS, RAS or LAS.

    A segmentation of 3D Slicer is no image; with `labels` it is what is wanted.

    Raises VolumeError: empty, unreadable, truncated, label, 4d, vector, single_slice, too_large, no_orientation,
    no_spacing.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        header = _header(path)
        sizes, axes = _axes(header, labels)
        shape = volume_shape(sizes, max_voxels, fewest)
        affine, notes = place(_affine(header, axes[:3]), shape[2])
    return Grid(_voxels(header, shape), affine, as_acquired=bool(notes), notes=notes)


def parts(path: Path) -> tuple[Path, ...]:
    """The file and those of its voxels, where they lie in other files. Raises VolumeError."""
    return tuple(dict.fromkeys((path, *_header(path).files)))


def _header(path: Path) -> _Header:
    fields: dict[str, str] = {}
    segmentation = False
    files: tuple[Path, ...] = (path,)
    with path.open("rb") as file:
        magic = _line(file)
        if not re.fullmatch(r"NRRD000[1-5]", magic or ""):
            if not magic and not path.stat().st_size:
                raise VolumeError("empty", "the file has 0 bytes: copy or download it again")
            raise VolumeError("unreadable", f"not an NRRD file: it begins with {(magic or '')[:20]!r}")
        while line := _line(file):
            name, colon, value = line.partition(":")
            if line.startswith("#") or not colon:
                continue
            if value.startswith("="):
                segmentation = segmentation or name.startswith("Segment0_")
                continue
            name, value = name.lower().replace(" ", ""), value.strip()
            if fields.get(name, value) != value:
                raise VolumeError("unreadable", f"the header states '{line.partition(':')[0]}' twice: correct it")
            fields[name] = value
            if name == "datafile" and value.split(" ")[0] == "LIST":
                files = payload.below(path, filter(None, iter(lambda: _line(file), None)))
        start = file.tell()
    named = fields.get("datafile", "")
    if named and named.split(" ")[0] != "LIST":
        files = payload.below(path, _names(named))
    return _Header(fields, files, start if files == (path,) and not named else 0, segmentation)


def _line(file: BinaryIO) -> str | None:
    """The next line without its end; None at the end of the file."""
    line = file.readline(1 << 20)
    if file.tell() > _MOST_HEADER or (len(line) == 1 << 20 and not line.endswith(b"\n")):
        raise VolumeError("unreadable", f"the header has no end within {_MOST_HEADER:,} bytes: download it again")
    return line.decode("utf-8", "surrogateescape").rstrip("\r\n") if line else None


def _names(value: str) -> Iterable[str]:
    """One name, or the names of `pattern first last step`."""
    pattern = re.fullmatch(r"(.*%0?\d*[di].*?) +(-?\d{1,9}) +(-?\d{1,9}) +(-?\d{1,9})( +\d+)?", value)
    if not pattern:
        return [value]
    first, last, step = (int(pattern[n]) for n in (2, 3, 4))
    if step == 0:
        raise VolumeError("unreadable", f"the header names its voxels by '{value[:80]}': correct its numbers")
    return _numbered(pattern[1], range(first, last + (1 if step > 0 else -1), step))


def _numbered(pattern: str, values: range) -> Iterable[str]:
    place = re.search(r"%(0?)(\d{0,2})[di]", pattern)
    if not place or pattern.count("%") > 1:
        raise VolumeError("unreadable", f"the header names its voxels by '{pattern[:80]}': one %d or %03d is needed")
    width = f"{place[1]}{place[2]}"
    return (f"{pattern[: place.start()]}{value:{width}d}{pattern[place.end() :]}" for value in values)


def _axes(header: _Header, labels: bool) -> tuple[list[int], list[str]]:
    """Sizes and direction of the axes that are places in space or time, fastest first. Raises label, vector."""
    dimension = _whole(header, "dimension")
    sizes = [_int(text, "sizes") for text in _field(header, "sizes").split()]
    if not 1 <= dimension <= 16 or len(sizes) != dimension:
        raise VolumeError("unreadable", f"the header is damaged: {dimension} dimensions with the sizes {sizes[:20]}")
    text = " x ".join(map(str, sizes))
    if header.segmentation and not labels:
        raise VolumeError("label", f"a segmentation of {text} voxels written by 3D Slicer, not an image")
    kinds = re.findall(r"\S+", header.fields.get("kinds", "").lower()) or [""] * dimension
    vectors = re.findall(r"none|\([^()]*\)", header.fields.get("spacedirections", "")) or ["?"] * dimension
    if len(kinds) != dimension or len(vectors) != dimension:
        raise VolumeError("unreadable", f"the header is damaged: {dimension} axes, but other kinds or space directions")
    kept: list[int] = []
    for axis, (size, kind, vector) in enumerate(zip(sizes, kinds, vectors, strict=True)):
        if kind in _ALONG_SPACE and (vector != "none" or kind == "time" or (axis == 3 and kind == "")):
            kept.append(axis)
        elif size != 1:
            raise VolumeError(
                "vector", f"{text} voxels have {size} values each along '{kind or 'no place'}': split them"
            )
    return [sizes[axis] for axis in kept], [vectors[axis] for axis in kept]


def _affine(header: _Header, vectors: list[str]) -> NDArray[np.float64]:
    """[3, 4] LPS in mm of the first three axes."""
    named = header.fields.get("space", "").lower().strip('"')
    named = named.removesuffix("-time")
    space = _SHORT_SPACES.get(named.removesuffix("t"), named)
    dimension = 3 if named else _int(header.fields.get("spacedimension", "3"), "space dimension")
    if dimension in (2, 4):
        space = "left-posterior-superior"  # ITK writes such images without a name for the LPS it means
    if space not in _SPACES or "?" in vectors or "none" in vectors:
        text = f"space '{named or 'missing'}'" + (" without space directions" if "?" in vectors else "")
        raise VolumeError(
            "no_orientation",
            f"the header has {text}, so left and right are unknown: convert the original DICOM series again, "
            "or set space and space directions",
        )
    columns = [_vector(vector, dimension) for vector in vectors] + [np.zeros(3)] * (3 - len(vectors))
    origin = _vector(header.fields["spaceorigin"], dimension) if "spaceorigin" in header.fields else np.zeros(3)
    affine: NDArray[np.float64] = np.column_stack([*columns, origin]) * np.array(_SPACES[space])[:, None]
    return affine * _unit(header)


def _unit(header: _Header) -> float:
    """Millimetres in the unit of the header's places."""
    units = set(re.findall(r'"([^"]*)"', header.fields.get("spaceunits", "").lower()))
    return {"m": 1000.0, "cm": 10.0, "um": 1e-3, "µm": 1e-3}.get(units.pop(), 1.0) if len(units) == 1 else 1.0


def _vector(text: str, dimension: int) -> NDArray[np.float64]:
    """The first three numbers; a 0 behind the two of a plane."""
    try:
        values = [float(part) for part in text.strip("() ").split(",")]
    except ValueError:
        values = []
    if len(values) < min(dimension, 3):
        raise VolumeError("unreadable", f"the header is damaged: '{text[:80]}' is no place in space")
    return np.array([*values, 0.0][:3])


def _voxels(header: _Header, shape: tuple[int, int, int]) -> NDArray[Any]:
    named = _field(header, "type").lower()
    if named not in _TYPES:
        raise VolumeError("vector", f"voxels of type '{named[:40]}' are not one number each: not a CT image")
    dtype = np.dtype(_TYPES[named])
    encoding = _field(header, "encoding").lower()
    if encoding not in _PACKINGS and encoding not in _TEXTS:
        known = "raw, gzip, bzip2, ascii and hex"
        raise VolumeError("unreadable", f"voxels written as '{encoding[:40]}' cannot be read, only {known}: convert it")
    endian = header.fields.get("endian", "").lower()
    if dtype.itemsize > 1 and _TEXTS.get(encoding) != "text":
        if endian not in ("little", "big"):
            raise VolumeError("unreadable", f"the header has endian '{endian[:20]}', not little or big: correct it")
        dtype = dtype.newbyteorder("<" if endian == "little" else ">")
    count = int(np.prod(shape, dtype=object))
    if _TEXTS.get(encoding) == "text":
        content = payload.gathered(header.files, count, lambda path, size: _text(header, path, size, dtype))
    else:
        size = count * dtype.itemsize
        content = payload.gathered(header.files, size, lambda path, size: _bytes(header, path, size, encoding))
    return content.view(dtype).reshape(shape[::-1])


def _text(header: _Header, path: Path, count: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    return payload.numbers(path, count, dtype, _start(header, path))


def _bytes(header: _Header, path: Path, size: int, encoding: str) -> NDArray[np.uint8]:
    """`size` bytes of one file."""
    if encoding == "hex":
        return payload.hexadecimal(path, size, _start(header, path))
    if encoding == "raw":
        return payload.contents(path, size, "", _start(header, path, size))
    skip = _whole(header, "byteskip", "0")
    if not 0 <= skip <= payload.MOST_SKIPPED:
        raise VolumeError("unreadable", f"the header is damaged: it skips {skip} bytes of {encoding} voxels")
    lines = _after_lines(header, path)
    return payload.contents(path, skip + size, _PACKINGS[encoding], lines)[skip:]  # bytes of what is unpacked


def _start(header: _Header, path: Path, size: int = 0) -> int:
    """The first byte of voxels that are not packed; byte skip -1 puts `size` bytes at the end of the file."""
    start = _after_lines(header, path)
    skip = _whole(header, "byteskip", "0")
    if skip < (-1 if size else 0):
        raise VolumeError("unreadable", f"the header is damaged: it skips {skip} bytes")
    return start + skip if skip >= 0 else max(start, path.stat().st_size - size)


def _after_lines(header: _Header, path: Path) -> int:
    lines = _whole(header, "lineskip", "0")
    if lines < 0:
        raise VolumeError("unreadable", f"the header is damaged: it skips {lines} lines")
    return payload.after_lines(path, header.start, lines) if lines else header.start


def _field(header: _Header, name: str) -> str:
    if name not in header.fields:
        raise VolumeError("unreadable", f"the header is damaged: it has no '{name}'")
    return header.fields[name]


def _whole(header: _Header, name: str, default: str = "") -> int:
    return _int(header.fields.get(name, default) if default else _field(header, name), name)


def _int(text: str, name: str) -> int:
    if not re.fullmatch(r"[+-]?\d{1,18}", text):
        raise VolumeError("unreadable", f"the header is damaged: {name} is '{text[:40]}', not a whole number")
    return int(text)
