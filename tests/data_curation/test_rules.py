"""Each rule with its settings: what it keeps, mends and refuses. Rules on values are in test_checks.py too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from data_curation import rules
from data_curation.catalogue import cases
from data_curation.checks import check, repair
from data_curation.grid import Grid, Volume, VolumeError, to_lps
from data_curation.histogram import measure
from data_curation.rules import Limits
from data_curation.volumes import Found, load, of_grid, read

GRADIENT = np.array([7.0, -3.0, 5.0])  # HU a mm along x, y, z


def stack(places: NDArray[np.float64], tilt: float = 0.0, side: int = 24, start: float = 0.0) -> Grid:
    """Slices of 2 mm pixels whose gantry leans by `tilt` degrees; their HU are linear in the patient's space."""
    c, s = np.cos(np.radians(tilt)), np.sin(np.radians(tilt))
    row, column = np.array([2.0, 0, 0]), np.array([0, 2.0 * c, 2.0 * s])
    normal = np.cross(row, column) / 4
    j, i = np.mgrid[:side, :side]
    offsets = i[..., None] * row + j[..., None] * column
    hu = np.stack([start + (offsets + place) @ GRADIENT for place in places])
    step = float(np.median(np.diff(places @ normal))) if len(places) > 1 else 1.0
    affine = np.column_stack([row, column, normal * step, places[0]])
    return Grid(hu.astype(np.float32), affine, places=places)


def along_z(*z: float) -> NDArray[np.float64]:
    return np.array([[-20.0, -30.0, place] for place in z])


def volume(hu: NDArray[np.int16], spacing: tuple[float, float, float] = (2.0, 1.0, 1.0)) -> Volume:
    return Volume(hu.astype(np.int16), spacing, "x.nii.gz")


def refusal(grid: Grid, **changes: object) -> tuple[str, str]:
    with pytest.raises(VolumeError) as caught:
        of_grid(grid, "x", Limits.model_validate(changes))
    return caught.value.reason, str(caught.value)


def test_every_rule_is_asked_and_its_settings_are_flat() -> None:
    asked = {rule.__module__ for rule in (*rules.OF_GRIDS, *rules.OF_VOLUMES, *rules.REPAIRS, *rules.REFUSALS)}
    files = {path.stem for path in Path(rules.__file__).parent.glob("*.py")} - {"__init__"}
    assert {name.rsplit(".", 1)[1] for name in asked} | {"floats", "max_voxels"} == files
    defaults = Limits()
    assert (defaults.min_side, defaults.min_slices, defaults.repair_offset) == (16, 2, True)
    assert (defaults.tilt, defaults.uneven, defaults.phases, defaults.padding) == ("keep", "keep", "refuse", "keep")


# --------------------------------------------------------------------------------------------------------- geometry


@pytest.mark.parametrize("tilt", [-18.5, 8.0, 20.0])
def test_a_resampled_tilt_puts_every_voxel_where_it_was_measured(tilt: float) -> None:
    grid = stack(along_z(*np.arange(0, 80, 5)), tilt)
    kept = of_grid(grid, "x")
    assert kept.hu.shape == grid.voxels.shape
    assert kept.notes[0] == f"gantry tilt {abs(tilt):.1f} degrees: slices kept as acquired"
    upright = rules.tilt.apply(grid, Limits(tilt="resample"))
    assert upright.notes == (f"gantry tilt {abs(tilt):.1f} degrees: resampled onto the patient's axes, linear",)
    voxels, spacing, _ = to_lps(upright)
    inside = voxels[6:9, 10:14, 10:14]
    for axis, slope in ((2, GRADIENT[0]), (1, GRADIENT[1]), (0, GRADIENT[2])):
        np.testing.assert_allclose(np.diff(inside, axis=axis), slope * spacing[axis], rtol=1e-3)
    z, y, x = 7, 12, 12
    place = upright.affine @ (x, y, z, 1)
    assert upright.voxels[z, y, x] == pytest.approx(place @ GRADIENT, abs=0.01)
    reason, text = refusal(grid, tilt="refuse")
    assert reason == "tilted"
    assert f"gantry tilt {abs(tilt):.1f} degrees" in text


