"""Scores of cases as files have them: those of `axial evaluate`, and nnU-Net's summary.json."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from downstream.cases import CaseError, file_ending

__all__ = ["CaseScores", "read_scores"]

MEASURES = {"dice": "dice", "nsd": "nsd", "hd95_mm": "hd95"}  # column -> measure
Values = tuple[int, ...]


@dataclass(frozen=True)
class CaseScores:
    """`table`: measure -> case -> organ -> value, NaN and inf as in `downstream.metrics`; `values`: of each organ."""

    path: Path
    table: Mapping[str, Mapping[str, Mapping[str, float]]]
    values: Mapping[str, Values]

    def named(self, values: Mapping[str, Values]) -> CaseScores:
        """The same with the organs of nnU-Net, which are known by their label values alone, called by their names."""
        names = {tuple(sorted(some)): organ for organ, some in values.items()}
        new = {organ: names.get(tuple(sorted(some)), organ) for organ, some in self.values.items()}
        table = {
            measure: {
                case: {new.get(organ, organ): value for organ, value in row.items()} for case, row in cases.items()
            }
            for measure, cases in self.table.items()
        }
        return CaseScores(self.path, table, {new[organ]: some for organ, some in self.values.items()})

    @property
    def cases(self) -> set[str]:
        """Names of the cases."""
        return {case for rows in self.table.values() for case in rows}

    @property
    def organs(self) -> list[str]:
        """Names of the organs, in the file's order."""
        return list(dict.fromkeys(organ for rows in self.table.values() for row in rows.values() for organ in row))


def read_scores(path: Path) -> tuple[CaseScores, bool]:
    """Scores of a folder of `axial evaluate`, its metrics.csv, or nnU-Net's summary.json or a folder with it.

    The second value says whether organs are called by their label values, as nnU-Net does. CaseError otherwise.
    """
    if not path.exists():
        raise CaseError(f"{path} is not there; give a folder of `axial evaluate`, or nnU-Net's summary.json")
    folder = path if path.is_dir() else path.parent
    table, summary = (folder / "metrics.csv", folder / "summary.json") if path.is_dir() else (path, path)
    if table.suffix == ".csv" and table.is_file():
        return _ours(table), False
    if summary.suffix != ".json" or not summary.is_file():
        raise CaseError(f"{path} holds neither metrics.csv nor summary.json; give a folder of `axial evaluate`")
    described = _json(summary)
    if "metric_per_case" in described:
        return _nnunet(summary, described["metric_per_case"]), True
    if "organs" in described and (folder / "metrics.csv").is_file():
        return _ours(folder / "metrics.csv"), False
    raise CaseError(
        f"{summary} has no table `metric_per_case`, so it is no summary of nnU-Net (version 2) with the scores of each "
        "case; give one, or a folder of `axial evaluate`"
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        described = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as fault:
        raise CaseError(f"{path}: not JSON ({fault}); copy it again") from None
    if not isinstance(described, dict):
        raise CaseError(f"{path}: no table of scores; give a folder of `axial evaluate`, or nnU-Net's summary.json")
    return described


def _ours(path: Path) -> CaseScores:
    found: dict[str, dict[str, dict[str, float]]] = {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, strict=True)
            given = [column for column in MEASURES if column in (reader.fieldnames or ())]
            if not given or not {"case", "organ"} <= set(reader.fieldnames or ()):
                raise CaseError(f"{path}: the first line must name case, organ and one of {', '.join(MEASURES)}")
            for row in reader:
                for column in given:
                    organs = found.setdefault(MEASURES[column], {}).setdefault(row["case"], {})
                    if row["organ"] in organs:
                        raise CaseError(f"{path}:{reader.line_num}: {row['case']}, {row['organ']} stands there twice")
                    organs[row["organ"]] = _number(row[column], f"{path}:{reader.line_num}: {column}")
    except (csv.Error, UnicodeDecodeError) as fault:
        raise CaseError(f"{path}: not a table of scores ({fault}); evaluate again") from None
    if not found:
        raise CaseError(f"{path}: no case is in it; evaluate again")
    beside = path.parent / "summary.json"
    values = _json(beside).get("values", {}) if beside.is_file() else {}
    return CaseScores(path, found, {organ: tuple(some) for organ, some in values.items()})


def _number(text: str | None, where: str) -> float:
    if text == "":
        return math.nan
    try:
        return float(text or "none")
    except ValueError:
        raise CaseError(
            f"{where} is {text!r}, which is no number; the file was cut or changed, evaluate again"
        ) from None


def _nnunet(path: Path, rows: Any) -> CaseScores:
    found: dict[str, dict[str, float]] = {}
    values: dict[str, Values] = {}
    for name, key, dice in _entries(path, rows):
        members = _members(key)
        if members is None:
            raise CaseError(f"{path}: {name}: {key!r} is neither a label value nor a list of them")
        organ = "label " + "+".join(map(str, members))
        values[organ] = members
        if organ in found.setdefault(name, {}):
            raise CaseError(f"{path}: {name} stands there twice")
        found[name][organ] = dice
    if not found:
        raise CaseError(f"{path}: metric_per_case is empty; evaluate again")
    return CaseScores(path, {"dice": found}, values)


def _entries(source: Path, rows: Any) -> Iterator[tuple[str, str, float]]:
    """Case, label value or region, Dice."""
    try:
        for row in rows:
            path = Path(row.get("prediction_file") or row["reference_file"])
            name = path.name.removesuffix(file_ending(path))
            for key, measures in row["metrics"].items():
                value = measures["Dice"]
                yield name, key, math.nan if value is None else float(value)
    except (KeyError, TypeError, ValueError, AttributeError) as fault:
        kind = f"{type(fault).__name__}: {fault}"
        raise CaseError(f"{source}: metric_per_case is not as nnU-Net writes it ({kind}); evaluate again") from None


def _members(key: str) -> Values | None:
    """`3` or `(1, 2)`, as nnU-Net writes a label or a region."""
    parts = [part for part in key.strip("() ").split(",") if part.strip()]
    return tuple(int(part) for part in parts) if parts and all(part.strip().isdecimal() for part in parts) else None
