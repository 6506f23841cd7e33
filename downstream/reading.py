"""A case of a data set as it is learnt from: its images and its label on one grid."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_curation.volumes import VolumeError
from downstream import geometry
from downstream.cases import CaseError, RawCase
from downstream.channels import kind_of
from downstream.geometry import Place
from downstream.images import read_image

__all__ = ["ReadCase", "read_case", "source_key"]


@dataclass(frozen=True)
class ReadCase:
    """Stored values [C, Z, Y, X] and label values [Z, Y, X] in LPS, spacing (z, y, x) in mm, the file's own grid."""

    stored: NDArray[np.int16]
    label: NDArray[np.uint8]
    spacing: tuple[float, float, float]
    own: Place
    notes: tuple[str, ...]


def read_case(case: RawCase, channels: Sequence[str]) -> ReadCase:
    """Images and label of a case; the label is brought over by nearest voxel where it lies on another grid.

    CaseError, VolumeError: what is wrong with it.
    """
    assert len(channels) == len(case.images), f"{case.name}: {len(case.images)} image(s) for channels {channels}"
    founds = [geometry.found_at(path) for path in case.images]
    try:
        image = read_image(founds, [kind_of(name) for name in channels], channels)
    except CaseError as fault:
        raise CaseError(f"{case.name}: {fault}") from None
    except VolumeError as fault:
        which = f"{case.images[0]}: " if len(case.images) == 1 else ""  # of several the fault names its own
        raise VolumeError(fault.reason, f"{case.name}: {which}{fault}") from None
    label, scan = geometry.read_labelmap(case.label), image.scan
    own = geometry.lps(label.place)
    turned = geometry.to_lps(label.array, label.place)
    values = geometry.align(turned, own, scan.place, f"{case.name}: {case.label.name}")
    notes = list(scan.volume.notes)
    if geometry.difference(own, scan.place):
        notes.append("the label lies on another grid: nearest voxel by position")
    return ReadCase(image.stored, values, scan.volume.spacing, scan.own, tuple(notes))


def source_key(case: RawCase, *rules: Any) -> str:
    """Changes when a file of the case (by place, size or time of change) or a rule does. OSError: a file is gone.

    The place tells data sets apart whose files have the same names, sizes and times.
    """
    paths = [path.resolve() for one in (*case.images, case.label) for path in geometry.found_at(one).files]
    files = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
    return hashlib.sha256(json.dumps([*rules, files]).encode()).hexdigest()[:16]
