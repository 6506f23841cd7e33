"""Which patches the student and its teachers are shown: exact counts on any grid, and where they lie."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pretrain.data.views import TeacherView, TeacherViews, batch_regions, draw_regions
from pretrain.data.window import HuWindow

Shown = NDArray[np.bool_]  # [crops, patches]


def teachers(*grids_and_masks: tuple[int, float], hidden: float = 0.75, **more: Any) -> TeacherViews:
    return TeacherViews(tuple(TeacherView(HuWindow(), 224, *one) for one in grids_and_masks), hidden, **more)


def shown(views: TeacherViews, grid: int, crops: int = 2, seed: int = 0, sample: int = 0) -> list[Shown]:
    """What each model is shown, the student first; what is drawn is checked on the way."""
    masks, kept = draw_regions(views, grid, crops, seed=seed, sample=sample)
    assert masks.shape == (crops, grid * grid)
    assert masks.dtype == np.bool_
    assert (grid * grid - masks.sum(1) == views.visible(grid)).all()
    made = [~masks]
    for teacher, patches in zip(views.of, kept, strict=True):
        own = np.zeros((crops, teacher.grid**2), np.bool_)
        assert (patches is None) == (teacher.mask == 0)
        if patches is None:
            own[:] = True
        else:
            assert patches.dtype == np.int64
            assert patches.shape == (crops, teacher.kept)
            assert (np.diff(patches, axis=1) > 0).all()
            np.put_along_axis(own, patches, True, 1)
        made.append(own)
    return made


def squares(side: int, grid: int, region: int) -> NDArray[np.int64]:
    """The square [side*side] of the student's grid that the centre of each patch lies in."""
    at = np.array([int(Fraction(2 * i + 1, 2 * side) * grid) // region for i in range(side)])
    return (at[:, None] * grid + at).ravel()


def partly(own: Shown, places: NDArray[np.int64]) -> int:
    """The most squares of a crop of which only some patches are shown."""
    return max(len(np.intersect1d(places[crop], places[~crop])) for crop in own)


@given(
    grid=st.integers(1, 16),
    of=st.lists(st.tuples(st.integers(1, 16), st.floats(0, 0.99)), min_size=1, max_size=4),
    hidden=st.floats(0, 0.99),
    nested=st.booleans(),
    region=st.integers(1, 5),
    crops=st.integers(1, 2),
    sample=st.integers(0, 2**40),
)
def test_laws(
    grid: int, of: list[tuple[int, float]], hidden: float, nested: bool, region: int, crops: int, sample: int
) -> None:
    """Exact counts; squares are shown whole but for one; a function of seed and sample; nested draws are a chain."""
    views = teachers(*of, hidden=hidden, nested=nested, region=region)
    made = shown(views, grid, crops, sample=sample)
    again = shown(views, grid, crops, sample=sample)
    assert all(np.array_equal(a, b) for a, b in zip(made, again, strict=True))
    grids = [grid, *(teacher.grid for teacher in views.of)]
    for own, side in zip(made, grids, strict=True):
        assert partly(own, squares(side, grid, region)) <= 1
        assert partly(own, squares(side, grid, 1)) <= 1, "whole patches of the student come first"
    if nested:
        for i, j in np.ndindex(len(made), len(made)):
            if grids[i] == grids[j] and made[i].sum() <= made[j].sum():
                assert (made[i] <= made[j]).all()


def test_counts_are_those_of_mae() -> None:
    views = teachers((14, 0.5), (14, 0.4), (14, 0.3))
    assert [views.visible(14), *(teacher.kept for teacher in views.of)] == [49, 98, 117, 137]
    assert teachers((10, 0.9)).of[0].kept == 10
    assert [TeacherView(HuWindow(), 16, side, 0.9).kept for side in (1, 2, 3)] == [1, 1, 1]
    for side in range(1, 40):
        for percent in range(100):
            exact = max(1, side**2 * (100 - percent) // 100)
            assert TeacherView(HuWindow(), 16, side, percent / 100).kept == exact
            assert teachers((1, 0), hidden=percent / 100).visible(side) == exact


def test_nested_regions_of_unequal_grids_show_the_same_places() -> None:
    """A teacher of 16 patches a side sees the squares of the student's 14, but where the numbers do not come out."""
    views = teachers((16, 0.5), (14, 0.5), hidden=0.5, nested=True)
    for sample in range(20):
        student, larger, equal = shown(views, 14, sample=sample)
        assert np.array_equal(student, equal)
        for crop in range(2):
            unlike = student[crop][squares(16, 14, 1)] != larger[crop]
            assert unlike.mean() < 0.12  # of 256; two draws for themselves differ in a half
    apart = [shown(teachers((16, 0.5), hidden=0.5), 14, sample=sample) for sample in range(20)]
    unlike = np.mean([student[0][squares(16, 14, 1)] != larger[0] for student, larger in apart])
    assert unlike == pytest.approx(0.5, abs=0.05)


def test_independent_draws_are_independent() -> None:
    """Of 196 patches the student and three teachers share as many as chance has it, and not the same ones."""
    views = teachers((14, 0.5), (14, 0.4), (14, 0.3))
    drawn = [shown(views, 14, sample=sample) for sample in range(500)]
    made = np.array(drawn).astype(float)  # [samples, models, crops, patches]
    share = np.array([49, 98, 117, 137]) / 196
    for i in range(4):
        for j in range(i):
            both = (made[:, i] * made[:, j]).mean()
            assert both == pytest.approx(share[i] * share[j], abs=0.005)
    first, second = made[:, :, 0], made[:, :, 1]
    assert (first * second).mean((0, 2)) == pytest.approx(share**2, abs=0.01), "crops have numbers of their own"
    everywhere = made.prod(1).mean() / share[0]
    assert everywhere == pytest.approx(0.209, abs=0.01), "of what the student sees, all three see a fifth"


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("region", [1, 2, 7])
def test_every_patch_is_as_likely_as_any_other(nested: bool, region: int) -> None:
    """At five deviations of 4000 draws of a fixed seed; on a grid of 16 patches squares of 1, 2 and 4 differ a bit."""
    views = teachers((14, 0.4), (16, 0.5), nested=nested, region=region)
    count = np.zeros(196), np.zeros(196), np.zeros(256)
    for sample in range(2000):
        for total, own in zip(count, shown(views, 14, sample=sample), strict=True):
            total += own.sum(0)
    for total, share, slack in zip(count, (0.25, 117 / 196, 0.5), (0, 0, 0.01), strict=True):
        assert total.sum() / 4000 == pytest.approx(len(total) * share)
        assert np.abs(total / 4000 - share).max() < 5 * np.sqrt(share * (1 - share) / 4000) + slack


def test_regions_are_whole() -> None:
    """Squares of 2x2 are kept together: 49 patches are 12 squares and one patch, 392 of 4x4 are 24 and a half."""
    views = teachers((14, 0.4), (28, 0.5), region=2)
    for sample in range(10):
        student, teacher, finer = shown(views, 14, sample=sample)
        for own, side, size in ((student, 14, 2), (teacher, 14, 2), (finer, 28, 4)):
            blocks = own.reshape(2, side // size, size, side // size, size).sum((2, 4)).reshape(2, 49)
            assert (np.isin(blocks, (0, size * size), invert=True).sum(1) == 1).all()
            assert (blocks.max(1) == size * size).all()


def test_seed_and_sample_matter() -> None:
    views = teachers((14, 0.5))
    first = shown(views, 14)[0]
    assert not np.array_equal(first, shown(views, 14, sample=1)[0])
    assert not np.array_equal(first, shown(views, 14, seed=1)[0])


def test_a_batch_of_regions_is_crop_major() -> None:
    views = teachers((7, 0.5), (14, 0.0), (14, 0.3))
    masks, kept = batch_regions(views, 14, 2, seed=3, samples=[5, 9, 6])
    assert kept[1] is None
    assert masks.counts == (147,) * 6
    for image, sample in enumerate((5, 9, 6)):
        own, patches = draw_regions(views, 14, 2, seed=3, sample=sample)
        for crop in range(2):
            row = 3 * crop + image
            assert np.array_equal(masks.masks[row].numpy(), own[crop])
            for teacher in (0, 2):
                found, expected = kept[teacher], patches[teacher]
                assert found is not None and expected is not None
                assert found[row].tolist() == expected[crop].tolist()


@pytest.mark.parametrize("wrong", [{"hidden": 1.0}, {"hidden": -0.1}, {"region": 0}])
def test_what_cannot_be_is_our_mistake(wrong: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        teachers((14, 0.5), **wrong)
    with pytest.raises(AssertionError):
        TeacherView(HuWindow(), 224, 14, 1.0)
