"""Dice, NSD and HD95 against values worked out by hand; intervals that are what a bootstrap of cases must give."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from downstream.metrics import bootstrap, score, scores


def box(*sides: tuple[int, int], shape: tuple[int, int, int] = (20, 20, 20)) -> NDArray[np.bool_]:
    mask = np.zeros(shape, bool)
    mask[tuple(slice(*side) for side in sides)] = True
    return mask


def test_a_shifted_line_of_voxels() -> None:
    """Ten voxels in a row against the same row one row further: no overlap, every surface distance is one voxel."""
    label, prediction = box((5, 6), (5, 6), (3, 13)), box((5, 6), (6, 7), (3, 13))
    far = score(prediction, label, (4.0, 1.5, 0.5), tolerance=1.0)
    assert (far.dice, far.nsd) == (0.0, 0.0)
    assert far.hd95 == pytest.approx(1.5)
    assert score(prediction, label, (4.0, 0.9, 0.5), tolerance=1.0).nsd == 1.0
    assert score(prediction, label, (4.0, 1.0, 0.5), tolerance=1.0).nsd == 1.0, "the tolerance itself is within"


def test_a_line_that_is_too_long() -> None:
    """Label 10 voxels, prediction 14 of which 10 agree; the four distances beyond are 1, 2, 3, 4 voxels of 2 mm."""
    label, prediction = box((5, 6), (5, 6), (2, 12)), box((5, 6), (5, 6), (2, 16))
    found = score(prediction, label, (1.0, 1.0, 2.0), tolerance=4.0)
    assert found.dice == pytest.approx(2 * 10 / 24)
    assert found.nsd == pytest.approx((10 + 2 + 10) / 24)
    # 14 distances 0 ... 0, 2, 4, 6, 8: the 95th percentile lies at position 0.95 * 13 = 12.35.
    assert found.hd95 == pytest.approx(6 + 0.35 * 2)


def test_spacing_belongs_to_its_axis() -> None:
    label = box((5, 6), (5, 6), (5, 6))
    for axis, spacing in enumerate((3.0, 5.0, 7.0)):
        moved = np.roll(label, 1, axis)
        assert score(moved, label, (3.0, 5.0, 7.0)).hd95 == pytest.approx(spacing)


def test_a_cube_touching_the_border_has_its_whole_surface() -> None:
    label, prediction = box((0, 3), (0, 3), (0, 3), shape=(3, 3, 5)), box((0, 3), (0, 3), (0, 4), shape=(3, 3, 5))
    found = score(prediction, label, (1, 1, 1), tolerance=0.5)
    # The cube's surface is 27 - 1 voxels, that of the box 36 - 2; the box's face of 9 lies one voxel off, and of the
    # cube the middle of the far face (1 voxel) has become the inside of the box.
    assert found.dice == pytest.approx(2 * 27 / (27 + 36))
    assert found.nsd == pytest.approx((26 - 1 + 34 - 9) / (26 + 34))


def test_perfect_empty_missed_and_invented() -> None:
    organ, nothing = box((3, 9), (3, 9), (3, 9)), np.zeros((20, 20, 20), bool)
    perfect = score(organ, organ, (1, 1, 1))
    assert (perfect.dice, perfect.nsd, perfect.hd95) == (1.0, 1.0, 0.0)
    both = score(nothing, nothing, (1, 1, 1))
    assert math.isnan(both.dice)
    assert math.isnan(both.nsd)
    assert math.isnan(both.hd95)
    for prediction, label in ((nothing, organ), (organ, nothing)):
        lost = score(prediction, label, (1, 1, 1))
        assert (lost.dice, lost.nsd, lost.hd95) == (0.0, 0.0, math.inf)


@pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")  # MONAI uses its own old argument
def test_the_crop_around_an_organ_changes_nothing_and_monai_agrees() -> None:
    from monai.metrics import compute_dice, compute_hausdorff_distance, compute_surface_dice
    from torch import from_numpy

    rng = np.random.default_rng(0)
    label = np.zeros((12, 30, 30), np.uint8)
    label[3:9, 5:20, 6:22], label[2:5, 20:28, 3:9] = 1, 3
    prediction = np.roll(label, (1, 2, -1), (0, 1, 2))
    prediction[rng.random(label.shape) < 0.02] = 1
    spacing = (2.5, 0.8, 0.8)
    found = scores(prediction, label, spacing, {"one": [1], "two": [2], "three": [3], "both": [1, 3]}, 1.0)
    assert math.isnan(found["two"].dice)
    for name, values in (("one", [1]), ("three", [3]), ("both", [1, 3])):
        y, p = (from_numpy(np.isin(volume, values)[None, None].astype(np.float32)) for volume in (label, prediction))
        assert found[name].dice == pytest.approx(compute_dice(p, y).item(), abs=1e-6)
        nsd = compute_surface_dice(p, y, [1.0], include_background=True, spacing=spacing)
        assert found[name].nsd == pytest.approx(nsd.item(), abs=1e-6)
        hd95 = compute_hausdorff_distance(p, y, include_background=True, percentile=95, spacing=spacing)
        assert found[name].hd95 == pytest.approx(hd95.item(), rel=1e-5)


def surface(mask: NDArray[np.bool_], ignored: NDArray[np.bool_]) -> list[tuple[int, ...]]:
    """Voxel by voxel: those with a neighbour outside of the mask that is not ignored, or at the volume's border."""
    found = []
    for at in map(tuple, np.argwhere(mask).tolist()):
        for axis, step in ((axis, step) for axis in range(3) for step in (-1, 1)):
            other = tuple(value + step * (number == axis) for number, value in enumerate(at))
            outside = any(not 0 <= value < size for value, size in zip(other, mask.shape, strict=True))
            if outside or not (mask[other] or ignored[other]):
                found.append(at)
                break
    return found


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.05, 0.9), st.floats(0, 0.4), st.sampled_from([0.5, 1.0, 2.1]))
def test_against_brute_force(seed: int, filled: float, unknown: float, tolerance: float) -> None:
    """Every distance between every pair of surface voxels, also where some voxels are to be ignored."""
    rng = np.random.default_rng(seed)
    shape, spacing = tuple(rng.integers(1, 6, 3)), np.array([2.0, 0.7, 0.1])
    label, prediction = rng.random(shape) < filled, rng.random(shape) < filled
    ignored = rng.random(shape) < unknown
    values = [mask * np.uint8(3) for mask in (prediction & ~ignored, label & ~ignored)]
    found = scores(*values, spacing, {"a": [3]}, tolerance, ignored)["a"]
    p, y = prediction & ~ignored, label & ~ignored
    if not p.any() and not y.any():
        assert math.isnan(found.dice)
        return
    assert found.dice == pytest.approx(2 * (p & y).sum() / (p.sum() + y.sum()))
    edges = [np.array(surface(mask, ignored)).reshape(-1, 3) for mask in (p, y)]
    if not all(map(len, edges)) or not p.any() or not y.any() or np.array_equal(p, y):
        return
    table = np.sqrt((((edges[0][:, None] - edges[1][None]) * spacing) ** 2).sum(-1))
    one, other = table.min(1), table.min(0)
    near = (one <= tolerance).sum() + (other <= tolerance).sum()
    assert found.nsd == pytest.approx(near / (len(one) + len(other)))
    assert found.hd95 == pytest.approx(max(np.quantile(one, 0.95), np.quantile(other, 0.95)))


