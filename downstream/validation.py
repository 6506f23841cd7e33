"""Dice of validation cases on the training grid, during fine-tuning and at its end."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from downstream import metrics
from downstream.cases import IGNORE
from downstream.inference import Window, decided, head_scores
from downstream.model import Header, SegmentationModel, save_model
from downstream.prepared import Prepared
from launch.distributed import World, from_first
from launch.run import read_json, write_text

__all__ = ["Best", "Table", "joined", "read_report", "region_dice", "report", "validate"]


@dataclass(frozen=True)
class Table:
    """`dice` [cases, organs], NaN where neither label nor prediction has the organ."""

    cases: tuple[str, ...]
    organs: tuple[str, ...]
    dice: NDArray[np.float64]

    def means(self) -> dict[str, float]:
        """Mean over cases of each organ, and `mean` over the organs that some case has."""
        each, whole = metrics.bootstrap(self.dice, draws=1)
        named = zip(self.organs, each, strict=True)
        return {"mean": whole.mean, **{organ: interval.mean for organ, interval in named}}


def joined(tables: Sequence[Table]) -> Table:
    """One table of the cases of all of them."""
    rows = sorted((name, row) for table in tables for name, row in zip(table.cases, table.dice.tolist(), strict=True))
    return Table(tuple(name for name, _ in rows), tables[0].organs, np.array([row for _, row in rows]))


def validate(model: SegmentationModel, header: Header, cases: Sequence[Prepared], window: Window, here: World) -> Table:
    """Every rank predicts its share of the cases; all get the whole table (a collective)."""
    was_training = model.training
    model.eval()
    mine = {case.name: _case(model, header, case, window) for case in cases[here.rank :: here.size]}
    model.train(was_training)
    parts = [mine]
    if here.size > 1:
        parts = [{} for _ in range(here.size)]
        dist.all_gather_object(parts, mine)
    rows = {name: row for part in parts for name, row in part.items()}
    names, organs = tuple(sorted(rows)), tuple(header.organs)
    return Table(names, organs, np.array([rows[name] for name in names], dtype=np.float64).reshape(len(names), -1))


def _case(model: SegmentationModel, header: Header, case: Prepared, window: Window) -> list[float]:
    classes = len(header.values)
    stored, label = case.volume()
    index = np.zeros(256, dtype=np.int64)  # label value -> class index
    index[list(header.values)] = np.arange(classes)
    confusion = np.zeros((classes, classes), dtype=np.int64)  # label, prediction
    for where, logits in head_scores(model, header, stored, case.spacing[0], window):
        found = index[decided(logits, header.labels).cpu().numpy()]
        truth = label[where]
        joint = (truth.astype(np.int64) * classes + found)[truth != IGNORE]
        confusion += np.bincount(joint.ravel(), minlength=classes**2).reshape(classes, classes)
    return [region_dice(confusion, index[list(values)].tolist()) for values in header.organs.values()]


def region_dice(confusion: NDArray[np.int64], members: Sequence[int]) -> float:
    """Dice of the union of some classes, from voxel counts [label, prediction]; NaN where neither side has it."""
    sizes = int(confusion[members].sum() + confusion[:, members].sum())
    return 2 * int(confusion[np.ix_(members, members)].sum()) / sizes if sizes else math.nan


class Best:
    """Keeps the weights of the best validation so far in `best.safetensors`; a continued run knows the mark.

    Every rank must make the same calls.
    """

    def __init__(self, folder: Path, model: SegmentationModel, header: Header, start: int) -> None:
        self.folder, self.model, self.header = folder, model, header

        def look() -> float:
            known = read_json(folder / "best.json")
            # What came after the checkpoint that we continue from will be done again.
            return float(known["dice"]) if known is not None and known["step"] <= start else -math.inf

        self.mark = from_first(look)  # it decides whether all ranks save together

    def offer(self, step: int, dice: float, here: World) -> None:
        """The weights now, after `step` steps (a collective: `dice` is the same on all ranks)."""
        if not dice > self.mark:
            return
        self.mark = dice
        header = self.header.model_copy(update={"step": step})
        save_model(self.folder / "best.safetensors", self.model, header, write=here.rank == 0)
        if here.rank == 0:
            write_text(self.folder / "best.json", json.dumps({"step": step, "dice": dice}) + "\n")


def read_report(folder: Path, step: int, data: str) -> Table | None:
    """What `report` wrote into a folder, if it is of that step and of those data."""
    about = read_json(folder / "validation.json")
    if about is None or about["step"] != step or about.get("data") != data:
        return None
    with (folder / "validation.csv").open(newline="") as file:
        organs, *rows = csv.reader(file)
    dice = [[float(value) if value else math.nan for value in row[1:]] for row in rows]
    return Table(tuple(row[0] for row in rows), tuple(organs[1:]), np.array(dice))


def report(folder: Path, table: Table, step: int, data: str = "") -> str:
    """Writes validation.csv (a line a case) and validation.json (means with intervals); gives the table as text.

    `data` tells the cases that were trained on and validated from any others (`training.digest`).
    """
    with (folder / "validation.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["case", *table.organs])
        for name, row in zip(table.cases, table.dice.tolist(), strict=True):
            writer.writerow([name, *("" if math.isnan(value) else repr(value) for value in row)])
    each, whole = metrics.bootstrap(table.dice)
    rows = dict(zip([*table.organs, "mean"], [*each, whole], strict=True))
    entries = {
        organ: {
            key: None if isinstance(value, float) and math.isnan(value) else value for key, value in asdict(row).items()
        }
        for organ, row in rows.items()
    }
    described = {"step": step, "grid": "training", "data": data, "cases": list(table.cases), "dice": entries}
    write_text(folder / "validation.json", json.dumps(described, indent=1) + "\n")
    width = max(len(organ) for organ in rows)
    lines = [f"Dice after {step} steps, {len(table.cases)} validation case(s), on the training grid"]
    for organ, row in rows.items():
        lines.append(f"  {organ:<{width}}  {metrics.with_interval(row.mean, row.low, row.high, 3)}")
    return "\n".join(lines)
