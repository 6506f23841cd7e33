"""What there is to curate: every data set's cases as tasks under hashed names, and what is ruled out by its place.

Only headers are read here.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

from data_curation.accounts import Refused
from data_curation.catalogue import Case, cases
from data_curation.folds import fold_of
from data_curation.scan import ScanTask, stamp
from data_curation.settings import Evaluation, Settings, Terms
from data_curation.volumes import Found, find

__all__ = ["EVALUATION", "CurateError", "gather"]

CHANNEL = re.compile(r"(_\d{4})?\.(nii(\.gz)?|nrrd|nhdr|mha|mhd)$", re.IGNORECASE)


class CurateError(ValueError):
    """The curation cannot start: what stands against it and what to do."""


def gather(settings: Settings) -> tuple[list[ScanTask], list[Refused]]:
    """The tasks of all data sets in their order, and what is refused already. All folders are looked at first."""
    tasks: list[ScanTask] = []
    refused: list[Refused] = []
    taken: dict[str, str] = {}
    named = [(f"data set {one.called}", one.root) for one in settings.datasets]
    scored = [(one.id or f"evaluation {number}", one) for number, one in enumerate(settings.evaluation, 1)]
    for name, root in (*named, *((name, one.root) for name, one in scored)):
        if not root.is_dir():
            raise CurateError(f"{name}: {root} is not a folder on this machine")
    for source in settings.datasets:
        found, ruled_out = cases(source.name, source.root)
        refused += [Refused(source.called, *one) for one in ruled_out]
        if settings.licence == "commercial" and not source.terms.commercial:
            text = f"licence: commercial is set, and {source.terms.licence} does not allow it"
            refused += [Refused(source.called, case.source, "licence", text) for case in found]
            continue
        for case in found:
            task = _task(settings, source.called, source.terms, case)
            if task.volume in taken:
                text = f"the same data set, patient, study and series as {taken[task.volume]}"
                refused.append(Refused(source.called, case.source, "same_identity", text))
                continue
            taken[task.volume] = case.source
            tasks.append(task)
    for name, evaluation in scored:
        tasks += [_task(settings, name, Terms("", False), case) for case in _to_score(evaluation, name)]
    return tasks, refused


def _task(settings: Settings, name: str, terms: Terms, case: Case) -> ScanTask:
    spool = not case.held_out or (settings.include_held_out and case.dataset != EVALUATION)
    identity = (case.patient, case.study, case.series)
    patient, study, volume = (_hashed(settings, name, *identity[:depth]) for depth in (1, 2, 3))
    rules = (terms, case.held_out, spool, settings.limits, settings.slices, settings.codec, volume)
    return ScanTask(
        case,
        name,
        terms,
        volume,
        patient,
        study,
        stamp(case, *rules),
        spool,
        settings.limits,
        settings.slices,
        settings.codec,
    )


def _hashed(settings: Settings, *names: str) -> str:
    """64 bits of a salted hash: enough to tell 100,000 volumes apart (chance of a clash 3 in 10^10)."""
    salt = settings.salt or f"seed {settings.seed}"
    return hashlib.sha256(json.dumps([salt, *names]).encode()).hexdigest()[:16]


EVALUATION = "evaluation"  # catalogue name of the cases that a user wants to score models on


def _to_score(evaluation: Evaluation, name: str) -> Iterator[Case]:
    """The test images, and the training images of one fold: of splits_final.json where there is one, else our own."""
    training = {_case_name(found): found for found in _images(evaluation.root / "imagesTr")}
    held = _split_file(evaluation) or fold_of(training, evaluation.fold, evaluation.folds)
    unknown = sorted(set(held) - set(training))
    if unknown:
        raise CurateError(f"{name}: splits_final.json names {unknown[0]}, which imagesTr does not hold: restore it")
    why = f"validation case of fold {evaluation.fold} of {evaluation.root.name}"
    chosen = [(case, training[case], why) for case in sorted(held)]
    tests = sorted((_case_name(found), found) for found in _images(evaluation.root / "imagesTs"))
    chosen += [(case, found, f"test case of {evaluation.root.name}") for case, found in tests]
    if not chosen:
        raise CurateError(f"{name}: neither {evaluation.root / 'imagesTr'} nor imagesTs beside it holds an image")
    for case, found, reason in chosen:
        yield Case(EVALUATION, case, f"{name}/{case}", found.source, found, None, reason, found.source)


def _images(folder: Path) -> list[Found]:
    return [found for found in find(folder) if not found.reason] if folder.is_dir() else []


def _case_name(found: Found) -> str:
    return CHANNEL.sub("", found.path.name)


def _split_file(evaluation: Evaluation) -> frozenset[str]:
    path = evaluation.root / "splits_final.json"
    if not path.is_file():
        return frozenset()
    try:
        return frozenset(json.loads(path.read_text())[evaluation.fold]["val"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        text = f"{path} gives no validation cases of fold {evaluation.fold} ({type(error).__name__})"
        raise CurateError(f"{text}: it must be nnU-Net's list of {{train: [...], val: [...]}}") from None
