"""NIfTI headers written field by field: what ITK's writer cannot be made to write, and what others have written."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_curation.volumes import find
from tests.data_curation.reading import refused, volume

SHAPE = (6, 9, 12)
SPACING = (2.5, 0.7, 0.8)


def body(shape: tuple[int, ...] = SHAPE, dtype: Any = np.int16) -> np.ndarray:
    return np.random.default_rng(3).integers(-1000, 1500, shape).astype(dtype)


def header(
    shape: tuple[int, ...] = SHAPE[::-1],
    *,
    code: int = 4,
    slope: float = 0.0,
    inter: float = 0.0,
    order: str = "<",
    magic: bytes = b"n+1\0",
    sform: Any = None,
    qform: Any = None,
    units: int = 2,
    offset: float = 352.0,
    pixdim: tuple[float, ...] = (1, *SPACING[::-1]),
) -> bytes:
    """A NIfTI-1 header written field by field: what ITK's writer cannot be made to write. RAS, as the format has it."""
    raw = bytearray(348)
    struct.pack_into(order + "i", raw, 0, 348)
    struct.pack_into(order + "8h", raw, 40, len(shape), *shape, *(1,) * (7 - len(shape)))
    struct.pack_into(order + "h", raw, 70, code)
    struct.pack_into(order + "8f", raw, 76, *pixdim, 0, 0, 0, 0)
    struct.pack_into(order + "3f", raw, 108, offset, slope, inter)
    raw[123] = units
    struct.pack_into(order + "2h", raw, 252, int(qform is not None), int(sform is not None))
    if qform is not None:
        struct.pack_into(order + "6f", raw, 256, *qform)
    if sform is not None:
        struct.pack_into(order + "12f", raw, 280, *np.asarray(sform, float).ravel())
    raw[344:348] = magic
    return bytes(raw) + b"\0\0\0\0"


LPS_SFORM = [[-0.8, 0, 0, 0], [0, -0.7, 0, 0], [0, 0, 2.5, 0]]


def test_kits_keeps_slices_on_the_first_array_axis(tmp_path: Path) -> None:
    """KiTS: affine [[0, 0, -x], [0, -y, 0], [-z, 0, 0]]; the longest axis need not be last."""
    hu = body()
    stored = np.ascontiguousarray(hu[::-1].transpose(2, 1, 0))  # file order k, j, i = x, y, -z
    sform = [[0, 0, -0.8, 0], [0, -0.7, 0, 0], [-2.5, 0, 0, 0]]
    (tmp_path / "imaging.nii").write_bytes(header(SHAPE, sform=sform) + stored.tobytes())
    result = volume(tmp_path / "imaging.nii")
    np.testing.assert_array_equal(result.hu, hu)
    assert result.spacing == pytest.approx(SPACING)


def test_sheared_affine_of_a_gantry_tilt(tmp_path: Path) -> None:
    sform = [[-0.8, 0, 0, 0], [0, -0.7, 0.7, 0], [0, 0, 2.5, 0]]
    (tmp_path / "ct.nii").write_bytes(header(sform=sform) + body().tobytes())
    result = volume(tmp_path / "ct.nii")
    np.testing.assert_array_equal(result.hu, body())
    assert result.spacing == pytest.approx(SPACING)
    assert result.notes == ("sheared by 15.6 degrees: slices kept as stored",)


def test_big_endian_and_second_version(tmp_path: Path) -> None:
    (tmp_path / "ct.nii").write_bytes(header(order=">", sform=LPS_SFORM) + body().astype(">i2").tobytes())
    np.testing.assert_array_equal(volume(tmp_path / "ct.nii").hu, body())
    raw = bytearray(540)
    struct.pack_into("<i8s", raw, 0, 540, b"n+2\0\r\n\x1a\n")
    struct.pack_into("<hh8q", raw, 12, 4, 16, 3, *SHAPE[::-1], 1, 1, 1, 1)
    struct.pack_into("<8d", raw, 104, 1, *SPACING[::-1], 0, 0, 0, 0)
    struct.pack_into("<q", raw, 168, 544)
    struct.pack_into("<2i", raw, 344, 0, 1)
    struct.pack_into("<12d", raw, 400, *np.ravel(LPS_SFORM))
    struct.pack_into("<i", raw, 500, 2)
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "ct.nii").write_bytes(bytes(raw) + b"\0" * 4 + body().tobytes())
    result = volume(tmp_path / "two" / "ct.nii")
    np.testing.assert_array_equal(result.hu, body())
    assert result.spacing == pytest.approx(SPACING)


