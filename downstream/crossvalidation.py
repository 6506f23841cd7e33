"""Label maps of the cases that a run, or one of each fold, validated on: on the images' own grids, then scored."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from downstream import evaluate
from downstream.cases import Dataset, label_files
from downstream.ensemble import load_models
from downstream.geometry import found_at
from downstream.naming import ending
from downstream.predicting import predict_image
from downstream.settings import Settings
from launch.distributed import World
from launch.progress import progress

__all__ = ["predict_cases", "score_maps"]


def predict_cases(settings: Settings, dataset: Dataset, names: Sequence[str], here: World) -> None:
    """Writes validation/CASE of a run, this rank's share of the cases, by the model file as `axial predict` would."""
    best = settings.folder / "best.safetensors"
    last = settings.folder / "model.safetensors"
    ensemble = load_models(best if settings.maps == "best" and best.is_file() else last, here.device)
    folder = settings.folder / "validation"
    folder.mkdir(exist_ok=True)
    mine = [case for case in dataset.cases if case.name in names][here.rank :: here.size]
    for case in progress(mine, len(mine), "predict", "cases", active=here.rank == 0):
        founds = [found_at(path) for path in case.images]
        predict_image(ensemble, founds, folder / (case.name + ending(founds[0])), settings.window)


def score_maps(folder: Path, runs: Sequence[Path], dataset: Dataset) -> None:
    """Brings the label maps of all runs together in `folder`/validation and scores them into `folder`/scores."""
    maps = folder / "validation"
    for run in runs if len(runs) > 1 else ():
        maps.mkdir(exist_ok=True)
        for path in label_files(run / "validation").values():
            (maps / path.name).unlink(missing_ok=True)
            os.link(path, maps / path.name)
    labels = {case.label.parent for case in dataset.cases}
    images = {case.images[0].parent for case in dataset.cases}
    if len(labels) > 1 or any(case.name not in case.label.name for case in dataset.cases):
        print(f"{maps}: not scored, the labels of {dataset.name} do not lie in one folder under the names of the cases")
        return
    evaluate.main(
        evaluate.Settings(
            folder=folder / "scores",
            predictions=maps,
            labels=labels.pop(),
            cases=tuple(label_files(maps)),
            images=images.pop() if len(images) == 1 else None,
            names=dataset.folder / "dataset.json",
        )
    )
