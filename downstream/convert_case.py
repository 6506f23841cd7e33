"""One case of a public data set becomes a case of nnU-Net's raw format, or is refused with the reason.

Nothing is resampled: a NIfTI file is linked or copied as it is, a DICOM series is written as NIfTI, int16 HU in LPS.
A label is linked too where it lies on its image's grid; else it is written anew on that grid.
"""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_curation.aside import aside, link_or_copy
from data_curation.catalogue import CATALOGUE, Case
from data_curation.rules import Limits, unknown_spacing
from data_curation.volumes import VolumeError, load
from downstream import geometry
from downstream.cases import CaseError
from downstream.convert_labels import merged, pictures
from downstream.geometry import LabelMap, Place, Scan
from downstream.nifti_file import write_nifti

__all__ = ["RECORDS", "Record", "Task", "convert_case", "is_packed"]

RECORDS = "conversion"  # folder of a file a case, which says that the case is done
VERSION = 1


@dataclass(frozen=True)
class Task:
    """What is to be done: `part` is Tr or Ts; `values` the label values, by organ; `ending` of all files."""

    case: Case
    name: str
    part: str
    folder: Path
    ending: str
    values: Mapping[str, int]
    link: bool
    unknown_spacing: bool

    @property
    def image(self) -> Path:
        """Where the image goes."""
        return self.folder / f"images{self.part}" / f"{self.name}_0000{self.ending}"

    @property
    def label(self) -> Path:
        """Where the label goes."""
        return self.folder / f"labels{self.part}" / f"{self.name}{self.ending}"

    def key(self) -> str:
        """Changes when a source (by name, size or time of change) or a rule does."""
        label = self.case.label
        paths = [*self.case.image.files]
        if label is not None:
            paths += sorted(label.iterdir()) if label.is_dir() else [label]
        files = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
        rules = [VERSION, self.part, self.ending, dict(self.values), self.unknown_spacing, files]
        return hashlib.sha256(json.dumps(rules).encode()).hexdigest()[:24]


@dataclass(frozen=True)
class Record:
    """What became of a case. `reason` is "" where it was converted; `turned`: slices are not its last stored axis."""

    name: str
    part: str
    image: str
    label: str
    key: str
    reason: str = ""
    detail: str = ""
    notes: tuple[str, ...] = ()
    turned: bool = False
    sizes: tuple[int, ...] = ()


def convert_case(task: Task) -> Record:
    """Converts, or finds that it was done before; whatever is wrong with the source is in the record."""
    label = task.case.label.name if task.case.label is not None else ""
    about = (task.name, task.part, task.case.source, label)
    try:
        key = task.key()
        done = _done(task, key)
        if done is not None:
            return done
        notes, turned = _convert(task)
    except (CaseError, VolumeError, MemoryError, OSError) as fault:
        if isinstance(fault, OSError) and _stands_against_all(fault, task.folder):
            raise
        reason = getattr(fault, "reason", "memory" if isinstance(fault, MemoryError) else "label")
        reason = "unreadable" if isinstance(fault, OSError) else reason
        for path in (task.image, task.label, _proof(task)):
            path.unlink(missing_ok=True)
        return Record(*about, key="", reason=reason, detail=str(fault) or "more memory needed than there is")
    record = Record(*about, key=key, notes=tuple(notes), turned=turned, sizes=_sizes(task))
    with aside(_proof(task)) as file:
        file.write((json.dumps(asdict(record), indent=1) + "\n").encode())
    return record


def _stands_against_all(fault: OSError, folder: Path) -> bool:
    """Is it of what is written, and not of this case's files? A folder that cannot be written fits no case."""
    below = fault.filename is not None and folder in Path(fault.filename).parents
    return below or fault.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


def _proof(task: Task) -> Path:
    return task.folder / RECORDS / f"{task.name}.json"


def _sizes(task: Task) -> tuple[int, ...]:
    return tuple(path.stat().st_size if path.is_file() else 0 for path in (task.image, task.label))


