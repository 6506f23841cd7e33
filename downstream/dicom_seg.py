"""A label map as a DICOM segmentation (SEG) of the series that it was made from, by highdicom.

A series' slices are where their own headers say, however they lean or how far apart they are; a label map in a file
with one affine cannot say that of every series, a SEG can.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_curation import dicom_headers
from data_curation.volumes import Found, VolumeError
from downstream.geometry import Place, Scan
from downstream.labels import Labels

__all__ = ["Slices", "on_one_affine", "series_slices", "write_seg"]

SCHEME = "99AXIAL"  # of names that have no code here
_SIDES = {"left": "Left", "right": "Right"}
_ABNORMAL = {"tumour": "Neoplasm", "tumor": "Neoplasm", "cancer": "Neoplasm", "cyst": "Cyst", "lesion": "Lesion"}
_STRUCTURES = {  # name without its side -> word of DICOM's SNOMED table
    "adrenal gland": "AdrenalGland",
    "adrenal glands": "AdrenalGland",
    "aorta": "Aorta",
    "arota": "Aorta",  # as AMOS22 spells it
    "bladder": "Bladder",
    "bone": "Bone",
    "brain": "Brain",
    "celiac trunk": "TruncusCoeliacus",
    "coeliac trunk": "TruncusCoeliacus",
    "colon": "Colon",
    "duodenum": "Duodenum",
    "esophagus": "Esophagus",
    "femur": "Femur",
    "gall bladder": "Gallbladder",
    "gallbladder": "Gallbladder",
    "head of femur": "HeadOfFemur",
    "heart": "Heart",
    "hepatic": "Liver",
    "inferior vena cava": "InferiorVenaCava",
    "kidney": "Kidney",
    "kidneys": "Kidney",
    "liver": "Liver",
    "lung": "Lung",
    "lungs": "Lung",
    "oesophagus": "Esophagus",
    "pancreas": "Pancreas",
    "pancreatic": "Pancreas",
    "portal vein": "PortalVein",
    "postcava": "InferiorVenaCava",
    "prostate": "Prostate",
    "rectum": "Rectum",
    "sacrum": "Sacrum",
    "small bowel": "SmallIntestine",
    "spinal cord": "SpinalCord",
    "spine": "Spine",
    "spleen": "Spleen",
    "stomach": "Stomach",
    "trachea": "Trachea",
    "urinary bladder": "Bladder",
}


@dataclass(frozen=True)
class Slices:
    """What a series' headers say: its data sets without pixels (one of a multi-frame series), and for each slice of the
    grid its place in the patient [k, 3], mm, and its image: the index of the data set, or of the frame."""

    datasets: tuple[Any, ...]
    places: NDArray[np.float64]
    images: tuple[int, ...]


def series_slices(found: Found, scan: Scan) -> Slices:
    """The slices behind the grid of a DICOM series, in the grid's order."""
    assert scan.places is not None, f"{found.path} is no DICOM series"
    frames = [frame if frame >= 0 else file for file, frame in found.frames]
    images = tuple(frames[index] if frames else index for index in scan.taken)
    return Slices(tuple(_opened(path) for path in found.files), scan.places, images)


def _opened(path: Path) -> Any:
    from pydicom import dcmread

    with dicom_headers.quiet():
        return dcmread(path, stop_before_pixels=True, force=True)


def on_one_affine(slices: Slices, place: Place) -> tuple[Place, str]:
    """The grid whose affine says where these slices lie, and what it still cannot say ("" for all but uneven ones).

    It is `place` itself where that is right to half a voxel; else its third axis leans as the slices of a tilted gantry
    do.
    """
    if not _off(slices, place):
        return place, ""
    along = (slices.places[-1] - slices.places[0]) / max(1, len(slices.places) - 1)
    leaning = Place(place.size, np.column_stack([place.affine[:, :2], along, slices.places[0]]))
    if not (away := _off(slices, leaning)):
        return leaning, ""
    return leaning, f"its slices lie at uneven distances: in a file with one affine some would be {away:.1f} mm off"


def _off(slices: Slices, place: Place) -> float:
    """By how many mm the affine misses a slice; 0.0 where none is off by more than half a voxel."""
    index = np.zeros_like(slices.places)
    index[:, 2] = np.arange(len(index))
    if np.abs(place.index(slices.places) - index).max() <= 0.5:
        return 0.0
    return float(np.linalg.norm(slices.places - place.position(index), axis=1).max())


