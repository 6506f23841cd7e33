"""What the catalogue knows about one data set. The entries are in data_curation/datasets, one file a collection."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["BELOW", "NIFTI", "TEST_SET", "Counts", "DataSet", "Link", "Place", "SplitTable", "Stated"]

TEST_SET = "official test set"
NIFTI = r"\.nii(\.gz)?"
BELOW = r"(.*/)?"  # at any depth: archives of several parts are unpacked in many ways


@dataclass(frozen=True)
class Place:
    """What lies where. `pattern` (case ignored) must match a whole path relative to the set's folder: an image file,
    or the folder of a DICOM series; its group `patient` names the patient.

    The reason "label" marks labels: they belong to the image of their patient, and are told only where there is none.
    Of several for one patient the place named first counts; with `structures` the label is the folder around the
    file, one file a structure. What lies at a place with another `reason` is refused with it. `label` is for labels
    that are no volumes: (what to replace, by what) in the path of the image.
    """

    pattern: str
    label: tuple[str, str] | None = None
    held_out: str = ""
    reason: str = ""
    detail: str = ""
    structures: bool = False


@dataclass(frozen=True)
class SplitTable:
    """A CSV file beside the images that says which patients are for testing."""

    file: str
    delimiter: str
    patient: str
    column: str
    value: str


@dataclass(frozen=True)
class Stated:
    """A licence, and who says so."""

    text: str
    source: str


@dataclass(frozen=True)
class Link:
    """Where a part is to be had. `size` is empty where it is not known."""

    name: str
    url: str
    size: str = ""
    registration: bool = False


@dataclass(frozen=True)
class Counts:
    """What a whole download holds: volumes to train on, volumes of the official test set; `of` volumes of them have
    `slices` slices, as somebody counted, or `about` so many."""

    train: int
    slices: int
    of: int
    test: int = 0
    about: bool = False


@dataclass(frozen=True)
class DataSet:
    """Facts about one data set. Patients are written as `Place` finds them."""

    name: str
    title: str
    licences: tuple[Stated, ...]  # the strictest first, where sources differ
    home_page: str
    doi: str
    citation: str
    tree: str  # what the root must look like, for people
    places: tuple[Place, ...]
    commercial: bool = False  # may be used commercially, by the strictest licence
    redistribution: bool = False  # a corpus made from it may be passed on (where not `commercial`, not for money)
    folder: str = ""  # name of its own folder, should the root be that folder's parent
    links: tuple[Link, ...] = ()
    counts: Counts | None = None
    train_ids: tuple[str, ...] = ()  # patients of a whole download, where they are known
    test_ids: tuple[str, ...] = ()
    labels: Mapping[int, str] | None = None
    split: SplitTable | None = None
    benchmark: bool = False  # one fold of the labelled training cases is kept to score segmentation on
    known_bad: Mapping[str, str] | None = None  # patient: what is wrong
    bogus_spacing: frozenset[str] = frozenset()  # patients whose files say 1 x 1 x 1 mm, which is not true
    same: tuple[tuple[str, str], ...] = ()  # (pattern of a whole patient, canonical name of the same scan elsewhere)
    overlaps: tuple[tuple[str, str], ...] = ()  # (data set, what they share)
    quirks: tuple[str, ...] = ()
    anything: bool = False  # any data whatever: a patient's name says nothing outside the folder

    @property
    def licence(self) -> str:
        """The strictest of the licences that are stated for it."""
        return self.licences[0].text