def test_slope_and_intercept(tmp_path: Path) -> None:
    stored = (body() + 1024).astype(np.int16)
    (tmp_path / "ct.nii").write_bytes(header(slope=1, inter=-1024, sform=LPS_SFORM) + stored.tobytes())
    result = volume(tmp_path / "ct.nii")
    np.testing.assert_array_equal(result.hu, body())
    assert result.rounding == 0.0
    for slope, inter in ((0.0, 7.0), (float("nan"), float("nan"))):  # slope 0 means: not scaled
        (tmp_path / "ct.nii").write_bytes(header(slope=slope, inter=inter, sform=LPS_SFORM) + body().tobytes())
        np.testing.assert_array_equal(volume(tmp_path / "ct.nii").hu, body())
    (tmp_path / "ct.nii").write_bytes(header(slope=0.25, inter=-1024, sform=LPS_SFORM) + stored.tobytes())
    result = volume(tmp_path / "ct.nii")
    np.testing.assert_array_equal(result.hu, np.rint(stored * 0.25 - 1024))
    assert result.rounding == pytest.approx(0.5)


def test_qform_is_used_without_sform_and_units_are_read(tmp_path: Path) -> None:
    quaternion = (0, 0, 1, 0, 0, 0)  # half a turn about z: RAS -> LPS
    (tmp_path / "ct.nii").write_bytes(header(qform=quaternion) + body().tobytes())
    result = volume(tmp_path / "ct.nii")
    np.testing.assert_array_equal(result.hu, body())
    assert result.spacing == pytest.approx(SPACING)
    metres = np.array(LPS_SFORM) / 1000
    (tmp_path / "ct.nii").write_bytes(header(sform=metres, units=1) + body().tobytes())
    assert volume(tmp_path / "ct.nii").spacing == pytest.approx(SPACING)


def test_flipped_bit_in_gzip_is_found(tmp_path: Path) -> None:
    path = tmp_path / "ct.nii.gz"
    plain = header((64, 64, 30), sform=LPS_SFORM) + body((30, 64, 64)).tobytes()
    raw = bytearray(gzip.compress(plain))
    raw[len(raw) // 2] ^= 0x10
    path.write_bytes(raw)
    refused(path, "truncated")


def test_gzip_of_several_members_and_plain_content(tmp_path: Path) -> None:
    plain = header(sform=LPS_SFORM) + body().tobytes()
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "ct.nii.gz").write_bytes(gzip.compress(plain[:500]) + gzip.compress(plain[500:]))
    np.testing.assert_array_equal(volume(tmp_path / "b" / "ct.nii.gz").hu, body())
    (tmp_path / "b" / "ct.nii.gz").write_bytes(plain)  # never compressed
    np.testing.assert_array_equal(volume(tmp_path / "b" / "ct.nii.gz").hu, body())
    (tmp_path / "a" / "ct.nii").write_bytes(gzip.compress(plain))  # compressed without saying so
    np.testing.assert_array_equal(volume(tmp_path / "a" / "ct.nii").hu, body())


def test_without_orientation(tmp_path: Path) -> None:
    (tmp_path / "ct.nii").write_bytes(header() + body().tobytes())
    assert "neither qform nor sform" in refused(tmp_path / "ct.nii", "no_orientation")
    analyze = tmp_path / "analyze"
    analyze.mkdir()
    (analyze / "ct.hdr").write_bytes(header(magic=b"\0\0\0\0", offset=0.0)[:348])
    (analyze / "ct.img").write_bytes(body().tobytes())
    refused(analyze / "ct.hdr", "no_orientation")
    (analyze / "ct.img").unlink()
    assert "ct.img, are missing" in refused(analyze / "ct.hdr", "unreadable")


@pytest.mark.parametrize(("head", "voxels"), [("CT.HDR", "CT.IMG"), ("CT.HDR", "CT.IMG.GZ"), ("ct.hdr", "ct.img.gz")])
def test_pairs_in_either_case(tmp_path: Path, head: str, voxels: str) -> None:
    (tmp_path / head).write_bytes(header(magic=b"ni1\0", sform=LPS_SFORM, offset=0.0)[:348])
    plain = body().tobytes()
    (tmp_path / voxels).write_bytes(gzip.compress(plain) if voxels.lower().endswith(".gz") else plain)
    np.testing.assert_array_equal(volume(tmp_path / head).hu, body())
    (found,) = find(tmp_path)
    assert found.files == (tmp_path / head, tmp_path / voxels)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"hello" * 200, "unreadable"),
        (b"\x1f\x8b\x08 not gzip at all", "truncated"),
        (header((0, 5, 5), sform=LPS_SFORM), "unreadable"),
        (header((30000, 30000, 30000), sform=LPS_SFORM), "too_large"),
        (header(sform=LPS_SFORM, code=128) + body().tobytes(), "vector"),
        (header(sform=LPS_SFORM, offset=float("nan")) + body().tobytes(), "unreadable"),
        (header(sform=np.full((3, 4), np.nan)) + body().tobytes(), "no_orientation"),
        (header(qform=(0, 0, 1, 0, 0, 0), pixdim=(1, 0.8, 0.0, 2.5)) + body().tobytes(), "no_spacing"),
    ],
)
def test_damaged_headers(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "ct.nii.gz").write_bytes(content)
    refused(tmp_path / "ct.nii.gz", reason)
