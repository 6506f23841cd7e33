"""One case of `evaluate`: prediction and label brought to one order of voxels, then scored.

A file is a task for a process of its own, so nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_curation.volumes import Found
from downstream import geometry, metrics
from downstream.cases import CaseError, Labels

__all__ = ["Aligned", "Task", "attempt", "read_aligned", "tolerances"]


@dataclass(frozen=True)
class Task:
    """Files of one case, what is in them, and the tolerance of each organ in mm."""

    name: str
    prediction: Path
    label: Path
    labels: Labels
    tolerance: Mapping[str, float]
    image: Found | None = None


@dataclass(frozen=True)
class Aligned:
    """Label values [Z, Y, X] in LPS order on one grid, 0 where `ignored` (None: nowhere); `place` is that grid."""

    predicted: NDArray[np.uint8]
    label: NDArray[np.uint8]
    ignored: NDArray[np.bool_] | None
    place: geometry.Place

    @property
    def spacing(self) -> tuple[float, float, float]:
        """mm along z, y, x."""
        x, y, z = self.place.spacing
        return z, y, x


def attempt(task: Task) -> dict[str, metrics.Score] | str:
    """The scores of each organ, or why there are none."""
    try:
        case = read_aligned(task)
    except CaseError as fault:
        return str(fault)
    return metrics.scores(case.predicted, case.label, case.spacing, task.labels.organs, task.tolerance, case.ignored)


def read_aligned(task: Task) -> Aligned:
    """Both label maps of a case; the same grid stored in another order of axes is the same grid.

    CaseError: a file cannot be read, holds a value without a name, or lies on another grid.
    """
    ignore = task.labels.ignore
    read = [geometry.read_labelmap(path) for path in (task.prediction, task.label)]
    place, *others = (geometry.lps(volume.place) for volume in reversed(read))
    if different := geometry.difference(others[0], place):
        raise CaseError(
            f"{task.name}: prediction and label lie on different grids: {different}; predict on the labelled image"
        )
    predicted, label = (np.ascontiguousarray(geometry.to_lps(volume.array, volume.place)) for volume in read)
    ignored = None
    if ignore is not None and bool((found := label == ignore).any()):
        ignored = found
        predicted[ignored], label[ignored] = 0, 0
    known = {0, *(value for values in task.labels.organs.values() for value in values)}
    for path, volume in ((task.prediction, predicted), (task.label, label)):
        unknown = sorted(set(np.flatnonzero(np.bincount(volume.ravel(), minlength=256)).tolist()) - known)
        if unknown:
            raise CaseError(
                f"{task.name}: {path} holds label values {unknown[:5]}, which have no name; known: {sorted(known)}"
            )
    return Aligned(predicted, label, ignored, place)


def tolerances(given: float | Mapping[str, float], organs: Sequence[str]) -> dict[str, float]:
    """The tolerance of each organ, mm; `default` is that of those not named. CaseError for a name that is none."""
    if not isinstance(given, Mapping):
        return dict.fromkeys(organs, given)
    unknown = sorted(set(given) - {*organs, "default"})
    if unknown:
        raise CaseError(f"tolerance names {unknown}, which are no organs; there are {', '.join(organs)}")
    missing = [organ for organ in organs if organ not in given]
    if missing and "default" not in given:
        raise CaseError(
            f"tolerance says nothing of {', '.join(missing[:5])}; name each organ, or add `default`, such as "
            "tolerance={pancreas: 2.0, default: 1.0}"
        )
    return {organ: given.get(organ, given.get("default", 0.0)) for organ in organs}
