"""The public CT sets as one table of facts: licence, home page, where images and labels lie, what is kept for testing.

A set is an entry of `CATALOGUE`; nothing else knows its name. The set `folder` takes any tree of images.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from data_curation.volumes import Found, find

__all__ = ["CATALOGUE", "Case", "CatalogueError", "DataSet", "Place", "SplitTable", "cases"]

TEST_SET = "official test set"
_CONTAINER = re.compile(  # names of folders that hold many patients
    r"(image|label|mask|seg|segmentation|raw_?data|data|(sub|data)?set|part|fold|batch|ct|dicom|nifti|nii|train|training"
    r"|test|testing|val|valid|validation)s?(tr|ts|va|val)?_?\d*|(scan|volume|case|patient|subject)s?",
    re.IGNORECASE,
)
_ENDING = re.compile(r"\.(nii(\.gz)?|hdr|img|nrrd|nhdr|mha|mhd)$", re.IGNORECASE)


class CatalogueError(ValueError):
    """The name of no data set, or a folder that does not hold the one it is said to hold."""


@dataclass(frozen=True)
class Case:
    """One image of a data set. `patient`, `study` and `series` are in clear, for hashing; `source` is relative to the
    data set's root. `held_out` says why curation leaves the case out unless it is told to include such cases."""

    dataset: str
    patient: str
    study: str
    series: str
    image: Found
    label: Path | None  # a file, or the folder that holds one file a structure
    held_out: str
    source: str
    same_as: tuple[str, ...] = ()


@dataclass(frozen=True)
class Place:
    """What lies where. `pattern` (case ignored) must match a whole path relative to the set's folder: an image file,
    or the folder of a DICOM series; its group `patient` names the patient. `label` is (what to replace, by what) in
    that path. With a `reason`, what lies there is refused; the reason "label" is for labels, told only when orphaned.
    """

    pattern: str
    label: tuple[str, str] | None = None
    held_out: str = ""
    reason: str = ""
    detail: str = ""


@dataclass(frozen=True)
class SplitTable:
    """A CSV file beside the images that says which patients are for testing."""

    file: str
    delimiter: str
    patient: str
    column: str
    value: str


@dataclass(frozen=True)
class DataSet:
    """Facts about one data set. `folder` is the name of its own folder, should the root be that folder's parent."""

    name: str
    title: str
    licence: str
    home_page: str
    doi: str
    citation: str
    tree: str  # what the root must look like, for error messages
    places: tuple[Place, ...]
    folder: str = ""
    labels: Mapping[int, str] | None = None
    split: SplitTable | None = None
    known_bad: Mapping[str, str] | None = None  # patient: what is wrong
    quirks: tuple[str, ...] = ()


_MSD_CITATION = "Antonelli M. et al., The Medical Segmentation Decathlon, Nature Communications 13, 4128 (2022)"
_MSD_TASKS: tuple[tuple[str, int, str, str, dict[int, str]], ...] = (  # name, task, folder's end, file stem, labels
    ("msd_liver", 3, "Liver", "liver", {1: "liver", 2: "liver tumour"}),
    ("msd_lung", 6, "Lung", "lung", {1: "lung tumour"}),
    ("msd_pancreas", 7, "Pancreas", "pancreas", {1: "pancreas", 2: "pancreatic tumour"}),
    ("msd_hepatic_vessel", 8, "HepaticVessel", "hepaticvessel", {1: "hepatic vessel", 2: "liver tumour"}),
    ("msd_spleen", 9, "Spleen", "spleen", {1: "spleen"}),
    ("msd_colon", 10, "Colon", "colon", {1: "colon tumour"}),
)


def _msd(name: str, task: int, end: str, stem: str, labels: dict[int, str]) -> DataSet:
    folder = f"Task{task:02d}_{end}"
    image = rf"(?P<patient>{stem}_\d+)\.nii(\.gz)?"
    return DataSet(
        name=name,
        title=f"Medical Segmentation Decathlon, task {task}: {end}",
        licence="CC BY-SA 4.0",
        home_page="http://medicaldecathlon.com",
        doi="10.1038/s41467-022-30695-9",
        citation=_MSD_CITATION,
        tree=f"{folder}/imagesTr/{stem}_*.nii.gz, {folder}/labelsTr/{stem}_*.nii.gz, {folder}/imagesTs/{stem}_*.nii.gz",
        places=(
            Place(rf"imagesTr/{image}", label=("imagesTr/", "labelsTr/")),
            Place(rf"imagesTs/{image}", held_out=TEST_SET),
            Place(rf"labelsTr/{image}", reason="label"),
        ),
        folder=folder,
        labels=labels,
        quirks=(
            ("the scans and numbers of LiTS, with the spacing that LiTS itself has lost for 28 to 47",)
            if name == "msd_liver"
            else ()
        ),
    )


