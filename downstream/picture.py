"""One PNG that shows what a run made: the slice, what the backbone sees in it, what was predicted, what is true."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

__all__ = ["Row", "draw", "overlay", "pca_colours", "windowed"]

Floats = NDArray[np.float64]
AIR_HU = -300
MARGIN_MM = 10.0

# Twelve hues that stay apart on a grey ground, also for the commonest colour blindness; more classes repeat them.
COLOURS = (
    "#d55e00", "#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#f0e442",
    "#0072b2", "#b2df8a", "#fb9a99", "#cab2d6", "#a6761d", "#66c2a5",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """What one line of the picture shows; every array is one axial slice in display orientation."""

    title: str
    hu: NDArray[np.int16]  # [Y, X]
    spacing: tuple[float, float]  # (y, x) mm, so that the body keeps its proportions
    features: Floats  # [h, w, 3] in 0..1, from pca_colours
    predicted: NDArray[np.integer]  # [Y, X]
    truth: NDArray[np.integer]  # [Y, X]


def windowed(hu: NDArray[np.integer], level: float = 40.0, width: float = 400.0) -> Floats:
    """HU of any shape as grey values 0..1 under a window; the default is the radiologist's abdominal window."""
    grey: Floats = np.clip((hu.astype(np.float64) - level + width / 2) / width, 0.0, 1.0)
    return grey


def pca_colours(maps: Sequence[Floats], bodies: Sequence[NDArray[np.bool_]]) -> list[Floats]:
    """The three leading components of patch features as red, green and blue.

    ``maps`` are [h, w, D] each, ``bodies`` [h, w] true where the patch lies on the body. The components are those of
    the body patches of all maps together, so that one tissue has one colour in every picture; air is drawn black.
    """
    tokens = np.concatenate([m[body] for m, body in zip(maps, bodies, strict=True)]).astype(np.float64)
    if len(tokens) < 3:
        return [np.zeros((*m.shape[:2], 3)) for m in maps]
    mean = tokens.mean(0)
    _, _, axes = np.linalg.svd(tokens - mean, full_matrices=False)
    axes = (
        axes[:3] * np.where(np.abs(axes[:3]).max(1) == axes[:3].max(1), 1.0, -1.0)[:, None]
    )  # the sign of an axis is free
    scores = (tokens - mean) @ axes.T
    low, high = np.percentile(scores, [2, 98], axis=0)
    return [
        np.clip(((m.astype(np.float64) - mean) @ axes.T - low) / np.maximum(high - low, 1e-9), 0, 1) * body[..., None]
        for m, body in zip(maps, bodies, strict=True)
    ]


def overlay(grey: Floats, labels: NDArray[np.integer], opacity: float = 0.55) -> Floats:
    """Grey [Y, X] in 0..1 under coloured labels [Y, X] -> RGB [Y, X, 3]; label 0 leaves the grey as it is."""
    palette = np.array([to_rgb(colour) for colour in COLOURS])
    colour = palette[(labels.astype(np.int64) - 1) % len(palette)]
    share = np.where(labels > 0, opacity, 0.0)[..., None]
    blended: Floats = grey[..., None] * (1 - share) + colour * share
    return blended


def _body_box(row: Row) -> tuple[float, float, float, float]:
    """Top, bottom, left and right of what is not air, in mm, with a centimetre around it; all of an empty slice."""
    edges = []
    for axis, step in enumerate(row.spacing):
        there = np.flatnonzero((row.hu > AIR_HU).any(1 - axis))
        first, last = (there[0], there[-1] + 1) if len(there) else (0, row.hu.shape[axis])
        edges += [float(first * step - MARGIN_MM), float(last * step + MARGIN_MM)]
    return edges[0], edges[1], edges[2], edges[3]


def draw(path: Path, rows: Sequence[Row], names: Mapping[int, str], title: str) -> Path:
    """Writes the picture: one line of four panels a row, the legend of the organs (label -> name) below."""
    figure = Figure(figsize=(11.5, 2.15 * len(rows) + 1.1), dpi=110, facecolor="black", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), 4, squeeze=False)
    figure.suptitle(title, color="white", fontsize=12)
    for line, row in zip(axes, rows, strict=True):
        grey = windowed(row.hu)
        height, width = row.hu.shape[0] * row.spacing[0], row.hu.shape[1] * row.spacing[1]
        panels = (grey, row.features, overlay(grey, row.predicted), overlay(grey, row.truth))
        top, bottom, left, right = _body_box(row)
        for axis, panel in zip(line, panels, strict=True):
            axis.imshow(panel, cmap="gray", vmin=0, vmax=1, extent=(0, width, height, 0), interpolation="nearest")
            axis.set_xlim(left, right)
            axis.set_ylim(bottom, top)
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_ylabel(row.title, color="white", fontsize=9)
    for axis, text in zip(axes[0], ("CT", "backbone features (PCA)", "prediction", "truth"), strict=True):
        axis.set_title(text, color="white", fontsize=10)
    palette = [Patch(color=COLOURS[(label - 1) % len(COLOURS)], label=name) for label, name in names.items() if label]
    figure.legend(handles=palette, loc="outside lower center", ncols=6, frameon=False, labelcolor="white", fontsize=9)
    figure.savefig(path, facecolor="black")
    return path
