"""Verb `finetune`: a backbone and a labelled data set in, one segmentation model out, or one of each fold.

The recipe is MedDINOv3's (arXiv 2509.02379): a decoder over several blocks, two learning rates, nnU-Net's loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial

from downstream import tuning
from downstream.cases import CaseError, Dataset, open_dataset, split
from downstream.crossvalidation import predict_cases, score_maps, scored_weights
from downstream.model import Header, SegmentationModel, save_model
from downstream.prepared import Prepared, prepare
from downstream.segmentation import Segmentation, draw
from downstream.settings import OptimSettings, Settings
from downstream.training import assemble, data_of, digest, outline, run, speaker
from downstream.validation import Table, joined, read_report, report
from launch.distributed import WAIT_S, World, barrier, from_first, world
from launch.run import Outcome, command
from pretrain.checkpoint import checkpoint_bytes

__all__ = ["OptimSettings", "Settings", "dry_run", "main", "parts", "samples"]


def main(settings: Settings) -> Outcome:
    """Fine-tune, or continue where the run folder's newest checkpoint stands; then validate and write the model.

    With `split.fold=all` every fold is a run of its own in fold_N, one after the other; what is finished stays.
    """
    dataset = open_dataset(settings.dataset)
    with world(settings.device, WAIT_S) as here:
        _check(settings, dataset, here)
        cases = _prepared(dataset, settings, here)
        runs = _folds(settings)
        tables = [_one(one, dataset, cases, here) for one in runs]
        held = [table for table in tables if table is not None]
        if here.rank == 0 and len(runs) > 1 and held:
            print(report(settings.folder, joined(held), settings.steps))
        if here.rank == 0 and held and settings.maps != "none":
            score_maps(settings.folder, [one.folder for one in runs], dataset)
    files = [str(scored_weights(one)) for one in runs]
    several = f"[{','.join(files)}]" if settings.maps == "best" else str(settings.folder)
    model = files[0] if len(files) == 1 else several
    names = ("validation.json", "validation.csv", "validation", "scores", "best.safetensors")
    made = [f"{one.folder}/model.safetensors" for one in runs]
    made += [f"{settings.folder}/{name}" for name in names if (settings.folder / name).exists()]
    return Outcome(
        made=tuple(made), next=(command("predict", f"model={model}", "images=IMAGES", "folder=PREDICTIONS"),)
    )


def _folds(settings: Settings) -> list[Settings]:
    """The runs: one, or one a fold, which share the prepared cases."""
    cache = settings.cache or settings.folder / "cache"
    if settings.split.fold != "all":
        return [settings.model_copy(update={"cache": cache})]
    found = []
    for fold in range(settings.split.folds):
        part = settings.split.model_copy(update={"fold": fold})
        found.append(
            settings.model_copy(update={"cache": cache, "split": part, "folder": settings.folder / f"fold_{fold}"})
        )
    return found


def parts(settings: Settings, most: int) -> list[Settings]:
    """With `split.fold=all` the run of each fold, which may be done elsewhere and at one time; `main` finds them done.

    As many as there are folds, whatever `most` says. CaseError where the cases cannot be cut so.
    """
    if settings.split.fold != "all":
        return []
    dataset = open_dataset(settings.dataset)
    runs = _folds(settings)
    for fold in runs:
        _cut(fold, dataset)
    return runs


def _one(settings: Settings, dataset: Dataset, cases: Mapping[str, Prepared], here: World) -> Table | None:
    """One run: the model is written, its validation cases are scored; their table, None where there are none."""
    training, validation = _cut(settings, dataset)
    train_cases, val_cases = [cases[name] for name in training], [cases[name] for name in validation]
    settings.folder.mkdir(parents=True, exist_ok=True)
    barrier()
    say = speaker(here)
    data = digest(data_of(train_cases, val_cases))
    known = from_first(partial(_known, settings, data)) if val_cases else None
    if known is not None:
        say(f"{settings.folder}: done before")
        return known
    model, header = assemble(settings, dataset, train_cases, say)
    say(_summary(settings, dataset, model, header, train_cases, len(val_cases)))
    ended, table = run(settings, model, header, train_cases, val_cases, here)
    header = header.model_copy(update={"step": ended})
    save_model(settings.folder / "model.safetensors", model, header, write=here.rank == 0)
    if table is None:
        return None
    if settings.maps != "none":
        barrier()
        predict_cases(settings, dataset, validation, here)
        barrier()
    if here.rank == 0:
        print(report(settings.folder, table, ended, data))
    return table


def _known(settings: Settings, data: str) -> Table | None:
    """The table of a run that was finished before, on the same data."""
    whole = (settings.folder / "model.safetensors").is_file()
    return read_report(settings.folder, settings.steps, data) if whole else None


def _check(settings: Settings, dataset: Dataset, here: World) -> None:
    """What would be found out late: when every case is prepared, and the folder holds a run with these settings."""
    each = here.size * settings.accumulate
    if settings.patches.batch_size % each:
        parts = f"{here.size} ranks in {settings.accumulate} parts"
        raise ValueError(f"patches.batch_size {settings.patches.batch_size} cannot be shared by {parts}")
    if here.size > 1 and settings.parallel.sharding != "replicate":
        raise ValueError("finetune copies the model to each rank: set parallel.sharding to replicate")
    for run_of_fold in _folds(settings):
        _cut(run_of_fold, dataset)
    outline(settings, dataset)


def _cut(settings: Settings, dataset: Dataset) -> tuple[list[str], list[str]]:
    """Names of the cases to train on, and of those that validate."""
    return split([case.name for case in dataset.cases], settings.split, dataset.folder)


def _prepared(dataset: Dataset, settings: Settings, here: World) -> dict[str, Prepared]:
    """Every rank prepares its share; then all find all of them ready.

    Runs of several folds may do so at once into one cache: each begins at another case.
    """
    cache = settings.cache or settings.folder / "cache"
    fold, count = settings.split.fold, len(dataset.cases)
    begin = 0 if fold == "all" else fold * count // settings.split.folds
    ordered = [*dataset.cases[begin:], *dataset.cases[:begin]]
    one = partial(prepare, labels=dataset.labels, spacing=settings.spacing, folder=cache, channels=dataset.channels)
    workers, first = settings.prepare_workers, here.rank == 0
    if here.size > 1:
        with suppress(CaseError, OSError):  # told below by every rank; here the others would wait for this one
            one(ordered[here.rank :: here.size], workers=workers, active=first)
        barrier()
    found = one(ordered, workers=workers if here.size == 1 else 0, active=first)
    return {case.name: case for case in found}


def samples(settings: Settings, step: int) -> list[str]:
    """Names of the cases that a step (the first is 1) sees, over all ranks; none where every fold has steps."""
    if settings.split.fold == "all":
        return []
    training, _ = _cut(settings, open_dataset(settings.dataset))
    size = settings.patches.batch_size
    return [draw(training, settings.seed, index)[0] for index in range((step - 1) * size, step * size)]


def dry_run(settings: Settings) -> str:
    """What a run would be: cases, classes, parameters. No voxel is read."""
    dataset = open_dataset(settings.dataset)
    counts = [tuple(map(len, _cut(one, dataset))) for one in _folds(settings)]
    return "\n".join(_lines(settings, dataset, outline(settings, dataset), *counts[0]))


def _lines(settings: Settings, dataset: Dataset, model: SegmentationModel, training: int, validation: int) -> list[str]:
    passes = settings.steps * settings.patches.batch_size / max(training, 1)
    organs = ", ".join(dataset.labels.organs)
    rule = "regions that may overlap" if dataset.labels.order else "labels that exclude one another"
    return [
        f"{dataset.name}: {training} cases to train, {validation} to validate; {rule}: {organs}",
        f"blocks {list(model.blocks)} are read",
        tuning.parameter_table(model),
        f"a checkpoint is {checkpoint_bytes(Segmentation(model, dataset.labels)) / 2**30:.2f} GiB",
        f"{settings.steps} steps of {settings.patches.batch_size} patches of {settings.patches.size} px: "
        f"{passes:.0f} patches a case",
    ]


def _summary(
    settings: Settings,
    dataset: Dataset,
    model: SegmentationModel,
    header: Header,
    cases: Sequence[Prepared],
    validation: int,
) -> str:
    spacings = sorted(case.spacing[1] for case in cases)
    lines = _lines(settings, dataset, model, len(cases), validation)
    rule = settings.normalisation if isinstance(settings.normalisation, str) else "given"
    lines += [f"{channel.name}: {channel.said()} ({rule})" for channel in header.channels]
    lines.append(f"pixels of {spacings[0]:.3g} to {spacings[-1]:.3g} mm, slices {_slices(cases)}")
    for case in cases:
        lines += [f"  {case.name}: {note}" for note in case.notes]
    return "\n".join(lines)


def _slices(cases: Sequence[Prepared]) -> str:
    sides = [side for case in cases for side in case.shape[1:]]
    return f"{min(sides)} to {max(sides)} px a side, {sum(case.shape[0] for case in cases):,} in all"
