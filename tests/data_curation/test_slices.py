"""The lossless round trip of a slice, the rule that chooses slices, and what is measured on each."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from data_curation.slices import CODECS, SliceError, SliceRule, checksum, content, cut, decode, encode, sha256

KINDS = {
    "any": lambda draw, shape: draw.integers(-32768, 32768, shape),
    "ends": lambda draw, shape: draw.choice([-32768, 32767], shape),
    "padded": lambda draw, shape: np.where(draw.random(shape) < 0.3, -3024, draw.integers(-1100, 3072, shape)),
    "flat": lambda draw, shape: np.full(shape, draw.integers(-32768, 32768)),
    "smooth": lambda draw, shape: np.cumsum(draw.integers(-30, 31, shape), axis=1).clip(-32768, 32767),
}


@pytest.mark.parametrize("codec", CODECS)
@settings(max_examples=150, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from(sorted(KINDS)), st.integers(0, 2**32 - 1))
def test_decode_undoes_encode(codec: str, height: int, width: int, kind: str, seed: int) -> None:
    hu = KINDS[kind](np.random.default_rng(seed), (height, width)).astype(np.int16)
    again = decode(encode(hu, codec), codec)
    assert again.dtype == np.int16
    assert again.flags.writeable
    np.testing.assert_array_equal(again, hu)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1), (1030, 517)])
def test_unusual_shapes(codec: str, shape: tuple[int, int]) -> None:
    hu = np.random.default_rng(0).integers(-32768, 32768, shape).astype(np.int16)
    np.testing.assert_array_equal(decode(encode(hu, codec), codec), hu)


def test_a_strided_view_is_stored_as_seen() -> None:
    volume = np.random.default_rng(0).integers(-1000, 1000, (9, 10, 11)).astype(np.int16)
    view = volume[::-1, :, 3].T[:, ::2]
    np.testing.assert_array_equal(decode(encode(view)), view)


@pytest.mark.parametrize(
    "wrong", [np.zeros((4, 4), np.int32), np.zeros((2, 4, 4), np.int16), np.zeros((0, 4), np.int16)]
)
def test_only_int16_images_are_stored(wrong: NDArray[np.int16]) -> None:
    with pytest.raises(SliceError, match=r"a slice is int16 \[Y, X\]"):
        encode(wrong)


def test_wrong_bytes_and_codecs_are_refused() -> None:
    with pytest.raises(SliceError, match=r"not a \.png image"):
        decode(b"not an image", "png")
    with pytest.raises(SliceError, match=r"not a \.j2c image"):
        decode(b"", "j2c")
    with pytest.raises(SliceError, match=r"no codec for \.pkl; there are: j2c, b2, png"):
        decode(b"", "pkl")


@given(st.binary())
def test_the_checksum_is_the_standard_crc32(data: bytes) -> None:
    assert checksum(data) == zlib.crc32(data)


def volume(depth: int = 12) -> NDArray[np.int16]:
    """Slices 0 and 1 are air, one pixel of body in slice 2, body in the others."""
    hu = np.random.default_rng(1).integers(-1010, -990, (depth, 40, 50)).astype(np.int16)
    hu[2, 20, 25] = 40
    hu[3:, 10:30, 10:40] = 30
    return hu


MM = (1.0, 1.0, 1.0)


def kept(hu: NDArray[np.int16], rule: SliceRule, spacing_z: float = 1.0) -> list[int]:
    return [one.z for one in cut(hu, (spacing_z, 1.0, 1.0), rule, {})]


def test_air_is_left_out_and_listed() -> None:
    left_out: dict[int, str] = {}
    assert [one.z for one in cut(volume(), MM, SliceRule(), left_out)] == list(range(3, 12))
    assert left_out == {0: "air", 1: "air", 2: "air"}
    assert kept(volume(), SliceRule(min_body=0)) == list(range(2, 12))
    assert kept(volume(), SliceRule(skip_air=False)) == list(range(12))


@settings(deadline=None)
@given(st.floats(0.3, 12), st.floats(0.3, 30))
def test_every_mm_keeps_slices_at_that_distance(spacing: float, every: float) -> None:
    hu = np.zeros((60, 2, 2), np.int16)
    left_out: dict[int, str] = {}
    chosen = np.array([one.z for one in cut(hu, (spacing, 1.0, 1.0), SliceRule(every_mm=every), left_out)])
    assert chosen[0] == 0
    assert left_out == dict.fromkeys(sorted(set(range(60)) - set(chosen.tolist())), "between")
    if every <= spacing:
        assert len(chosen) == 60
    else:
        assert np.all(np.diff(chosen) * spacing > every - spacing - 1e-3)
        assert np.all(np.diff(chosen) * spacing < every + spacing + 1e-3)


def test_statistics_are_those_of_numpy() -> None:
    hu = np.random.default_rng(2).integers(-1024, 3072, (64, 48)).astype(np.int16)
    one = next(cut(hu[None], MM, SliceRule(box="none"), {}))
    measured = one.statistics()
    assert (measured["hu_min"], measured["hu_max"]) == (hu.min(), hu.max())
    assert measured["hu_mean"] == pytest.approx(hu.mean())
    assert measured["hu_std"] == pytest.approx(hu.std())
    assert one.body_fraction == np.mean(hu > -500)


def test_content_sees_through_clipping_but_not_through_change() -> None:
    hu = np.random.default_rng(3).integers(-2000, 3000, (30, 20)).astype(np.int16)
    same, other = hu.clip(-1024, 1500), hu.copy()
    other[4, 5] = 0 if other[4, 5] else 1
    assert content(same) == content(hu)
    assert sha256(same) != sha256(hu)
    assert content(other) != content(same)
    assert content(hu.reshape(20, 30)) != content(same)
    assert content(np.full((9, 9), -1500, np.int16)) == ""


def test_what_is_stored_and_what_is_not() -> None:
    hu = np.full((1, 100, 120), -1000, np.int16)
    hu[0, 40:60, 50:80] = 30
    hu[0, 95, :] = 100  # a couch: thinner than a block
    one = next(cut(hu, (1.0, 0.75, 0.75), SliceRule(margin_mm=3.0), {}))
    assert (one.box.y, one.box.x, one.box.height, one.box.width) == (33, 45, 34, 42)
    np.testing.assert_array_equal(one.hu, hu[0, 33:67, 45:87])
    assert one.hu.flags.c_contiguous
    assert (one.outside_max, one.outside_body) == (100, 120 / 12000)
    assert one.frame == (100, 120)
    whole = next(cut(hu, (1.0, 0.75, 0.75), SliceRule(box="none"), {}))
    assert (whole.hu.shape, whole.outside_max, whole.outside_body) == ((100, 120), -32768, 0.0)