def write_seg(
    path: Path,
    array: NDArray[np.uint8],
    slices: Slices,
    labels: Labels,
    digest: str,
    software: str = "axial",
    tell: Callable[[Sequence[str]], None] = lambda notes: None,
) -> None:
    """Label values [k, j, i] in the order of the grid, as a binary SEG; the file appears whole or not at all.

    A segment for each label value, in their order, also where it is empty; slices without a label have no frames. The
    identifiers follow from the series and the model's `digest`: the same prediction has the same ones. What the series'
    headers lack or have wrong is drawn or left empty; `tell` is given notes of it before the file is there. VolumeError
    `no_seg` where that is not enough.
    """
    aside = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on values in the source that break a rule of the standard
            made, notes = _segmentation(array, slices, labels, digest, software)
            made.save_as(aside)
        tell(notes)
        os.replace(aside, path)
    except (MemoryError, OSError, VolumeError):
        raise
    except Exception as fault:  # whatever the libraries stumble over in headers of unknown origin
        text = f"the series' headers make no segmentation ({type(fault).__name__}: {fault})"
        raise VolumeError("no_seg", f"{text}: convert the series to NIfTI") from None
    finally:
        aside.unlink(missing_ok=True)


def _segmentation(
    array: NDArray[np.uint8], slices: Slices, labels: Labels, digest: str, software: str
) -> tuple[Any, tuple[str, ...]]:
    import highdicom
    from pydicom.uid import generate_uid

    values = [value for value in labels.values if value]
    table = np.zeros(256, np.uint8)
    table[values] = np.arange(1, len(values) + 1)
    sources, pixels = _stacked(slices, table[array])
    notes = _mend(sources, slices)
    uids = [str(dataset.SOPInstanceUID) for dataset in sources]
    series, instance, dimensions = (
        generate_uid(entropy_srcs=[what, digest, *uids]) for what in ("series", "sop", "dim")
    )
    made = highdicom.seg.Segmentation(
        source_images=sources,
        pixel_array=pixels,
        segmentation_type="BINARY",
        segment_descriptions=_segments(labels, values, [series, *uids]),
        series_instance_uid=series,
        series_number=300,
        sop_instance_uid=instance,
        instance_number=1,
        manufacturer="axial",
        manufacturer_model_name=software,
        software_versions=_version(),
        device_serial_number=digest[:16],
        content_label="SEGMENTATION",
        content_description="Segmentation by a neural network, not reviewed",
        omit_empty_frames=bool(pixels.any()),
    )
    made.DimensionOrganizationSequence[0].DimensionOrganizationUID = dimensions
    for item in made.DimensionIndexSequence:
        item.DimensionOrganizationUID = dimensions
    made.SeriesDescription = "Axial segmentation"
    return made, notes


def _stacked(slices: Slices, segments: NDArray[np.uint8]) -> tuple[list[Any], NDArray[np.uint8]]:
    """The source images and a plane of segment numbers for each of them, or for each frame of the only one."""
    first = slices.datasets[0]
    frames = int(first.get("NumberOfFrames") or 1)
    if frames <= 1:
        return [slices.datasets[index] for index in slices.images], segments
    if len(slices.datasets) > 1:
        raise VolumeError("no_seg", "a DICOM SEG cannot tell of several multi-frame files: convert the series to NIfTI")
    pixels = np.zeros((frames, *segments.shape[1:]), np.uint8)
    pixels[list(slices.images)] = segments
    return [first], pixels


_DRAWN = ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "SOPInstanceUID")


def _mend(sources: Sequence[Any], slices: Slices) -> tuple[str, ...]:
    """Makes the headers such as a segmentation may repeat, and tells what was changed.

    Values that are none of their kind are left out, identifiers that are missing are drawn from the others.
    """
    from pydicom.uid import CTImageStorage, generate_uid

    wrong: set[str] = set()
    drawn: set[str] = set()
    steps = np.linalg.norm(np.diff(slices.places, axis=0), axis=1)
    entropy = [str(sources[0].get(name, "")) for name in ("PatientID", *_DRAWN)] + [str(slices.places.tolist())]
    for index, dataset in enumerate(sources):
        wrong |= _without_faults(dataset)
        if not dataset.get("SOPClassUID"):
            dataset.SOPClassUID = CTImageStorage
        for name in _DRAWN:  # slices of a series share all but the last
            if not dataset.get(name):
                drawn.add(name)
                own = [str(index)] if name == "SOPInstanceUID" else []
                setattr(dataset, name, generate_uid(entropy_srcs=[name, *entropy, *own]))
        if "NumberOfFrames" not in dataset and not float(dataset.get("SliceThickness") or 0) > 0:
            dataset.SliceThickness = f"{np.median(steps):.6g}" if len(steps) else "1"
    notes = (
        (wrong, "left empty in the segmentation, not valid in the series"),
        (drawn, "drawn, missing in the series"),
    )
    return tuple(f"{', '.join(sorted(names))}: {what}" for names, what in notes if names)


