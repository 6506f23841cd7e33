"""Labelled scans of a probe: which patient is which, and the slices that are looked at, kept in files of their own.

A file is made by a process of its own and appears whole or not at all; it is used again if the scan, the label and the
draw are those it was made from. Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from data_curation.aside import aside, sweep
from data_curation.finding import parts
from downstream import cases
from downstream.sharing import shared
from pretrain.watch.pairs import Pair, ProbeError, find_pairs, groups, labelled_slices, read_pair

__all__ = ["Kept", "Patients", "keep", "patients"]

VERSION = 1  # of the files


@dataclass(frozen=True)
class Patients:
    """Scans by patient; `labels` None: the organs are the values that are found."""

    pairs: Mapping[str, tuple[Pair, ...]]
    labels: cases.Labels | None


@dataclass(frozen=True)
class Wanted:
    """A scan of which `count` slices are to be kept at `path`; None: all with a label."""

    name: str
    pair: Pair
    path: Path
    count: int | None
    seed: int


@dataclass(frozen=True)
class Kept:
    """Slices of a scan on its own grid: `path` holds hu int16 and labels uint16, both [S, Y, X]; `key` says of what."""

    name: str
    path: Path
    key: str
    shape: tuple[int, int, int]
    values: tuple[int, ...]

    def load(self) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
        """HU and label values, both [S, Y, X]."""
        with safe_open(self.path, framework="np") as file:
            return file.get_tensor("hu"), file.get_tensor("labels").astype(np.int64)


def patients(
    dataset: Path | None, images: Path | None, labels: Path | None, pairs: Path | None, names: Path | None
) -> Patients:
    """The scans of an nnU-Net data set, of two folders, or of a list. CaseError, ProbeError: what is wrong."""
    if dataset is not None:
        from downstream.channels import kind_of  # brings torch, which the processes that read scans need not

        opened = cases.open_dataset(dataset)
        if kind_of(opened.channels[0]) != "ct":
            raise cases.CaseError(
                f"{dataset}: its first channel is {opened.channels[0]}; backbones of axial see HU, give a CT data set"
            )
        return Patients({case.name: (Pair(case.images[0], case.label),) for case in opened.cases}, opened.labels)
    try:
        found = find_pairs(images, labels, pairs)
    except ProbeError as fault:  # its settings have the same names in the watch of a pretraining run
        raise ProbeError(str(fault).replace("watch.probe.", "")) from None
    of_patient: dict[str, tuple[Pair, ...]] = {}
    for some in groups(found).values():
        name = some[0].group
        if name in of_patient:
            raise ProbeError(
                f"{some[0].image} and {of_patient[name][0].image} are both called {name}; give a list of pairs= with "
                "the name of each patient"
            )
        of_patient[name] = tuple(some)
    beside = [folder / "dataset.json" for folder in (labels, labels.parent)] if labels is not None else []
    named = names or next((path for path in beside if path.is_file()), None)
    return Patients(of_patient, cases.read_labels(named) if named is not None else None)


def keep(
    found: Patients, counts: Mapping[str, int | None], folder: Path, seed: int, workers: int
) -> dict[str, list[Kept]]:
    """So many slices (None: all with a label) of these patients' scans. CaseError tells all faults together."""
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    wanted, owners = [], []
    for name, count in counts.items():
        for number, pair in enumerate(found.pairs[name]):
            case = name if len(found.pairs[name]) == 1 else f"{name}_{number}"
            # Two names may be one when written plainly: scan 1 of patient A, and patient A_1.
            mark = hashlib.sha256(json.dumps([name, number]).encode()).hexdigest()[:8]
            wanted.append(Wanted(case, pair, folder / f"{_plain(case)}_{mark}.safetensors", count, seed))
            owners.append(name)
    known = None if found.labels is None else _known(found.labels)
    tasks = partial(_attempt, known=known)
    results = shared(tasks, wanted, [one.name for one in wanted], workers, "read")
    faults = [result for result in results if isinstance(result, str)]
    if faults:
        raise cases.CaseError(cases.told(f"{len(faults)} of {len(wanted)} scans cannot be used", faults))
    kept: dict[str, list[Kept]] = {name: [] for name in counts}
    for owner, result in zip(owners, results, strict=True):
        assert not isinstance(result, str)
        kept[owner].append(result)
    return kept


def _plain(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name)


def _known(labels: cases.Labels) -> frozenset[int]:
    ignore = () if labels.ignore is None else (labels.ignore,)
    return frozenset({*labels.values, *ignore})


def _attempt(wanted: Wanted, known: frozenset[int] | None) -> Kept | str:
    try:
        kept = _keep(wanted)
    except (ProbeError, OSError) as fault:
        return f"{wanted.name}: {fault}"
    unknown = sorted(set(kept.values) - known) if known is not None else []
    if unknown:
        return (
            f"{wanted.name}: {wanted.pair.label} holds label value(s) {unknown[:5]}, dataset.json knows "
            f"{sorted(known or ())}; name them there, or correct the label"
        )
    return kept


def _keep(wanted: Wanted) -> Kept:
    key = _key(wanted)
    about = _about(wanted.path)
    if about is None or about["key"] != key:
        hu, labels = read_pair(wanted.pair)
        picked = labelled_slices(labels, wanted.count, wanted.seed, wanted.pair.group)
        if not len(picked):
            raise ProbeError(f"{wanted.pair.label} holds no label; leave the case out with leave_out=[{wanted.name}]")
        values = sorted({int(value) for plane in labels for value in np.unique(np.rint(plane))})
        pixels = np.clip(np.rint(hu[picked]), -32768, 32767).astype(np.int16)
        tensors = {"hu": pixels, "labels": np.rint(labels[picked]).astype(np.uint16)}
        about = {"key": key, "shape": list(pixels.shape), "values": values}
        with aside(wanted.path, lasting=False) as file:
            file.write(save(tensors, {"about": json.dumps(about)}))
    slices, height, width = about["shape"]
    return Kept(wanted.name, wanted.path, key, (slices, height, width), tuple(about["values"]))


def _key(wanted: Wanted) -> str:
    files: list[list[str | int]] = []
    for path in (wanted.pair.image, wanted.pair.label):
        some = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else parts(path)
        files += [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in some]
    text = json.dumps([VERSION, files, wanted.count, wanted.seed, wanted.pair.group])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _about(path: Path) -> dict[str, Any] | None:
    """What an earlier start left; None where there is no whole file."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="np") as file:
            about: dict[str, Any] = json.loads(file.metadata()["about"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):  # a damaged file is made again
        return None
    return about
