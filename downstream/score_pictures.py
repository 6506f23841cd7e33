"""Pictures of a score page, as PNG bytes: box plots of the measures, contours of label and prediction on one slice."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_curation.grid import AIR, VolumeError
from data_curation.volumes import Found, load
from downstream.cases import CaseError
from downstream.geometry import Place, place_of, planes
from downstream.metrics import Score
from downstream.scoring import Aligned, Task, read_aligned

__all__ = ["Shown", "boxes", "draw"]

INK = "#1d2329"
LABEL, PREDICTION = "#1b9e77", "#d95f02"  # apart for the commonest colour blindness, too
MARGIN_MM = 25.0  # around the organ
CT_FLOOR = -200  # an image that goes below holds HU


@dataclass(frozen=True)
class Shown:
    """A case to be drawn, and the organ that it is about; "": all organs."""

    task: Task
    organ: str = ""


def draw(shown: Shown) -> tuple[bytes, str] | str:
    """The axial slice on which label and prediction differ most: PNG, and what it shows; or why there is none."""
    try:
        case = read_aligned(shown.task)
    except CaseError as fault:
        return str(fault)
    organs = shown.task.labels.organs
    named = {shown.organ: organs[shown.organ]} if shown.organ else dict(organs)
    values = np.array(sorted({value for some in named.values() for value in some}), np.uint8)
    z = _most_different(case, values)
    masks = {
        name: (np.isin(case.label[z], members), np.isin(case.predicted[z], members)) for name, members in named.items()
    }
    grey, note = np.zeros(case.label.shape[1:]), "no image"
    if shown.task.image is not None:
        try:
            grey, note = _window(_plane(shown.task.image, case.place, z)), ""
        except (VolumeError, OSError) as fault:
            note = f"{shown.task.image.path}: {fault}"
    if note:  # the labelled voxels themselves, so that there is something to see
        grey = np.where(case.label[z] > 0, 0.35, 0.1)
    told = f"slice {z + 1} of {len(case.label)}" + (f"; {note}" if note else "")
    return _contours(grey, masks, case.spacing[1:], bool(shown.organ)), told


def _most_different(case: Aligned, values: NDArray[np.uint8]) -> int:
    """Of slices that agree alike, the one that has the most of the organs."""
    wrong, there = [], []
    for said, true in zip(case.predicted, case.label, strict=True):
        member = np.isin(true, values)
        wrong.append(int(np.count_nonzero((said != true) & (member | np.isin(said, values)))))
        there.append(int(np.count_nonzero(member)))
    return int(np.lexsort((there, wrong))[-1])


def _plane(found: Found, place: Place, z: int) -> NDArray[Any]:
    """The image's values at the voxels of slice `z` of a grid [Y, X], whatever the image's own grid is."""
    grid = load(found)
    one = Place((*place.size[:2], 1), np.column_stack([place.affine[:, :3], place.position(np.array([0.0, 0.0, z]))]))
    ((_, fractional),) = planes(place_of(grid), one)
    at = np.rint(fractional).astype(int)
    inside = ((at >= 0) & (at < np.array(grid.voxels.shape[::-1]))).all(-1)
    values = np.full(inside.shape, min(AIR, float(grid.voxels.min())))
    i, j, k = at[inside].T
    values[inside] = grid.voxels[k, j, i]
    return values


def _window(values: NDArray[Any]) -> NDArray[Any]:
    """Grey from 0 to 1: the abdominal window of a CT, the percentiles 1 and 99 of anything else."""
    low, high = (-160.0, 240.0) if values.min() < CT_FLOOR else np.percentile(values, [1, 99])
    grey: NDArray[Any] = np.clip((values - low) / max(high - low, 1e-6), 0, 1)
    return grey


def _contours(
    grey: NDArray[Any],
    masks: Mapping[str, tuple[NDArray[np.bool_], NDArray[np.bool_]]],
    spacing: Sequence[float],
    close: bool,
) -> bytes:
    from matplotlib.figure import Figure

    rows, columns = ((np.arange(n) + 0.5) * step for n, step in zip(grey.shape, spacing, strict=True))
    height, width = rows[-1] + rows[0], columns[-1] + columns[0]
    top, bottom, left, right = 0.0, height, 0.0, width
    where = np.argwhere(np.any([mask for pair in masks.values() for mask in pair], axis=0))
    if close and len(where):
        (top, left), (bottom, right) = where.min(0) * spacing - MARGIN_MM, (where.max(0) + 1) * spacing + MARGIN_MM
    share = min(max((bottom - top) / (right - left), 0.3), 2.0)
    figure = Figure(figsize=(4.0, 4.0 * share), dpi=100, facecolor="black")
    axis = figure.add_axes((0, 0, 1, 1))
    axis.imshow(grey, cmap="gray", vmin=0, vmax=1, extent=(0, width, height, 0), interpolation="nearest")
    around = [np.array([-0.5 * step, *at, at[-1] + step]) for step, at in zip(spacing, (rows, columns), strict=True)]
    for said_and_true, colour, style in ((0, LABEL, "solid"), (1, PREDICTION, "dashed")):
        for pair in masks.values():
            if pair[said_and_true].any():
                padded = np.pad(pair[said_and_true], 1).astype(float)
                axis.contour(around[1], around[0], padded, [0.5], colors=colour, linewidths=1.2, linestyles=style)
    axis.set_xlim(left, right)
    axis.set_ylim(bottom, top)
    axis.set_axis_off()
    return _png(figure)


def boxes(scores: Mapping[str, Mapping[str, Score]], organs: Sequence[str]) -> bytes:
    """Dice, NSD and HD95 of all cases: a box and its points for each organ; values that are not finite are left out."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 0.9 + 0.27 * len(organs)), dpi=100, facecolor="none", layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    draws = np.random.default_rng(0)
    for axis, (measure, title) in zip(axes, (("dice", "Dice"), ("nsd", "NSD"), ("hd95", "HD95, mm")), strict=True):
        for row, organ in enumerate(organs):
            values = np.array([getattr(scores[name][organ], measure) for name in sorted(scores)], np.float64)
            _box(axis, row, values[np.isfinite(values)], draws)
        axis.set_title(title, fontsize=10, color=INK)
        axis.set_yticks(np.arange(len(organs)), organs, fontsize=8, color=INK, parse_math=False)
        axis.grid(axis="x", color="#d9dee4", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.set_ylim(len(organs) - 0.4, -0.6)
        axis.set_xlim(*((-0.02, 1.02) if measure != "hd95" else (0, None)))
    return _png(figure)


def _box(axis: Any, row: int, values: NDArray[np.float64], draws: np.random.Generator) -> None:
    """Quartiles as a box, the median in it, whiskers to the furthest values within 1.5 boxes, and every value."""
    if not len(values):
        return
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    reach = 1.5 * (high - low)
    ends = values[(values >= low - reach) & (values <= high + reach)]
    axis.plot([ends.min(), ends.max()], [row, row], color=INK, linewidth=1)
    axis.barh(row, high - low, 0.6, low, facecolor="white", edgecolor=INK)
    axis.plot([middle, middle], [row - 0.3, row + 0.3], color=PREDICTION, linewidth=2)
    axis.scatter(values, row + draws.uniform(-0.2, 0.2, len(values)), s=6, color=LABEL, alpha=0.5, zorder=3)


def _png(figure: Any) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()
