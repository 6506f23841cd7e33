"""Cases made ready for training and kept in the run folder: int16 HU and class indices on the training grid.

A case is one safetensors file that holds its slices back to back, each compressed by itself: a patch costs one slice,
however many there are. Files appear by rename; a file is used again if the settings, the image and the label (with the
voxels beside a header) are those it was made from.
Intensities are not normalised here: the window may be one of the data set, known only when all cases have been seen.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch.nn import functional

from data_curation.volumes import VolumeError
from downstream import geometry
from downstream.cases import CaseError, Labels, RawCase, told
from launch.progress import progress
from pretrain.data.window import HuWindow

__all__ = ["Prepared", "dataset_window", "prepare", "prepare_case", "resample", "target_size"]

VERSION = 2  # of the files; another one makes old files be made anew


@dataclass(frozen=True)
class Prepared:
    """One case: where its slices are, their spacing (z, y, x) in mm, and what is in them.

    `counts` [Z, classes]: pixels of each class in each slice. `histogram`: HU -> voxels of foreground, native grid.
    `bounds` [Z + 1]: where each slice starts and ends among the file's compressed bytes.
    """

    name: str
    path: Path
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    counts: NDArray[np.int64]
    histogram: Mapping[int, int]
    bounds: NDArray[np.int64]
    notes: tuple[str, ...] = ()

    def slice(self, z: int) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
        """HU and class indices [Y, X] of one slice. CaseError if the file was damaged meanwhile."""
        with safe_open(self.path, framework="np") as file:
            return self._unpacked(file, z)

    def volume(self) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
        """HU and class indices [Z, Y, X]. CaseError if the file was damaged meanwhile."""
        with safe_open(self.path, framework="np") as file:
            pairs = [self._unpacked(file, z) for z in range(self.shape[0])]
        return np.stack([hu for hu, _ in pairs]), np.stack([label for _, label in pairs])

    def _unpacked(self, file: Any, z: int) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
        import imagecodecs

        pixels = self.shape[1] * self.shape[2]
        packed = file.get_slice("slices")[int(self.bounds[z]) : int(self.bounds[z + 1])]
        try:
            raw = imagecodecs.deflate_decode(packed.tobytes(), out=3 * pixels)  # proves a checksum
        except RuntimeError as fault:
            raise CaseError(f"{self.path}: slice {z} is damaged ({fault}); delete the file and start again") from None
        hu, label = np.frombuffer(raw, np.int16, pixels), np.frombuffer(raw, np.uint8, pixels, 2 * pixels)
        return hu.reshape(self.shape[1:]), label.reshape(self.shape[1:])


def prepare(
    cases: Sequence[RawCase], labels: Labels, spacing: float | None, folder: Path, workers: int = 0, active: bool = True
) -> list[Prepared]:
    """All cases, in order. Whatever is wrong with any of them is told together, as a CaseError.

    `spacing` is the in-plane mm to resample to, or None; `workers` processes share the cases (0: this one does them).
    """
    folder.mkdir(parents=True, exist_ok=True)
    one = partial(_try, labels=labels, spacing=spacing, folder=folder)
    if workers > 1 and len(cases) > 1:
        with ProcessPoolExecutor(min(workers, len(cases)), mp_context=get_context("spawn")) as pool:
            results = list(progress(pool.map(one, cases), len(cases), "prepare", "cases", active))
    else:
        results = [one(case) for case in progress(cases, len(cases), "prepare", "cases", active)]
    faults = [result for result in results if isinstance(result, str)]
    if faults:
        raise CaseError(told(f"{len(faults)} of {len(cases)} cases cannot be used", faults))
    return [result for result in results if isinstance(result, Prepared)]


def _try(case: RawCase, labels: Labels, spacing: float | None, folder: Path) -> Prepared | str:
    try:
        return prepare_case(case, labels, spacing, folder)
    except CaseError as fault:
        return str(fault)
    except (VolumeError, OSError) as fault:
        return f"{case.name}: {case.image}: {fault}"


def prepare_case(case: RawCase, labels: Labels, spacing: float | None, folder: Path) -> Prepared:
    """One case from its files, or from `folder` where it lies ready. CaseError, VolumeError: what is wrong with it."""
    key = _key(case, labels, spacing)
    path = folder / f"{case.name}.safetensors"
    ready = _ready(case.name, path, key)
    if ready is not None:
        return ready
    scan = geometry.read_scan(geometry.found_at(case.image))
    label = geometry.read_labelmap(case.label)
    classes = _classes(case, labels, label.array)
    turned = geometry.to_lps(classes, label.place)
    own = geometry.lps(label.place)
    classes = geometry.align(turned, own, scan.place, f"{case.name}: {case.label.name}")
    hu = scan.volume.hu
    histogram = _histogram(hu[classes > 0])
    size = target_size(hu.shape[1:], scan.volume.spacing[1:], spacing)
    z, y, x = scan.volume.spacing
    spaced = (z, y * hu.shape[1] / size[0], x * hu.shape[2] / size[1])
    hu, classes = resample(hu, size), _nearest(classes, size)
    counts = np.stack([np.bincount(plane.ravel(), minlength=len(labels.values)) for plane in classes]).astype(np.int64)
    notes = list(scan.volume.notes)
    if geometry.difference(own, scan.place):
        notes.append("the label lies on another grid: nearest voxel by position")
    about = {"key": key, "shape": hu.shape, "spacing": spaced, "notes": notes, "histogram": list(histogram.items())}
    bounds = _write(path, hu, classes, counts, about)
    return Prepared(case.name, path, hu.shape, spaced, counts, histogram, bounds, tuple(notes))


def _write(
    path: Path, hu: NDArray[np.int16], classes: NDArray[np.uint8], counts: NDArray[np.int64], about: Mapping[str, Any]
) -> NDArray[np.int64]:
    """The bounds of the slices in the file, which appears whole or not at all."""
    import imagecodecs

    packed = [
        imagecodecs.deflate_encode(plane.tobytes() + label.tobytes(), 4)
        for plane, label in zip(hu, classes, strict=True)
    ]
    bounds = np.cumsum([0, *map(len, packed)], dtype=np.int64)
    tensors = {"bounds": bounds, "counts": counts, "slices": np.frombuffer(b"".join(packed), np.uint8)}
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(tensors, aside, {"about": json.dumps(about)})
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    return bounds


def _key(case: RawCase, labels: Labels, spacing: float | None) -> str:
    paths = [path for one in (case.image, case.label) for path in geometry.found_at(one).files]
    files = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
    text = json.dumps([VERSION, files, list(labels.values), spacing])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _ready(name: str, path: Path, key: str) -> Prepared | None:
    """What an earlier start left, if it is whole and made from the same things."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="np") as file:
            about = json.loads(file.metadata()["about"])
            bounds, counts = file.get_tensor("bounds"), file.get_tensor("counts")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):  # a damaged file is made again
        return None
    if about["key"] != key:
        return None
    histogram = {int(value): int(count) for value, count in about["histogram"]}
    shape, spacing = tuple(about["shape"]), tuple(about["spacing"])
    return Prepared(name, path, shape, spacing, counts, histogram, bounds, tuple(about["notes"]))


