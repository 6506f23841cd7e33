"""The validation fold: the same cases whoever asks, in any order and spelling."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from data_curation.folds import drawn, fold_of

NUMBERS = st.sets(st.integers(0, 9999), min_size=5, max_size=60)


@given(NUMBERS, st.integers(2, 6), st.randoms())
def test_folds_part_the_names_evenly_whatever_their_order(numbers: set[int], folds: int, random: object) -> None:
    names = [f"case_{n:05d}" for n in numbers]
    random.shuffle(names)  # type: ignore[attr-defined]
    parts = [fold_of(names, fold, folds) for fold in range(folds)]
    assert sorted(name for part in parts for name in part) == sorted(names)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert parts == [fold_of(sorted(names), fold, folds) for fold in range(folds)]


@given(NUMBERS)
def test_a_case_goes_by_its_number(numbers: set[int]) -> None:
    held = {int(name) for name in fold_of([str(n) for n in numbers])}
    for spelt in ("amos_{:04d}", "volume-{}", "KiTS2023_{:05d}", "img{:04d}.x"):
        assert fold_of([spelt.format(n) for n in numbers]) == {spelt.format(n) for n in held}


def test_names_that_share_a_number_or_have_none_go_by_themselves() -> None:
    for names in (["a_1", "b_1", "c_2", "d_3", "e_4"], ["left", "right", "up", "down", "in"]):
        parts = [fold_of(names, fold) for fold in range(5)]
        assert sorted(name for part in parts for name in part) == sorted(names)
    assert drawn(["a_1", "b_1", "c_2"]) == drawn(["c_2", "b_1", "a_1"])


def test_the_fold_never_changes() -> None:
    """Published scores and corpora rest on it: another order here would let held-out cases into training."""
    assert sorted(fold_of([str(n) for n in range(40)]), key=int) == ["11", "15", "17", "25", "30", "34", "36", "39"]
