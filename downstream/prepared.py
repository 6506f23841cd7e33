"""Cases made ready for training and kept in the run folder: int16 values and class indices on the training grid.

A case is one safetensors file that holds its slices back to back, each compressed by itself: a patch costs one slice,
however many there are. Files appear by rename, under a name that holds a key of the settings, the images and the label
(with the voxels beside a header): runs of any settings, data sets and machines may share a folder, at once too. A file
is used if what it says of itself is what was written. Each slice is proven when it is read. The same sources give the
same bytes.
Intensities are not normalised here: the window may be one of the data set, known only when all cases have been seen.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch.nn import functional

from data_curation.aside import aside, sweep
from data_curation.volumes import VolumeError
from downstream.cases import IGNORE, CaseError, Labels, RawCase, told
from downstream.channels import ZSCORE, Channel, kind_of
from downstream.normalisation import ct_window, histogram
from downstream.reading import read_case, source_key
from downstream.sharing import shared

__all__ = ["Prepared", "channel_windows", "prepare", "prepare_case", "resample", "target_size"]

VERSION = 4  # of the files; another one makes old files be made anew


@dataclass(frozen=True)
class Prepared:
    """One case: where its slices are, their spacing (z, y, x) in mm, and what is in them.

    `counts` [Z, classes]: pixels of each class in each slice, without those to ignore. `histograms`: per channel HU ->
    voxels of foreground, native grid; empty for a channel that is no CT. `bounds` [Z + 1]: where each slice starts and
    ends among the file's compressed bytes; `proofs` [Z]: the CRC-32 of these.
    """

    name: str
    path: Path
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    counts: NDArray[np.int64]
    histograms: tuple[Mapping[int, int], ...]
    bounds: NDArray[np.int64]
    proofs: NDArray[np.int64]
    notes: tuple[str, ...] = ()

    def slice(self, z: int) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
        """Stored values [C, Y, X] and class indices [Y, X] of a slice. CaseError if the file was damaged meanwhile."""
        return self._read([z])[0]

    def volume(self) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
        """Stored values [C, Z, Y, X] and class indices [Z, Y, X]. CaseError if the file was damaged meanwhile."""
        pairs = self._read(range(self.shape[0]))
        return np.stack([stored for stored, _ in pairs], axis=1), np.stack([label for _, label in pairs])

    def _read(self, chosen: Sequence[int]) -> list[tuple[NDArray[np.int16], NDArray[np.uint8]]]:
        try:
            with safe_open(self.path, framework="np") as file:
                slices = file.get_slice("slices")
                return [self._unpacked(slices, z) for z in chosen]
        except (OSError, SafetensorError) as fault:
            raise CaseError(f"{self.path}: cannot be read any more ({fault}); start again to make it anew") from None

    def _unpacked(self, slices: Any, z: int) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
        import imagecodecs

        channels, pixels = len(self.histograms), self.shape[1] * self.shape[2]
        packed = slices[int(self.bounds[z]) : int(self.bounds[z + 1])].tobytes()
        try:
            if zlib.crc32(packed) != self.proofs[z]:
                raise RuntimeError("its checksum is another one")
            raw = imagecodecs.deflate_decode(packed, out=(2 * channels + 1) * pixels)
        except RuntimeError as fault:
            raise CaseError(f"{self.path}: slice {z} is damaged ({fault}); delete the file and start again") from None
        stored = np.frombuffer(raw, np.int16, channels * pixels).reshape(channels, *self.shape[1:])
        return stored, np.frombuffer(raw, np.uint8, pixels, 2 * channels * pixels).reshape(self.shape[1:])


def prepare(
    cases: Sequence[RawCase],
    labels: Labels,
    spacing: float | None,
    folder: Path,
    workers: int = 0,
    active: bool = True,
    channels: Sequence[str] = ("CT",),
) -> list[Prepared]:
    """All cases, in order. Whatever is wrong with any of them is told together, as a CaseError.

    `spacing` is the in-plane mm to resample to, or None; `workers` processes share the cases (0: this one does them);
    `channels` are the names of the images of a case. What another run is at is left to it until all else is done.
    OSError: `folder` cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder, shared=True)
    one = partial(_try, labels=labels, spacing=spacing, folder=folder, channels=channels)
    names, count = [case.name for case in cases], max(workers, 1)
    results = shared(partial(one, patient=True), cases, names, count, "prepare", active)
    late = [number for number, result in enumerate(results) if result is None]
    again = shared(one, [cases[number] for number in late], [names[number] for number in late], count, "again", active)
    for number, result in zip(late, again, strict=True):
        results[number] = result
    faults = [result for result in results if isinstance(result, str)]
    if faults:
        raise CaseError(told(f"{len(faults)} of {len(cases)} cases cannot be used", faults))
    return [result for result in results if isinstance(result, Prepared)]


def _try(
    case: RawCase,
    labels: Labels,
    spacing: float | None,
    folder: Path,
    channels: Sequence[str],
    patient: bool = False,
) -> Prepared | str | None:
    try:
        return prepare_case(case, labels, spacing, folder, channels, patient)
    except (CaseError, VolumeError) as fault:
        return str(fault)
    except MemoryError:
        return f"{case.name}: more memory needed than there is; use fewer processes"


