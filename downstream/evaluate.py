"""Verb `evaluate`: predicted label maps against reference ones, per case and organ, with intervals.

Both are compared on the label's own grid, by file name. A case that lies on another grid is named and left out, and so
are predictions without a label and labels without a prediction; none of them is passed over in silence.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from downstream import cases, geometry, metrics
from launch import settings as base
from launch.progress import progress
from launch.run import Outcome

__all__ = ["Settings", "main", "table"]

MEASURES = ("dice", "nsd", "hd95")


class Settings(base.Settings):
    """Settings of `axial evaluate`."""

    folder: Path = Field(description="where metrics.csv and summary.json go")
    predictions: Path = Field(description="folder of predicted label maps, CASE.nii.gz")
    labels: Path = Field(description="folder of reference label maps, CASE.nii.gz")
    names: Path | None = Field(
        None,
        description="dataset.json or model.safetensors that names the organs; null: dataset.json beside the labels",
    )
    tolerance: float = Field(1.0, gt=0, description="distance that counts as the same surface in NSD, mm")
    draws: int = Field(2000, ge=1, description="bootstrap draws")
    level: float = Field(0.95, gt=0, lt=1, description="share of the draws that an interval holds")
    seed: int = Field(0, ge=0, description="seed of the bootstrap")


def main(settings: Settings) -> Outcome:
    """Scores every case that has both, writes metrics.csv and summary.json, prints the table."""
    organs = _organs(settings).organs
    predicted, labelled = cases.label_files(settings.predictions), cases.label_files(settings.labels)
    common = sorted(set(predicted) & set(labelled))
    if not common:
        raise cases.CaseError(
            f"no case in common: {settings.predictions} has {sorted(predicted)[:3]}, {settings.labels} has "
            f"{sorted(labelled)[:3]}; files are matched by name"
        )
    found: dict[str, dict[str, metrics.Score]] = {}
    refused: dict[str, str] = {}
    for name in progress(common, len(common), "evaluate", "cases"):
        try:
            found[name] = _case(name, predicted[name], labelled[name], organs, settings.tolerance)
        except cases.CaseError as fault:
            refused[name] = str(fault)
    if not found:
        raise cases.CaseError(cases.told(f"none of the {len(common)} case(s) can be scored", list(refused.values())))
    summary = _summary(found, list(organs), settings)
    unmatched = {
        "refused": refused,
        "without_prediction": sorted(set(labelled) - set(predicted)),
        "without_label": sorted(set(predicted) - set(labelled)),
    }
    _write(settings.folder, found, summary | unmatched)
    print(table(summary))
    for name, why in refused.items():
        print(f"left out: {name}: {why}")
    for key in ("without_prediction", "without_label"):
        if unmatched[key]:
            listed = list(unmatched[key])
            print(
                f"{len(listed)} {key.replace('_', ' ')}: {', '.join(listed[:10])}{' ...' if len(listed) > 10 else ''}"
            )
    made = tuple(str(settings.folder / name) for name in ("metrics.csv", "summary.json"))
    return Outcome(made=made, ok=not refused)


def _organs(settings: Settings) -> cases.Labels:
    if settings.names is not None and settings.names.suffix == ".safetensors":
        from downstream.model import load_model

        return load_model(settings.names)[1].labels
    candidates = [settings.labels / "dataset.json", settings.labels.parent / "dataset.json"]
    named = settings.names or next((path for path in candidates if path.is_file()), candidates[1])
    if not named.is_file():
        raise cases.CaseError(
            f"{named} is not there; set names=dataset.json or names=model.safetensors, to name the organs"
        )
    return cases.read_labels(named)


def _case(
    name: str, prediction: Path, label: Path, organs: Mapping[str, tuple[int, ...]], tolerance: float
) -> dict[str, metrics.Score]:
    predicted, reference = geometry.read_labelmap(prediction), geometry.read_labelmap(label)
    known = {0, *(value for values in organs.values() for value in values)}
    for path, volume in ((prediction, predicted), (label, reference)):
        unknown = sorted(set(np.unique(volume.array).tolist()) - known)
        if unknown:
            raise cases.CaseError(
                f"{name}: {path} holds label values {unknown[:5]}, which have no name; known: {sorted(known)}"
            )
    different = geometry.difference(predicted.place, reference.place)
    if different:
        raise cases.CaseError(
            f"{name}: prediction and label lie on different grids: {different}; predict on the labelled image"
        )
    return metrics.scores(predicted.array, reference.array, reference.place.spacing[::-1], organs, tolerance)


def _summary(found: Mapping[str, Mapping[str, metrics.Score]], organs: list[str], settings: Settings) -> dict[str, Any]:
    """organ -> measure -> interval; `mean` is over organs. HD95: finite cases only, `lost` counts the infinite."""
    names = sorted(found)
    report: dict[str, dict[str, Any]] = {organ: {} for organ in [*organs, "mean"]}
    for measure in MEASURES:
        values = np.array(
            [[getattr(found[name][organ], measure) for organ in organs] for name in names], dtype=np.float64
        )
        each, whole = metrics.bootstrap(
            values.reshape(len(names), len(organs)), settings.seed, settings.draws, settings.level
        )
        for organ, interval in zip([*organs, "mean"], [*each, whole], strict=True):
            report[organ][measure] = asdict(interval)
        if measure == "hd95":
            lost = np.isinf(values).sum(0).tolist()
            for organ, count in zip([*organs, "mean"], [*lost, sum(lost)], strict=True):
                report[organ]["lost"] = count
    return {"cases": names, "tolerance_mm": settings.tolerance, "organs": report}


def table(summary: Mapping[str, Any]) -> str:
    """The summary as lines of text: one organ a line, each measure with its interval."""
    heads = ["organ", "cases", "Dice", f"NSD {summary['tolerance_mm']:g} mm", "HD95 mm", "lost"]
    rows = [heads]
    for organ, row in summary["organs"].items():
        cells = [_cell(row[measure], 1 if measure == "hd95" else 3) for measure in MEASURES]
        rows.append([organ, str(row["dice"]["cases"]), *cells, str(row["lost"])])
    widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def _cell(interval: Mapping[str, float], digits: int) -> str:
    if math.isnan(interval["mean"]):
        return "-"
    text = f"{interval['mean']:.{digits}f}"
    if math.isnan(interval["low"]):
        return text
    return f"{text} [{interval['low']:.{digits}f}, {interval['high']:.{digits}f}]"


def _write(folder: Path, found: Mapping[str, Mapping[str, metrics.Score]], summary: Mapping[str, Any]) -> None:
    """NaN is an empty cell in the CSV and null in the JSON, which knows neither NaN nor infinity."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["case", "organ", "dice", "nsd", "hd95_mm"])
        for name in sorted(found):
            for organ, score in found[name].items():
                values = [getattr(score, measure) for measure in MEASURES]
                writer.writerow([name, organ, *("" if math.isnan(value) else f"{value:.6g}" for value in values)])
    (folder / "summary.json").write_text(json.dumps(_finite(summary), indent=2) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
