"""The scores of `evaluate` as one HTML page that needs nothing else: tables, box plots, rules, the worst cases."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from downstream import score_pictures
from downstream.metrics import Score, overall, with_interval

__all__ = ["Figure", "case_means", "page", "rules"]

HEADS = ("organ", "cases ", "Dice ", "NSD ", "HD95 mm ", "lost ")
STYLE = """
:root { --ink: #1d2329; --soft: #5d6771; --line: #d9dee4; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: #fff; max-width: 72rem; margin: 2rem auto;
  padding: 0 1.2rem; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p, figcaption { color: var(--soft); } .wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; color: var(--soft); } th, td { padding: .25rem .7rem .25rem 0; vertical-align: top;
  border-bottom: 1px solid var(--line); } th.n, td.n { text-align: right; white-space: nowrap; }
.shown { display: flex; flex-wrap: wrap; gap: 1rem; } figure { margin: 0; width: 20rem; overflow-wrap: anywhere; }
img { max-width: 100%; height: auto; } figure img { background: #000; border-radius: 4px; }
"""


@dataclass(frozen=True)
class Figure:
    """A picture with its caption; without bytes the caption says why there is none."""

    caption: str
    png: bytes = b""


def page(
    summary: Mapping[str, Any],
    scores: Mapping[str, Mapping[str, Score]],
    overall_worst: Sequence[Figure],
    organ_worst: Sequence[Figure],
) -> str:
    """The whole page; `summary` is what summary.json holds, `scores` case -> organ -> score."""
    organs = list(next(iter(scores.values())))
    given = summary["settings"]
    parts = [
        f"<h1>Scores of {len(scores):,} cases</h1>",
        f"<p>{escape(str(given['predictions']))} against {escape(str(given['labels']))}</p>",
        "<h2>Organs</h2>",
        _table(HEADS, [_row(name, row) for name, row in summary["organs"].items()]),
        f'<h2>Spread over cases</h2><img alt="box plots" src="{_uri(score_pictures.boxes(scores, organs))}">',
        "<h2>Rules</h2><ul>" + "".join(f"<li>{escape(rule)}</li>" for rule in rules(summary)) + "</ul>",
        _left_out(summary),
        _shown("Worst cases overall", overall_worst),
        _shown("Worst case of each organ, lowest mean Dice first", organ_worst),
        "<h2>Cases, worst first</h2>",
        _table(("case", "Dice ", "NSD ", "HD95 mm ", "worst organ"), _cases(scores)),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Scores</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def rules(summary: Mapping[str, Any]) -> list[str]:
    """How the numbers were made, in sentences."""
    tolerance = summary["tolerance_mm"]
    different = len(set(tolerance.values())) > 1
    each = ", ".join(f"{organ} {mm:g}" for organ, mm in tolerance.items()) if different else ""
    given = summary["settings"]
    found = [
        "Organ in neither label nor prediction: the case does not count for this organ.",
        "Organ in one of them only: Dice 0, NSD 0, HD95 infinite. Infinite distances are counted as lost and left out "
        "of the mean distance.",
        "A surface is the voxels of an organ that touch the outside by a face. NSD is the share of both surfaces' "
        "voxels that lie within the tolerance of the other surface: "
        + (f"mm by organ: {each}." if different else f"{next(iter(tolerance.values())):g} mm."),
        "HD95 is the larger of the 95th percentiles of the distances one way and the other, in mm.",
        f"Intervals hold {given['level']:.0%} of {given['draws']:,} bootstrap draws of whole cases; `mean` is the mean "
        "over organs of their means.",
        "Label and prediction are compared by position, on the label's own grid; nothing is resampled.",
    ]
    if summary["ignore"] is not None:
        found.append(
            f"Voxels labelled {summary['ignore']} (ignore) count on neither side, and an organ's border with them is "
            "no surface."
        )
    return found


def case_means(row: Mapping[str, Score]) -> tuple[float, float, float]:
    """Mean Dice, NSD and HD95 of one case over its organs; values that are not finite are left out."""
    dice, nsd, hd95 = (
        overall(np.array([getattr(score, measure) for score in row.values()], dtype=np.float64))
        for measure in ("dice", "nsd", "hd95")
    )
    return dice, nsd, hd95


def _row(name: str, row: Mapping[str, Any]) -> list[str]:
    cells = [_interval(row[measure], digits) for measure, digits in (("dice", 3), ("nsd", 3), ("hd95", 1))]
    return [name, f"{row['dice']['cases']:,}", *cells, f"{row['lost']:,}"]


def _interval(value: Mapping[str, Any], digits: int) -> str:
    return with_interval(value["mean"], value["low"], value["high"], digits)


def _cases(scores: Mapping[str, Mapping[str, Score]]) -> list[list[str]]:
    rows = []
    for name, row in scores.items():
        dice, nsd, hd95 = case_means(row)
        finite = {organ: score.dice for organ, score in row.items() if math.isfinite(score.dice)}
        worst = min(finite, key=lambda organ: finite[organ], default="")
        told = f"{worst} {finite[worst]:.3f}" if worst else "no organ in label or prediction"
        numbers = [
            "–" if math.isnan(value) else f"{value:.{digits}f}" for value, digits in ((dice, 3), (nsd, 3), (hd95, 1))
        ]
        rows.append((-1.0 if math.isnan(dice) else dice, [name, *numbers, told]))
    return [cells for _, cells in sorted(rows, key=lambda row: (row[0], row[1]))]


def _left_out(summary: Mapping[str, Any]) -> str:
    rows = [(name, why) for name, why in summary["refused"].items()]
    rows += [(name, "no prediction") for name in summary["without_prediction"]]
    rows += [(name, "no label") for name in summary["without_label"]]
    return f"<h2>Left out</h2>{_table(('case', 'reason'), rows)}" if rows else ""


def _shown(title: str, figures: Sequence[Figure]) -> str:
    if not figures:
        return ""
    parts = [
        (f'<img alt="" src="{_uri(figure.png)}">' if figure.png else "")
        + f"<figcaption>{escape(figure.caption)}</figcaption>"
        for figure in figures
    ]
    key = "Label: solid green. Prediction: dashed orange. The axial slice on which the two differ most."
    inner = "".join(f"<figure>{part}</figure>" for part in parts)
    return f'<h2>{escape(title)}</h2><p>{key}</p><div class="shown">{inner}</div>'


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of escaped texts; a column whose head ends in a blank stands to the right."""

    def line(tag: str, cells: Sequence[str]) -> str:
        marks = [' class="n"' if head.endswith(" ") else "" for head in heads]
        return "<tr>" + "".join(f"<{tag}{m}>{escape(c)}</{tag}>" for m, c in zip(marks, cells, strict=True)) + "</tr>"

    return f'<div class="wide"><table>{line("th", heads)}{"".join(line("td", row) for row in rows)}</table></div>'


def _uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
