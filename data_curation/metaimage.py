"""MetaImage, `.mha` and `.mhd` with its voxels in other files, read strictly.

ITK's reader can end the process on a damaged header and allocates whatever it claims; here the header is believed as
far as the files' sizes allow. Without a TransformMatrix the axes are taken as LPS, as ITK and Elastix take them, and
AnatomicalOrientation is not used: writers disagree on what it means.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_curation import payload
from data_curation.extent import place, volume_shape
from data_curation.grid import Grid, VolumeError
from data_curation.rules.max_voxels import MAX_VOXELS

__all__ = ["load", "parts"]

_TYPES = {  # MET_LONG has 4 bytes, whatever the machine
    "MET_CHAR": "i1",
    "MET_UCHAR": "u1",
    "MET_SHORT": "i2",
    "MET_USHORT": "u2",
    "MET_INT": "i4",
    "MET_UINT": "u4",
    "MET_LONG": "i4",
    "MET_ULONG": "u4",
    "MET_LONG_LONG": "i8",
    "MET_ULONG_LONG": "u8",
    "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}
_MATRIX = ("TransformMatrix", "Rotation", "Orientation")
_MILLIMETRES = {"m": 1000.0, "cm": 10.0, "um": 1e-3}
_STATED = re.compile(r"\s*([^\x00-\x1f=:]{1,80}?)\s*[=:](.*)")
_MOST_HEADER = 1 << 20


@dataclass(frozen=True)
class _Header:
    path: Path
    fields: dict[str, str]
    listed: tuple[str, ...]  # the lines behind `ElementDataFile = LIST`
    start: int  # first byte behind the header


def load(path: Path, max_voxels: int = MAX_VOXELS, fewest: int = 2) -> Grid:
    """Voxels as stored, of `fewest` slices at least.

    Raises VolumeError: empty, unreadable, truncated, 4d, vector, single_slice, too_large, no_spacing.
    """
    header = _header(path)
    dimensions, sizes = _sizes(header)
    channels = _whole(header, "ElementNumberOfChannels", 1)
    if channels != 1:
        text = f"{' x '.join(map(str, sizes))} voxels of {channels} values each are not one CT volume: split them"
        raise VolumeError("vector", text)
    shape = volume_shape(sizes, max_voxels, fewest)
    with np.errstate(over="ignore", invalid="ignore"):
        affine, notes = place(_affine(header, dimensions), shape[2])
    assumed = () if any(name in header.fields for name in _MATRIX) else ("no TransformMatrix: axes taken as LPS",)
    return Grid(_voxels(header, shape), affine, as_acquired=bool(notes), notes=(*notes, *assumed))


def parts(path: Path) -> tuple[Path, ...]:
    """The file and those of its voxels, where they lie in other files. Raises VolumeError."""
    header = _header(path)
    return tuple(dict.fromkeys((path, *_files(header, _sizes(header)[1][-1]))))


def _header(path: Path) -> _Header:
    fields: dict[str, str] = {}
    listed: tuple[str, ...] = ()
    with path.open("rb") as file:
        while "ElementDataFile" not in fields:
            line = file.readline(1 << 16)
            stated = _STATED.fullmatch(line.decode("utf-8", "surrogateescape").rstrip("\r\n"))
            if not stated or file.tell() > _MOST_HEADER:
                break
            name, value = stated[1], stated[2].strip()
            if fields.get(name, value) != value:
                raise VolumeError("unreadable", f"the header states {name} twice: correct it")
            fields[name] = value
        start = file.tell()
        if fields.get("ElementDataFile", "").split(" ")[0].upper() == "LIST":
            rest = file.read(_MOST_HEADER).decode("utf-8", "surrogateescape")
            listed = tuple(line.strip() for line in rest.splitlines() if line.strip())
    if not fields and not path.stat().st_size:
        raise VolumeError("empty", "the file has 0 bytes: copy or download it again")
    if "ElementDataFile" not in fields:
        text = (
            f"its header breaks off after {len(fields)} fields" if fields else "it does not begin with 'Name = value'"
        )
        raise VolumeError("unreadable", f"not a MetaImage file, or damaged: {text}; copy or download it again")
    return _Header(path, fields, listed, start)


def _sizes(header: _Header) -> tuple[int, list[int]]:
    dimensions = _whole(header, "NDims")
    sizes = [_int(text, "DimSize") for text in _field(header, "DimSize").split()]
    if not 1 <= dimensions <= 10 or len(sizes) != dimensions:
        raise VolumeError("unreadable", f"the header is damaged: {dimensions} dimensions of the sizes {sizes[:20]}")
    return dimensions, sizes


def _affine(header: _Header, dimensions: int) -> NDArray[np.float64]:
    """[3, 4] LPS in mm. The matrix holds one axis after another, each in patient coordinates."""
    turn = _floats(header, _MATRIX, dimensions * dimensions)
    matrix = np.eye(dimensions) if turn is None else turn.reshape(dimensions, dimensions)
    origin = _floats(header, ("Offset", "Position", "Origin"), dimensions)
    spacing = _floats(header, ("ElementSpacing", "ElementSize"), dimensions)
    if spacing is None:
        text = "the header has neither ElementSpacing nor ElementSize: write the true spacing into it and try again"
        raise VolumeError("no_spacing", text)
    there = min(dimensions, 3)
    affine = np.zeros((3, 4))  # of an image of two dimensions, the third axis stays without length
    affine[:there, :there] = matrix[:3, :3].T * spacing[:3]
    if origin is not None:
        affine[:there, 3] = origin[:3]
    return affine * _MILLIMETRES.get(header.fields.get("DistanceUnits", "mm").lower(), 1.0)


def _voxels(header: _Header, shape: tuple[int, int, int]) -> NDArray[Any]:
    named = _field(header, "ElementType")
    if named not in _TYPES:
        raise VolumeError("vector", f"voxels of ElementType {named[:40]} are not one number each: not a CT image")
    big = _true(header, "BinaryDataByteOrderMSB", False) or _true(header, "ElementByteOrderMSB", False)
    dtype = np.dtype(_TYPES[named]).newbyteorder(">" if big else "<")
    count = int(np.prod(shape, dtype=object))
    files = _files(header, shape[2])
    if not _true(header, "BinaryData", True):
        dtype = dtype.newbyteorder("=")
        content = payload.gathered(
            files, count, lambda path, n: payload.numbers(path, n, dtype, _start(header, path, 0))
        )
    else:
        size = count * dtype.itemsize
        content = payload.gathered(files, size, lambda path, n: _bytes(header, path, n, len(files)))
    return content.view(dtype).reshape(shape[::-1])


def _bytes(header: _Header, path: Path, size: int, files: int) -> NDArray[np.uint8]:
    start = _start(header, path, size)
    if not _true(header, "CompressedData", False):
        return payload.contents(path, size, "", start)
    stored = _whole(header, "CompressedDataSize", 0) if files == 1 else 0
    if stored < 0:
        raise VolumeError("unreadable", f"the header is damaged: CompressedDataSize is {stored}")
    return payload.contents(path, size, "deflate", start, stored or None)


def _start(header: _Header, path: Path, size: int) -> int:
    """The first byte of the voxels: behind the header, or HeaderSize; -1 puts them at the end of the file."""
    skip = _whole(header, "HeaderSize", 0)
    if skip < -1 or (skip < 0 and (_true(header, "CompressedData", False) or not size)):
        raise VolumeError("unreadable", f"the header is damaged: HeaderSize is {skip}")
    if skip < 0:
        return max(0, path.stat().st_size - size)
    return skip or (header.start if path == header.path else 0)


def _files(header: _Header, slices: int) -> tuple[Path, ...]:
    """The files of the voxels, in order: the header's own, one, those of a list, or those of a numbered pattern."""
    named = header.fields["ElementDataFile"]
    if named.upper() == "LOCAL":
        return (header.path,)
    if named.split(" ")[0].upper() == "LIST":
        names: Iterable[str] = header.listed
    elif numbered := re.fullmatch(r"(.*)%(0?)(\d{0,2})d([^%]*?)((?: +-?\d{1,9}){0,3})", named):
        names = _numbered(numbered, slices)
    else:
        names = (named,)
    return payload.below(header.path, names)


