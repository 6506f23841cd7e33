"""The public CT sets and what of them lies in a folder: images, labels, and what is kept for testing.

The facts are entries in data_curation/datasets; CATALOGUE has them by name, and nothing else knows their names. The
set `folder` takes any tree of images.

CatalogueError (a ValueError): no such data set, or a folder that does not hold it.
"""

from __future__ import annotations

import csv
import importlib
import pkgutil
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from types import MappingProxyType

from data_curation import datasets
from data_curation.dataset import TEST_SET, DataSet, Place
from data_curation.folds import FOLD, FOLDS, fold_of
from data_curation.volumes import Found, find

__all__ = ["CATALOGUE", "VALIDATION", "Case", "CatalogueError", "cases", "missing"]

VALIDATION = f"validation fold {FOLD} of {FOLDS} of the benchmark"
_CONTAINER = re.compile(  # names of folders that hold many patients
    r"(image|label|mask|seg|segmentation|raw_?data|data|(sub|data)?set|part|fold|batch|ct|dicom|nifti|nii|train|training"
    r"|test|testing|val|valid|validation)s?(tr|ts|va|val)?_?\d*|(scan|volume|case|patient|subject)s?",
    re.IGNORECASE,
)
_ENDING = re.compile(r"\.(nii(\.gz)?|hdr|img|nrrd|nhdr|mha|mhd)$", re.IGNORECASE)

Refusal = tuple[str, str, str]  # source, reason, detail


class CatalogueError(ValueError):
    """The name of no data set, or a folder that does not hold the one it is said to hold."""


@dataclass(frozen=True)
class Case:
    """One image of a data set. `patient`, `study` and `series` are in clear, for hashing; `source` is relative to the
    data set's root. `held_out` says why curation leaves the case out unless it is told to include such cases.

    `same_as` are the canonical names that the scan goes by, CATALOGUE_NAME/PATIENT: its own, and those that it is known
    to have in other sets. Two cases that share one are the same scan, whatever the data sets are called in a corpus.
    Empty for `folder`, whose names mean nothing elsewhere.
    """

    dataset: str
    patient: str
    study: str
    series: str
    image: Found
    label: Path | None  # a file, or the folder that holds one file a structure
    held_out: str
    source: str
    same_as: tuple[str, ...] = ()


@dataclass
class _Sorted:
    """What `find` found, by the place it lies in."""

    images: list[tuple[Found, Place, str]] = field(default_factory=list)  # with the patient
    labels: dict[str, list[tuple[int, Path, Found]]] = field(default_factory=lambda: defaultdict(list))
    left_out: set[str] = field(default_factory=set)  # patients of refused images
    refused: list[Refusal] = field(default_factory=list)

    def label(self, patient: str) -> Path | None:
        """The label of the place named first."""
        return min((one[:2] for one in self.labels.get(patient, ())), default=(0, None))[1]


def _listed() -> Mapping[str, DataSet]:
    """The entries of every module of the package, `folder` first."""
    modules = sorted(info.name for info in pkgutil.iter_modules(datasets.__path__))
    entries: dict[str, DataSet] = {}
    for module in sorted(modules, key=lambda module: module != "folder"):
        for entry in importlib.import_module(f"{datasets.__name__}.{module}").DATASETS:
            assert entry.name not in entries, f"two data sets are called {entry.name}"
            entries[entry.name] = entry
    return MappingProxyType(entries)


CATALOGUE: Mapping[str, DataSet] = _listed()


