"""Volumes written as NIfTI-1, slice by slice.

ITK's writer tells nothing of a full disk and leaves half a file.
"""

from __future__ import annotations

import gzip
import struct
from contextlib import nullcontext
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from data_curation.aside import aside

__all__ = ["write_nifti"]

_CODES = {np.dtype(np.uint8): 2, np.dtype(np.int16): 4}
_MM, _SCANNER = 2, 1  # units of length; what coordinates are those of


def write_nifti(path: Path, array: NDArray[np.uint8] | NDArray[np.int16], affine: NDArray[np.float64]) -> None:
    """An array [k, j, i] and where it lies: `affine` [3, 4] takes (i, j, k) to mm in LPS, its columns orthogonal.

    Compressed where the name ends in .gz. The file appears whole or not at all; OSError, which names it: a full disk.
    """
    with aside(path) as file:
        packed: Any = gzip.GzipFile("", "wb", 6, file, 0) if path.name.endswith(".gz") else nullcontext(file)
        with packed as out:
            _write(out, array, affine)


def _write(out: IO[bytes], array: NDArray[Any], affine: NDArray[np.float64]) -> None:
    out.write(_header(array.shape[::-1], array.dtype, affine))
    for plane in array:
        out.write(np.ascontiguousarray(plane, array.dtype.newbyteorder("<")).data)


def _header(size: tuple[int, ...], dtype: np.dtype[Any], affine: NDArray[np.float64]) -> bytes:
    """The 348 bytes, and no extension. The place is said in both of the format's ways: as a turn and as rows."""
    rows = np.diag([-1.0, -1.0, 1.0]) @ affine  # NIfTI's x and y run to the patient's right and front
    spacing = np.linalg.norm(rows[:, :3], axis=0)
    turn = rows[:, :3] / spacing
    hand = 1.0 if np.linalg.det(turn) > 0 else -1.0
    turn[:, 2] *= hand  # a turn has no mirror: that is said of the third axis
    x, y, z, w = Rotation.from_matrix(turn).as_quat()
    sign = -1.0 if w < 0 else 1.0
    header = bytearray(348)
    struct.pack_into("<i", header, 0, 348)
    struct.pack_into("<8h", header, 40, 3, *size, 1, 1, 1, 1)
    struct.pack_into("<2h", header, 70, _CODES[dtype], 8 * dtype.itemsize)
    struct.pack_into("<4f", header, 76, hand, *spacing)
    struct.pack_into("<3f", header, 108, 352.0, 1.0, 0.0)  # where the voxels begin, scale, shift
    header[123] = _MM
    struct.pack_into("<2h", header, 252, _SCANNER, _SCANNER)
    struct.pack_into("<6f", header, 256, sign * x, sign * y, sign * z, *rows[:, 3])
    struct.pack_into("<12f", header, 280, *rows.ravel())
    header[344:348] = b"n+1\0"
    return bytes(header) + bytes(4)
