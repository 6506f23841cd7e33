"""Verb `compare`: two sets of scores of the same cases, paired, organ by organ and over all organs.

A difference is second - first, so a positive one speaks for the second in Dice and NSD, a negative one in HD95.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy import stats

from downstream import cases, metrics
from downstream.score_files import CaseScores, read_scores
from launch import settings as base
from launch.run import Outcome, write_text

__all__ = ["Paired", "Settings", "holm", "main", "signed_rank"]

EXACT = 50  # differences that are not zero, up to which the distribution of the rank sum is counted out
SAME = 1e-9  # differences up to this are rounding
TITLES = {"dice": "Dice", "nsd": "NSD", "hd95": "HD95 mm"}
RULES = (
    "A difference is second - first, of cases that both have; where the organ is in neither label nor prediction of "
    "one of the two, and where a distance is infinite, the pair is left out.",
    "Interval: percentile bootstrap over whole cases of the mean difference.",
    f"p: Wilcoxon's signed-rank test, two-sided; zero differences are dropped; exact, ties included, for up to {EXACT} "
    "other differences, else the normal approximation.",
    "Holm: p corrected for the number of organs of the same measure. The row `mean` is the mean over organs, tested on "
    "the means of the cases over their organs; it is not one of the organs.",
)


class Settings(base.Settings):
    """Settings of `axial compare`."""

    folder: Path = Field(description="where compare.csv, compare.json and compare.txt go")
    first: Path = Field(description="a folder of `axial evaluate`, or nnU-Net's summary.json or its folder")
    second: Path = Field(description="the scores that are compared with the first")
    names: Path | None = Field(
        None, description="dataset.json that names the label values of nnU-Net's scores; null: the other side's names"
    )
    draws: int = Field(2000, ge=1, description="bootstrap draws")
    level: float = Field(0.95, gt=0, lt=1, description="share of the draws that an interval holds")
    seed: int = Field(0, ge=0, description="seed of the bootstrap")


@dataclass(frozen=True)
class Paired:
    """One organ, or `mean`, by one measure: both means over the pairs, their difference, who is better how often."""

    measure: str
    organ: str
    pairs: int
    first: float
    second: float
    difference: float
    low: float
    high: float
    better: int  # pairs in which the second is
    worse: int
    equal: int
    p: float
    p_holm: float  # NaN for `mean`


def main(settings: Settings) -> Outcome:
    """Writes compare.csv, compare.json and compare.txt, and prints the text."""
    first, second = _read(settings)
    common = sorted(first.cases & second.cases)
    if not common:
        raise cases.CaseError(
            f"no case in common: {first.path} has {sorted(first.cases)[:3]}, {second.path} has "
            f"{sorted(second.cases)[:3]}; cases are paired by name"
        )
    organs = [organ for organ in first.organs if organ in second.organs]
    if not organs:
        raise cases.CaseError(
            f"no organ in common: {first.path} has {first.organs[:5]}, {second.path} has {second.organs[:5]}; "
            "names=dataset.json gives the label values of nnU-Net's scores their names"
        )
    measures = [measure for measure in TITLES if measure in first.table and measure in second.table]
    if not measures:
        raise cases.CaseError(f"{first.path} and {second.path} have no measure in common")
    rows = [row for measure in measures for row in _compared(measure, first, second, common, organs, settings)]
    alone = {
        "cases_only_in_first": sorted(first.cases - second.cases),
        "cases_only_in_second": sorted(second.cases - first.cases),
        "organs_only_in_first": [organ for organ in first.organs if organ not in organs],
        "organs_only_in_second": [organ for organ in second.organs if organ not in organs],
    }
    text = _text(rows, alone, first, second, len(common))
    _write(settings, rows, {"cases": common, **alone}, text)
    print(text, end="")
    return Outcome(made=tuple(str(settings.folder / name) for name in ("compare.csv", "compare.json", "compare.txt")))


def _read(settings: Settings) -> tuple[CaseScores, CaseScores]:
    """Both sides; organs that are known by their label values take the names of `names`, or of the other side."""
    read = [read_scores(path) for path in (settings.first, settings.second)]
    given = cases.read_labels(settings.names).organs if settings.names is not None else None
    found = []
    for (scores, by_value), (other, _) in zip(read, reversed(read), strict=True):
        found.append(scores.named(given if given is not None else other.values) if by_value else scores)
    return found[0], found[1]


def _compared(
    measure: str, first: CaseScores, second: CaseScores, names: Sequence[str], organs: Sequence[str], settings: Settings
) -> list[Paired]:
    """Each organ, then `mean`."""
    sides = np.array(
        [
            [[side.table[measure].get(name, {}).get(organ, math.nan) for organ in organs] for name in names]
            for side in (first, second)
        ],
        dtype=np.float64,
    ).reshape(2, len(names), len(organs))
    sides[:, ~np.isfinite(sides).all(0)] = np.nan  # pairs only
    difference = sides[1] - sides[0]
    difference[np.abs(difference) <= SAME] = 0.0
    each, whole = metrics.bootstrap(difference, settings.seed, settings.draws, settings.level)
    columns = [(organ, difference[:, o], each[o], sides[:, :, o]) for o, organ in enumerate(organs)]
    over = [np.array([metrics.overall(row) for row in table]) for table in (difference, *sides)]
    means = [metrics.overall(np.array([metrics.overall(column) for column in side.T])) for side in sides]
    found = []
    for organ, values, interval, side in [*columns, ("mean", over[0], whole, np.stack(over[1:]))]:
        pairs = values[np.isfinite(values)]
        first_mean, second_mean = means if organ == "mean" else [metrics.overall(column) for column in side]
        up, down = int((pairs > 0).sum()), int((pairs < 0).sum())
        better, worse = (down, up) if measure == "hd95" else (up, down)
        numbers = (first_mean, second_mean, interval.mean, interval.low, interval.high)
        p = signed_rank(pairs)
        found.append(Paired(measure, organ, len(pairs), *numbers, better, worse, len(pairs) - up - down, p, math.nan))
    corrected = holm([row.p for row in found[:-1]])
    return [Paired(**(asdict(row) | {"p_holm": p})) for row, p in zip(found, [*corrected, math.nan], strict=True)]


def signed_rank(differences: NDArray[np.float64]) -> float:
    """Two-sided p of Wilcoxon's signed-rank test (1945) of [n] paired differences; zeros are dropped.

    NaN without any pair, 1 where all are zero. Up to `EXACT` others the distribution of the rank sum is counted over
    all signs, with the mean ranks of ties; beyond that scipy's normal approximation with its correction for ties.
    """
    if not len(differences):
        return math.nan
    # Differences of decimal scores that are equal on paper differ in their last bits.
    values = np.round(differences[np.abs(differences) > SAME], 9)
    if not len(values):
        return 1.0
    if len(values) > EXACT:
        return float(stats.wilcoxon(values).pvalue)
    ranks = np.rint(2 * stats.rankdata(np.abs(values))).astype(np.int64)  # doubled: whole numbers
    ways = np.ones(1)  # ways[s]: of the signs that give rank sum s, exact in float64 up to 2**53
    for rank in ranks.tolist():
        ways = np.concatenate([ways, np.zeros(rank)]) + np.concatenate([np.zeros(rank), ways])
    observed = int(ranks[values > 0].sum())
    tail = min(ways[: observed + 1].sum(), ways[observed:].sum())
    return float(min(1.0, 2 * tail / ways.sum()))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction (1979) of p values; NaN are none and stay NaN."""
    order = sorted((value, place) for place, value in enumerate(p) if not math.isnan(value))
    found, least = [math.nan] * len(p), 0.0
    for done, (value, place) in enumerate(order):
        least = max(least, min(1.0, value * (len(order) - done)))
        found[place] = least
    return found