def test_the_real_tilted_head_in_all_three_ways(real_ct: Path) -> None:
    (case,), _ = cases("folder", real_ct / "ge_head_tilt_dicom")
    kept = read(case.image)
    assert kept.hu.shape == (28, 512, 512)
    upright = read(case.image, Limits(tilt="resample", uneven="resample"))
    assert upright.notes[0].startswith("uneven slice spacing 1.08 to 7.00 mm: resampled")
    assert upright.notes[1].startswith("gantry tilt 18.5 degrees: resampled")
    assert upright.hu.min() >= -1024
    assert upright.hu.shape[0] > 28
    grid = load(case.image)
    turned = rules.tilt.apply(rules.uneven.apply(grid, Limits(uneven="resample")), Limits(tilt="resample"))
    assert grid.places is not None
    k, j, i = np.random.default_rng(0).integers(0, np.array(grid.voxels.shape)[:, None], (3, 20000))
    places = grid.places[k] + np.stack([i, j], -1) @ grid.affine[:, :2].T
    x, y, z = np.rint((places - turned.affine[:, 3]) / np.diag(turned.affine)).astype(int).T
    depth, height, width = turned.voxels.shape  # even steps end up to a step before the last slice
    inside = (z < depth) & (y < height) & (x < width)
    measured = np.maximum(grid.voxels[k, j, i], -1024)[inside]
    assert inside.mean() > 0.95
    assert np.corrcoef(measured, turned.voxels[z[inside], y[inside], x[inside]])[0, 1] > 0.95
    for change, reason in (({"tilt": "refuse"}, "tilted"), ({"uneven": "refuse"}, "uneven")):
        with pytest.raises(VolumeError) as caught:
            read(case.image, Limits.model_validate(change))
        assert caught.value.reason == reason


@settings(max_examples=25, deadline=None)
@given(apart=st.lists(st.floats(1.0, 4.0), min_size=4, max_size=12))
def test_even_slices_lie_between_their_neighbours(apart: list[float]) -> None:
    """A field that is linear along the stack is met exactly wherever the new slices lie."""
    z = np.concatenate([[0.0], np.cumsum(apart)])
    grid = stack(along_z(*z), side=8, start=500.0)
    even = rules.uneven.apply(grid, Limits(uneven="resample", uneven_tolerance=0.0))
    if not even.notes:
        assert np.ptp(apart) <= 0.02
        return
    assert even.places is not None
    np.testing.assert_allclose(np.diff(even.places[:, 2]), np.median(apart), rtol=1e-9)
    j, i = np.mgrid[:8, :8]
    for plane, place in zip(even.voxels, even.places, strict=True):
        at = np.stack([place[0] + 2 * i, place[1] + 2 * j, np.full(i.shape, place[2])], -1)
        np.testing.assert_allclose(plane, 500 + at @ GRADIENT, atol=0.01)


def test_uneven_spacing_has_a_tolerance() -> None:
    grid = stack(along_z(0, 5, 10, 15.4))
    assert "uneven slice spacing 5.00 to 5.40 mm: the median 5.00 is used" in of_grid(grid, "x").notes
    assert of_grid(grid, "x", Limits(uneven_tolerance=0.1)).notes == ()
    assert refusal(grid, uneven="refuse")[0] == "uneven"


def test_gaps_have_limits() -> None:
    grid = stack(along_z(0, 2, 4, 22))
    assert refusal(grid)[0] == "not_a_volume"
    assert "uneven" in of_grid(grid, "x", Limits(max_gap=20)).notes[0]
    assert "uneven" in of_grid(stack(along_z(0, 2, 4, 18)), "x").notes[0]