def prepare_case(
    case: RawCase,
    labels: Labels,
    spacing: float | None,
    folder: Path,
    channels: Sequence[str] = ("CT",),
    patient: bool = False,
) -> Prepared | None:
    """One case from its files, or from `folder` where it lies ready. CaseError, VolumeError: what is wrong with it.

    With `patient`, None where another process is at this case now. OSError: `folder` cannot be written.
    """
    try:
        key = source_key(case, VERSION, list(labels.values), labels.ignore, list(channels), spacing)
    except OSError as fault:
        raise CaseError(f"{case.name}: {fault}") from None
    path = folder / f"{case.name}.{key}.safetensors"
    ready = _ready(case.name, path, key)
    if ready is not None:
        return ready
    if sweep(folder, path.name, shared=True) and patient:
        return None
    with aside(path) as file:  # from now on it shows that this case is being made
        try:
            made = _made(case, labels, spacing, channels, key)
        except OSError as fault:  # of the case's own files: what the folder has against it is told of the folder
            raise CaseError(f"{case.name}: {fault}") from None
        file.write(made)
    ready = _ready(case.name, path, key)
    assert ready is not None, f"{path} was written just now"
    return ready


def _made(case: RawCase, labels: Labels, spacing: float | None, channels: Sequence[str], key: str) -> bytes:
    """The file of a case."""
    read = read_case(case, channels)
    classes = _classes(case, labels, read.label)
    inside = (classes > 0) & (classes != IGNORE)
    ct = [kind_of(name) == "ct" for name in channels]
    histograms = [histogram(values[inside]) if is_ct else {} for values, is_ct in zip(read.stored, ct, strict=True)]
    z, y, x = read.spacing
    rows, columns = read.stored.shape[2:]
    size = target_size((rows, columns), (y, x), spacing)
    spaced = (z, y * rows / size[0], x * columns / size[1])
    planes, classes = [resample(values, size) for values in read.stored], _nearest(classes, size)
    count = len(labels.values)
    counts = np.stack([np.bincount(plane.ravel(), minlength=IGNORE + 1)[:count] for plane in classes]).astype(np.int64)
    about = {
        "key": key,
        "shape": classes.shape,
        "spacing": spaced,
        "notes": read.notes,
        "histograms": [list(one.items()) for one in histograms],
    }
    return _packed(planes, classes, counts, about)


def _packed(
    planes: Sequence[NDArray[np.int16]], classes: NDArray[np.uint8], counts: NDArray[np.int64], about: Mapping[str, Any]
) -> bytes:
    import imagecodecs

    packed = [
        imagecodecs.deflate_encode(b"".join([*(plane[z].tobytes() for plane in planes), classes[z].tobytes()]), 4)
        for z in range(len(classes))
    ]
    bounds = np.cumsum([0, *map(len, packed)], dtype=np.int64)
    proofs = np.array([zlib.crc32(one) for one in packed], np.int64)
    text = json.dumps({**about, "proof": _proof(about, counts, bounds, proofs)})
    tensors = {
        "bounds": bounds,
        "counts": counts,
        "proofs": proofs,
        "slices": np.frombuffer(b"".join(packed), np.uint8),
    }
    whole: bytes = save(tensors, {"about": text})
    return whole


def _proof(about: Mapping[str, Any], *arrays: NDArray[np.int64]) -> str:
    """Of all in a file but the slices, which have proofs of their own."""
    parts = [json.dumps(about).encode(), *(array.tobytes() for array in arrays)]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:32]


def _ready(name: str, path: Path, key: str) -> Prepared | None:
    """What an earlier start left, if it is whole and made from the same things."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="np") as file:
            about = json.loads(file.metadata()["about"])
            bounds, counts, proofs = (file.get_tensor(part) for part in ("bounds", "counts", "proofs"))
            size = file.get_slice("slices").get_shape()
        proof = about.pop("proof")
        if proof != _proof(about, counts, bounds, proofs) or about["key"] != key or size != [int(bounds[-1])]:
            return None
        histograms = tuple({int(value): int(count) for value, count in one} for one in about["histograms"])
        shape, spacing = tuple(about["shape"]), tuple(about["spacing"])
        return Prepared(name, path, shape, spacing, counts, histograms, bounds, proofs, tuple(about["notes"]))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError):  # damaged: made again
        return None


def _classes(case: RawCase, labels: Labels, array: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Label values -> class indices, IGNORE where the label says so."""
    present = np.flatnonzero(np.bincount(array.ravel(), minlength=256)).tolist()
    if unnamed := labels.unnamed(present):
        raise CaseError(f"{case.name}: {case.label.name} {unnamed}")
    table = np.zeros(256, dtype=np.uint8)
    table[list(labels.values)] = np.arange(len(labels.values))
    if labels.ignore is not None:
        table[labels.ignore] = IGNORE
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


def channel_windows(cases: Sequence[Prepared], channels: Sequence[str]) -> tuple[Channel, ...]:
    """How each channel is normalised: CT by the window of these cases' foreground, others image by image."""
    made = []
    for number, name in enumerate(channels):
        kind = kind_of(name)
        window = ct_window(case.histograms[number] for case in cases) if kind == "ct" else ZSCORE
        made.append(Channel(name=name, kind=kind, window=window))
    return tuple(made)
