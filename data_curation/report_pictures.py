"""The pictures of a report: histograms, contact sheet, overview. All are PNG bytes or grey pixels."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from data_curation.report_facts import HU_EDGES, SIZE_EDGES, Facts, Tile

__all__ = ["LEVEL", "TILE", "WINDOW", "charts", "contact_sheet", "overview", "png"]

LEVEL, WINDOW = 40, 400  # HU: the usual soft-tissue window
TILE = 168  # pixels
INK = {False: ("#1d2329", "#c3c9d0"), True: ("#dde3ea", "#46505b")}  # dark? -> text, lines
COLOURS = ("#3b78c3", "#e08a1e", "#2f9e77", "#c2528b", "#7a6cc9", "#a5761d", "#4aa8c9", "#8c939b")


def contact_sheet(tiles: Sequence[Tile], columns: int = 8) -> NDArray[np.uint8]:
    """The slices side by side in the window, each scaled to TILE pixels on its longer side in mm.

    uint8 [Y, X]; columns and rows of pixels stay in proportion to their spacing.
    """
    rows = -(-len(tiles) // columns)
    sheet = np.zeros((rows * TILE, min(columns, len(tiles)) * TILE), np.uint8)
    for i, tile in enumerate(tiles):
        hu = tile.hu
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


def charts(facts: Facts, dark: bool) -> bytes:
    """Six histograms as PNG, for a light or a dark page. Made without pyplot: no state is shared with other plots."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.6), dpi=110, facecolor="none")
    room = {"left": 0.06, "right": 0.99, "top": 0.95, "bottom": 0.05, "hspace": 0.3, "wspace": 0.24}
    _draw(figure.subplots(2, 3, gridspec_kw=room), facts, dark)
    return _drawn(figure)


def _draw(axes: Any, facts: Facts, dark: bool) -> None:
    ink, lines = INK[dark]
    shown = _few(facts)
    volumes = {name: facts.volumes.of(name) for names in shown.values() for name in names}
    measures: tuple[tuple[str, float, dict[str, NDArray[Any]]], ...] = (
        ("mm between slices", 1e-3, {name: one.between for name, one in volumes.items()}),
        ("mm between pixels", 1e-3, {name: one.within for name, one in volumes.items()}),
        ("slices of a volume", 0.5, {name: one.slices for name, one in volumes.items()}),
        ("share of the frame that is stored", 1e-3, {name: one.stored / one.frame for name, one in volumes.items()}),
    )
    for ax, (title, unit, measure) in zip(axes.flat, measures, strict=False):
        groups = [np.concatenate([measure[name] for name in names]) for names in shown.values()]
        values = np.concatenate(groups)
        low, high = float(values.min()), float(values.max())
        pad = max((high - low) * 0.02, abs(high) * 0.02, unit)
        ax.hist(groups, np.linspace(low - pad, high + pad, 31), stacked=True, color=COLOURS[: len(groups)])
        _labelled(ax, "volumes", title, ink)
    sizes, hu = axes.flat[4:]
    for (label, names), colour in zip(shown.items(), COLOURS, strict=False):
        sizes.stairs(sum(facts.sizes[name] for name in names), SIZE_EDGES, color=colour, linewidth=1.4)
        share = np.mean([facts.hu[name] for name in names], axis=0)
        hu.stairs(100 * share, HU_EDGES, color=colour, label=label, linewidth=1.4)
    _labelled(sizes, "slices", "kB of a stored slice", ink)
    _labelled(hu, "% of pixels", "HU of sampled slices", ink)
    hu.set_yscale("log")
    hu.set_ylim(bottom=2e-3)
    legend = hu.legend(frameon=False, fontsize=8, labelcolor=ink)
    for text in legend.get_texts():
        text.set_parse_math(False)
    for ax in axes.flat:
        ax.set_facecolor("none")
        ax.tick_params(colors=ink, labelsize=8)
        ax.yaxis.get_major_locator().set_params(**({} if ax is hu else {"integer": True}))
        for side, spine in ax.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(lines)


def _labelled(ax: Any, what: str, title: str, ink: str) -> None:
    ax.set_ylabel(what, color=ink)
    ax.set_title(title, color=ink, fontsize=10)


def _few(facts: Facts) -> Mapping[str, list[str]]:
    """At most as many groups as there are colours; the smallest data sets go together."""
    names = [s.name for s in sorted(facts.kept, key=lambda s: -s.volumes)]
    if len(names) <= len(COLOURS):
        return {name: [name] for name in names}
    kept = len(COLOURS) - 1
    return {name: [name] for name in names[:kept]} | {f"{len(names) - kept} others": names[kept:]}


def overview(facts: Facts) -> bytes:
    """report.png: counts, histograms and contact sheet in one picture."""
    from matplotlib.figure import Figure

    sheets = {name: contact_sheet(tiles) for name, tiles in facts.tiles.items() if tiles}
    heights = [sheet.shape[0] / TILE * 1.42 + 0.3 for sheet in sheets.values()]
    figure = Figure(figsize=(11.4, 6.4 + sum(heights)), dpi=100, facecolor="white")
    parts: Any = figure.subfigures(2, 1, height_ratios=(6.4, max(sum(heights), 0.1)))
    top, bottom = parts
    volumes, slices = sum(s.volumes for s in facts.sets), sum(s.slices for s in facts.sets)
    refused = sum(sum(s.refused.values()) for s in facts.sets)
    state = "splits are apart" if not facts.wrong else "BROKEN: " + "; ".join(facts.wrong)
    top.suptitle(
        f"{volumes:,} volumes, {slices:,} slices kept, {refused:,} scans refused; {state}\n{facts.fingerprint}",
        fontsize=10,
    )
    room = {"hspace": 0.42, "wspace": 0.3, "top": 0.86, "bottom": 0.08, "left": 0.07, "right": 0.98}
    _draw(top.subplots(2, 3, gridspec_kw=room), facts, False)
    if sheets:
        room = {"top": 0.96, "bottom": 0.02, "left": 0.02, "right": 0.98}
        rows = np.atleast_1d(bottom.subplots(len(sheets), 1, height_ratios=heights, gridspec_kw=room))
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