def test_oblique_and_non_axial_volumes_can_be_refused() -> None:
    c, s = np.cos(0.2), np.sin(0.2)
    affine = np.column_stack([[1.0, 0, 0], [0, c, s], [0, -s, c], [0, 0, 0]])
    turned = Grid(np.full((20, 20, 20), 40, np.int16), affine)
    assert "oblique by 11.5 degrees: resampled" in of_grid(turned, "x").notes[0]
    reason, text = refusal(turned, oblique="refuse")
    assert (reason, "oblique by 11.5 degrees" in text) == ("oblique", True)
    assert of_grid(turned, "x", Limits(oblique="refuse", oblique_degrees=12)).notes == ()
    sagittal = Grid(np.full((20, 30, 40), 40, np.int16), np.column_stack([np.eye(3)[:, [1, 2, 0]], np.zeros(3)]))
    assert of_grid(sagittal, "x").hu.shape == (30, 40, 20)
    reason, text = refusal(sagittal, non_axial="refuse")
    assert (reason, "20 sagittal slices of 30 x 40 pixels" in text) == ("non_axial", True)


def test_phases_of_a_four_dimensional_grid() -> None:
    grid = stack(along_z(0, 2, 4))
    both = replace(grid, voxels=np.stack([grid.voxels, grid.voxels + 100]))
    reason, text = refusal(both)
    assert (reason, "24 x 24 x 3 x 2 voxels" in text) == ("4d", True)
    first = of_grid(both, "x", Limits(phases="first"))
    np.testing.assert_array_equal(first.hu, of_grid(grid, "x").hu)
    assert "the first of 2 phases" in first.notes
    assert of_grid(replace(grid, voxels=grid.voxels[None]), "x").notes == of_grid(grid, "x").notes


def test_promised_voxels_have_a_limit() -> None:
    rules.max_voxels.fits((1000, 1000, 2000))
    with pytest.raises(VolumeError, match=r"more than limits.max_voxels") as caught:
        rules.max_voxels.fits((1000, 1000, 2001))
    assert caught.value.reason == "too_large"


# ------------------------------------------------------------------------------------------------------------ values


def padded() -> Volume:
    hu = np.random.default_rng(0).integers(-1000, 1000, (6, 40, 40)).astype(np.int16)
    hu[:, :4], hu[:, 4:6] = -3024, -2990
    return replace(volume(hu), padding=(-3024.0, -2974.0))


def test_padding_is_kept_or_made_air() -> None:
    given = padded()
    kept = rules.padding.apply(given, Limits())
    assert kept.hu is given.hu
    assert kept.notes == ("padding -3024 to -2974 on 15.0% of the voxels kept",)
    air = rules.padding.apply(given, Limits(padding="air"))
    assert air.notes == ("padding -3024 to -2974 on 15.0% of the voxels replaced by -1024",)
    np.testing.assert_array_equal(air.hu, np.where(given.hu < -2000, -1024, given.hu))
    undeclared = rules.padding.apply(replace(given, padding=None), Limits(padding="air"))
    assert undeclared.hu.min() == -2990
    assert given.hu.min() == -3024


def test_padding_of_a_real_chest_becomes_air(real_ct: Path) -> None:
    (case,) = (one for one in cases("folder", real_ct / "lidc0001_chest")[0] if one.source == "ct.nii.gz")
    kept, air = read(case.image), read(case.image, Limits(padding="air"))
    assert kept.notes == ("padding -2048 on 21.3% of the voxels kept",)
    assert air.notes == ("padding -2048 on 21.3% of the voxels replaced by -1024",)
    np.testing.assert_array_equal(air.hu[60], np.where(kept.hu[60] == -2048, -1024, kept.hu[60]))
    assert check(air, Limits()).kept


def test_declared_padding_that_is_tissue_is_left_alone() -> None:
    """Many headers say 0, which is water once the intercept is 0."""
    given = replace(padded(), padding=(0.0, 0.0))
    assert 0 in rules.padding.apply(given, Limits(padding="air")).hu