def _numbered(numbered: re.Match[str], slices: int) -> Iterable[str]:
    """`name%03d.raw first last step`; without numbers, one file a slice from 1 on."""
    given = [int(text) for text in numbered[5].split()]
    first = given[0] if given else 1
    last = given[1] if len(given) > 1 else first + slices - 1
    step = given[2] if len(given) > 2 else max(1, (last - first) // max(1, slices))
    if step < 1:
        raise VolumeError("unreadable", f"the header names its voxels by '{numbered[0][:80]}': correct its numbers")
    width = f"{numbered[2]}{numbered[3]}"
    return (f"{numbered[1]}{value:{width}d}{numbered[4]}" for value in range(first, last + 1, step))


def _true(header: _Header, name: str, default: bool) -> bool:
    return header.fields[name][:1] in ("T", "t", "1") if name in header.fields else default


def _field(header: _Header, name: str) -> str:
    if name not in header.fields:
        raise VolumeError("unreadable", f"the header is damaged: it has no {name}")
    return header.fields[name]


def _whole(header: _Header, name: str, default: int | None = None) -> int:
    return default if default is not None and name not in header.fields else _int(_field(header, name), name)


def _int(text: str, name: str) -> int:
    if not re.fullmatch(r"[+-]?\d{1,18}", text):
        raise VolumeError("unreadable", f"the header is damaged: {name} is '{text[:40]}', not a whole number")
    return int(text)


def _floats(header: _Header, names: tuple[str, ...], count: int) -> NDArray[np.float64] | None:
    """The first of these fields that the header has, [count]."""
    name = next((name for name in names if name in header.fields), None)
    if name is None:
        return None
    try:
        values = np.array([float(text) for text in header.fields[name].split()])
    except ValueError:
        values = np.zeros(0)
    if len(values) != count:
        raise VolumeError("unreadable", f"the header is damaged: {name} is '{header.fields[name][:80]}'")
    return values
