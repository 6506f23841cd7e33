"""A DICOM SEG opens again, with highdicom and by its plain headers, and is the label map it was made from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray

from data_curation.volumes import Found, find
from downstream import geometry, predict
from downstream.dicom_seg import Slices, on_one_affine, series_slices, write_seg
from downstream.labels import Labels
from tests.data_curation.test_dicom import only, write
from tests.data_curation.test_dicom_frames import PLACES, enhanced
from tests.downstream.random_models import saved

LABELS = Labels({"left kidney": (3,), "liver tumour": (7,), "prostate or uterus": (9,)}, (0, 3, 7, 9))
SERIES = (
    "ge_head_tilt_dicom",
    "edge_cases/gantrytilt_noise_dicom",
    "edge_cases/irregular_spacing_noise_dicom",
    "edge_cases/tiny16_axial_dicom",
    "edge_cases/dicom_seg_3slice/ct",
    "sts_002_multimodal/CT_dicom",
)


def drawn(found: Found, values: tuple[int, ...]) -> tuple[NDArray[np.uint8], Slices]:
    """A label map [k, j, i] of the series, its first slice empty."""
    scan = geometry.read_scan(found)
    array = np.random.default_rng(0).choice(np.array(values, np.uint8), size=scan.own.size[::-1])
    array[0] = 0
    return array, series_slices(found, scan)


def values_of(seg: Any, slices: Slices) -> NDArray[np.uint8]:
    """Segment numbers of each slice of the series, in the series' order."""
    if len(slices.datasets) > 1:
        uids = [slices.datasets[index].SOPInstanceUID for index in slices.images]
        found = seg.get_pixels_by_source_instance(uids, combine_segments=True, assert_missing_frames_are_empty=True)
    else:
        frames = [index + 1 for index in slices.images]
        found = seg.get_pixels_by_source_frame(
            slices.datasets[0].SOPInstanceUID, frames, combine_segments=True, assert_missing_frames_are_empty=True
        )
    return np.asarray(found)


@pytest.mark.parametrize("series", SERIES)
def test_a_real_series_gets_back_what_was_told_of_it(real_ct: Path, tmp_path: Path, series: str) -> None:
    (found,) = find(real_ct / series)
    array, slices = drawn(found, LABELS.values)
    path = tmp_path / "seg.dcm"
    write_seg(path, array, slices, LABELS, "digest")
    seg = highdicom.seg.segread(path)
    assert np.array_equal(np.array(LABELS.values)[values_of(seg, slices)], array)
    plain = pydicom.dcmread(path)  # and without highdicom: each frame's segment, place and pixels
    kept = {tuple(place): array[k] for k, place in enumerate(slices.places.tolist())}
    pixels, seen = plain.pixel_array, 0
    for frame, groups in zip(pixels, plain.PerFrameFunctionalGroupsSequence, strict=True):
        place = tuple(float(x) for x in groups.PlanePositionSequence[0].ImagePositionPatient)
        value = LABELS.values[groups.SegmentIdentificationSequence[0].ReferencedSegmentNumber]
        assert np.array_equal(frame > 0, kept[place] == value)
        seen += 1
    assert seen == 3 * (len(array) - 1), "empty slices have no frames"
    source = slices.datasets[0]
    assert (plain.StudyInstanceUID, plain.PatientID) == (source.StudyInstanceUID, source.PatientID)
    referenced = {
        item.ReferencedSOPInstanceUID for item in plain.ReferencedSeriesSequence[0].ReferencedInstanceSequence
    }
    assert referenced == {dataset.SOPInstanceUID for dataset in slices.datasets}


def test_frames_of_one_file_in_another_order(tmp_path: Path) -> None:
    found = only(write(tmp_path / "in", enhanced(PLACES, (2, 0, 3, 1))))
    array, slices = drawn(found, LABELS.values)
    assert slices.images == (1, 3, 0, 2)
    assert on_one_affine(slices, (own := geometry.read_scan(found).own)) == (own, "")
    write_seg(tmp_path / "seg.dcm", array, slices, LABELS, "digest")
    seg = highdicom.seg.segread(tmp_path / "seg.dcm")
    assert np.array_equal(np.array(LABELS.values)[values_of(seg, slices)], array)


def test_codes_are_snomeds_where_the_organ_is_known(tmp_path: Path) -> None:
    found = only(write(tmp_path / "in", enhanced(PLACES, (0, 1, 2, 3))))
    array, slices = drawn(found, LABELS.values)
    write_seg(tmp_path / "seg.dcm", array, slices, LABELS, "digest")
    kidney, tumour, other = pydicom.dcmread(tmp_path / "seg.dcm").SegmentSequence
    kind = kidney.SegmentedPropertyTypeCodeSequence[0]
    assert (kind.CodeValue, kind.CodingSchemeDesignator) == ("64033007", "SCT")
    assert kind.SegmentedPropertyTypeModifierCodeSequence[0].CodeMeaning == "Left"
    assert tumour.SegmentedPropertyTypeCodeSequence[0].CodeMeaning == "Neoplasm"
    assert tumour.SegmentedPropertyCategoryCodeSequence[0].CodeMeaning == "Morphologically Abnormal Structure"
    assert tumour.AnatomicRegionSequence[0].CodeMeaning == "Liver"
    kind = other.SegmentedPropertyTypeCodeSequence[0]
    assert (kind.CodeValue, kind.CodingSchemeDesignator, kind.CodeMeaning) == (
        "label9",
        "99AXIAL",
        "prostate or uterus",
    )
    assert [segment.SegmentAlgorithmType for segment in (kidney, tumour, other)] == ["AUTOMATIC"] * 3