def _text(
    rows: Sequence[Paired], alone: Mapping[str, Sequence[str]], first: CaseScores, second: CaseScores, common: int
) -> str:
    lines = [f"first:  {first.path}", f"second: {second.path}", f"{common} case(s) in both"]
    for measure in dict.fromkeys(row.measure for row in rows):
        digits = 1 if measure == "hd95" else 3
        heads = [TITLES[measure], "pairs", "first", "second", "second - first", "better", "worse", "equal", "p", "Holm"]
        table = [heads]
        for row in (row for row in rows if row.measure == measure):
            numbers = ["-" if math.isnan(value) else f"{value:.{digits}f}" for value in (row.first, row.second)]
            counts = [str(count) for count in (row.better, row.worse, row.equal)]
            table.append(
                [row.organ, str(row.pairs), *numbers, _interval(row, digits), *counts, _p(row.p), _p(row.p_holm)]
            )
        widths = [max(len(cells[i]) for cells in table) for i in range(len(heads))]
        lines.append("")
        lines += ["  ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)).rstrip() for cells in table]
    lines.append("")
    lines += [f"{key.replace('_', ' ')}: {', '.join(names)}" for key, names in alone.items() if names]
    return "\n".join([*lines, *RULES]) + "\n"


def _interval(row: Paired, digits: int) -> str:
    return metrics.with_interval(row.difference, row.low, row.high, digits, "+")


def _p(value: float) -> str:
    return "-" if math.isnan(value) else "<0.0001" if value < 1e-4 else f"{value:.4f}"


def _write(settings: Settings, rows: Sequence[Paired], facts: Mapping[str, Any], text: str) -> None:
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(asdict(rows[0]))
    for row in rows:
        cells = asdict(row).values()
        writer.writerow(
            ["" if _nan(value) else f"{value:.6g}" if isinstance(value, float) else value for value in cells]
        )
    listed = [{key: None if _nan(value) else value for key, value in asdict(row).items()} for row in rows]
    described = {"settings": settings.model_dump(mode="json"), **facts, "rules": list(RULES), "rows": listed}
    settings.folder.mkdir(parents=True, exist_ok=True)
    write_text(settings.folder / "compare.csv", table.getvalue())
    write_text(settings.folder / "compare.json", json.dumps(described, indent=1) + "\n")
    write_text(settings.folder / "compare.txt", text)


def _nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)
