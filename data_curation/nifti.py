"""NIfTI-1 and NIfTI-2, `.nii`, `.nii.gz` and `.hdr/.img`, read strictly.

ITK's reader returns a truncated file as an image with an invented rest and turns NaN into 0 HU (water), both without a
word; here the size, the gzip checksum and every value count. libdeflate also halves the time of reading.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_curation.extent import SHEAR_DEGREES, orthogonal, place, volume_shape
from data_curation.grid import Grid, VolumeError
from data_curation.payload import MOST_SKIPPED, beginning, contents
from data_curation.rules.max_voxels import MAX_VOXELS

__all__ = ["load"]

_TYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
_TO_MILLIMETRES = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # xyzt_units & 7
_PEEK = 4096  # bytes that hold any header


@dataclass(frozen=True)
class _Header:
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int
    slope: float
    inter: float
    affine: NDArray[np.float64] | None  # [3, 4] RAS in mm; None where the header places the voxels nowhere
    pair: bool


def load(path: Path, max_voxels: int = MAX_VOXELS, fewest: int = 2) -> Grid:
    """Voxels with scl_slope and scl_inter applied (integers stay integers where both are whole).

    Memory: the compressed bytes and one volume, and the scaled volume where there is a scale. With `fewest` 1 one slice
    is a volume. Raises VolumeError: empty, unreadable, truncated, 4d, vector, single_slice, too_large, no_orientation,
    no_spacing.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # what a damaged header makes of it is refused by its result
        header = _header(beginning(path, _PEEK))
        shape = volume_shape(header.shape, max_voxels, fewest)
        image = _beside(path) if header.pair else path
        if header.affine is None:
            raise VolumeError(
                "no_orientation",
                "the header has neither qform nor sform (or is Analyze 7.5), so left and right are unknown: "
                "convert the original DICOM series again, or set the qform",
            )
        affine, notes = place(np.diag([-1.0, -1.0, 1.0]) @ header.affine, shape[2])
        voxels = _voxels(image, header, shape)
    return Grid(voxels, affine, as_acquired=bool(notes), notes=notes)


def _beside(path: Path) -> Path:
    """The voxels of a header that has none."""
    image = path.with_suffix(".img" if path.suffix.islower() else ".IMG")
    packed = image.with_name(image.name + (".gz" if path.suffix.islower() else ".GZ"))
    for voxels in (image, packed, packed.with_suffix(".gz")):
        if voxels != path and voxels.is_file():
            return voxels
    raise VolumeError("unreadable", f"the voxels of this header, {image.name}, are missing beside it: copy both again")


def _header(start: bytes) -> _Header:
    if len(start) >= 4:
        for order in "<>":
            size = struct.unpack_from(order + "i", start)[0]
            if size == 348 and len(start) >= 348:
                return _first(start, order)
            if size == 540 and len(start) >= 540:
                return _second(start, order)
    raise VolumeError("unreadable", f"not a NIfTI file: its first bytes are {start[:4].hex(' ')}")


def _first(start: bytes, order: str) -> _Header:
    """NIfTI-1 (or Analyze 7.5, which has no magic and no affine)."""
    dim = struct.unpack_from(order + "8h", start, 40)
    code = struct.unpack_from(order + "h", start, 70)[0]
    pixdim = struct.unpack_from(order + "8f", start, 76)
    offset, slope, inter = struct.unpack_from(order + "3f", start, 108)
    qform, sform = struct.unpack_from(order + "2h", start, 252)
    quaternion = struct.unpack_from(order + "6f", start, 256)
    rows = np.array(struct.unpack_from(order + "12f", start, 280), np.float64).reshape(3, 4)
    magic = start[344:347]
    affine = _affine(qform, sform, quaternion, pixdim, rows, start[123]) if magic in (b"n+1", b"ni1") else None
    if not magic.startswith(b"n"):
        slope, inter = 0.0, 0.0
    return _Header(_dims(dim), _dtype(code, order), _offset(offset), slope, inter, affine, magic != b"n+1")