def _done(task: Task, key: str) -> Record | None:
    try:
        found = json.loads(_proof(task).read_text())
        record = Record(**{**found, "notes": tuple(found["notes"]), "sizes": tuple(found["sizes"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return record if record.key == key and record.sizes == _sizes(task) else None


def _convert(task: Task) -> tuple[list[str], bool]:
    """Notes, and whether the slices are not the last axis of the file."""
    case = task.case
    # Oblique voxels stay where they are: an affine can say so, and resampling is for who reads the file.
    grid = replace(load(case.image, Limits(min_slices=1)), as_acquired=True)
    scan = geometry.scan_of(grid, case.image.source or case.image.path.name)
    _spacing(task, scan)
    plain = case.image.kind == "nifti"
    place = scan.own if plain else scan.place
    label, notes = _label(task, scan, place)
    notes += scan.volume.notes
    if plain:
        notes += _placed(case.image.path, task.image, task.link)
    else:
        write_nifti(task.image, scan.volume.hu, scan.place.affine)
    if label is None and case.label is not None:
        notes += _placed(case.label, task.label, task.link)
    elif label is not None:
        geometry.write_labelmap(task.label, label, place, like=task.image)
    along = np.abs(place.affine[:, :3] / place.spacing)
    return list(dict.fromkeys(notes)), bool(along[2].argmax() != 2)


def _spacing(task: Task, scan: Scan) -> None:
    """Raises VolumeError where the header has lost the true spacing: for a label the lengths matter too."""
    bogus = task.case.patient in CATALOGUE[task.case.dataset].bogus_spacing
    if task.unknown_spacing or scan.volume.spacing != (1.0, 1.0, 1.0):
        return
    if bogus or unknown_spacing.lost(scan.volume):
        raise VolumeError(
            "unknown_spacing",
            "1 x 1 x 1 mm: the header has lost the true spacing; take a copy that has it (`axial catalogue "
            f"{task.case.dataset}` tells), or set unknown_spacing=true",
        )


def _label(task: Task, scan: Scan, place: Place) -> tuple[NDArray[np.uint8] | None, list[str]]:
    """The label on the image's grid, None where its file can be taken as it is (or there is none), and notes."""
    path, image = task.case.label, task.case.image
    if path is None:
        return None, []
    if path.is_dir():
        if image.kind == "dicom":
            label, notes = pictures(path, image)
            array = geometry.to_lps(label.array, label.place)
            return geometry.align(array, geometry.lps(label.place), place, str(path)), notes
        label, notes = merged(path, task.values, place)
        return label.array, notes
    label = geometry.read_labelmap(path)
    _known(task, path, label)
    if not geometry.difference(label.place, place):
        return None, []
    straight = geometry.lps(label.place)
    lps = geometry.lps(place)
    told = "on another grid" if geometry.difference(straight, lps) else "in another order of voxels"
    array = geometry.align(label.array, label.place, place, str(path))
    return array, [f"the label lies {told} than the image: written anew, nearest voxel by position"]


def _known(task: Task, path: Path, label: LabelMap) -> None:
    present = np.flatnonzero(np.bincount(label.array.ravel(), minlength=256)).tolist()
    unknown = sorted(set(present) - {0, *task.values.values()})
    if unknown:
        raise CaseError(f"{path}: label value(s) {unknown[:5]} are none of {sorted(task.values.values())}")


def is_packed(path: Path) -> bool:
    """Whether a file is compressed by gzip: what its first bytes say, whatever it is called."""
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def _placed(source: Path, target: Path, link: bool) -> list[str]:
    """The file under another name: as a hard link, else as a copy; compressed where the target's name says so."""
    packed, wanted = is_packed(source), target.name.endswith(".gz")
    if link and packed == wanted:
        return [] if link_or_copy(source, target) else ["copied: this file system has no links to the source"]
    assert wanted or not packed, f"{source} is compressed, {target} is not"
    with source.open("rb") as file, aside(target) as out:
        if packed == wanted:
            shutil.copyfileobj(file, out, 1 << 20)
        else:
            with gzip.GzipFile("", "wb", 6, out, 0) as squeezed:
                shutil.copyfileobj(file, squeezed, 1 << 20)
    return []
