"""The HU window of a data set: nnU-Net's normalisation of CT."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from downstream.labels import CaseError
from pretrain.data.window import HuWindow

__all__ = ["ct_window", "histogram", "percentiles"]


def histogram(values: NDArray[np.int16]) -> dict[int, int]:
    """Value -> how often it occurs."""
    found, counts = np.unique(values, return_counts=True)
    return dict(zip(found.tolist(), counts.tolist(), strict=True))


def ct_window(histograms: Iterable[Mapping[int, int]]) -> HuWindow:
    """Cut to the 0.5 and 99.5 percentiles of foreground HU, mean to 0, deviation to 1.

    Exact, over every foreground voxel that the histograms (HU -> voxels) count; nnU-Net draws 10,000 a case.
    """
    values, counts = _total(histograms)
    low, high = _at(values, counts, (0.005, 0.995))
    mean = float(values @ counts / counts.sum())
    std = math.sqrt(float((values - mean) ** 2 @ counts / counts.sum()))
    return HuWindow(low=low, high=max(high, low + 1), mean=mean, std=max(std, 1.0))


def percentiles(histograms: Iterable[Mapping[int, int]], shares: Sequence[float]) -> list[float]:
    """The values below which these shares of the voxels lie."""
    return _at(*_total(histograms), shares)


def _total(histograms: Iterable[Mapping[int, int]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Values in order, and how often each occurs."""
    total: dict[int, int] = {}
    for histogram in histograms:
        for value, count in histogram.items():
            total[value] = total.get(value, 0) + count
    if not total:
        raise CaseError(
            "no training case has any foreground to take an HU window of; check the labels, or fine-tune with "
            "normalisation=pretraining"
        )
    values = np.array(sorted(total), dtype=np.float64)
    return values, np.array([total[int(value)] for value in values], dtype=np.float64)


def _at(values: NDArray[np.float64], counts: NDArray[np.float64], shares: Sequence[float]) -> list[float]:
    ranks = np.cumsum(counts)
    return [float(values[np.searchsorted(ranks, share * ranks[-1])]) for share in shares]