def _second(start: bytes, order: str) -> _Header:
    code = struct.unpack_from(order + "h", start, 12)[0]
    dim = struct.unpack_from(order + "8q", start, 16)
    pixdim = struct.unpack_from(order + "8d", start, 104)
    offset = struct.unpack_from(order + "q", start, 168)[0]
    slope, inter = struct.unpack_from(order + "2d", start, 176)
    qform, sform = struct.unpack_from(order + "2i", start, 344)
    quaternion = struct.unpack_from(order + "6d", start, 352)
    rows = np.array(struct.unpack_from(order + "12d", start, 400), np.float64).reshape(3, 4)
    units = struct.unpack_from(order + "i", start, 500)[0]
    affine = _affine(qform, sform, quaternion, pixdim, rows, units)
    return _Header(_dims(dim), _dtype(code, order), _offset(offset), slope, inter, affine, start[4:7] == b"ni2")


def _offset(offset: float) -> int:
    if not 0 <= offset <= MOST_SKIPPED:  # also not a number
        raise VolumeError("unreadable", f"the header is damaged: its voxels start at byte {offset}")
    return int(offset)


def _dims(dim: tuple[int, ...]) -> tuple[int, ...]:
    if not 1 <= dim[0] <= 7 or min(dim[1 : dim[0] + 1]) < 1:
        raise VolumeError("unreadable", f"the header is damaged: it states the dimensions {list(dim)}")
    return tuple(dim[1 : dim[0] + 1])


def _dtype(code: int, order: str) -> np.dtype[Any]:
    if code not in _TYPES:
        text = f"voxels of NIfTI data type {code} (colour, complex or packed) are not one number each: not a CT image"
        raise VolumeError("vector", text)
    return np.dtype(_TYPES[code]).newbyteorder(order)  # type: ignore[arg-type]


def _affine(
    qform: int,
    sform: int,
    quaternion: tuple[float, ...],
    pixdim: tuple[float, ...],
    rows: NDArray[np.float64],
    units: int,
) -> NDArray[np.float64] | None:
    """[3, 4] RAS: the sform, unless it is absent, or sheared while a qform is there."""
    scale = _TO_MILLIMETRES.get(units & 7, 1.0)
    usable = sform > 0 and bool(np.isfinite(rows).all()) and np.linalg.norm(rows[:, :3], axis=0).min() > 0
    by_rows = rows if usable else None
    if by_rows is not None and (qform <= 0 or orthogonal(by_rows)[1] <= SHEAR_DEGREES):
        return by_rows * scale
    if qform <= 0 or not np.isfinite([*quaternion, *pixdim[:4]]).all():
        return None
    b, c, d = quaternion[:3]
    length = math.hypot(b, c, d)
    if length > 1.0:  # rounded, or damaged: the nearest turn, as the format's own library has it
        b, c, d = b / length, c / length, d / length
    a = math.sqrt(max(0.0, 1.0 - b * b - c * c - d * d))
    rotation = np.array(
        [
            [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
            [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
            [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - c * c - b * b],
        ]
    )
    factor = -1.0 if pixdim[0] < 0 else 1.0
    axes = rotation * np.array([pixdim[1], pixdim[2], pixdim[3] * factor])
    return np.column_stack([axes, quaternion[3:6]]) * scale


def _voxels(path: Path, header: _Header, shape: tuple[int, int, int]) -> NDArray[Any]:
    offset = header.offset if header.pair else max(header.offset, 352)
    content = contents(path, offset + math.prod(shape) * header.dtype.itemsize, "auto")
    voxels: NDArray[Any] = np.frombuffer(content, header.dtype, math.prod(shape), offset).reshape(shape[::-1])
    slope, inter = header.slope, header.inter
    if not (math.isfinite(slope) and math.isfinite(inter)) or slope == 0 or (slope, inter) == (1.0, 0.0):
        return voxels
    whole = slope.is_integer() and inter.is_integer() and max(abs(slope), abs(inter)) < 2**20
    if voxels.dtype.kind in "iu" and whole:
        # Of stored 16-bit values 32 bits are enough: a scan of 1,000 slices would be 2 GB in 64.
        small = voxels.dtype.itemsize <= 2 and max(abs(slope), abs(inter)) < 2**14
        scaled: NDArray[Any] = voxels.astype(np.int32 if small else np.int64)
        scaled *= int(slope)
        scaled += int(inter)
        return scaled
    real = voxels.astype(np.float64)
    real *= slope
    real += inter
    return real.astype(np.float32)
