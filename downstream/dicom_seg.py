"""A label map as a DICOM segmentation (SEG) of the series that it was made from, by highdicom.

A series' slices are where their own headers say, however they lean or how far apart they are; a label map in a file
with one affine cannot say that of every series, a SEG can.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_curation import dicom_headers
from data_curation.grid import SAME_PLACE_MM
from data_curation.volumes import Found, VolumeError
from downstream.geometry import Place
from downstream.labels import Labels

__all__ = ["Slices", "misplaced", "series_slices", "write_seg"]

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


def series_slices(found: Found, place: Place) -> Slices:
    """The slices behind the grid of a DICOM series, in the grid's order. VolumeError where they are not that many."""
    headers = []
    for index, path in enumerate(found.files):
        wanted = {frame for file, frame in found.frames if file == index}
        headers += [
            (header, header.frame if header.frame >= 0 else index)
            for header in dicom_headers.read(path)
            if not header.reason and (header.frame in wanted or not found.frames)
        ]
    normal = place.affine[:, 2] / np.linalg.norm(place.affine[:, 2])
    along = [float(np.asarray(header.position) @ normal) for header, _ in headers]
    kept: list[int] = []
    for index in np.argsort(along, kind="stable").tolist():
        if not kept or along[index] - along[kept[-1]] > SAME_PLACE_MM:  # copies of a slice count once
            kept.append(index)
    if len(kept) != place.size[2]:
        raise VolumeError("not_a_volume", f"{len(kept)} slices by their headers, {place.size[2]} were read: copy again")
    places = np.array([headers[index][0].position for index in kept])
    return Slices(tuple(_opened(path) for path in found.files), places, tuple(headers[index][1] for index in kept))


def _opened(path: Path) -> Any:
    from pydicom import dcmread

    with dicom_headers.quiet():
        return dcmread(path, stop_before_pixels=True, force=True)


def misplaced(slices: Slices, place: Place) -> str:
    """Why one affine cannot say where these slices lie; "" where no voxel is off by more than half a voxel."""
    index = np.zeros_like(slices.places)
    index[:, 2] = np.arange(len(index))
    off = np.abs(place.index(slices.places) - index)
    if off.max() <= 0.5:
        return ""
    away = float(np.linalg.norm(slices.places - place.position(index), axis=1).max())
    what = "lie at uneven distances" if off[:, 2].max() > off[:, :2].max() else "lean (a tilted gantry)"
    return f"its slices {what}: in a file with one affine some would be {away:.1f} mm off; use dicom=seg"


def write_seg(
    path: Path, array: NDArray[np.uint8], slices: Slices, labels: Labels, digest: str, software: str = "axial"
) -> None:
    """Label values [k, j, i] in the order of the grid, as a binary SEG; the file appears whole or not at all.

    A segment for each label value, in their order, also where it is empty; slices without a label have no frames. The
    identifiers follow from the series and the model's `digest`: the same prediction has the same ones.
    VolumeError `no_seg` where the series' headers lack what a segmentation must repeat.
    """
    import highdicom
    from pydicom.uid import generate_uid

    values = [value for value in labels.values if value]
    table = np.zeros(256, np.uint8)
    table[values] = np.arange(1, len(values) + 1)
    sources, pixels = _stacked(slices, table[array])
    uids = [str(dataset.SOPInstanceUID) for dataset in sources]
    series, instance, *others = (generate_uid(entropy_srcs=[word, digest, *uids]) for word in ("series", "sop", "dim"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on values in the source that break a rule of the standard
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
    except (AttributeError, KeyError, TypeError, ValueError) as fault:
        raise VolumeError("no_seg", f"the series' headers make no segmentation ({fault}); use dicom=nifti") from None
    made.DimensionOrganizationSequence[0].DimensionOrganizationUID = others[0]
    for item in made.DimensionIndexSequence:
        item.DimensionOrganizationUID = others[0]
    made.SeriesDescription = "Axial segmentation"
    aside = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        made.save_as(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _stacked(slices: Slices, segments: NDArray[np.uint8]) -> tuple[list[Any], NDArray[np.uint8]]:
    """The source images and a plane of segment numbers for each of them, or for each frame of the only one."""
    from pydicom.uid import generate_uid

    first = slices.datasets[0]
    frames = int(first.get("NumberOfFrames") or 1)
    if frames > 1:
        if len(slices.datasets) > 1:
            raise VolumeError("no_seg", "a series of several multi-frame files; use dicom=nifti")
        pixels = np.zeros((frames, *segments.shape[1:]), np.uint8)
        pixels[list(slices.images)] = segments
        chosen = [first]
    else:
        chosen, pixels = [slices.datasets[index] for index in slices.images], segments
    for dataset in chosen:
        if not dataset.get("FrameOfReferenceUID"):  # left out by some anonymisers; slices of a series share one
            dataset.FrameOfReferenceUID = generate_uid(entropy_srcs=["frame", str(dataset.get("SeriesInstanceUID"))])
        if not dataset.get("SliceThickness") and not frames > 1:
            dataset.SliceThickness = f"{np.median(np.linalg.norm(np.diff(slices.places, axis=0), axis=1)):.6g}"
        if not dataset.get("SpecificCharacterSet", "none"):
            del dataset.SpecificCharacterSet
        for name in _COPIED:
            if name not in dataset:
                setattr(dataset, name, "")
    return chosen, pixels


_COPIED = (  # what a segmentation repeats of its source, and anonymised series leave out; it may be empty
    "AccessionNumber",
    "PatientBirthDate",
    "PatientID",
    "PatientName",
    "PatientSex",
    "StudyDate",
    "StudyID",
    "StudyTime",
)


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
