"""Compressed streams that lie about their size, and what reading them costs."""

from __future__ import annotations

import bz2
import gc
import gzip
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_curation import nifti
from data_curation.grid import VolumeError
from data_curation.payload import contents, hexadecimal, numbers
from tests.data_curation.test_nifti import LPS_SFORM, header

DATA = np.random.default_rng(0).integers(0, 50, 70_000, np.uint8).tobytes()


def save(folder: Path, content: bytes) -> Path:
    (folder / "v").write_bytes(content)
    return folder / "v"


def reason(path: Path, size: int, packing: str) -> str:
    with pytest.raises(VolumeError, match=" ") as caught:
        contents(path, size, packing)
    return caught.value.reason


def lying(packed: bytes, size: int) -> bytes:
    return packed[:-4] + (size % 2**32).to_bytes(4, "little")


MANY = b"".join(gzip.compress(DATA[at : at + 100], mtime=0) for at in range(0, len(DATA), 100))


@pytest.mark.parametrize(
    ("packing", "content"),
    [
        ("", DATA),
        ("", DATA + b"more"),
        ("auto", DATA),
        ("auto", gzip.compress(DATA, mtime=0)),
        ("deflate", gzip.compress(DATA, mtime=0)),
        ("deflate", zlib.compress(DATA)),
        ("gzip", gzip.compress(DATA + b"more", mtime=0)),
        ("gzip", gzip.compress(DATA, mtime=0) + b"\0" * 100_000),
        ("gzip", MANY),
        ("gzip", gzip.compress(b"", mtime=0) + b"\0\0" + gzip.compress(DATA, mtime=0)),
        ("gzip", gzip.compress(DATA, mtime=0) + gzip.compress(b"", mtime=0) * 3000),
        ("zlib", zlib.compress(DATA) + b"\0"),
        ("bzip2", bz2.compress(DATA)),
        ("bzip2", bz2.compress(DATA[:9]) + bz2.compress(DATA[9:])),
    ],
    ids=range(14),
)
def test_what_is_whole_is_read(tmp_path: Path, packing: str, content: bytes) -> None:
    assert contents(save(tmp_path, content), len(DATA), packing).tobytes() == DATA
    assert contents(save(tmp_path, b"start" + content), len(DATA), packing, 5).tobytes() == DATA


@pytest.mark.parametrize(
    ("packing", "content", "expected"),
    [
        ("", DATA[:-1], "truncated"),
        ("gzip", DATA, "truncated"),
        ("gzip", gzip.compress(DATA, mtime=0)[:-1], "truncated"),
        ("gzip", gzip.compress(DATA[:-1], mtime=0), "truncated"),
        ("gzip", lying(gzip.compress(DATA[:-1], mtime=0), len(DATA)), "truncated"),
        ("gzip", lying(gzip.compress(DATA, mtime=0), 5), "truncated"),
        ("gzip", gzip.compress(DATA, mtime=0) + b"garbage", "truncated"),
        ("gzip", MANY[:-30], "truncated"),
        ("gzip", gzip.compress(bytes(50_000_000), mtime=0), "unreadable"),
        ("zlib", zlib.compress(DATA)[:-1], "truncated"),
        ("zlib", zlib.compress(bytes(50_000_000)), "unreadable"),
        ("bzip2", bz2.compress(DATA)[:-1], "truncated"),
        ("bzip2", bz2.compress(bytes(50_000_000)), "unreadable"),
        ("bzip2", b"BZh9 hello", "truncated"),
    ],
    ids=range(14),
)
def test_what_lies_is_refused(tmp_path: Path, packing: str, content: bytes, expected: str) -> None:
    assert reason(save(tmp_path, content), len(DATA), packing) == expected


