"""Label maps of the cases that a run, or one of each fold, validated on: on the images' own grids, then scored."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from data_curation.aside import link_or_copy
from downstream import evaluate
from downstream.cases import Dataset, file_ending, label_files
from downstream.ensemble import Ensemble, load_models
from downstream.geometry import found_at
from downstream.naming import ending
from downstream.predicting import predict_image
from downstream.settings import Settings
from launch.distributed import World, barrier
from launch.progress import progress
from launch.run import read_json, write_text

__all__ = ["predict_cases", "score_maps", "scored_weights"]


def scored_weights(settings: Settings) -> Path:
    """The model file of a finished run whose label maps are scored: the last, or with maps=best the best."""
    best = settings.folder / "best.safetensors"
    return best if settings.maps == "best" and best.is_file() else settings.folder / "model.safetensors"


def predict_cases(settings: Settings, dataset: Dataset, names: Sequence[str], here: World) -> None:
    """Writes validation/CASE of a run, this rank's share of the cases, by the model file as `axial predict` would.

    Every rank must call it. Maps that an earlier start made with the same weights stay.
    """
    weights = scored_weights(settings)
    ensemble = load_models(weights, here.device)
    if here.rank == 0:
        if settings.maps == "best" and weights.name != "best.safetensors":
            print(f"{settings.folder}: no validation has a Dice, so none is best; the maps are of {weights.name}")
        _clear(settings, ensemble)
    barrier()
    mine = [case for case in dataset.cases if case.name in names][here.rank :: here.size]
    for case in progress(mine, len(mine), "predict", "cases", active=here.rank == 0):
        founds = [found_at(path) for path in case.images]
        target = settings.folder / "validation" / (case.name + ending(founds[0]))
        if not target.exists():
            predict_image(ensemble, founds, target, settings.window)


def _clear(settings: Settings, ensemble: Ensemble) -> None:
    """Leaves only maps in validation/ that these weights made; maps.json says whose they are."""
    folder, note = settings.folder / "validation", settings.folder / "maps.json"
    folder.mkdir(exist_ok=True)
    for left in folder.glob(".*"):  # of a process that was killed
        left.unlink()
    said = {"weights": ensemble.files[0].name, "sha256": ensemble.digest, "step": ensemble.headers[0].step}
    if read_json(note) != said:
        for path in label_files(folder).values():
            path.unlink()
        write_text(note, json.dumps(said) + "\n")


def score_maps(folder: Path, runs: Sequence[Path], dataset: Dataset) -> None:
    """Brings the label maps of all runs together in `folder`/validation and scores them into `folder`/scores."""
    maps = folder / "validation"
    for run in runs if len(runs) > 1 else ():
        maps.mkdir(exist_ok=True)
        for path in label_files(run / "validation").values():
            link_or_copy(path, maps / path.name)
    labels = {case.label.parent for case in dataset.cases}
    images = {case.images[0].parent for case in dataset.cases}
    shown = len(images) == 1 and all(
        _stem(case.images[0]) in (case.name, f"{case.name}_0000") for case in dataset.cases
    )
    if len(labels) > 1 or any(_stem(case.label) != case.name for case in dataset.cases):
        print(f"{maps}: not scored, the labels of {dataset.name} do not lie in one folder under the names of the cases")
        return
    evaluate.main(
        evaluate.Settings(
            folder=folder / "scores",
            predictions=maps,
            labels=labels.pop(),
            cases=tuple(label_files(maps)),
            images=images.pop() if shown else None,
            names=dataset.folder / "dataset.json",
        )
    )


def _stem(path: Path) -> str:
    """The name by which `axial evaluate` pairs files."""
    return path.name.removesuffix(file_ending(path))
