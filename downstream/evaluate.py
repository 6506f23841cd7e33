"""Verb `evaluate`: predicted label maps against reference ones, per case and organ, with intervals.

Both are compared by position on the label's own grid, and paired by file name. A case that lies on another grid is
named and left out, and so are predictions without a label and labels without a prediction; none of them is passed over
in silence.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from data_curation.finding import Found, find
from downstream import cases, metrics, score_page, score_pictures, scoring
from downstream.sharing import shared
from launch import settings as base
from launch.run import Outcome, command, write_text

__all__ = ["Settings", "main", "table"]

MEASURES = ("dice", "nsd", "hd95")
Millimetres = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Settings(base.Settings):
    """Settings of `axial evaluate`."""

    folder: Path = Field(description="where metrics.csv, summary.json and scores.html go")
    predictions: Path = Field(description="folder of predicted label maps, CASE.nii.gz")
    labels: Path = Field(description="folder of reference label maps, CASE.nii.gz")
    images: Path | None = Field(
        None, description="folder of the scans, CASE_0000.nii.gz or DICOM folders CASE: shown beneath the contours"
    )
    cases: tuple[str, ...] | None = Field(None, description="only these cases; null: every one that has both")
    names: Path | None = Field(
        None,
        description="dataset.json or model.safetensors that names the organs; null: dataset.json beside the labels",
    )
    tolerance: Millimetres | dict[str, Millimetres] = Field(
        1.0,
        description="distance that counts as the same surface in NSD, mm; or one for each organ, and `default` for the "
        "others, such as {pancreas: 2.0, default: 1.0}",
    )
    workers: int = Field(0, ge=0, description="processes that share the cases; 0: one for each core")
    worst: int = Field(3, ge=0, description="worst cases that the page shows")
    worst_organs: int = Field(24, ge=0, description="organs whose worst case the page shows, lowest mean Dice first")
    draws: int = Field(2000, ge=1, description="bootstrap draws")
    level: float = Field(0.95, gt=0, lt=1, description="share of the draws that an interval holds")
    seed: int = Field(0, ge=0, description="seed of the bootstrap")


def main(settings: Settings) -> Outcome:
    """Scores every case that has both; writes metrics.csv, summary.json and scores.html, prints the table."""
    labels = _organs(settings)
    tolerance = scoring.tolerances(settings.tolerance, list(labels.organs))
    predicted, labelled = (_maps(folder, settings.cases) for folder in (settings.predictions, settings.labels))
    common = sorted(set(predicted) & set(labelled))
    if not common:
        raise cases.CaseError(
            f"no case in common: {settings.predictions} has {sorted(predicted)[:3]}, {settings.labels} has "
            f"{sorted(labelled)[:3]}; files are matched by name"
        )
    images = _images(settings.images, common)
    tasks = [
        scoring.Task(name, predicted[name], labelled[name], labels, tolerance, images.get(name)) for name in common
    ]
    results = list(zip(common, shared(scoring.attempt, tasks, common, settings.workers, "score"), strict=True))
    found = {name: result for name, result in results if not isinstance(result, str)}
    refused = {name: result.removeprefix(f"{name}: ") for name, result in results if isinstance(result, str)}
    if not found:
        raise cases.CaseError(cases.told(f"none of the {len(common)} case(s) can be scored", _lines(refused)))
    lacking = sorted(set(labelled) - set(predicted))
    objects = [name for name in lacking if (settings.predictions / f"{name}.dcm").is_file()]
    summary = _summary(found, labels, tolerance, settings) | {
        "refused": refused | {name: f"{name}.dcm is a DICOM SEG, which is not scored" for name in objects},
        "without_prediction": [name for name in lacking if name not in objects],
        "without_label": sorted(set(predicted) - set(labelled)),
    }
    _write(settings.folder, found, summary)
    overall_worst, organ_worst = _worst(found, {task.name: task for task in tasks}, summary, settings)
    html = score_page.page(summary, found, overall_worst, organ_worst)
    write_text(settings.folder / "scores.html", html)
    print(table(summary))
    print(_unscored(summary), end="")
    made = tuple(str(settings.folder / name) for name in ("metrics.csv", "summary.json", "scores.html"))
    following = (command("compare", f"first={settings.folder}", "second=OTHER_SCORES", "folder=COMPARISON"),)
    return Outcome(made=made, next=following, ok=not refused)


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


def _maps(folder: Path, chosen: Sequence[str] | None) -> dict[str, Path]:
    found = cases.label_files(folder)
    if chosen is None:
        return found
    if missing := sorted(set(chosen) - set(found)):
        raise cases.CaseError(f"{folder} has no label map of {', '.join(missing[:5])}, which cases= names")
    return {name: found[name] for name in chosen}


def _images(folder: Path | None, names: Sequence[str]) -> dict[str, Found]:
    if folder is None:
        return {}
    if not folder.is_dir():
        raise cases.CaseError(f"images={folder} is not a folder; give that of the scans, or leave it out")
    there = {one.path.name.removesuffix(cases.file_ending(one.path)): one for one in find(folder) if not one.reason}
    found = {name: there[key] for name in names for key in (name, f"{name}_0000") if key in there}
    if not found:
        raise cases.CaseError(
            f"images={folder} has no scan of any case: it has {', '.join(sorted(there)[:3]) or 'none'}, the cases are "
            f"{', '.join(names[:3])}; scans are called CASE_0000.nii.gz or CASE.nii.gz, or are DICOM folders CASE"
        )
    return found


def _worst(
    found: Mapping[str, Mapping[str, metrics.Score]],
    tasks: Mapping[str, scoring.Task],
    summary: Mapping[str, Any],
    settings: Settings,
) -> tuple[list[score_page.Figure], list[score_page.Figure]]:
    """Pictures of the cases with the lowest Dice, over all organs and of each; those of Dice 1 show nothing."""
    means = {name: score_page.case_means(row)[0] for name, row in found.items()}
    order = sorted((mean, name) for name, mean in means.items() if mean < 1)[: settings.worst]  # NaN is not below 1
    wanted = [(name, "", f"{name}: mean Dice {mean:.3f}") for mean, name in order]
    overall = {organ: row["dice"]["mean"] for organ, row in summary["organs"].items() if organ != "mean"}
    organs = sorted((mean, organ) for organ, mean in overall.items() if mean < 1)
    for _, organ in organs[: settings.worst_organs]:
        scored = [(row[organ].dice, -row[organ].hd95, name) for name, row in found.items() if row[organ].dice < 1]
        dice, far, name = min(scored)
        wanted.append((name, organ, f"{organ}, {name}: Dice {dice:.3f}, HD95 {-far:.1f} mm"))
    shown = [score_pictures.Shown(tasks[name], organ) for name, organ, _ in wanted]
    drawn = shared(score_pictures.draw, shown, [name for name, _, _ in wanted], settings.workers, "draw")
    figures = [
        score_page.Figure(f"{text}; {made}")
        if isinstance(made, str)
        else score_page.Figure(f"{text}; {made[1]}", made[0])
        for (_, _, text), made in zip(wanted, drawn, strict=True)
    ]
    return figures[: len(order)], figures[len(order) :]


def _summary(
    found: Mapping[str, Mapping[str, metrics.Score]],
    labels: cases.Labels,
    tolerance: Mapping[str, float],
    settings: Settings,
) -> dict[str, Any]:
    """organ -> measure -> interval; `mean` is over organs. HD95: finite cases only, `lost` counts the infinite."""
    names, organs = sorted(found), list(labels.organs)
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
    return {
        "cases": names,
        "settings": settings.model_dump(mode="json"),
        "values": {organ: list(values) for organ, values in labels.organs.items()},
        "ignore": labels.ignore,
        "tolerance_mm": dict(tolerance),
        "organs": report,
    }


def table(summary: Mapping[str, Any]) -> str:
    """The summary as lines of text: one organ a line, each measure with its interval."""
    allowed = set(summary["tolerance_mm"].values())
    nsd = f"NSD {allowed.pop():g} mm" if len(allowed) == 1 else "NSD"
    heads = ["organ", "cases", "Dice", nsd, "HD95 mm", "lost"]
    rows = [heads]
    for organ, row in summary["organs"].items():
        cells = [_cell(row[measure], 1 if measure == "hd95" else 3) for measure in MEASURES]
        rows.append([organ, str(row["dice"]["cases"]), *cells, str(row["lost"])])
    widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def _cell(interval: Mapping[str, float], digits: int) -> str:
    return metrics.with_interval(interval["mean"], interval["low"], interval["high"], digits)


def _lines(refused: Mapping[str, str]) -> list[str]:
    return [f"{name}: {why}" for name, why in refused.items()]


def _unscored(summary: Mapping[str, Any]) -> str:
    lines = [f"left out: {line}" for line in _lines(summary["refused"])]
    for key in ("without_prediction", "without_label"):
        names = summary[key]
        if names:
            more = " ..." if len(names) > 10 else ""
            lines.append(f"{len(names)} {key.replace('_', ' ')}: {', '.join(names[:10])}{more}")
    return "".join(f"{line}\n" for line in lines)


def _write(folder: Path, found: Mapping[str, Mapping[str, metrics.Score]], summary: Mapping[str, Any]) -> None:
    """NaN is an empty cell in the CSV and null in the JSON, which knows neither NaN nor infinity."""
    folder.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["case", "organ", "dice", "nsd", "hd95_mm"])
    for name in sorted(found):
        for organ, score in found[name].items():
            values = [getattr(score, measure) for measure in MEASURES]
            writer.writerow([name, organ, *("" if math.isnan(value) else f"{value:.10g}" for value in values)])
    write_text(folder / "metrics.csv", text.getvalue())
    write_text(folder / "summary.json", json.dumps(_finite(summary), indent=2) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
