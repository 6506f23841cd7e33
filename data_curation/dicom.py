"""DICOM files of one folder -> CT stacks.

Headers only are read to group files: by series, then by plane and pixel grid (a scout inside a series is set apart),
then ordered along the slices' normal. What cannot be CT is named here without its pixels being read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_curation.grid import Grid, VolumeError, from_image

__all__ = ["Header", "Stack", "load", "looks_like", "stacks"]

SAME_PLACE_MM = 0.01  # slices nearer than this are at one position
GAP_MM, GAP_TIMES = 15.0, 2.5  # a gap above both (the latter in median spacings) is a hole, not a missing slice
UNEVEN = 0.02  # relative departure from the median spacing that is worth a note
TILT_DEGREES = 0.5  # angle between the stack's direction and the slices' normal that is worth a note

_CT = tuple(f"1.2.840.10008.5.1.4.1.1.2{end}" for end in ("", ".1", ".2"))  # plain, Enhanced, Legacy Converted
_NOT_PIXELS = {  # SOP class prefix: what it is
    "1.2.840.10008.5.1.4.1.1.66": "a segmentation or registration object",
    "1.2.840.10008.5.1.4.1.1.481.2": "a radiotherapy dose",
    "1.2.840.10008.5.1.4.1.1.481": "a radiotherapy structure set or plan",
    "1.2.840.10008.5.1.4.1.1.11": "a presentation state",
    "1.2.840.10008.5.1.4.1.1.88": "a structured report",
    "1.2.840.10008.5.1.4.1.1.104": "an encapsulated document",
    "1.2.840.10008.1.3.10": "a DICOMDIR",
}
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
_IMAGE_TYPES = {  # word of ImageType: reason, what it is
    "LOCALIZER": ("localizer", "a scout view"),
    "REF_SURVIEW": ("screen_save", "a screen save"),
    "DOSE_INFO": ("screen_save", "a screen save of dose figures"),
    "SCREEN SAVE": ("screen_save", "a screen save"),
    "PERFUSION": ("derived", "a perfusion map"),
    "PROJECTION IMAGE": ("derived", "a projection through many slices"),
    "MIP": ("derived", "a maximum projection"),
    "MAX_IP": ("derived", "a maximum projection"),
    "MIN_IP": ("derived", "a minimum projection"),
    "VOLUME_RENDER": ("derived", "a rendered view"),
    "CSA 3D": ("derived", "a rendered view"),
    "SUBTRACTION": ("derived", "a difference of two scans"),
}
_TAGS = frozenset(
    f"{group}|{element}"
    for group, elements in {
        "0008": "0008 0016 0060",
        "0010": "0020",
        "0020": "000d 000e 0012 0032 0037",
        "0028": "0004 0030",
    }.items()
    for element in elements.split()
)
_SOP_CLASS = re.compile(rb"1\.2\.840\.10008\.(?:5\.1\.4\.1\.1\.[\d.]+|1\.3\.10)")


@dataclass(frozen=True)
class Header:
    """What grouping needs to know of one file. `plane` is ImageOrientationPatient, `position` ImagePositionPatient."""

    path: Path
    series: str = ""
    study: str = ""
    patient: str = ""
    acquisition: str = ""
    size: tuple[int, ...] = ()  # columns, rows, frames
    spacing: tuple[float, ...] = ()  # between rows, between columns; empty where the header has none
    plane: tuple[float, ...] = ()
    position: tuple[float, ...] = ()
    reason: str = ""  # why it is no CT slice; "" where it is one
    detail: str = ""


@dataclass(frozen=True)
class Stack:
    """Files that belong together, in order from one end of the stack to the other, or the reason why they do not."""

    headers: tuple[Header, ...]
    name: str  # series UID, "/2" and so on appended where a series holds several stacks
    reason: str = ""
    detail: str = ""


def looks_like(path: Path) -> bool:
    """Is it DICOM by its first bytes? Files without the 128-byte preamble are known by their first tag."""
    with path.open("rb") as file:
        start = file.read(132)
    return start[128:] == b"DICM" or (len(start) == 132 and start[:2] in (b"\x02\x00", b"\x08\x00") and start[3] == 0)


def stacks(files: Iterable[Path]) -> list[Stack]:
    """The files of one folder as stacks, ordered by series and place; refused files of one series share one entry."""
    series: dict[tuple[str, str], list[Header]] = {}
    for path in files:
        header = _header(path)
        alone = str(path) if header.reason in ("unreadable", "empty") else header.series
        series.setdefault((alone, header.reason), []).append(header)
    found: list[Stack] = []
    for (name, reason), headers in series.items():
        if reason:
            count = f"{len(headers)} files: " if len(headers) > 1 else ""
            found.append(Stack(tuple(headers), name, reason, count + headers[0].detail))
            continue
        groups = [part for group in _planes(headers) for part in _phases(group)]
        for index, group in enumerate(groups):
            found.append(_ordered(group, name if index == 0 else f"{name}/{index + 1}"))
    return found


def _header(path: Path) -> Header:
    try:
        return _opened(path)
    except OSError as error:
        text = f"the file cannot be opened ({error.strerror or error}): allow reading it"
        return _refused(Header(path), "unreadable", text)


def _opened(path: Path) -> Header:
    import SimpleITK as sitk

    nothing = Header(path)
    if path.stat().st_size == 0:
        return _refused(nothing, "empty", "the file has 0 bytes: copy or download it again")
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO("GDCMImageIO")
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        with path.open("rb") as file:
            known = _SOP_CLASS.search(file.read(8192))
        what = _what(known.group().decode()) if known else ""
        if what:
            return _refused(nothing, "not_image", f"{what}, not an image")
        return _refused(nothing, "unreadable", "cut short, damaged or without pixels: copy or download it again")
    tags = {key: _clean(reader.GetMetaData(key)) for key in reader.GetMetaDataKeys() if key in _TAGS}
    header = Header(
        path,
        series=tags.get("0020|000e", ""),
        study=tags.get("0020|000d", ""),
        patient=tags.get("0010|0020", ""),
        acquisition=tags.get("0020|0012", ""),
        size=tuple(reader.GetSize()),
        spacing=_numbers(tags.get("0028|0030", "")),
        plane=_numbers(tags.get("0020|0037", "")),
        position=_numbers(tags.get("0020|0032", "")),
    )
    return _refused(header, *_judge(tags, header, reader.GetNumberOfComponents()))


def _judge(tags: Mapping[str, str], header: Header, components: int) -> tuple[str, str]:
    """(reason, detail) why a readable file is no CT slice, or two empty texts."""
    sop, modality = tags.get("0008|0016", ""), tags.get("0008|0060", "")
    words = [word.strip().upper() for word in tags.get("0008|0008", "").split("\\")]
    kind = "\\".join(words)
    if what := _what(sop):
        return "not_image", f"{what} (modality {modality or 'unknown'}), not a CT image"
    if sop == _SECONDARY_CAPTURE or sop.startswith(_SECONDARY_CAPTURE + "."):
        return "screen_save", f"a secondary capture ({kind}), not what the scanner measured: leave it out"
    if modality != "CT":
        return "not_ct", f"modality {modality or 'unknown'}, not CT: leave it out"
    if sop and sop not in _CT:
        return "not_image", f"SOP class {sop} is not a CT image: leave it out"
    for word in words:
        if word in _IMAGE_TYPES:
            reason, what = _IMAGE_TYPES[word]
            return reason, f"{what} (image type {kind}), not CT slices in HU: leave it out"
    if components != 1 or not tags.get("0028|0004", "MONOCHROME").startswith("MONOCHROME"):
        return "screen_save", f"a colour picture ({components} values a pixel), not CT in HU: leave it out"
    if len(header.size) > 2 and header.size[2] > 1:
        return "", ""  # multi-frame: its geometry is inside, per frame
    if len(header.spacing) != 2:
        return "no_spacing", "the header has no usable PixelSpacing, so sizes in mm are unknown: leave it out"
    if len(header.position) != 3 or len(header.plane) != 6 or abs(np.linalg.norm(_normal(header)) - 1) > 0.1:
        text = "the header has no usable ImagePositionPatient and ImageOrientationPatient: slices cannot be ordered"
        return "no_position", text
    return "", ""


def _refused(header: Header, reason: str, detail: str) -> Header:
    return replace(header, reason=reason, detail=detail)


def _what(sop: str) -> str:
    return next((what for prefix, what in _NOT_PIXELS.items() if sop == prefix or sop.startswith(prefix + ".")), "")


def _clean(text: str) -> str:
    """Text of a tag without padding; bytes in other character sets become question marks, the same every time."""
    return text.encode("utf-8", "replace").decode().replace("\0", "").strip()


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split("\\") if part.strip())
    except ValueError:
        return ()


def _normal(header: Header) -> NDArray[np.float64]:
    plane = np.array(header.plane, np.float64)
    return np.cross(plane[:3], plane[3:])


def _planes(headers: Sequence[Header]) -> list[list[Header]]:
    """Split by pixel grid and orientation; small noise in the cosines does not split."""
    groups: list[list[Header]] = []
    for header in headers:
        for group in groups:
            first = group[0]
            same = header.size == first.size and (len(header.size) < 3 or header.size[2] == 1)
            if (
                same
                and np.allclose(header.plane, first.plane, atol=0.01)
                and np.allclose(header.spacing, first.spacing, rtol=0.01)
            ):
                group.append(header)
                break
        else:
            groups.append([header])
    return groups


def _phases(group: list[Header]) -> list[list[Header]]:
    """Split a stack that was scanned several times by AcquisitionNumber, where that gives each position once."""
    if len(group) < 4 or _distinct(group) == len(group):
        return [group]
    phases: dict[str, list[Header]] = {}
    for header in group:
        phases.setdefault(header.acquisition, []).append(header)
    parts = list(phases.values())
    if len(parts) > 1 and all(len(part) > 1 and _distinct(part) == len(part) for part in parts):
        return parts
    return [group]


def _distinct(group: Sequence[Header]) -> int:
    """Number of different positions."""
    if len(group[0].position) != 3:
        return len(group)
    normal = _normal(group[0])
    places = np.sort([float(np.dot(header.position, normal)) for header in group])
    return 1 + int(np.count_nonzero(np.diff(places) > SAME_PLACE_MM))


def _ordered(group: list[Header], name: str) -> Stack:
    """Sorted along the normal, holes found. Copies of a slice stay in: only pixels can tell them from another phase."""
    if len(group[0].size) > 2 and group[0].size[2] > 1:
        return Stack(tuple(group), name)
    normal = _normal(group[0])
    places = {header.path: float(np.dot(header.position, normal)) for header in group}
    headers = tuple(sorted(group, key=lambda header: (places[header.path], header.path)))
    if len(headers) == 1:
        return Stack(headers, name, "single_slice", "one slice is not a volume: leave it out")
    steps = np.diff([places[header.path] for header in headers])
    apart = steps[steps > SAME_PLACE_MM]
    if apart.size == 0:
        text = f"{len(headers)} slices all at one position (a bolus or perfusion run): leave the series out"
        return Stack(headers, name, "not_a_volume", text)
    median = float(np.median(apart))
    if apart.max() > max(GAP_MM, GAP_TIMES * median):
        text = f"a gap of {apart.max():.1f} mm among {len(headers)} slices {median:.2f} mm apart: "
        return Stack(headers, name, "not_a_volume", text + "fetch the missing slices, or split the folder at the gap")
    return Stack(headers, name)


def load(files: Sequence[Path]) -> Grid:
    """One ordered stack, or one multi-frame file, in HU: slope and intercept of each slice are its own.

    Slices at one position are dropped when they are equal, else VolumeError `not_a_volume`. The grid's stack axis is
    the slices' normal and its step the median distance along it; tilt and uneven spacing are told in the notes.
    """
    import SimpleITK as sitk

    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    slices: list[NDArray[Any]] = []
    positions: list[tuple[float, ...]] = []
    image: Any = None
    for path in files:
        reader.SetFileName(str(path))
        try:
            image = reader.Execute()
        except RuntimeError:
            text = f"the pixels of {path.name} are cut short or damaged: copy or download it again"
            raise VolumeError("truncated", text) from None
        if len(files) == 1:
            return _multi_frame(image)
        slices.append(_small(sitk.GetArrayViewFromImage(image)[0]))
        positions.append(_numbers(_clean(reader.GetMetaData("0020|0032"))))
    axes = np.array(image.GetDirection(), np.float64).reshape(3, 3)
    row, column = axes[:, 0], axes[:, 1]
    normal = np.cross(row, column)
    kept = _without_repeats(slices, [float(np.dot(position, normal)) for position in positions])
    places = np.array(positions)[kept]
    steps = np.diff(places @ normal)
    median = float(np.median(steps))
    along = places[-1] - places[0]
    tilt = float(np.degrees(np.arccos(np.clip(along @ normal / np.linalg.norm(along), -1.0, 1.0))))
    notes: list[str] = []
    if len(kept) < len(slices):
        notes.append(f"{len(slices) - len(kept)} repeated slices left out")
    if tilt > TILT_DEGREES:
        notes.append(f"gantry tilt {tilt:.1f} degrees: slices kept as acquired")
    if np.abs(steps - median).max() > max(UNEVEN * median, SAME_PLACE_MM):
        notes.append(f"uneven slice spacing {steps.min():.2f} to {steps.max():.2f} mm: the median {median:.2f} is used")
    scale = image.GetSpacing()
    affine = np.column_stack([row * scale[0], column * scale[1], normal * median, places[0]])
    return Grid(np.stack([slices[index] for index in kept]), affine, tilt > TILT_DEGREES, tuple(notes))


def _multi_frame(image: Any) -> Grid:
    """Enhanced CT. Frames that are shuffled or unevenly spaced reach us as stored, with 1 x 1 x 1 mm for a sign."""
    if image.GetDimension() != 3 or image.GetSize()[2] < 2:
        raise VolumeError("single_slice", "one slice is not a volume: leave it out")
    if tuple(image.GetSpacing()) == (1.0, 1.0, 1.0):
        text = f"{image.GetSize()[2]} frames that are not in order at even distances: write them as single-frame files"
        raise VolumeError("not_a_volume", text)
    return from_image(image)


def _small(values: NDArray[Any]) -> NDArray[Any]:
    """A copy, as int16 where that loses nothing: a stack of 1,000 slices should not be held as float64."""
    low, high = values.min(), values.max()
    fits = low >= -32768 and high <= 32767
    if fits and (values.dtype.kind in "iu" or np.array_equal(values, np.rint(values))):
        return values.astype(np.int16)
    return values.astype(np.float32) if values.dtype.kind == "f" else values.astype(np.int32)


def _without_repeats(slices: Sequence[NDArray[Any]], places: Sequence[float]) -> list[int]:
    kept = [0]
    for index in range(1, len(slices)):
        if places[index] - places[kept[-1]] > SAME_PLACE_MM:
            kept.append(index)
        elif not np.array_equal(slices[index], slices[kept[-1]]):
            distinct = 1 + int(np.count_nonzero(np.diff(places) > SAME_PLACE_MM))
            text = f"{len(slices)} slices share {distinct} positions (several phases in one series): "
            raise VolumeError("not_a_volume", text + "put each phase into a folder of its own")
    return kept
