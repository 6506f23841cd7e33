"""What a probe found: CSV of every draw, JSON of means and spreads, a curve over the number of cases, a table."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_curation.aside import aside
from downstream.metrics import overall
from launch.run import write_text

__all__ = ["organ_means", "summarised", "write"]

PATCH = tuple(f"{name}/{what}" for name in ("knn", "linear") for what in ("accuracy", "recall", "dice"))
SHOWN = {"knn/dice": "k-NN Dice", "linear/dice": "linear Dice", "pixel/dice": "pixel Dice"}
COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#1d2329", "#a6761d")


def organ_means(table: NDArray[np.float64], organs: Sequence[str]) -> dict[str, float | None]:
    """Dice [scans, organs] -> the mean of each organ over the scans that have it, and `mean` over these organs."""
    means = [overall(column) for column in table.T]
    named = zip([*organs, "mean"], [*means, overall(np.array(means))], strict=True)
    return {organ: None if math.isnan(value) else value for organ, value in named}


def summarised(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each backbone, block and number of shots: mean and standard deviation of each measure over the draws."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["backbone"], row["block"], row["shots"]), []).append(row)
    found = []
    for (backbone, block, shots), draws in groups.items():
        measures = {name: _spread([row[name] for row in draws]) for name in PATCH}
        organs = {organ: _spread([row["pixel/dice"][organ] for row in draws]) for organ in draws[0]["pixel/dice"]}
        measures["pixel/dice"] = organs.pop("mean")
        counts = {"shots": shots, "cases": len(draws[0]["cases"]), "draws": len(draws)}
        found.append({"backbone": backbone, "block": block, **counts, **measures, "organs": organs})
    return found


def _spread(values: Sequence[float | None]) -> dict[str, float | None]:
    """`sd` (n - 1) is None for fewer than two draws."""
    finite = np.array([value for value in values if value is not None and math.isfinite(value)], dtype=np.float64)
    return {
        "mean": float(finite.mean()) if len(finite) else None,
        "sd": float(finite.std(ddof=1)) if len(finite) > 1 else None,
    }


def write(folder: Path, rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> tuple[list[Path], str]:
    """Writes probe.csv, probe.json and probe.png; their paths, and the table as text."""
    found = summarised(rows)
    paths = [folder / name for name in ("probe.csv", "probe.json", "probe.png")]
    write_text(paths[0], _csv(rows))
    write_text(paths[1], json.dumps({**about, "results": found}, indent=1) + "\n")
    with aside(paths[2], lasting=False) as file:
        file.write(_curve(found))
    return paths, _table(found)


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["backbone", "block", "shots", "draw", "cases", "measure", "organ", "value"])
    for row in rows:
        start = [row["backbone"], row["block"], row["shots"], row["draw"], " ".join(row["cases"])]
        lines = [(name, "", row[name]) for name in PATCH]
        lines += [("pixel/dice", organ, value) for organ, value in row["pixel/dice"].items()]
        for measure, organ, value in lines:
            missing = value is None or math.isnan(value)
            writer.writerow([*start, measure, organ, "" if missing else f"{value:.6g}"])
    return text.getvalue()


def _table(found: Sequence[Mapping[str, Any]]) -> str:
    lines = [["backbone", "block", "shots", "cases", "draws", *SHOWN.values()]]
    for row in found:
        counts = [str(row[name]) for name in ("block", "shots", "cases", "draws")]
        lines.append([_short(row["backbone"]), *counts, *(_told(row[name]) for name in SHOWN)])
    widths = [max(len(cells[i]) for cells in lines) for i in range(len(lines[0]))]
    text = ["  ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)).rstrip() for cells in lines]
    notes = (
        "k-NN, linear: mean Dice of classes over drawn patches of the validation cases, background included.",
        "pixel: a linear map's labels of whole validation slices; Dice by case, mean over cases, then over organs.",
        "± is the standard deviation over the draws of training cases.",
    )
    return "\n".join([*text, *notes])


def _told(spread: Mapping[str, float | None]) -> str:
    if spread["mean"] is None:
        return "-"
    return f"{spread['mean']:.3f}" + (f" ± {spread['sd']:.3f}" if spread["sd"] is not None else "")


def _short(name: str) -> str:
    """The end of a path, which tells it from others."""
    return "/".join(Path(name).parts[-2:])


def _curve(found: Sequence[Mapping[str, Any]]) -> bytes:
    """Each measure of the table over the number of training cases, a line for each backbone and block."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.2), dpi=110, facecolor="white", layout="constrained")
    axes = figure.subplots(1, len(SHOWN), sharey=True)
    lines = list(dict.fromkeys((row["backbone"], row["block"]) for row in found))
    for axis, (measure, title) in zip(axes, SHOWN.items(), strict=True):
        for number, line in enumerate(lines):
            rows = sorted((r for r in found if (r["backbone"], r["block"]) == line), key=lambda row: row["cases"])
            points = [
                (r["cases"], r[measure]["mean"], r[measure]["sd"] or 0) for r in rows if r[measure]["mean"] is not None
            ]
            if points:
                x, y, error = zip(*points, strict=True)
                style = {"color": COLOURS[number % len(COLOURS)], "marker": "o", "markersize": 4, "capsize": 3}
                axis.errorbar(x, y, error, label=f"{_short(line[0])}, block {line[1]}", **style)
        axis.set_xscale("log")
        ticks = sorted({row["cases"] for row in found})
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.set_xlabel("training cases")
        axis.set_title(title, fontsize=11)
        axis.set_ylim(0, 1)
        axis.grid(color="#d9dee4", linewidth=0.6)
    for text in axes[0].legend(fontsize=8, frameon=False).get_texts():
        text.set_parse_math(False)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()