def cases(name: str, root: Path) -> tuple[list[Case], list[Refusal]]:
    """The cases of data set `name` below `root`, and (source, reason, detail) of all that is ruled out already.

    Only headers are read. What is no image by its name is counted, one entry an ending. Held out are the official test
    set, the validation fold of a benchmark (drawn over all its cases where these are known, else over the labelled ones
    that are found), and what is known to be the same scan as one of them. Raises CatalogueError.
    """
    if name not in CATALOGUE:
        raise CatalogueError(f"no data set is called {name!r}: take one of {', '.join(CATALOGUE)}")
    dataset = CATALOGUE[name]
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise CatalogueError(f"{name}: {root} {what}; expected a folder with {dataset.tree}")
    inner = root / dataset.folder if dataset.folder and (root / dataset.folder).is_dir() else root
    skipped: Counter[str] = Counter()
    found = list(find(inner, skipped))
    there = _sort(dataset, inner, found)
    tests = _tests(dataset, inner, there.refused)
    labelled = [patient for _, place, patient in there.images if not place.held_out and there.label(patient)]
    drawn = fold_of(labelled) if dataset.benchmark and not dataset.train_ids else frozenset()
    kept = [
        _case(dataset, inner, image, patient, (there.label(patient), place), (tests, drawn))
        for image, place, patient in there.images
    ]
    refused = there.refused + _orphans(there, {case.patient for case in kept}, inner)
    if not kept and (not found or not dataset.anything):
        raise CatalogueError(_nothing(dataset, root, refused, skipped))
    for ending, count in sorted(skipped.items()):
        kind = f"*{ending}" if ending.startswith(".") else ending
        refused.append(
            (kind, "not_image", f"{count} file(s) of a kind that is not read: NIfTI, NRRD, MetaImage and DICOM are")
        )
    return _below(kept, refused, inner.relative_to(root).as_posix())


def missing(name: str, found: Iterable[Case]) -> tuple[str, ...]:
    """Patients that a whole download of `name` has and `found` has not; empty where its patients are not known."""
    there = {case.patient for case in found}
    expected = (*CATALOGUE[name].train_ids, *CATALOGUE[name].test_ids)
    return tuple(patient for patient in expected if patient not in there)


def _sort(dataset: DataSet, root: Path, found: Iterable[Found]) -> _Sorted:
    there = _Sorted()
    for image in found:
        rank, place, match = _place(dataset, image.path.relative_to(root).as_posix())
        if place is None or match is None:
            away = f"not where {dataset.name} keeps its images ({dataset.tree})"
            there.refused.append((image.source, image.reason or "outside_layout", image.detail or away))
            continue
        patient = match["patient"] if "patient" in match.re.groupindex else _patient(image, root)
        bad = (dataset.known_bad or {}).get(patient)
        if place.reason == "label" and not image.reason:
            path = image.path.parent if place.structures else image.path
            there.labels[patient].append((rank, path, image))
        elif place.reason or image.reason:
            there.refused.append((image.source, place.reason or image.reason, place.detail or image.detail))
            there.left_out.add(patient)
        elif bad:
            there.refused.append((image.source, "known_bad", f"{bad}: left out"))
            there.left_out.add(patient)
        else:
            there.images.append((image, place, patient))
    return there


def _place(dataset: DataSet, path: str) -> tuple[int, Place | None, re.Match[str] | None]:
    for rank, place in enumerate(dataset.places):
        match = re.fullmatch(place.pattern, path, re.IGNORECASE)
        if match:
            return rank, place, match
    return 0, None, None


def _patient(image: Found, root: Path) -> str:
    """Where the layout does not name the patient: DICOM does, or a folder that is not there for many patients."""
    folder = image.path if image.kind == "dicom" else image.path.parent
    named = [part for part in folder.relative_to(root).parts if not _CONTAINER.fullmatch(part)]
    return image.patient or (named[0] if named else _ENDING.sub("", image.path.name))


def _case(
    dataset: DataSet,
    root: Path,
    image: Found,
    patient: str,
    lies: tuple[Path | None, Place],
    sets: tuple[Set[str] | None, Set[str]],
) -> Case:
    label, place = lies
    if place.label:
        beside = root / re.sub(*place.label, image.path.relative_to(root).as_posix(), flags=re.IGNORECASE)
        label = beside if beside.exists() else None
    own = f"{dataset.name}/{patient}"
    names = () if dataset.anything else (own, *_elsewhere(dataset, patient))
    held_out = _held_out(dataset, patient, place, names, sets)
    return Case(dataset.name, patient, image.study or own, image.series, image, label, held_out, image.source, names)


