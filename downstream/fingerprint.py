"""What a labelled data set is like: grids, intensities of the foreground, how often each organ occurs.

Every case is read once; what was found lies in a file a case, which is used again while the case's files are the same.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_curation.volumes import VolumeError
from downstream.cases import CaseError, Dataset, Labels, RawCase
from downstream.channels import kind_of
from downstream.geometry import Place
from downstream.normalisation import ct_window, histogram, percentiles
from downstream.reading import read_case, source_key
from downstream.sharing import shared
from launch.run import write_text

__all__ = ["Facts", "fingerprint", "orientation", "read_facts", "table"]

VERSION = 2
_SHOWN = 10  # cases whose notes are shown
_LETTERS = (("R", "L"), ("A", "P"), ("I", "S"))  # where an axis comes from and goes to, along x, y and z of LPS


@dataclass(frozen=True)
class Facts:
    """One case: size (z, y, x), spacing (z, y, x) in mm, the axes of its file, voxels by label value.

    `histograms`: of each channel HU -> voxels of foreground, empty for one that is no CT. `fault` says why the case
    cannot be trained on, "" where it can.
    """

    name: str
    size: tuple[int, int, int] = (0, 0, 0)
    spacing: tuple[float, float, float] = (0.0, 0.0, 0.0)
    axes: str = ""
    voxels: Mapping[int, int] | None = None
    histograms: tuple[Mapping[int, int], ...] = ()
    notes: tuple[str, ...] = ()
    fault: str = ""

    @property
    def view(self) -> float:
        """The longer side of a slice, mm."""
        return max(self.size[1] * self.spacing[1], self.size[2] * self.spacing[2])


def read_facts(dataset: Dataset, folder: Path, workers: int = 0) -> list[Facts]:
    """The facts of all cases, in order; `workers` processes share what `folder` does not hold yet."""
    folder.mkdir(parents=True, exist_ok=True)
    one = partial(_facts, labels=dataset.labels, channels=dataset.channels, folder=folder)
    names = [case.name for case in dataset.cases]
    results = shared(one, dataset.cases, names, max(workers, 1), "plan")
    return [Facts(name, fault=one) if isinstance(one, str) else one for name, one in zip(names, results, strict=True)]


def _facts(case: RawCase, labels: Labels, channels: Sequence[str], folder: Path) -> Facts:
    path = folder / f"{case.name}.json"
    try:
        key = source_key(case, VERSION, list(labels.values), labels.ignore, list(channels))
        known = _known(path, key)
        if known is not None:
            return known
        facts = _read(case, labels, channels)
    except (CaseError, VolumeError, OSError) as fault:  # read again next time: the file may have been mended
        return Facts(case.name, fault=str(fault))
    except MemoryError:
        return Facts(case.name, fault=f"{case.name}: more memory needed than there is; use fewer workers")
    write_text(path, json.dumps({"key": key, **asdict(facts)}) + "\n")
    return facts


def _known(path: Path, key: str) -> Facts | None:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if found.pop("key") != key:
            return None
        size, spacing, notes = (tuple(found[name]) for name in ("size", "spacing", "notes"))
        histograms = tuple(_numbers(one) for one in found["histograms"])
        voxels, fault = _numbers(found["voxels"]), found["fault"]
        return Facts(found["name"], size, spacing, found["axes"], voxels, histograms, notes, fault)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _numbers(counts: Mapping[str, int]) -> dict[int, int]:
    return {int(value): int(count) for value, count in counts.items()}


def _read(case: RawCase, labels: Labels, channels: Sequence[str]) -> Facts:
    read = read_case(case, channels)
    counts = np.bincount(read.label.ravel(), minlength=256)
    voxels = {int(value): int(counts[value]) for value in np.flatnonzero(counts)}
    inside = (read.label > 0) & (read.label != (-1 if labels.ignore is None else labels.ignore))
    histograms = tuple(
        histogram(values[inside]) if kind_of(name) == "ct" else {}
        for values, name in zip(read.stored, channels, strict=True)
    )
    unnamed = labels.unnamed(voxels)
    fault = f"{case.name}: {case.label.name} {unnamed}" if unnamed else ""
    z, y, x = read.label.shape
    return Facts(case.name, (z, y, x), read.spacing, orientation(read.own), voxels, histograms, read.notes, fault)


def orientation(place: Place) -> str:
    """The patient's directions in which a file's axes i, j, k run, such as LPS."""
    letters = []
    for axis in range(3):
        column = place.affine[:, axis]
        row = int(np.abs(column).argmax())
        letters.append(_LETTERS[row][int(column[row] > 0)])
    return "".join(letters)


def fingerprint(dataset: Dataset, cases: Sequence[Facts], training: Sequence[str]) -> dict[str, Any]:
    """All facts as JSON; intensities are those of the foreground of the cases named in `training`."""
    usable = [case for case in cases if not case.fault]
    names, taught = set(training), [case for case in cases if case.name in set(training) and not case.fault]
    intensities = {}
    for number, name in enumerate(dataset.channels):
        histograms = [case.histograms[number] for case in taught if case.histograms[number]]
        if kind_of(name) == "ct" and histograms:
            window = ct_window(histograms)
            shares = percentiles(histograms, (0.0, 0.005, 0.5, 0.995, 1.0))
            keys = ("min", "percentile_00_5", "median", "percentile_99_5", "max")
            intensities[f"{number:04d}"] = {
                "channel": name,
                **dict(zip(keys, shares, strict=True)),
                "mean": window.mean,
                "deviation": window.std,
            }
    return {
        "dataset": dataset.name,
        "channels": list(dataset.channels),
        "cases": len(cases),
        "usable": len(usable),
        "training": len(names & {case.name for case in usable}),
        "size_zyx": _spread([case.size for case in usable]),
        "spacing_zyx_mm": _spread([case.spacing for case in usable]),
        "view_mm": _spread([(case.view,) for case in usable]),
        "axes": dict(Counter(case.axes for case in usable).most_common()),
        "foreground_intensities": intensities,
        "organs": {name: _organ(values, usable) for name, values in dataset.labels.organs.items()},
        "ignored_voxels": sum((case.voxels or {}).get(dataset.labels.ignore or -1, 0) for case in usable),
        "refused": {case.name: case.fault for case in cases if case.fault},
        "notes": {case.name: list(case.notes) for case in usable if case.notes},
        "each": {
            case.name: {"size_zyx": case.size, "spacing_zyx_mm": case.spacing, "axes": case.axes} for case in usable
        },
    }


def _spread(rows: Sequence[Sequence[float]]) -> dict[str, list[float]]:
    array = np.array(rows, dtype=np.float64).reshape(len(rows), -1)
    ends = {"min": array.min(axis=0), "median": np.median(array, axis=0), "max": array.max(axis=0)}
    return {name: [round(float(value), 4) for value in values] for name, values in ends.items()}


def _organ(values: Sequence[int], cases: Sequence[Facts]) -> dict[str, Any]:
    each = [sum((case.voxels or {}).get(value, 0) for value in values) for case in cases]
    volumes = [count * float(np.prod(case.spacing)) / 1000 for count, case in zip(each, cases, strict=True) if count]
    everything = sum(int(np.prod(case.size)) for case in cases)
    return {
        "values": list(values),
        "cases": len(volumes),
        "voxels": sum(each),
        "share": sum(each) / max(everything, 1),
        "median_ml": round(float(np.median(volumes)), 3) if volumes else None,
    }


def table(found: Mapping[str, Any]) -> str:
    """The fingerprint for a reader."""
    axes = ", ".join(f"{name} {count}" for name, count in found["axes"].items())
    lines = [
        f"{found['dataset']}: {found['usable']} of {found['cases']} cases can be used, {found['training']} to train on",
        f"{'':<16}{'smallest':>22}{'median':>22}{'largest':>22}",
    ]
    for label, key in (("size z, y, x", "size_zyx"), ("spacing, mm", "spacing_zyx_mm"), ("slice, mm", "view_mm")):
        cells = [" x ".join(f"{value:.4g}" for value in found[key][kind]) for kind in ("min", "median", "max")]
        lines.append(f"{label:<16}" + "".join(f"{cell:>22}" for cell in cells))
    lines.append(f"axes of the files: {axes}")
    lines += [
        f"{one['channel']} of the foreground: {one['percentile_00_5']:.0f} to {one['percentile_99_5']:.0f} "
        f"(0.5 and 99.5 %), mean {one['mean']:.1f}, deviation {one['deviation']:.1f}, median {one['median']:.0f}"
        for one in found["foreground_intensities"].values()
    ]
    wide = max(map(len, found["organs"]))
    lines.append(f"{'organ':<{wide}}  {'values':>9}  {'cases':>6}  {'voxels':>15}  {'share':>8}  {'median ml':>10}")
    for name, one in found["organs"].items():
        middle = "" if one["median_ml"] is None else f"{one['median_ml']:.4g}"
        values = ",".join(map(str, one["values"]))
        row = f"{name:<{wide}}  {values:>9}  {one['cases']:>6}  {one['voxels']:>15,}  {one['share']:>8.3%}"
        lines.append(f"{row}  {middle:>10}")
    noted = list(found["notes"].items())
    lines += [f"  {name}: {'; '.join(notes)}" for name, notes in noted[:_SHOWN]]
    if len(noted) > _SHOWN:
        lines.append(f"  ... and notes on {len(noted) - _SHOWN} more cases, in fingerprint.json")
    return "\n".join(lines)