_TOTALSEGMENTATOR = DataSet(
    name="totalsegmentator",
    title="TotalSegmentator CT dataset, version 2",
    licence="CC BY 4.0",
    home_page="https://zenodo.org/records/10047292",
    doi="10.5281/zenodo.10047292",
    citation="Wasserthal J. et al., TotalSegmentator, Radiology: Artificial Intelligence 5(5), e230024 (2023)",
    tree="s0000/ct.nii.gz, s0000/segmentations/*.nii.gz, ..., meta.csv",
    places=(
        Place(r"(?P<patient>s\d{4})/ct\.nii(\.gz)?", label=(r"/ct\.nii(\.gz)?$", "/segmentations")),
        Place(r"s\d{4}/segmentations/[^/]+\.nii(\.gz)?", reason="label"),
    ),
    folder="Totalsegmentator_dataset_v201",
    split=SplitTable("meta.csv", ";", "image_id", "split", "test"),
    known_bad=dict.fromkeys(
        ("s0184", "s0224", "s0830", "s0864", "s0992"), "its HU are wrong in version 2.0.0 of the data set"
    ),
    quirks=(
        "resampled to 1.5 mm; many scans are small fragments",
        "faces are blurred",
        "tails from -9,000 to 11,000 HU",
    ),
)

_CHAOS = DataSet(
    name="chaos",
    title="CHAOS: Combined Healthy Abdominal Organ Segmentation, CT arm",
    licence="CC BY-NC-SA 4.0",
    home_page="https://chaos.grand-challenge.org",
    doi="10.5281/zenodo.3362844",
    citation="Kavur A. E. et al., CHAOS Challenge, Medical Image Analysis 69, 101950 (2021)",
    tree="Train_Sets/CT/1/DICOM_anon/*.dcm, Train_Sets/CT/1/Ground/*.png, ..., Test_Sets/CT/3/DICOM_anon/*.dcm",
    places=(
        Place(r"(.*/)?Train_Sets/CT/(?P<patient>\d+)/DICOM_anon", label=("/DICOM_anon$", "/Ground")),
        Place(r"(.*/)?Test_Sets/CT/(?P<patient>\d+)/DICOM_anon", held_out=TEST_SET),
        Place(r"(.*/)?(Train|Test)_Sets/MR/.*", reason="not_ct", detail="the MR arm of the data set: left out"),
    ),
    labels={1: "liver"},
    quirks=("labels are PNG files whose order and flip need not be those of the DICOM files",),
)

_FOLDER = DataSet(
    name="folder",
    title="Any folder of CT images",
    licence="unknown",
    home_page="",
    doi="",
    citation="",
    tree="patient/scan.nii.gz, patient/series/*.dcm, *.nrrd, *.mha, ... at any depth",
    places=(Place(r".*"),),
    quirks=(
        "a patient is a DICOM PatientID, else the first folder not called images, train or the like, else the file",
    ),
)

CATALOGUE: Mapping[str, DataSet] = {
    dataset.name: dataset for dataset in (_FOLDER, *(_msd(*task) for task in _MSD_TASKS), _TOTALSEGMENTATOR, _CHAOS)
}