def test_a_border_with_ignored_voxels_is_no_surface() -> None:
    """5 x 5 x 5 voxels of an organ that goes on into ignored ones; the prediction begins one voxel later."""
    label, prediction = box((3, 8), (3, 8), (3, 13)), box((3, 8), (3, 8), (4, 13))
    ignored = box((0, 20), (0, 20), (8, 20))
    found = score(prediction, label, (1, 1, 1), 0.5, ignored)
    assert found.dice == pytest.approx(2 * 100 / (125 + 100))
    # Surfaces without the face to the ignored voxels: a face of 25 and 4 rims of 16; of the prediction
    # 9 voxels of its face lie behind the label's, and the rims are the same.
    assert found.nsd == pytest.approx((64 + 64) / (25 + 64 + 9 + 64))
    cut = score(prediction & ~ignored, label & ~ignored, (1, 1, 1), 0.5)
    assert cut.nsd == pytest.approx((64 + 9 + 64 + 9) / (25 + 64 + 9 + 9 + 64 + 9)), "that face would speak for both"
    assert math.isnan(score(prediction & ignored, label & ignored, (1, 1, 1), 0.5, ignored).dice)


def test_each_organ_has_its_tolerance() -> None:
    label = np.zeros((9, 9, 9), np.uint8)
    label[2:5, 2:5, 2:5], label[6:8, 6:8, 6:8] = 1, 2
    prediction = np.roll(label, 1, 0)
    found = scores(prediction, label, (2, 2, 2), {"a": [1], "b": [2]}, {"a": 2.0, "b": 1.9})
    assert found["a"].nsd == 1.0
    assert 0 < found["b"].nsd < 1


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 2, 2\).*\(2, 2, 3\)"):
        scores(np.zeros((2, 2, 2), np.uint8), np.zeros((2, 2, 3), np.uint8), (1, 1, 1), {"a": [1]})


def test_intervals_hold_the_mean_repeat_and_shrink() -> None:
    rng = np.random.default_rng(1)
    table = rng.normal(0.8, 0.1, (200, 2))
    each, whole = bootstrap(table, seed=3)
    assert bootstrap(table, seed=3) == (each, whole)
    assert bootstrap(table, seed=4) != (each, whole)
    for organ, interval in enumerate(each):
        assert interval.mean == pytest.approx(table[:, organ].mean())
        # A mean of 200 draws with sigma 0.1 has a standard error of 0.0071, so the interval is about 0.028 wide.
        assert 0.022 < interval.high - interval.low < 0.034
    assert whole.mean == pytest.approx(table.mean())
    few, _ = bootstrap(table[:10], seed=3)
    assert few[0].high - few[0].low > 2 * (each[0].high - each[0].low)


def test_absent_organs_do_not_count() -> None:
    table = np.array([[0.5, np.nan, np.nan], [0.7, 0.9, np.nan], [0.6, np.inf, np.nan]])
    each, whole = bootstrap(table)
    assert (each[0].mean, each[0].cases) == (pytest.approx(0.6), 3)
    assert (each[1].mean, each[1].cases) == (pytest.approx(0.9), 1)
    assert math.isnan(each[1].low), "one case has no interval"
    assert math.isnan(each[2].mean)
    assert (whole.mean, whole.cases) == (pytest.approx(0.75), 3)
