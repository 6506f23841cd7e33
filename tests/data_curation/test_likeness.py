"""The same scan is found again however it was repackaged; scans of different patients are not tied."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage

from data_curation import phantom
from data_curation.box import body_box
from data_curation.likeness import DOUBTS, HIGH_HU, LOW_HU, SIDE, SURE_BITS, shown, sign
from data_curation.likeness_match import Alike, Rules, alike, turned
from data_curation.volumes import find, read

Hu = NDArray[np.int16]
MM = 2.8  # what the box takes for the side of a pixel, true or not
SHAPE, SPACING = (40, 128, 128), (4.0, 2.8, 2.8)


class Signs:
    """The signs of some volumes, and which thumbnails were asked for."""

    def __init__(self, *volumes: Hu) -> None:
        signs = [[sign(shown(body_box(plane, (MM, MM), 6.0)[1].of(plane))) for plane in hu] for hu in volumes]
        self.codes = [np.array([one.code for one in volume], np.uint64) for volume in signs]
        self.doubts = [np.array([one.doubt for one in volume], np.uint64) for volume in signs]
        self.pictures = [
            np.stack([one.thumb for one in volume]) if volume else np.empty((0, SIDE, SIDE), np.uint8)
            for volume in signs
        ]
        self.loaded: set[int] = set()

    def thumbs(self, volume: int) -> NDArray[np.uint8]:
        self.loaded.add(volume)
        return self.pictures[volume]

    def alike(self, rules: Rules | None = None) -> list[Alike]:
        return alike(self.codes, self.doubts, self.thumbs, rules=rules)


@pytest.fixture(scope="module")
def patients() -> list[Hu]:
    return [phantom.make(seed, SHAPE, SPACING, centre_mm=20.0 * (seed % 3)).hu for seed in range(8)]


def _averaged(hu: Hu, thick: int) -> Hu:
    whole = len(hu) // thick * thick
    return np.asarray(np.rint(hu[:whole].reshape(-1, thick, *hu.shape[1:]).mean(1)), np.int16)


def _zoomed(hu: Hu, *factors: float) -> Hu:
    zoomed = ndimage.zoom(hu.astype(np.float32), factors, order=1, grid_mode=True, mode="nearest")
    return np.asarray(np.rint(zoomed), np.int16)


def _noisy(hu: Hu, size: int) -> Hu:
    return (hu + np.random.default_rng(0).integers(-size, size + 1, hu.shape)).astype(np.int16)


def _with_table(hu: Hu) -> Hu:
    copy = hu.copy()
    copy[:, 122:124, 10:118] = 50
    return copy


# What was done to the copy, and the share of its slices that must be known again.
REPACKAGED: dict[str, tuple[Callable[[Hu], Hu], float]] = {
    "plain": (lambda hu: hu, 1.0),
    "backwards": (lambda hu: hu[::-1], 1.0),
    "turned and backwards": (lambda hu: turned(hu, 6)[::-1], 1.0),
    "clipped": (lambda hu: np.clip(hu, -1000, 1000), 1.0),
    "windowed": (lambda hu: np.clip(hu, -200, 300), 1.0),
    "offset": (lambda hu: _noisy(hu, 1) + np.int16(1), 0.95),
    "noisy": (lambda hu: _noisy(hu, 15), 0.95),
    "every second slice": (lambda hu: hu[1::2], 1.0),
    "every fifth slice": (lambda hu: hu[2::5], 1.0),
    "between slices": (lambda hu: np.rint(hu[1:] / 2 + hu[:-1] / 2).astype(np.int16), 0.9),
    "twice as thick": (lambda hu: _averaged(hu, 2), 0.9),
    "three times as thick": (lambda hu: _averaged(hu, 3), 0.9),
    "resampled to 1.5 mm": (lambda hu: _zoomed(hu, 4 / 1.5, 2.8 / 1.5, 2.8 / 1.5), 0.9),
    "smaller pixels": (lambda hu: _zoomed(hu, 1, 1.37, 1.37), 0.9),
    "a part": (lambda hu: hu[10:24], 1.0),
    "another field of view": (lambda hu: np.pad(hu[:, 8:, 5:], ((0, 0), (30, 0), (0, 9)), constant_values=-1024), 0.9),
    "on a table": (_with_table, 0.9),
    "all at once": (lambda hu: turned(np.clip(_averaged(hu[6:36], 2), -1000, 1000), 3)[::-1], 0.9),
}  # fmt: skip


@pytest.mark.parametrize("what", REPACKAGED)
def test_a_planted_copy_is_found(what: str, patients: list[Hu]) -> None:
    change, share = REPACKAGED[what]
    signs = Signs(*patients[:4], change(patients[2]))
    (found,) = signs.alike(Rules(repeated=0.90))
    assert (found.first, found.second) == (2, 4)
    assert found.same.shape == (len(signs.codes[4]),)
    assert found.same.mean() >= share
    assert found.correlation >= 0.93


@pytest.mark.parametrize("turn", range(8))
def test_the_turn_leads_back(turn: int, patients: list[Hu]) -> None:
    signs = Signs(patients[0], turned(patients[0], turn))
    (found,) = signs.alike()
    difference = turned(signs.pictures[1], found.turn).astype(int) - signs.pictures[0]
    assert np.median(np.abs(difference)) <= 1
    assert found.same.all()


def test_different_patients_are_not_tied(patients: list[Hu]) -> None:
    copies = [hu for patient in patients for hu in (patient, np.clip(turned(patient[::2], 5), -1000, 400)[::-1])]
    found = Signs(*copies).alike()
    assert [(one.first, one.second) for one in found] == [(2 * i, 2 * i + 1) for i in range(len(patients))]


def test_thumbnails_alone_keep_patients_apart(patients: list[Hu]) -> None:
    """With codes of 16 bits nearly all pairs are proposed."""
    signs = Signs(*patients)
    assert signs.alike(Rules(bits=16, crowd=1000, correlation=0.87, distance=63)) == []
    assert len(signs.loaded) == len(patients)


def test_codes_alone_keep_patients_apart(patients: list[Hu]) -> None:
    signs = Signs(*patients)
    assert signs.alike(Rules(bits=16, crowd=1000, correlation=0.0, same=0.5, distance=8)) == []


def test_only_what_the_first_one_has_is_the_same(patients: list[Hu]) -> None:
    (found,) = Signs(patients[1][12:30], patients[1]).alike()
    expected = np.zeros(len(patients[1]), bool)
    expected[12:30] = True
    assert np.count_nonzero(found.same != expected) <= 2  # the next slice may look the same
    (other,) = Signs(patients[1], patients[1][12:30]).alike()
    assert other.same.all()


def test_copies_of_copies_are_all_tied(patients: list[Hu]) -> None:
    found = Signs(patients[0], patients[0][::2], patients[3], patients[0][::-1]).alike()
    assert [(one.first, one.second) for one in found] == [(0, 1), (0, 3), (1, 3)]


def test_thumbnails_are_loaded_only_for_what_is_proposed(patients: list[Hu]) -> None:
    signs = Signs(patients[0], patients[4], patients[4])
    assert len(signs.alike()) == 1
    assert signs.loaded == {1, 2}


def test_a_code_in_a_crowd_proposes_nothing(patients: list[Hu]) -> None:
    signs = Signs(*[patients[0][10:20]] * 3)
    assert len(signs.alike()) == 3
    signs.loaded.clear()
    assert signs.alike(Rules(crowd=2)) == []
    assert not signs.loaded


def test_in_a_crowd_all_bits_count(patients: list[Hu]) -> None:
    (found,) = Signs(*patients, patients[5][::-1]).alike(Rules(bits=3, crowd=3))
    assert (found.first, found.second) == (5, 8)


def test_chunks_change_nothing(patients: list[Hu]) -> None:
    signs = Signs(*patients[:3], *(hu[::2] for hu in patients[:3]))
    whole, parts = signs.alike(), signs.alike(Rules(chunk=1))
    assert len(whole) == 3
    assert [(one.first, one.second, one.turn) for one in whole] == [(one.first, one.second, one.turn) for one in parts]


def test_nothing_to_compare(patients: list[Hu]) -> None:
    air = np.full((5, 64, 64), -1000, np.int16)
    assert Signs().alike() == []
    assert Signs(air, air, air[:0], patients[0]).alike() == []
    assert Signs(patients[0][:2], patients[0][:2]).alike() == []  # two slices are too few to tie


def test_a_slice_that_shows_nothing_has_no_code() -> None:
    noise = np.random.default_rng(0).normal(0, 10, (90, 90)).astype(np.int16)
    for empty in (np.full((64, 64), -1000), np.full((64, 64), 40), np.zeros((3, 50)), np.zeros((0, 0)), noise):
        one = sign(empty.astype(np.int16))
        assert (one.code, one.doubt) == (0, 0)
        assert one.thumb.shape == (SIDE, SIDE)


@pytest.mark.parametrize("shape", [(32, 32), (64, 96), (45, 33), (17, 200), (8, 9), (350, 400), (4500, 40)])
def test_a_cell_is_the_mean_of_its_area(shape: tuple[int, int]) -> None:
    hu = np.random.default_rng(1).integers(-1200, 1200, shape).astype(np.int16)
    fine = np.clip(hu, LOW_HU, HIGH_HU).astype(float)
    for axis, n in enumerate(shape):
        parts = np.repeat(fine, SIDE, axis)  # now every cell has n whole pixels along this axis
        fine = np.add.reduceat(parts, np.arange(SIDE) * n, axis) / n
    expected = (fine - LOW_HU) * 255 / (HIGH_HU - LOW_HU)
    assert np.abs(sign(hu).thumb - expected).max() <= 0.51


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), turn=st.integers(0, 7), height=st.integers(40, 90), width=st.integers(40, 90))
def test_the_code_ignores_turns(seed: int, turn: int, height: int, width: int) -> None:
    rough = np.random.default_rng(seed).normal(40, 900, (height, width))
    hu = ndimage.gaussian_filter(rough, 3).astype(np.int16)
    one, other = sign(hu), sign(turned(hu[None], turn)[0])
    assert one.code.bit_length() == 64
    assert one.doubt.bit_count() == DOUBTS
    assert one.doubt >> (63 - SURE_BITS) << (63 - SURE_BITS) == one.doubt
    # Rounding may turn over a bit whose coefficient is nearly zero, and rarely a whole axis with it.
    assert (one.code ^ other.code).bit_count() <= 2 or (one.code ^ other.code) & one.doubt


def test_strides_do_not_matter() -> None:
    hu = phantom.make(3, (2, 128, 128), (5.0, 2.8, 2.8)).hu
    view = hu.transpose(0, 2, 1)[::-1, ::2, ::-1][0]
    assert sign(view).code == sign(np.ascontiguousarray(view)).code


def test_the_body_without_table_and_air(patients: list[Hu]) -> None:
    def cropped(plane: Hu) -> Hu:
        return shown(body_box(plane, (MM, MM), 6.0)[1].of(plane))

    plane = patients[0][20]
    body = cropped(plane)
    assert body.shape[0] < 110
    wide = np.pad(_with_table(plane[None])[0], ((9, 40), (70, 3)), constant_values=-1024)
    moved = cropped(wide)
    assert np.abs(np.subtract(moved.shape, body.shape)).max() <= 1
    assert shown(np.full((50, 50), -1000, np.int16)).size == 0


def test_known_pairs_among_real_scans(real_ct: Path) -> None:
    """Two parts of one scan, a DICOM series and its NIfTI twin, one scan at two resolutions; all others differ."""
    parts = ("ts_example/ct", "sts_002_multimodal/CT", "sts_gtv", "elastix_lung/3DCT_lung", "innereye", "slicer_ct")
    volumes = {}
    for one in find(real_ct):
        if not one.reason and one.source.startswith(parts) and not any(x in one.source for x in ("mask", "seg", "Seg")):
            volumes[one.source] = read(one).hu
    names = list(volumes)
    assert len(names) >= 18
    found = {(names[one.first], names[one.second]) for one in Signs(*volumes.values()).alike()}
    assert {tuple(sorted(pair)) for pair in found} == {
        ("elastix_lung/3DCT_lung.mha", "elastix_lung/3DCT_lung_baseline_small.mha"),
        ("sts_002_multimodal/CT_dicom", "sts_002_multimodal/CT_image.nii.gz"),
        ("ts_example/ct.nii.gz", "ts_example/ct_sm.nii.gz"),
    }