def _without_faults(dataset: Any) -> set[str]:
    """Takes out the values that cannot be understood; their names."""
    from pydicom.datadict import keyword_for_tag
    from pydicom.valuerep import DA, TM

    copied: dict[
        str, Callable[[str], object]
    ] = {  # what a segmentation repeats of its source, and what it must be; anonymised series leave it out
        **dict.fromkeys(("AccessionNumber", "PatientID", "PatientName", "StudyID"), str),
        **dict.fromkeys(("PatientBirthDate", "StudyDate"), DA),
        "PatientSex": ("", "F", "M", "O").index,
        "StudyTime": TM,
    }
    wrong = set()
    for tag in list(dataset.keys()):
        try:
            element = dataset[tag]
            if element.VR in ("DS", "IS"):
                np.asarray(element.value or 0, np.float64)
            elif element.VR != "SQ":
                str(element.value)
        except Exception:  # a word where a number belongs, bytes of another type
            wrong.add(keyword_for_tag(tag) or str(tag))
            del dataset[tag]
    for name, kind in copied.items():
        text = str(dataset.get(name) or "")
        try:
            kind(text)
        except (ValueError, OverflowError):
            wrong.add(name)
            text = ""
        setattr(dataset, name, text)
    dataset.SpecificCharacterSet = "ISO_IR 192"  # the texts were decoded; not every set of a series is known elsewhere
    return wrong


def _segments(labels: Labels, values: Sequence[int], entropy: Sequence[str]) -> list[Any]:
    from highdicom import AlgorithmIdentificationSequence
    from highdicom.seg import SegmentDescription
    from pydicom.sr.codedict import codes
    from pydicom.uid import generate_uid

    algorithm = AlgorithmIdentificationSequence("axial", codes.DCM.ArtificialIntelligence, _version())
    names = dict(zip(labels.values, labels.names, strict=True))
    made = []
    for number, value in enumerate(values, 1):
        category, kind, side, regions = _coded(names[value], value)
        segment = SegmentDescription(
            number, names[value][:64], category, kind, "AUTOMATIC", algorithm,
            tracking_uid=generate_uid(entropy_srcs=[*entropy, str(value)]), tracking_id=names[value][:64],
            anatomic_regions=regions or None,
        )  # fmt: skip
        if side:
            segment.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence = [_concept(side)]
        made.append(segment)
    return made


def _coded(name: str, value: int) -> tuple[Any, Any, str, list[Any]]:
    """Category, type, side ("Left", "Right" or "") and the organs that an abnormal structure lies in."""
    from highdicom.sr import CodedConcept

    words = name.lower().replace("_", " ").replace("-", " ").split()
    side = next((_SIDES[word] for word in words if word in _SIDES), "")
    rest = " ".join(word for word in words if word not in _SIDES)
    if rest in _STRUCTURES:
        return _concept("AnatomicalStructure"), _concept(_STRUCTURES[rest]), side, []
    *organ, last = rest.split() or [""]
    if last in _ABNORMAL:
        where = _STRUCTURES.get(" ".join(organ))
        return (
            _concept("MorphologicallyAbnormalStructure"),
            _concept(_ABNORMAL[last]),
            side,
            [_concept(where)] if where else [],
        )
    return _concept("AnatomicalStructure"), CodedConcept(f"label{value}", SCHEME, name[:64]), side, []


def _concept(keyword: str) -> Any:
    from highdicom.sr import CodedConcept
    from pydicom.sr.codedict import codes

    return CodedConcept.from_code(getattr(codes.SCT, keyword))


def _version() -> str:
    try:
        return version("axial-ct")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "0"