def test_tails_are_kept_and_told() -> None:
    hu = np.random.default_rng(0).integers(-1000, 1000, (6, 40, 40)).astype(np.int16)
    assert rules.tails.apply(volume(hu), Limits()).notes == ()
    hu[0, 0, 0] = 27572
    told = of_grid(Grid(hu, np.column_stack([np.eye(3), np.zeros(3)])), "x")
    assert told.notes == ("values up to 27572 HU, beyond 12 bits, kept",)
    assert told.hu.max() == 27572


def test_a_lost_spacing_can_be_given() -> None:
    hu = np.random.default_rng(0).integers(-1000, 1000, (3, 512, 512)).astype(np.int16)
    lost = volume(hu, (1.0, 1.0, 1.0))
    assert check(lost, Limits()).reason == "unknown_spacing"
    known = Limits(assumed_spacing=(2.5, 0.7, 0.7))
    mended = repair(lost, known)
    assert mended.spacing == (2.5, 0.7, 0.7)
    assert mended.notes == ("spacing was lost: 2.5 x 0.7 x 0.7 mm assumed",)
    assert check(mended, known).reason != "unknown_spacing"
    sure = volume(hu, (1.0, 0.7, 0.7))
    assert repair(sure, known) is sure


def test_the_least_range_of_floats_is_a_setting() -> None:
    unit = np.random.default_rng(0).random((6, 20, 20)).astype(np.float32)
    grid = Grid(unit, np.column_stack([np.eye(3), np.zeros(3)]))
    assert refusal(grid)[0] == "not_ct"
    assert of_grid(grid, "x", Limits(min_float_range=0.5)).rounding == pytest.approx(0.5, abs=0.01)


# ------------------------------------------------------------------------------------- what volumes are made of


@settings(max_examples=30, deadline=None)
@given(
    order=st.permutations(range(3)),
    flips=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    dtype=st.sampled_from(["<i2", ">i2", "u2", "i4", "f4", "f8"]),
)
def test_hu_are_the_same_however_they_lie_in_memory(
    order: list[int], flips: tuple[bool, bool, bool], dtype: str
) -> None:
    hu = np.random.default_rng(1).integers(0, 900, (40, 35, 50)).astype(dtype)
    axes = np.eye(3)[:, order] * np.where(flips, -1.0, 1.0)
    made = of_grid(Grid(hu, np.column_stack([axes, np.zeros(3)])), "x")
    back = made.hu
    stored = hu.transpose([2 - order.index(row) for row in (2, 1, 0)])
    expected = stored[tuple(slice(None, None, -1 if flips[order.index(row)] else 1) for row in (2, 1, 0))]
    np.testing.assert_array_equal(back, expected)
    assert back.dtype == np.int16
    assert abs(back.strides[0]) >= max(abs(back.strides[1]), abs(back.strides[2]))
    if dtype == "<i2" and order[2] == 2:
        assert np.shares_memory(back, hu)
    np.testing.assert_array_equal(measure(back).counts, measure(np.ascontiguousarray(back)).counts)


def test_counts_of_a_large_volume_are_a_fair_sample(real_ct: Path) -> None:
    path = real_ct / "lidc0001_chest" / "ct.nii.gz"
    hu = of_grid(load(Found(path, (path,), "nifti", "x")), "x").hu
    sampled = measure(hu)
    every = np.bincount(hu.ravel().astype(np.int32) + 32768, minlength=65536)
    assert (sampled.low, sampled.high) == (int(hu.min()), int(hu.max()))
    assert sampled.counts.sum() < every.sum() / 10
    for low, high in ((-1100, -50), (-300, 300), (-2048, -2048), (300, 3071)):
        share = every[low + 32768 : high + 32769].sum() / every.sum()
        assert sampled.between(low, high) == pytest.approx(share, abs=0.003)