@pytest.mark.parametrize("packing", ["", "gzip", "zlib", "bzip2"])
def test_a_claim_costs_no_memory(tmp_path: Path, packing: str) -> None:
    """A promise of 4 TB, and a bomb, both in a few kilobytes."""
    pack = {"": bytes, "gzip": gzip.compress, "zlib": zlib.compress, "bzip2": bz2.compress}[packing]
    bomb = save(tmp_path, pack(bytes(20_000_000)) if packing else DATA)
    tracemalloc.start()
    assert reason(bomb, 2**42, packing) == "truncated"
    claimed = tracemalloc.get_traced_memory()[1]
    if packing:
        gc.collect()  # what the error's frames held
        tracemalloc.reset_peak()
        assert reason(bomb, 1000, packing) == "unreadable"
        assert tracemalloc.get_traced_memory()[1] < 6_000_000
    tracemalloc.stop()
    assert claimed < (30_000_000 if packing == "bzip2" else 1_000_000)


@given(st.binary(max_size=300), st.integers(0, 40), st.sampled_from(["gzip", "zlib", "bzip2"]), st.data())
def test_any_cut_or_flip_is_right_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, more: int, packing: str, draw: st.DataObject
) -> None:
    pack = {"gzip": gzip.compress, "zlib": zlib.compress, "bzip2": bz2.compress}[packing]
    raw = bytearray(pack(data + bytes(more)))
    raw[draw.draw(st.integers(0, len(raw) - 1))] ^= 1 << draw.draw(st.integers(0, 7))
    path = save(tmp_path_factory.mktemp("flip"), bytes(raw[: draw.draw(st.integers(1, len(raw)))]))
    try:
        read = contents(path, len(data) + more, packing).tobytes()
    except VolumeError:
        return
    assert read == data + bytes(more)


def test_texts(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(-999, 999, 400_000)
    path = save(tmp_path, b"x " + " ".join(map(str, values)).encode())
    np.testing.assert_array_equal(numbers(path, len(values), np.dtype(">i2"), 2), values)
    assert hexadecimal(save(tmp_path, b"x" + DATA.hex("\n", 3).encode()), len(DATA), 1).tobytes() == DATA
    for text, dtype in (
        (b"1 2 70000", "i2"),
        (b"1 2 3.5", "i2"),
        (b"1 2 nan", "u1"),
        (b"1 2 x", "f4"),
        (b"9" * 99, "f4"),
    ):
        with pytest.raises(VolumeError) as caught:
            numbers(save(tmp_path, text), 3, np.dtype(dtype))
        assert caught.value.reason == "unreadable"
    for content in (b"0g1122", b"\xff01122"):
        with pytest.raises(VolumeError, match="hexadecimal"):
            hexadecimal(save(tmp_path, content), 3)


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_reading_holds_the_file_and_one_volume(tmp_path: Path, ending: str) -> None:
    hu = np.random.default_rng(0).integers(-1000, 1500, (40, 128, 128)).astype(np.int16)
    plain = header((128, 128, 40), sform=LPS_SFORM) + hu.tobytes()
    stored = gzip.compress(plain, 1, mtime=0) if ending == ".nii.gz" else plain
    (tmp_path / f"ct{ending}").write_bytes(stored)
    nifti.load(tmp_path / f"ct{ending}")
    tracemalloc.start()
    grid = nifti.load(tmp_path / f"ct{ending}")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(grid.voxels, hu)
    assert peak < hu.nbytes + (len(stored) if ending == ".nii.gz" else 0) + 100_000


def test_too_large_is_said_before_anything_is_inflated(tmp_path: Path) -> None:
    path = tmp_path / "ct.nii.gz"
    path.write_bytes(gzip.compress(header((2000, 2000, 2000), sform=LPS_SFORM)))
    with pytest.raises(VolumeError, match=r"8,000,000,000 voxels, more than limits.max_voxels=2,000,000,000") as caught:
        nifti.load(path)
    assert caught.value.reason == "too_large"
    with pytest.raises(VolumeError, match="that the header promises"):
        nifti.load(path, max_voxels=8_000_000_000)
