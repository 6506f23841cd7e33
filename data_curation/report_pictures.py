"""The pictures of a report: histograms, contact sheet, overview. All are PNG bytes or grey pixels."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from data_curation.box import BODY_HU
from data_curation.report import HU_EDGES, Facts, Tile

__all__ = ["LEVEL", "TILE", "WINDOW", "charts", "contact_sheet", "overview", "png"]

LEVEL, WINDOW = 40, 400  # HU: the usual soft-tissue window
TILE = 168  # pixels
INK = {False: ("#1d2329", "#c3c9d0"), True: ("#dde3ea", "#46505b")}  # dark? -> text, lines
COLOURS = ("#3b78c3", "#e08a1e", "#2f9e77", "#c2528b", "#7a6cc9", "#a5761d", "#4aa8c9", "#8c939b")


def contact_sheet(tiles: Sequence[Tile], columns: int = 8) -> NDArray[np.uint8]:
    """The slices side by side in the window, each cut to its body and scaled to TILE pixels on its longer side in mm.

    uint8 [Y, X]; columns and rows of pixels stay in proportion to their spacing.
    """
    rows = -(-len(tiles) // columns)
    sheet = np.zeros((rows * TILE, min(columns, len(tiles)) * TILE), np.uint8)
    for i, tile in enumerate(tiles):
        hu = _body(tile.hu)
        seen = np.clip((hu.astype(np.float32) - (LEVEL - WINDOW / 2)) / WINDOW, 0, 1)
        extent = np.array(seen.shape) * tile.spacing
        size = np.maximum(1, np.rint(extent / extent.max() * TILE)).astype(int)
        factor = size / seen.shape
        smooth = ndimage.gaussian_filter(seen, np.maximum(0, 0.45 * (1 / factor - 1)))
        small = ndimage.zoom(smooth, factor, order=1, mode="nearest", grid_mode=True)[:TILE, :TILE]
        top, left = (TILE - small.shape[0]) // 2, (TILE - small.shape[1]) // 2
        y, x = i // columns * TILE + top, i % columns * TILE + left
        sheet[y : y + small.shape[0], x : x + small.shape[1]] = np.rint(small * 255).astype(np.uint8)
    return sheet


def _body(hu: NDArray[np.int16]) -> NDArray[np.int16]:
    """The rows and columns that show more than air, with a margin; table tops and noise hardly count."""
    body = hu > BODY_HU
    cuts = []
    for axis in (1, 0):
        filled = np.flatnonzero(body.mean(axis) > 0.03)
        margin = hu.shape[1 - axis] // 50
        low, high = (filled[0], filled[-1] + 1) if len(filled) else (0, hu.shape[1 - axis])
        cuts.append(slice(max(0, low - margin), high + margin))
    return hu[tuple(cuts)]


def charts(facts: Facts, dark: bool) -> bytes:
    """Four histograms as PNG, for a light or a dark page. Made without pyplot: no state is shared with other plots."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.6), dpi=110, facecolor="none")
    room = {"left": 0.06, "right": 0.99, "top": 0.95, "bottom": 0.05, "hspace": 0.3, "wspace": 0.16}
    _draw(figure.subplots(2, 2, gridspec_kw=room), facts, dark)
    return _drawn(figure)


def _draw(axes: Any, facts: Facts, dark: bool) -> None:
    ink, lines = INK[dark]
    shown = _few(facts)
    for ax, measure, title in zip(
        axes.flat,
        (facts.between, facts.within, facts.depth),
        ("mm between slices", "mm between pixels", "slices of a volume"),
        strict=False,
    ):
        groups = [np.concatenate([measure[name] for name in names]) for names in shown.values()]
        values = np.concatenate(groups)
        low, high = float(values.min()), float(values.max())
        pad = max((high - low) * 0.02, abs(high) * 0.02, 0.5 if measure is facts.depth else 1e-3)
        ax.hist(groups, np.linspace(low - pad, high + pad, 31), stacked=True, color=COLOURS[: len(groups)])
        ax.set_ylabel("volumes", color=ink)
        ax.set_title(title, color=ink, fontsize=10)
    last = axes.flat[3]
    for (label, names), colour in zip(shown.items(), COLOURS, strict=False):
        share = np.mean([facts.hu[name] for name in names], axis=0)
        last.stairs(100 * share, HU_EDGES, color=colour, label=label, linewidth=1.4)
    last.set_yscale("log")
    last.set_ylim(bottom=2e-3)
    last.set_ylabel("% of pixels", color=ink)
    last.set_title("HU of sampled slices", color=ink, fontsize=10)
    last.legend(frameon=False, fontsize=8, labelcolor=ink)
    for ax in axes.flat:
        ax.set_facecolor("none")
        ax.tick_params(colors=ink, labelsize=8)
        ax.yaxis.get_major_locator().set_params(**({} if ax is last else {"integer": True}))
        for side, spine in ax.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(lines)


def _few(facts: Facts) -> Mapping[str, list[str]]:
    """At most as many groups as there are colours; the smallest data sets go together."""
    names = [s.name for s in sorted(facts.sets, key=lambda s: -s.volumes)]
    if len(names) <= len(COLOURS):
        return {name: [name] for name in names}
    kept = len(COLOURS) - 1
    return {name: [name] for name in names[:kept]} | {f"{len(names) - kept} others": names[kept:]}


def overview(facts: Facts) -> bytes:
    """report.png: counts, histograms and contact sheet in one picture."""
    from matplotlib.figure import Figure

    sheets = {name: contact_sheet(tiles) for name, tiles in facts.tiles.items()}
    heights = [sheet.shape[0] / TILE * 1.42 + 0.3 for sheet in sheets.values()]
    figure = Figure(figsize=(11.4, 6.4 + sum(heights)), dpi=100, facecolor="white")
    parts: Any = figure.subfigures(2, 1, height_ratios=(6.4, sum(heights)))
    top, bottom = parts
    volumes, slices = sum(s.volumes for s in facts.sets), sum(s.slices for s in facts.sets)
    refused = sum(refusal.count for refusal in facts.refusals)
    state = "splits are apart" if not facts.wrong else "BROKEN: " + "; ".join(facts.wrong)
    top.suptitle(
        f"{volumes:,} volumes, {slices:,} slices kept, {refused:,} files refused; {state}\n{facts.fingerprint}",
        fontsize=10,
    )
    _draw(
        top.subplots(2, 2, gridspec_kw={"hspace": 0.42, "top": 0.86, "bottom": 0.08, "left": 0.07, "right": 0.98}),
        facts,
        False,
    )
    rows = np.atleast_1d(
        bottom.subplots(
            len(sheets),
            1,
            height_ratios=heights,
            gridspec_kw={"top": 0.96, "bottom": 0.02, "left": 0.02, "right": 0.98},
        )
    )
    for ax, (name, sheet) in zip(rows, sheets.items(), strict=True):
        ax.imshow(sheet, cmap="gray", vmin=0, vmax=255)
        ax.set_title(name, fontsize=9, loc="left", parse_math=False)
        ax.set_axis_off()
    return _drawn(figure)


def _drawn(figure: Any) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def png(picture: NDArray[np.uint8]) -> bytes:
    """Grey pixels as a PNG file."""
    import imagecodecs

    return bytes(imagecodecs.png_encode(picture))