def _classes(case: RawCase, labels: Labels, array: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Label values -> class indices."""
    present = np.flatnonzero(np.bincount(array.ravel(), minlength=256)).tolist()
    unknown = sorted(set(present) - set(labels.values))
    if unknown:
        raise CaseError(
            f"{case.name}: {case.label.name} holds label value(s) {unknown[:5]}, dataset.json knows "
            f"{list(labels.values)}; name them there, or correct the label"
        )
    table = np.zeros(256, dtype=np.uint8)
    table[list(labels.values)] = np.arange(len(labels.values))
    return table[array]


def target_size(shape: Sequence[int], own: Sequence[float], wanted: float | None) -> tuple[int, int]:
    """Rows and columns of a slice at about `wanted` mm; its edges stay where they are."""
    if wanted is None:
        return int(shape[0]), int(shape[1])
    rows, columns = (max(1, round(n * mm / wanted)) for n, mm in zip(shape, own, strict=True))
    return rows, columns


def resample(hu: NDArray[np.int16], size: tuple[int, int]) -> NDArray[np.int16]:
    """Slices [Z, Y, X] on another in-plane grid: antialiased bicubic, cut to the values that the volume had."""
    if hu.shape[1:] == size:
        return np.require(hu, requirements=["C", "W"])  # a volume may be a flipped, read-only view of a file
    low, high = int(hu.min()), int(hu.max())
    found = np.empty((len(hu), *size), dtype=np.int16)
    for z, plane in enumerate(hu):
        image = torch.from_numpy(plane.astype(np.float32))[None, None]
        resized = functional.interpolate(image, size=size, mode="bicubic", antialias=True, align_corners=False)[0, 0]
        found[z] = resized.round_().clamp_(low, high).numpy()
    return found


def _nearest(classes: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    if classes.shape[1:] == size:
        return np.ascontiguousarray(classes)
    rows, columns = (
        np.minimum(((np.arange(n) + 0.5) * side / n).astype(np.int64), side - 1)
        for n, side in zip(size, classes.shape[1:], strict=True)
    )
    return np.ascontiguousarray(classes[:, rows[:, None], columns[None, :]])


def _histogram(values: NDArray[np.int16]) -> dict[int, int]:
    found, counts = np.unique(values, return_counts=True)
    return dict(zip(found.tolist(), counts.tolist(), strict=True))


def dataset_window(cases: Sequence[Prepared]) -> HuWindow:
    """nnU-Net's CT normalisation: cut to the 0.5 and 99.5 percentiles of foreground HU, mean to 0, deviation to 1.

    Exact, over every foreground voxel of the given cases at their native grid (nnU-Net draws 10,000 a case).
    """
    total: dict[int, int] = {}
    for case in cases:
        for value, count in case.histogram.items():
            total[value] = total.get(value, 0) + count
    if not total:
        raise CaseError("no training case has any foreground; use normalisation=pretraining, or check the labels")
    values = np.array(sorted(total), dtype=np.float64)
    counts = np.array([total[int(value)] for value in values], dtype=np.float64)
    ranks = np.cumsum(counts)
    low, high = (float(values[np.searchsorted(ranks, share * ranks[-1])]) for share in (0.005, 0.995))
    mean = float(values @ counts / ranks[-1])
    std = math.sqrt(float((values - mean) ** 2 @ counts / ranks[-1]))
    return HuWindow(low=low, high=max(high, low + 1), mean=mean, std=max(std, 1.0))
