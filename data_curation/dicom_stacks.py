"""DICOM slices of a whole data set -> stacks: what belongs together, in order, by headers alone.

By series, then by plane, pixel grid and kernel (a scout inside a series is set apart), over folders where the parts
fit into each other; then by what tells phases apart. What cannot be CT is named without its pixels being read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_curation.dicom_headers import PHASES, Header, normal_of
from data_curation.grid import SAME_PLACE_MM
from data_curation.rules import gaps, uneven

__all__ = ["Stack", "in_order", "stacks"]

_GAPS, _UNEVEN = gaps.Settings(), uneven.Settings()


@dataclass(frozen=True)
class Stack:
    """Slices that belong together, in order from one end of the stack to the other, or the reason why they do not."""

    headers: tuple[Header, ...]
    name: str  # series UID, "/2" and so on appended where a series holds several stacks
    reason: str = ""
    detail: str = ""


def stacks(headers: Iterable[Header]) -> list[Stack]:
    """Every slice in one stack; refused ones of one series and folder share an entry.

    In the order in which the series and their folders come. Folders that hold parts of one stack give one; folders
    that hold copies of a stack give one each.
    """
    found: list[Stack] = []
    series: dict[str, dict[Path, list[Header]]] = {}
    refused: dict[tuple[str, Path, str], list[Header]] = {}
    for header in headers:
        folder = header.path.parent
        if header.reason in ("unreadable", "empty"):
            found.append(Stack((header,), str(header.path), header.reason, header.detail))
        elif header.reason:
            refused.setdefault((header.series, folder, header.reason), []).append(header)
        else:
            series.setdefault(header.series, {}).setdefault(folder, []).append(header)
    for (name, _, reason), some in refused.items():
        count, what = len({header.path for header in some}), "files"
        if count == 1:
            count, what = len(some), "frames"
        found.append(Stack(tuple(some), name, reason, (f"{count} {what}: " if count > 1 else "") + some[0].detail))
    for name, folders in series.items():
        numbers: dict[Path, int] = {}
        for group in _joined([group for some in folders.values() for group in _groups(some)]):
            for phase in _phases(group):
                folder = phase[0].path.parent
                number = numbers[folder] = numbers.get(folder, 0) + 1
                found.append(_ordered(phase, name if number == 1 else f"{name}/{number}"))
    return found


def _groups(headers: Sequence[Header]) -> list[list[Header]]:
    """Split by pixel grid, orientation and kernel; small noise in the cosines does not split."""
    groups: list[list[Header]] = []
    for header in headers:
        for group in groups:
            if _alike(header, group[0]):
                group.append(header)
                break
        else:
            groups.append([header])
    return groups


def _alike(one: Header, other: Header) -> bool:
    """Do two slices lie on the same pixel grid, parallel to each other, made by one kernel?"""
    return (
        (one.size, one.kernel) == (other.size, other.kernel)
        and (one.plane == other.plane or bool(np.allclose(one.plane, other.plane, atol=0.01)))
        and (one.spacing == other.spacing or bool(np.allclose(one.spacing, other.spacing, rtol=0.01)))
    )


def _joined(groups: list[list[Header]]) -> list[list[Header]]:
    """Groups of one series from several folders, put together where they make one stack: all at once, or in pairs."""
    kinds: list[list[list[Header]]] = []
    for group in groups:
        kind = next((kind for kind in kinds if _same_body(group[0], kind[0][0])), None)
        if kind is None:
            kinds.append([group])
        else:
            kind.append(group)
    whole = [[[header for group in kind for header in group]] if _fit(kind) else _paired(kind) for kind in kinds]
    return [group for some in whole for group in some]


def _paired(groups: list[list[Header]]) -> list[list[Header]]:
    joined: list[list[Header]] = []
    for group in groups:
        other = next((other for other in joined if _fit([other, group])), None)
        if other is None:
            joined.append(group)
        else:
            other += group
    return joined


def _same_body(one: Header, other: Header) -> bool:
    """May they be parts of one stack? Some archives give all series of all patients the same UID."""
    return (one.patient, one.study, one.body) == (other.patient, other.study, other.body) and _alike(one, other)


def _fit(groups: list[list[Header]]) -> bool:
    """Are they parts of one stack: no place twice, no hole between, and as even as the parts were?

    Copies of a folder must not be mixed, nor two stacks that lie between each other.
    """
    if len({group[0].path.parent for group in groups}) < len(groups) or len(groups) < 2:
        return False
    steps = _steps([header for group in groups for header in group])
    if steps.min() <= SAME_PLACE_MM or steps.max() > max(_GAPS.max_gap, _GAPS.max_gap_times * float(np.median(steps))):
        return False
    return _unevenness(steps) <= max(_UNEVEN.uneven_tolerance, *(_unevenness(_steps(group)) for group in groups))


def _places(headers: Sequence[Header]) -> NDArray[np.float64]:
    """Along the normal of the first slice, mm."""
    return np.array([header.position for header in headers]) @ normal_of(headers[0].plane)


def _steps(headers: Sequence[Header]) -> NDArray[np.float64]:
    return np.diff(np.sort(_places(headers)))


def _unevenness(steps: NDArray[np.float64]) -> float:
    """Largest departure from the median distance, relative; a slice or two fit anywhere."""
    if len(steps) < 2:
        return np.inf
    median = float(np.median(steps))
    return float(np.abs(steps - median).max()) / max(median, SAME_PLACE_MM)


def _phases(group: list[Header]) -> list[list[Header]]:
    """Split a stack that was scanned several times by the first tag that gives each place once."""
    if len(group) < 4 or _is_simple(group):
        return [group]
    most = _most_at_one_place(group)
    for row in range(len(PHASES)):
        phases: dict[str, list[Header]] = {}
        for header in group:
            phases.setdefault(header.phase[row], []).append(header)
        parts = list(phases.values())
        # A time that changes with every turn of the tube would leave crumbs; acquisitions may follow each other.
        if 1 < len(parts) <= (most if row else len(group)) and all(len(p) > 1 and _is_simple(p) for p in parts):
            return parts
    return [group]


def _most_at_one_place(group: Sequence[Header]) -> int:
    places = _places(group)
    starts = np.flatnonzero(np.diff(np.sort(places)) > SAME_PLACE_MM)
    return int(np.diff([-1, *starts, len(places) - 1]).max())


def _is_simple(group: Sequence[Header]) -> bool:
    """Is each slice at a place of its own?"""
    return bool((_steps(group) > SAME_PLACE_MM).all())


def _ordered(group: list[Header], name: str) -> Stack:
    """Sorted along the normal. Copies of a slice stay in: only pixels can tell them from another phase."""
    group = sorted(group, key=lambda header: (header.instance, header.path, header.frame))
    places = _places(group)
    headers = tuple(group[index] for index in in_order(places))
    if len(headers) == 1:
        return Stack(headers, name, "single_slice", "one slice is not a volume: leave it out")
    if places.max() - places.min() <= SAME_PLACE_MM:
        text = f"{len(headers)} slices all at one position (a bolus or perfusion run): leave the series out"
        return Stack(headers, name, "not_a_volume", text)
    return Stack(headers, name)


def in_order(places: NDArray[np.float64]) -> list[int]:
    """Indices from the lowest place to the highest; slices at one place stay in the order in which they are given."""
    by_place = np.argsort(places, kind="stable")
    rank = np.zeros(len(places), int)
    rank[by_place[1:]] = np.cumsum(np.diff(places[by_place]) > SAME_PLACE_MM)
    found: list[int] = np.argsort(rank, kind="stable").tolist()
    return found