def _elsewhere(dataset: DataSet, patient: str) -> list[str]:
    matches = ((re.fullmatch(pattern, patient), name) for pattern, name in dataset.same)
    return [match.expand(name) for match, name in matches if match]


def _held_out(
    dataset: DataSet, patient: str, place: Place, names: Iterable[str], sets: tuple[Set[str] | None, Set[str]]
) -> str:
    """Why this case is not for training; `sets`: who is for testing (None: nobody knows), who validates."""
    tests, drawn = sets
    if tests is None:
        assert dataset.split is not None
        return f"it may be of the {TEST_SET}, which {dataset.split.file} tells: put that file beside the cases"
    if place.held_out or patient in tests:
        return place.held_out or TEST_SET
    if patient in drawn:
        return VALIDATION
    for name in names:
        owner, _, number = name.partition("/")
        why = TEST_SET if number in CATALOGUE[owner].test_ids else VALIDATION if number in _validation(owner) else ""
        if why:
            return why if owner == dataset.name else f"{why} (the same scan as {name})"
    return ""


@cache
def _validation(name: str) -> frozenset[str]:
    """The validation fold of a benchmark whose cases are known, so that no download changes it."""
    dataset = CATALOGUE[name]
    return fold_of(dataset.train_ids) if dataset.benchmark and dataset.train_ids else frozenset()


def _tests(dataset: DataSet, root: Path, refused: list[Refusal]) -> frozenset[str] | None:
    """Patients whom the split table sets apart for testing; None, and told among the refused, where it is missing."""
    table = dataset.split
    if table is None:
        return frozenset()
    path = root / table.file
    if not path.is_file():
        text = (
            f"{table.file} is missing, so the test cases of {dataset.name} cannot be told apart and all its cases are "
            "held out: put it beside the cases"
        )
        refused.append((table.file, "no_split", text))
        return None
    # Only numbers and splits are read, so a name in another character set may be spoilt.
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        rows = list(csv.DictReader(file, delimiter=table.delimiter))
    if not rows or not {table.patient, table.column} <= rows[0].keys():
        columns = ", ".join(rows[0]) if rows else "no rows"
        raise CatalogueError(
            f"{path}: expected columns {table.patient} and {table.column} between {table.delimiter!r}, found {columns}"
        )
    return frozenset(row[table.patient] for row in rows if row[table.column] == table.value)


def _orphans(there: _Sorted, kept: Set[str], root: Path) -> list[Refusal]:
    """Labels of patients without an image that is kept, one entry a file or a folder of structures."""
    told: dict[str, str] = {}
    for patient in there.labels.keys() - kept:
        for _, path, image in there.labels[patient]:
            source = image.source if path == image.path else path.relative_to(root).as_posix()
            bad = patient in there.left_out
            told[source] = (
                "the label of an image that is left out" if bad else "a label without its image: fetch the image"
            )
    return [(source, "label", text) for source, text in sorted(told.items())]


def _nothing(dataset: DataSet, root: Path, refused: list[Refusal], skipped: Counter[str]) -> str:
    there = sorted(path.name + ("/" if path.is_dir() else "") for path in root.iterdir())
    reasons = Counter(reason for _, reason, _ in refused)
    counted = [f"{count} {what}" for what, count in (*sorted(reasons.items()), *sorted(skipped.items()))]
    listing = ", ".join(there[:8]) + (f" and {len(there) - 8} more" if len(there) > 8 else "")
    return (
        f"{dataset.name}: no CT image found below {root}; expected {dataset.tree}; found "
        f"{listing or 'an empty folder'}" + (f" ({', '.join(counted)})" if counted else "")
    )


def _below(kept: list[Case], refused: list[Refusal], prefix: str) -> tuple[list[Case], list[Refusal]]:
    """Sources relative to the root that was given, where the set's own folder lies inside it."""
    if prefix == ".":
        return kept, refused
    moved = []
    for case in kept:
        source = f"{prefix}/{case.source}"
        moved.append(replace(case, source=source, image=replace(case.image, source=source)))
    return moved, [(f"{prefix}/{source}", reason, detail) for source, reason, detail in refused]