def cases(name: str, root: Path) -> tuple[list[Case], list[tuple[str, str, str]]]:
    """The cases of data set `name` below `root`, and (source, reason, detail) of all that is ruled out already.

    Only headers are read. What is no image by its name is counted, one entry an ending. Raises CatalogueError.
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
    kept: list[Case] = []
    refused: list[tuple[str, str, str]] = []
    loose: list[Found] = []  # labels, until their image is known
    left_out: set[Path | None] = set()  # labels of images that are known to be bad
    tests = _tests(dataset, inner, refused)
    for image in found:
        place, match = _place(dataset, image.path.relative_to(inner).as_posix())
        if place is None or match is None:
            away = f"not where {name} keeps its images ({dataset.tree})"
            refused.append((image.source, image.reason or "outside_layout", image.detail or away))
        elif place.reason == "label":
            loose.append(image)
        elif place.reason or image.reason:
            refused.append((image.source, place.reason or image.reason, place.detail or image.detail))
        else:
            case = _case(dataset, inner, image, place, match, tests)
            bad = (dataset.known_bad or {}).get(case.patient)
            if bad:
                refused.append((image.source, "known_bad", f"{bad}: left out"))
                left_out.add(case.label)
            else:
                kept.append(case)
    refused += _orphans(loose, kept, left_out)
    if not kept and (not found or name != "folder"):
        raise CatalogueError(_nothing(dataset, root, refused, skipped))
    for ending, count in sorted(skipped.items()):
        kind = f"*{ending}" if ending.startswith(".") else ending
        refused.append(
            (kind, "not_image", f"{count} file(s) of a kind that is not read: NIfTI, NRRD, MetaImage and DICOM are")
        )
    return _below(kept, refused, inner.relative_to(root).as_posix())


def _place(dataset: DataSet, path: str) -> tuple[Place | None, re.Match[str] | None]:
    for place in dataset.places:
        match = re.fullmatch(place.pattern, path, re.IGNORECASE)
        if match:
            return place, match
    return None, None


def _case(
    dataset: DataSet, root: Path, image: Found, place: Place, match: re.Match[str], tests: frozenset[str]
) -> Case:
    if "patient" in match.re.groupindex:
        patient = match["patient"]
    else:
        folder = image.path if image.kind == "dicom" else image.path.parent
        named = [part for part in folder.relative_to(root).parts if not _CONTAINER.fullmatch(part)]
        patient = image.patient or (named[0] if named else _ENDING.sub("", image.path.name))
    label = None
    if place.label:
        path = root / re.sub(*place.label, image.path.relative_to(root).as_posix(), flags=re.IGNORECASE)
        label = path if path.exists() else None
    held_out = TEST_SET if patient in tests else place.held_out
    study = image.study or f"{dataset.name}/{patient}"
    return Case(dataset.name, patient, study, image.series, image, label, held_out, image.source)


def _tests(dataset: DataSet, root: Path, refused: list[tuple[str, str, str]]) -> frozenset[str]:
    """Patients whom the split table sets apart for testing; a missing table is told among the refused."""
    table = dataset.split
    if table is None:
        return frozenset()
    path = root / table.file
    if not path.is_file():
        text = (
            f"{table.file} is missing, so the test cases of {dataset.name} cannot be set apart: put it beside the cases"
        )
        refused.append((table.file, "no_split", text))
        return frozenset()
    # Only numbers and splits are read, so a name in another character set may be spoilt.
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        rows = list(csv.DictReader(file, delimiter=table.delimiter))
    if not rows or not {table.patient, table.column} <= rows[0].keys():
        columns = ", ".join(rows[0]) if rows else "no rows"
        raise CatalogueError(
            f"{path}: expected columns {table.patient} and {table.column} between {table.delimiter!r}, found {columns}"
        )
    return frozenset(row[table.patient] for row in rows if row[table.column] == table.value)


def _orphans(
    labels: Iterable[Found], kept: Iterable[Case], left_out: Collection[Path | None]
) -> list[tuple[str, str, str]]:
    """Labels that belong to no kept case."""
    used = {case.label for case in kept}
    found = []
    for label in labels:
        if label.path in used or label.path.parent in used:
            continue
        bad = label.path in left_out or label.path.parent in left_out
        text = "the label of an image that is left out" if bad else "a label without its image: fetch the image"
        found.append((label.source, "label", text))
    return found


def _nothing(dataset: DataSet, root: Path, refused: list[tuple[str, str, str]], skipped: Counter[str]) -> str:
    there = sorted(path.name + ("/" if path.is_dir() else "") for path in root.iterdir())
    reasons = Counter(reason for _, reason, _ in refused)
    counted = [f"{count} {what}" for what, count in (*sorted(reasons.items()), *sorted(skipped.items()))]
    listing = ", ".join(there[:8]) + (f" and {len(there) - 8} more" if len(there) > 8 else "")
    return (
        f"{dataset.name}: no CT image found below {root}; expected {dataset.tree}; found "
        f"{listing or 'an empty folder'}" + (f" ({', '.join(counted)})" if counted else "")
    )


def _below(
    kept: list[Case], refused: list[tuple[str, str, str]], prefix: str
) -> tuple[list[Case], list[tuple[str, str, str]]]:
    """Sources relative to the root that was given, where the set's own folder lies inside it."""
    if prefix == ".":
        return kept, refused
    moved = []
    for case in kept:
        source = f"{prefix}/{case.source}"
        moved.append(replace(case, source=source, image=replace(case.image, source=source)))
    return moved, [(f"{prefix}/{source}", reason, detail) for source, reason, detail in refused]
