"""DICOM headers: what one file says of its slices, by pydicom, and why a slice may be no CT.

Multi-frame files (Enhanced and Legacy Converted CT) keep a slice a frame, each with its own place, scale and type in
the functional groups; they are spread out here, so that a frame is a slice like any other.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from data_curation import dicom_pixels
from data_curation.dicom_pixels import Unsupported

__all__ = ["PHASES", "Header", "looks_like", "normal_of", "numbers", "opened", "per_slice", "quiet", "read"]

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
_IMAGE_TYPES = {  # word of ImageType or FrameType: reason, what it is
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
_NOT_HU = {"MGML": "a material density map", "Z_EFF": "an atomic number map", "ED": "an electron density map"}

# What may tell phases of one series apart, best first; of several names of a row the first that is there counts.
PHASES = (
    ("FrameAcquisitionNumber", "AcquisitionNumber"),
    ("TemporalPositionIndex", "TemporalPositionIdentifier"),
    ("NominalPercentageOfCardiacPhase",),
    ("NominalCardiacTriggerDelayTime", "TriggerTime"),
    ("ContentTime",),
    ("AcquisitionTime",),
    ("StackID",),
    ("FrameType", "ImageType"),
)
_SCALE = ("PixelPaddingValue", "PixelPaddingRangeLimit", "RescaleSlope", "RescaleIntercept", "RescaleType")
_FORMAT = (
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "NumberOfFrames",
    "Rows",
    "Columns",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "LossyImageCompression",
)
_OWN = (
    "SOPClassUID",
    "Modality",
    "PatientID",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "FrameOfReferenceUID",
    "ConvolutionKernel",
    "InstanceNumber",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "SliceThickness",
    "ModalityLUTSequence",
)
_NAMES = frozenset((*_OWN, *_FORMAT, *_SCALE, *(name for names in PHASES for name in names)))
_GROUPS = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
_OFFSETS = ("ExtendedOffsetTable", "ExtendedOffsetTableLengths")  # of compressed frames
_TEXTS = frozenset(("CS", "DA", "DS", "IS", "LO", "SH", "TM", "UI"))  # value representations


@dataclass(frozen=True, slots=True)
class Header:
    """What grouping needs to know of one slice. `plane` is ImageOrientationPatient, `position` ImagePositionPatient.

    `frame` counts from 0 in a multi-frame file and is -1 in a file of one slice.
    """

    path: Path
    frame: int = -1
    instance: int = 0  # InstanceNumber
    series: str = ""
    study: str = ""
    patient: str = ""
    body: str = ""  # FrameOfReferenceUID
    kernel: str = ""
    phase: tuple[str, ...] = ()  # one text for each row of PHASES
    size: tuple[int, ...] = ()  # columns, rows
    spacing: tuple[float, ...] = ()  # between rows, between columns; empty where the header has none
    plane: tuple[float, ...] = ()
    position: tuple[float, ...] = ()
    reason: str = ""  # why it is no CT slice; "" where it is one
    detail: str = ""


def looks_like(path: Path) -> bool:
    """Is it DICOM by its first bytes? Files without the 128-byte preamble are known by their first tag."""
    with path.open("rb") as file:
        return _looks_like(file.read(132))


def _looks_like(start: bytes) -> bool:
    return start[128:] == b"DICM" or (len(start) == 132 and start[:2] in (b"\x02\x00", b"\x08\x00") and start[3] == 0)


def read(path: Path, seen: dict[Any, Any] | None = None) -> list[Header]:
    """A header for each slice of a file. `seen` keeps one copy of what slices share, for many files in memory."""
    seen = {} if seen is None else seen
    try:
        with path.open("rb") as file:
            if path.stat().st_size == 0:
                return [Header(path, reason="empty", detail="the file has 0 bytes: copy or download it again")]
            found = _headers(path, file)
    except OSError as error:
        text = f"the file cannot be opened ({error.strerror or error}): allow reading it"
        return [Header(path, reason="unreadable", detail=text)]
    return [_shared(header, seen) for header in found]


def _shared(header: Header, seen: dict[Any, Any]) -> Header:
    shared = ("series", "study", "patient", "body", "kernel", "phase", "size", "spacing", "plane", "detail")
    values: dict[str, Any] = {name: getattr(header, name) for name in shared}
    return replace(header, **{name: seen.setdefault(value, value) for name, value in values.items()})


def _headers(path: Path, file: BinaryIO) -> list[Header]:
    damaged = "cut short, damaged or without pixels: copy or download it again"
    try:
        with quiet():
            data = opened(file)
            tops, slices = _texts(data), list(per_slice(data))
    except OSError:
        raise
    except Exception:  # whatever a parser may stumble over in bytes of unknown origin
        return [Header(path, reason="unreadable", detail=damaged)]
    first = _header(path, -1, tops)
    if what := _what(tops.get("SOPClassUID", "")):
        modality = tops.get("Modality", "") or "unknown"
        return [replace(first, reason="not_image", detail=f"{what} (modality {modality}), not a CT image")]
    try:
        with quiet():
            dicom_pixels.locate(file, data, tops)
    except Unsupported as error:
        reason, detail = _judge(tops, first)
        named = (reason, detail) if reason not in ("", "no_spacing", "no_position") else ("unsupported", str(error))
        return [replace(first, reason=named[0], detail=named[1])]
    except OSError:
        raise
    except Exception:
        return [replace(first, reason="unreadable", detail=damaged)]
    found = []
    for frame, texts in slices:
        header = _header(path, frame, texts)
        reason, detail = _judge(texts, header)
        found.append(replace(header, reason=reason, detail=detail))
    return found


def opened(file: BinaryIO) -> Any:
    """The file's dataset up to its pixels, with the tags that matter; the file stands at the pixels.

    Raises what pydicom does: call it where anything may be raised.
    """
    from pydicom import dcmread

    file.seek(0)
    forced = _looks_like(file.read(132))
    file.seek(0)
    return dcmread(file, stop_before_pixels=True, force=forced, specific_tags=[*_tags(), *_OFFSETS])


def per_slice(data: Any) -> Iterator[tuple[int, Mapping[str, str]]]:
    """(frame, values by keyword, as text) of each slice; frame -1 is the only one of a single-frame file."""
    top = _texts(data)
    per_frame = data.get(_GROUPS[1])
    if int(top.get("NumberOfFrames") or 1) <= 1 and not per_frame:
        yield -1, top
        return
    shared = _flat(data[_GROUPS[0]].value[0]) if data.get(_GROUPS[0]) else {}
    for index, groups in enumerate(per_frame or [()] * int(top["NumberOfFrames"])):
        yield index, {**top, **shared, **_flat(groups)}


@cache
def _tags() -> Mapping[Any, str]:
    from pydicom.datadict import tag_for_keyword
    from pydicom.tag import Tag

    return {Tag(tag_for_keyword(name) or 0): name for name in (*_NAMES, *_GROUPS)}


def _flat(groups: Any) -> dict[str, str]:
    """The values that matter inside the functional groups of a frame, each of which is a sequence of one item."""
    found: dict[str, str] = {}
    for group in groups:
        if group.VR == "SQ" and group.value:
            found |= _texts(group.value[0])
    return found


def _texts(data: Any) -> dict[str, str]:
    """The values that matter as text, several with a backslash between them; a sequence is an empty text.

    Most are taken as the bytes they are, since pydicom's own conversion takes as long as reading a slice's pixels.
    """
    from pydicom.datadict import dictionary_VR

    found = {}
    _, little = data.original_encoding
    for tag in data.keys() & _tags().keys():
        name, element = _tags()[tag], data.get_item(tag)
        if name in _GROUPS:
            continue
        kind, value = element.VR or dictionary_VR(tag), element.value
        if isinstance(value, bytes) and kind in _TEXTS and value.isascii():
            found[name] = value.decode("ascii").strip(" \0")
        elif isinstance(value, bytes) and kind in ("US", "US or SS") and len(value) == 2:
            found[name] = str(int.from_bytes(value, "little" if little else "big"))
        else:
            found[name] = "" if kind == "SQ" else _text(data[tag].value)
    return found


def _text(value: Any) -> str:
    """A value as text without padding; bytes in other character sets become question marks, the same every time."""
    several = isinstance(value, Sequence) and not isinstance(value, str | bytes)
    text = "\\".join(str(part) for part in value) if several else "" if value is None else str(value)
    return text.encode("utf-8", "replace").decode().replace("\0", "").strip()


def _header(path: Path, frame: int, texts: Mapping[str, str]) -> Header:
    phase = tuple(next((texts[name] for name in names if texts.get(name)), "") for names in PHASES)
    return Header(
        path,
        frame,
        instance=int(number) if (number := texts.get("InstanceNumber", "")).isdecimal() else 0,
        series=texts.get("SeriesInstanceUID", ""),
        study=texts.get("StudyInstanceUID", ""),
        patient=texts.get("PatientID", ""),
        body=texts.get("FrameOfReferenceUID", ""),
        kernel=texts.get("ConvolutionKernel", ""),
        phase=phase,
        size=tuple(int(texts[name]) for name in ("Columns", "Rows") if texts.get(name, "").isdecimal()),
        spacing=numbers(texts.get("PixelSpacing", "")),
        plane=numbers(texts.get("ImageOrientationPatient", "")),
        position=numbers(texts.get("ImagePositionPatient", "")),
    )


def _judge(texts: Mapping[str, str], header: Header) -> tuple[str, str]:
    """(reason, detail) why a readable slice is no CT, or two empty texts."""
    sop, modality = texts.get("SOPClassUID", ""), texts.get("Modality", "")
    kinds = [texts[name] for name in ("ImageType", "FrameType") if texts.get(name)]
    words = [word.strip().upper() for kind in kinds for word in kind.split("\\")]
    kind = "\\".join(words)
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
    samples = texts.get("SamplesPerPixel", "") or "1"
    if samples != "1" or not texts.get("PhotometricInterpretation", "MONOCHROME").startswith("MONOCHROME"):
        return "screen_save", f"a colour picture ({samples} values a pixel), not CT in HU: leave it out"
    if texts.get("RescaleType", "") in _NOT_HU:
        return "derived", f"{_NOT_HU[texts['RescaleType']]} (rescale type {texts['RescaleType']}): leave it out"
    if "ModalityLUTSequence" in texts:
        return "lookup_table", "values go through a modality lookup table, which is not read: export the series in HU"
    if len(header.spacing) != 2 or min(header.spacing) <= 0:
        return "no_spacing", "the header has no usable PixelSpacing, so sizes in mm are unknown: leave it out"
    if (
        len(header.position) != 3
        or len(header.plane) != 6
        or abs(math.dist(normal_of(header.plane), (0, 0, 0)) - 1) > 0.1
    ):
        text = "the header has no usable ImagePositionPatient and ImageOrientationPatient: slices cannot be ordered"
        return "no_position", text
    return "", ""


def _what(sop: str) -> str:
    return next((what for prefix, what in _NOT_PIXELS.items() if sop == prefix or sop.startswith(prefix + ".")), "")


def numbers(text: str) -> tuple[float, ...]:
    """The finite numbers of a text with backslashes between; none where one of them is no number."""
    try:
        found = tuple(float(part) for part in text.split("\\") if part.strip())
    except ValueError:
        return ()
    return found if all(map(math.isfinite, found)) else ()


def normal_of(plane: Sequence[float]) -> NDArray[np.float64]:
    """The direction across slices whose rows and columns run along `plane` [6]."""
    a, b, c, d, e, f = plane
    return np.array((b * f - c * e, c * d - a * f, a * e - b * d))


@contextmanager
def quiet() -> Iterator[None]:
    """Without pydicom's warnings on values that break a rule of the standard; what matters is judged here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
