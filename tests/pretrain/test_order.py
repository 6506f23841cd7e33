"""The order of the samples: permutations, shares of several sources, and that all follows from a sample's number."""

from __future__ import annotations

import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.order import TABLE, Order, Source, deal, sample_order, whole_counts

COUNTS = st.lists(st.integers(1, 40), min_size=1, max_size=9)
SOURCES = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 9)), min_size=1, max_size=6)


def _order(sources: list[tuple[int, int]], seed: int) -> Order:
    """Sources of these lengths and weights, every other slice of the corpora left out."""
    runs, first = [], 0
    for length, _ in sources:
        runs.append([(first + 2 * i, first + 2 * i + 1) for i in range(length)])
        first += 2 * length
    return Order.of([Source(run) for run in runs], [Fraction(weight) for _, weight in sources], seed)


@pytest.mark.parametrize("length", [1, 2, 3, 7, 64, 1000, 12345])
def test_every_epoch_is_a_permutation_of_its_own(length: int) -> None:
    epochs = sample_order(np.arange(3 * length), length, seed=0).reshape(3, length)
    assert (np.sort(epochs, 1) == np.arange(length)).all()
    if length > 10:
        assert (epochs[0] != epochs[1]).any()
        assert (epochs[0] != sample_order(np.arange(length), length, seed=1)).any()


def test_the_order_looks_random() -> None:
    length = 5000
    order = sample_order(np.arange(20 * length), length, seed=0).reshape(20, length)
    steps = np.diff(order) % length
    counts = np.histogram(steps, bins=50, range=(0, length))[0]
    assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 100  # chi-square of 49 degrees of freedom
    halves = (order[:, : length // 2] < length // 2).mean()
    assert halves == pytest.approx(0.5, abs=0.01)
    assert abs(np.corrcoef(order[0], order[1])[0, 1]) < 0.06
    small = np.stack([sample_order(np.arange(e * 4, e * 4 + 4), 4, seed=0) for e in range(2400)])
    _, tally = np.unique(small, axis=0, return_counts=True)
    assert len(tally) == 24
    assert ((tally - 100) ** 2 / 100).sum() < 60  # all 24 orders of 4, 23 degrees of freedom


def test_the_order_needs_no_memory_and_little_time() -> None:
    positions = np.arange(512, dtype=np.int64) + 10**12
    start = time.process_time()
    order = sample_order(positions, 3_868_833, seed=0)
    assert time.process_time() - start < 0.1
    assert len(np.unique(order)) == 512
    assert order.max() < 3_868_833


@given(COUNTS)
def test_no_count_is_ever_one_away_from_its_share(counts: list[int]) -> None:
    source, number = deal(counts)
    total = sum(counts)
    for k, count in enumerate(counts):
        own = source == k
        dealt = np.cumsum(own)
        # In whole numbers: |dealt - n count / total| < 1 for every n.
        assert (np.abs(dealt * total - np.arange(1, total + 1) * count) < total).all()
        assert (number[own] == np.arange(count)).all()


@given(SOURCES, st.integers(0, 3), st.integers(1, 400))
@settings(max_examples=50)
def test_shares_epochs_and_positions_of_many_sources(sources: list[tuple[int, int]], seed: int, samples: int) -> None:
    order = _order(sources, seed)
    chosen = order.at(np.arange(samples))
    source, position = order.place(np.arange(samples))
    weights = sum(weight for _, weight in sources)
    for k, (length, weight) in enumerate(sources):
        own = source == k
        assert abs(own.sum() - Fraction(samples * weight, weights)) < 1
        assert (position[own] == np.arange(own.sum())).all()
        there = set(order.sources[k].slices(np.arange(length)).tolist())
        assert len(there) == length
        for epoch in range(0, int(own.sum()), length):  # all of them, once, before any comes again
            seen = chosen[own][epoch : epoch + length].tolist()
            assert len(set(seen)) == len(seen)
            assert set(seen) <= there
            assert len(seen) < length or set(seen) == there


@given(SOURCES, st.integers(0, 10**9), st.integers(1, 4), st.integers(1, 8))
@settings(max_examples=50)
def test_any_part_of_the_order_can_be_asked_for_alone(
    sources: list[tuple[int, int]], start: int, ranks: int, images: int
) -> None:
    order = _order(sources, 5)
    whole = order.at(np.arange(start, start + ranks * images))
    parts = [order.at(np.arange(images) + start + rank * images) for rank in range(ranks)]
    assert (np.concatenate(parts) == whole).all()
    assert [int(order.at(np.array([start + i]))[0]) for i in range(len(whole))] == whole.tolist()


@given(st.integers(1, 500), st.integers(0, 2**40))
def test_one_source_is_the_order_of_one_corpus(length: int, start: int) -> None:
    samples = np.arange(start, start + 64)
    order = Order.of([Source([(0, length)])], [Fraction(length)], 3)
    assert (order.at(samples) == sample_order(samples, length, 3)).all()


def test_sources_of_one_length_have_orders_of_their_own() -> None:
    order = _order([(500, 1), (500, 1)], 0)
    first, second = (order.slices(k, np.arange(500)) - 1000 * k for k in range(2))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.15


@given(st.lists(st.fractions(Fraction(1, 10**4), 10**3, max_denominator=10**4), min_size=1, max_size=12))
@settings(max_examples=50)
def test_whole_counts_are_the_shares(shares: list[Fraction]) -> None:
    total = sum(shares)
    if min(shares) / total < Fraction(1, 2 * TABLE):
        return  # refused, or held exactly by a small table
    counts = whole_counts(shares)
    assert sum(counts) <= TABLE
    for share, count in zip(shares, counts, strict=True):
        assert count > 0
        assert abs(share / total - Fraction(count, sum(counts))) < Fraction(len(shares), TABLE)


def test_simple_shares_are_exact() -> None:
    assert whole_counts([Fraction(2), Fraction(1)]) == (2, 1)
    assert whole_counts([Fraction("0.7"), Fraction("0.2"), Fraction("0.1")]) == (7, 2, 1)
    assert whole_counts([Fraction(3_868_833)]) == (1,)
    assert sum(whole_counts([Fraction(3_868_833), Fraction(12_345), Fraction(678)])) <= TABLE


def test_a_share_of_less_than_one_in_the_table_is_named() -> None:
    with pytest.raises(ValueError) as error:
        whole_counts([Fraction(10**9), Fraction(7)])
    assert error.value.args == (1,)
