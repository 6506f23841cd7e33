"""The facts of a corpus as a page and as a picture. Every text of the corpus is escaped; nothing is loaded from elsewhere."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from data_curation.catalogue import CATALOGUE
from data_curation.report import HU_EDGES, Facts, Tile

__all__ = ["overview", "page"]

LEVEL, WINDOW = 40, 400  # HU: the usual soft-tissue window
TILE = 168  # pixels
INK = {False: ("#1d2329", "#c3c9d0"), True: ("#dde3ea", "#46505b")}  # dark? -> text, lines
COLOURS = ("#3b78c3", "#e08a1e", "#2f9e77", "#c2528b", "#7a6cc9", "#a5761d", "#4aa8c9", "#8c939b")

STYLE = """
:root { color-scheme: light dark; --ink: #1d2329; --soft: #5d6771; --line: #d9dee4; --back: #fff; --card: #f6f7f9;
  --good: #1a7f4b; --bad: #c0312b; --bar: #3b78c3; }
@media (prefers-color-scheme: dark) { :root { --ink: #dde3ea; --soft: #98a3af; --line: #323a43; --back: #14181d;
  --card: #1c2229; --good: #4cc38a; --bad: #ff7b72; --bar: #5b95dd; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back); max-width: 76rem;
  margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.6rem; margin: 0 0 .2rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p, figcaption, summary small { color: var(--soft); } code { font-size: .86em; overflow-wrap: anywhere; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--soft); } th, td { padding: .3rem .7rem .3rem 0;
  border-bottom: 1px solid var(--line); vertical-align: top; overflow-wrap: anywhere; }
td.n, th.n { text-align: right; white-space: nowrap; } .good { color: var(--good); } .bad { color: var(--bad); }
.tiles { display: flex; flex-wrap: wrap; gap: 1.6rem; margin: 1.2rem 0; } .tiles b { display: block; font-size: 1.5rem; }
.bar { display: inline-block; height: .6em; background: var(--bar); border-radius: 2px; min-width: 2px; }
img { max-width: 100%; height: auto; } figure { margin: 0 0 1.2rem; } figure img.ct { background: #000; border-radius: 4px; }
details { border-bottom: 1px solid var(--line); padding: .35rem 0; } summary { cursor: pointer; }
.verdict { background: var(--card); padding: .7rem 1rem; border-radius: 6px; }
"""


def page(facts: Facts) -> str:
    """The whole report as one HTML document; pictures are inside it."""
    body = [
        _head(facts),
        _kept(facts),
        _split(facts),
        "<h2>Measures</h2>",
        _charts_twice(facts),
        _sheet(facts),
        _refused(facts),
        _sources(facts),
    ]
    title = f"Corpus {facts.fingerprint[:12]}"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table of escaped texts; columns of numbers, and those whose head ends in a blank, stand to the right."""
    listed = [list(row) for row in rows]
    right = [
        all(isinstance(row[i], int | float) for row in listed) or head.endswith(" ") for i, head in enumerate(heads)
    ]

    def line(tag: str, cells: Sequence[object]) -> str:
        texts = [f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in cells]
        marks = [' class="n"' if number else "" for number in right]
        return "<tr>" + "".join(f"<{tag}{m}>{escape(t)}</{tag}>" for m, t in zip(marks, texts, strict=True)) + "</tr>"

    return f'<div class="wide"><table>{line("th", heads)}{"".join(line("td", row) for row in listed)}</table></div>'


def _head(facts: Facts) -> str:
    sets, refused = facts.sets, sum(refusal.count for refusal in facts.refusals)
    numbers = (
        ("data sets", f"{len(sets):,}"),
        ("patients", f"{sum(s.patients for s in sets):,}"),
        ("volumes kept", f"{sum(s.volumes for s in sets):,}"),
        ("slices kept", f"{sum(s.slices for s in sets):,}"),
        ("stored", _bytes(sum(s.size for s in sets))),
        ("files refused", f"{refused:,}"),
    )
    tiles = "".join(f"<div><b>{escape(value)}</b>{escape(name)}</div>" for name, value in numbers)
    verdict = (
        '<p class="verdict bad">This corpus breaks its own claims: ' + escape("; ".join(facts.wrong)) + ".</p>"
        if facts.wrong
        else '<p class="verdict good">No patient, duplicate group or pixel content is in more than one split.</p>'
    )
    return (
        f"<h1>Corpus {escape(facts.folder.resolve().name)}</h1>"
        f"<p>Fingerprint <code>{escape(facts.fingerprint)}</code></p>"
        f'<div class="tiles">{tiles}</div>{verdict}'
    )


def _kept(facts: Facts) -> str:
    heads = (
        "data set",
        "patients",
        "volumes",
        "slices",
        "repeated",
        "of test sets",
        "stored ",
        "slices mm ",
        "pixels mm ",
    )
    rows = [
        (
            s.name,
            s.patients,
            s.volumes,
            s.slices,
            s.duplicates,
            s.held_out,
            _bytes(s.size),
            _range(s.between),
            _range(s.within),
        )
        for s in facts.sets
    ]
    note = "Repeated slices have the content of an earlier slice; readers leave them out."
    return f"<h2>Kept</h2>{_table((*heads, 'licence'), [(*r, s.licence) for r, s in zip(rows, facts.sets, strict=True)])}<p>{note}</p>"


def _split(facts: Facts) -> str:
    heads = ("split", "slices", "volumes", "patients", "duplicate groups")
    rows = [(s.name, s.slices, s.volumes, s.patients, s.groups) for s in facts.splits]
    lines = []
    for proof in facts.proofs:
        kind = "bad" if proof.shared else "good"
        lines.append(
            f'<tr><td>{escape(proof.what)}</td><td class="n">{proof.total:,}</td>'
            f'<td class="n {kind}">{proof.shared:,}</td></tr>'
        )
    proofs = '<tr><th>compared</th><th class="n">different</th><th class="n">in more than one split</th></tr>'
    return (
        f"<h2>Splits</h2>{_table(heads, rows)}"
        f'<h2>Proof that the splits are apart</h2><div class="wide"><table>{proofs}{"".join(lines)}</table></div>'
        "<p>Counted from the rows of the index; slices of one value alone are not compared.</p>"
    )


def _refused(facts: Facts) -> str:
    if not facts.refusals:
        return "<h2>Refused</h2><p>Nothing was refused.</p>"
    most = max(refusal.count for refusal in facts.refusals)
    parts = []
    for refusal in facts.refusals:
        left = refusal.count - len(refusal.rows)
        more = f"<p>and {left:,} more in refused.csv</p>" if left else ""
        listing = _table(("data set", "file", "why"), refusal.rows)
        parts.append(
            f'<details><summary><span class="bar" style="width:{max(0.2, 14 * refusal.count / most):.1f}rem"></span> '
            f"<b>{escape(refusal.reason)}</b> {refusal.count:,}</summary>{listing}{more}</details>"
        )
    return f"<h2>Refused, by reason</h2>{''.join(parts)}"


def _sources(facts: Facts) -> str:
    rows = []
    for facts_of in facts.sets:
        entry = CATALOGUE.get(facts_of.name)
        known = (
            (entry.title, entry.citation, entry.doi, entry.home_page) if entry else ("not in the catalogue", "", "", "")
        )
        rows.append((facts_of.name, known[0], facts_of.licence, known[1], known[2] or known[3]))
    listed = _table(("data set", "title", "licence", "to cite", "where"), rows)
    told = [(key, value) for key, value in facts.recorded.items() if isinstance(value, str | int | float)]
    return f"<h2>Licences and citations</h2>{listed}<h2>Record</h2>{_table(('corpus.json', ''), told)}"


def _sheet(facts: Facts) -> str:
    parts = [
        f"<h2>Contact sheet</h2><p>Window {LEVEL}/{WINDOW} HU, slices at even distances through each data set.</p>"
    ]
    for name, tiles in facts.tiles.items():
        keys = ", ".join(tile.key for tile in tiles)
        parts.append(
            f'<figure><img class="ct" alt="{escape(name)}: {len(tiles)} slices" title="{escape(keys)}" '
            f'src="{_uri(_png(contact_sheet(tiles)))}"><figcaption>{escape(name)}</figcaption></figure>'
        )
    return "".join(parts)


def contact_sheet(tiles: Sequence[Tile], columns: int = 8) -> NDArray[np.uint8]:
    """The slices side by side in the window, each scaled to TILE pixels along its longer side in mm; [Y, X]."""
    rows = -(-len(tiles) // columns)
    sheet = np.zeros((rows * TILE, min(columns, len(tiles)) * TILE), np.uint8)
    for i, tile in enumerate(tiles):
        seen = np.clip((tile.hu.astype(np.float32) - (LEVEL - WINDOW / 2)) / WINDOW, 0, 1)
        extent = np.array(seen.shape) * tile.spacing
        size = np.maximum(1, np.rint(extent / extent.max() * TILE)).astype(int)
        factor = size / seen.shape
        smooth = ndimage.gaussian_filter(seen, np.maximum(0, 0.45 * (1 / factor - 1)))
        small = ndimage.zoom(smooth, factor, order=1, mode="nearest", grid_mode=True)[:TILE, :TILE]
        top, left = (TILE - small.shape[0]) // 2, (TILE - small.shape[1]) // 2
        y, x = i // columns * TILE + top, i % columns * TILE + left
        sheet[y : y + small.shape[0], x : x + small.shape[1]] = np.rint(small * 255).astype(np.uint8)
    return sheet


def _charts_twice(facts: Facts) -> str:
    light, dark = (_uri(_drawn(_charts(facts, is_dark))) for is_dark in (False, True))
    text = "Histograms of spacing between slices, spacing between pixels, slices of a volume, and HU, by data set"
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img alt="{text}" src="{light}"></picture></figure>'
    )


def _charts(facts: Facts, dark: bool, height: float = 5.4) -> Any:
    """The four histograms; figures are made without pyplot, so no state is shared with the caller's plots."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, height), dpi=110, layout="constrained", facecolor="none")
    _draw(figure.subplots(2, 2), facts, dark)
    return figure


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
        pad = max((high - low) * 0.02, abs(high) * 0.01, 1e-3)
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
    top, bottom = figure.subfigures(2, 1, height_ratios=(6.4, sum(heights)))
    volumes, slices = sum(s.volumes for s in facts.sets), sum(s.slices for s in facts.sets)
    refused = sum(refusal.count for refusal in facts.refusals)
    state = "splits are apart" if not facts.wrong else "BROKEN: " + "; ".join(facts.wrong)
    top.suptitle(
        f"{volumes:,} volumes, {slices:,} slices kept, {refused:,} files refused; {state}\n{facts.fingerprint}",
        fontsize=10,
    )
    _draw(top.subplots(2, 2, gridspec_kw={"hspace": 0.42, "top": 0.86, "bottom": 0.08}), facts, False)
    rows = np.atleast_1d(
        bottom.subplots(len(sheets), 1, height_ratios=heights, gridspec_kw={"top": 0.96, "bottom": 0.02})
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


def _png(picture: NDArray[np.uint8]) -> bytes:
    import imagecodecs

    return bytes(imagecodecs.png_encode(picture))


def _uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _range(values: tuple[float, float]) -> str:
    low, high = (f"{value:.2f}" for value in values)
    return low if low == high else f"{low} – {high}"


def _bytes(count: int) -> str:
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"