def test_an_empty_label_map_is_still_a_segmentation(tmp_path: Path) -> None:
    found = only(write(tmp_path / "in", enhanced(PLACES, (0, 1, 2, 3))))
    array, slices = drawn(found, LABELS.values)
    write_seg(tmp_path / "seg.dcm", np.zeros_like(array), slices, LABELS, "digest")
    seg = highdicom.seg.segread(tmp_path / "seg.dcm")
    assert not values_of(seg, slices).any()


def test_the_same_prediction_has_the_same_identifiers(tmp_path: Path) -> None:
    found = only(write(tmp_path / "in", enhanced(PLACES, (0, 1, 2, 3))))
    array, slices = drawn(found, LABELS.values)
    made = []
    for name, digest in (("a", "one"), ("b", "one"), ("c", "two")):
        write_seg(tmp_path / name, array, slices, LABELS, digest)
        made.append(pydicom.dcmread(tmp_path / name))
    times = {
        "InstanceCreationDate",
        "InstanceCreationTime",
        "ContentDate",
        "ContentTime",
        "ContributingEquipmentSequence",
    }
    one, again, other = made
    assert {element.keyword for element in one if element != again.get(element.tag)} <= times
    assert one.SOPInstanceUID != other.SOPInstanceUID


def test_predicted_series_become_segmentations(real_ct: Path, tmp_path: Path) -> None:
    """A tilted one too; what is no DICOM keeps its format."""
    for series in (SERIES[0], SERIES[3]):
        shutil.copytree(real_ct / series, tmp_path / "in" / Path(series).name)
    shutil.copy(real_ct / "ts_example/ct_sm.nii.gz", tmp_path / "in")
    model = saved(tmp_path / "m.safetensors", spacing=4.0)
    given = {"model": model, "images": tmp_path / "in"}
    for kind in ("seg", "nifti"):
        assert predict.main(predict.Settings.model_validate({"folder": tmp_path / kind, "dicom": kind, **given})).ok
    assert {path.name for path in (tmp_path / "seg").iterdir() if path.suffix in (".dcm", ".gz")} == {
        "ge_head_tilt_dicom.dcm",
        "tiny16_axial_dicom.dcm",
        "ct_sm.nii.gz",
    }
    (found,) = find(tmp_path / "in" / "tiny16_axial_dicom")
    slices = series_slices(found, geometry.read_scan(found))
    seg = values_of(highdicom.seg.segread(tmp_path / "seg" / "tiny16_axial_dicom.dcm"), slices)
    nifti = geometry.read_labelmap(tmp_path / "nifti" / "tiny16_axial_dicom.nii.gz").array
    assert np.array_equal(np.array([0, 1, 5])[seg], nifti)


def test_a_series_of_slices_that_lean_or_lie_unevenly_gets_a_segmentation_object(real_ct: Path, tmp_path: Path) -> None:
    """A lean of 14 degrees; distances of 5 and 10 mm. What was made is not made again."""
    (tmp_path / "in").mkdir()
    for name in ("gantrytilt_noise_dicom", "irregular_spacing_noise_dicom"):
        (tmp_path / "in" / name).symlink_to(real_ct / "edge_cases" / name)
    model = saved(tmp_path / "m.safetensors", spacing=8.0)
    given = predict.Settings(folder=tmp_path / "out", model=model, images=tmp_path / "in", device="cpu")
    assert predict.main(given).ok
    made = sorted((tmp_path / "out").glob("*.dcm"))
    assert [path.stem for path in made] == ["gantrytilt_noise_dicom", "irregular_spacing_noise_dicom"]
    assert not list((tmp_path / "out").glob("*.nii.gz"))
    assert len((tmp_path / "out/refused.csv").read_text().splitlines()) == 1
    for path in made:
        source = {pydicom.dcmread(file).SOPInstanceUID for file in (tmp_path / "in" / path.stem).iterdir()}
        whole = pydicom.dcmread(path)
        assert {
            one.ReferencedSOPInstanceUID for one in whole.ReferencedSeriesSequence[0].ReferencedInstanceSequence
        } == source
    when = [path.stat().st_mtime_ns for path in made]
    assert predict.main(given).ok
    assert [path.stat().st_mtime_ns for path in made] == when
