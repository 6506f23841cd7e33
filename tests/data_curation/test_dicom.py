"""DICOM folders as scanners, archives and people leave them; written with pydicom, read with ours."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom import uid
from pydicom.dataset import FileDataset, FileMetaDataset

from data_curation.volumes import Found, Volume, VolumeError, find, read

CT = "1.2.840.10008.5.1.4.1.1.2"
SIZE = 40
SERIES = "1.2.3.4"


def pixels(z: float) -> np.ndarray:
    """Different in every slice, and without symmetry, so that any wrong order or flip shows."""
    y, x = np.mgrid[:SIZE, :SIZE]
    return (-1000 + 20 * x + 3 * y + round(10 * z)).astype(np.int16)


def slice_at(z: float, **changes: Any) -> FileDataset:
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = changes.pop("syntax", uid.ExplicitVRLittleEndian)
    meta.MediaStorageSOPClassUID = changes.get("SOPClassUID", CT)
    data = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    hu = changes.pop("hu", pixels(z))
    slope, intercept = changes.get("RescaleSlope", 1), changes.get("RescaleIntercept", -1024)
    data.SOPClassUID, data.SOPInstanceUID = CT, uid.generate_uid(entropy_srcs=[repr((z, sorted(changes.items())))])
    meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
    data.Modality, data.ImageType = "CT", ["ORIGINAL", "PRIMARY", "AXIAL"]
    data.PatientID, data.StudyInstanceUID, data.SeriesInstanceUID = "patient 7", "1.2.3", SERIES
    data.PatientName = "Somebody"
    data.ImagePositionPatient, data.ImageOrientationPatient = [-10, -20, z], [1, 0, 0, 0, 1, 0]
    data.PixelSpacing, data.SliceThickness = [0.8, 0.7], 2
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 1
    data.RescaleSlope, data.RescaleIntercept = slope, intercept
    stored = np.rint((hu - float(intercept)) / float(slope)).astype(np.int16)
    data.Rows, data.Columns = stored.shape
    data.PixelData = stored.tobytes()
    for key, value in changes.items():
        if value is None:
            delattr(data, key)
        else:
            setattr(data, key, value)
    return data


def write(folder: Path, *slices: FileDataset, names: str = "{}.dcm") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index, data in enumerate(slices):
        data.save_as(folder / names.format(index), enforce_file_format=True)
    return folder


def only(folder: Path) -> Found:
    found = list(find(folder))
    assert len(found) == 1, found
    return found[0]


def volume(folder: Path) -> Volume:
    return read(only(folder))


def expected(*places: float) -> np.ndarray:
    return np.stack([pixels(z) for z in places])


def refused(folder: Path, reason: str) -> str:
    with pytest.raises(VolumeError) as caught:
        volume(folder)
    assert caught.value.reason == reason
    return str(caught.value)


def test_slices_are_ordered_by_place_not_by_name(tmp_path: Path) -> None:
    folder = write(tmp_path, *(slice_at(z) for z in (6, 0, 4, 2)))
    found = only(folder)
    assert (found.kind, found.series, found.study, found.patient) == ("dicom", SERIES, "1.2.3", "patient 7")
    result = read(found)
    np.testing.assert_array_equal(result.hu, expected(0, 2, 4, 6))
    assert result.spacing == pytest.approx((2, 0.8, 0.7))
    assert result.notes == ()
    assert result.hu.dtype == np.int16


def test_flipped_rows_as_in_pancreas_ct_are_turned(tmp_path: Path) -> None:
    changes = {"ImageOrientationPatient": [1, 0, 0, 0, -1, 0]}
    folder = write(tmp_path, *(slice_at(z, **changes, hu=pixels(z)[::-1]) for z in (0, 2, 4)))
    np.testing.assert_array_equal(volume(folder).hu, expected(0, 2, 4))


def test_a_sagittal_stack_becomes_axial(tmp_path: Path) -> None:
    """Columns run to the back, rows down, slices to the left: [x, -z, y] of the body."""
    body = np.random.default_rng(0).integers(-1000, 1000, (SIZE, SIZE, 5)).astype(np.int16)  # [Z, Y, X]
    slices = []
    for x in range(5):
        place = {"ImagePositionPatient": [3.0 * x, 0, 60], "ImageOrientationPatient": [0, 1, 0, 0, 0, -1]}
        slices.append(slice_at(x, **place, PixelSpacing=[1.5, 0.5], hu=body[::-1, :, x]))
    result = volume(write(tmp_path, *slices))
    np.testing.assert_array_equal(result.hu, body)
    assert result.spacing == pytest.approx((1.5, 0.5, 3.0))


def test_each_slice_has_its_own_slope_and_intercept(tmp_path: Path) -> None:
    slices = [slice_at(0, RescaleIntercept=-1024), slice_at(2, RescaleIntercept=0), slice_at(4, RescaleSlope=1.0)]
    np.testing.assert_array_equal(volume(write(tmp_path, *slices)).hu, expected(0, 2, 4))
    halves = [slice_at(z, RescaleSlope=2.5) for z in (0, 2, 4)]
    result = volume(write(tmp_path / "halves", *halves))
    assert 0 < result.rounding <= 0.5
    assert np.abs(result.hu - expected(0, 2, 4)).max() <= 2
    assert "rounded" in result.notes[0]


def test_padding_below_air_is_kept(tmp_path: Path) -> None:
    slices = []
    for z in (0, 2, 4):
        hu = pixels(z)
        hu[:5] = -3024
        slices.append(slice_at(z, hu=hu, PixelPaddingValue=-2000))
    result = volume(write(tmp_path, *slices))
    assert result.hu.min() == -3024
    assert result.notes == ("padding -3024 on 12.5% of the voxels kept",)


def test_any_name_is_read_and_junk_is_counted(tmp_path: Path) -> None:
    slices = [slice_at(z) for z in (0, 2, 4, 6)]
    for name, data in zip(("I10", "1.2.840.55", "A.IMA", "b.DCM"), slices, strict=True):
        write(tmp_path, data, names=name)
    (tmp_path / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM" + b"\0" * 100)
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "._A.IMA").write_text("x")
    (tmp_path / "short").write_text("x")
    skipped: Counter[str] = Counter()
    (found,) = find(tmp_path, skipped)
    np.testing.assert_array_equal(read(found).hu, expected(0, 2, 4, 6))
    assert skipped == {"dicomdir": 1, ".txt": 1, "hidden files": 1, "files without an ending": 1}


def test_files_without_preamble_are_read(tmp_path: Path) -> None:
    for z in (0, 2, 4):
        data = slice_at(z, syntax=uid.ImplicitVRLittleEndian)
        bare = pydicom.Dataset(data)
        bare.save_as(tmp_path / f"im{z}", implicit_vr=True, little_endian=True)
    np.testing.assert_array_equal(volume(tmp_path).hu, expected(0, 2, 4))


def test_two_series_in_one_folder_are_two_volumes(tmp_path: Path) -> None:
    write(tmp_path, *(slice_at(z) for z in (0, 2, 4)), names="a{}")
    write(tmp_path, *(slice_at(z, SeriesInstanceUID="9.9") for z in (1, 2, 3)), names="b{}")
    found = list(find(tmp_path))
    assert [item.series for item in found] == [SERIES, "9.9"]
    assert len({item.source for item in found}) == 2
    np.testing.assert_array_equal(read(found[0]).hu, expected(0, 2, 4))
    np.testing.assert_array_equal(read(found[1]).hu, expected(1, 2, 3))


def test_scouts_and_other_planes_in_a_series_are_set_apart(tmp_path: Path) -> None:
    scout = slice_at(50, ImageOrientationPatient=[0, 1, 0, 0, 0, -1], ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    unmarked = slice_at(51, ImageOrientationPatient=[0, 1, 0, 0, 0, -1])
    write(tmp_path, scout, unmarked, *(slice_at(z) for z in (0, 2, 4)))
    found = {item.reason: item for item in find(tmp_path)}
    assert set(found) == {"localizer", "single_slice", ""}
    assert found["single_slice"].series != found[""].series
    np.testing.assert_array_equal(read(found[""]).hu, expected(0, 2, 4))


def test_copies_and_repeats_of_a_slice_are_dropped(tmp_path: Path) -> None:
    first = [slice_at(z) for z in (0, 2, 4)]
    write(tmp_path, *first)
    write(tmp_path, copy.deepcopy(first[1]), names="copy{}")  # the same file twice
    write(tmp_path, slice_at(2, SOPInstanceUID="5.5"), names="again{}")  # sent twice under another instance UID
    result = volume(tmp_path)
    np.testing.assert_array_equal(result.hu, expected(0, 2, 4))
    assert result.notes == ("2 repeated slices left out",)


def test_one_instance_uid_on_all_slices_does_not_lose_them(tmp_path: Path) -> None:
    write(tmp_path, *(slice_at(z, SOPInstanceUID="5.5") for z in (0, 2, 4)))
    np.testing.assert_array_equal(volume(tmp_path).hu, expected(0, 2, 4))


def test_phases_are_split_by_acquisition_or_refused(tmp_path: Path) -> None:
    places = (0, 2, 4)
    native = [slice_at(z, AcquisitionNumber=1) for z in places]
    venous = [slice_at(z, AcquisitionNumber=2, hu=pixels(z) + 50) for z in places]
    found = list(find(write(tmp_path / "numbered", *native, *venous)))
    assert [item.series for item in found] == [SERIES, f"{SERIES}/2"]
    np.testing.assert_array_equal(read(found[0]).hu, expected(*places))
    np.testing.assert_array_equal(read(found[1]).hu, expected(*places) + 50)
    mixed = [slice_at(z, hu=pixels(z) + rise) for z in places for rise in (0, 50)]
    assert "6 slices share 3 positions" in refused(write(tmp_path / "mixed", *mixed), "not_a_volume")


def test_places_that_are_no_volume(tmp_path: Path) -> None:
    same = write(tmp_path / "same", *(slice_at(1, InstanceNumber=n, hu=pixels(n)) for n in range(4)))
    assert "4 slices all at one position" in refused(same, "not_a_volume")
    gap = write(tmp_path / "gap", *(slice_at(z) for z in (0, 1.25, 2.5, 205)))
    assert "a gap of 202.5 mm among 4 slices 1.25 mm apart" in refused(gap, "not_a_volume")
    refused(write(tmp_path / "one", slice_at(0)), "single_slice")
    refused(write(tmp_path / "nowhere", *(slice_at(z, ImagePositionPatient=None) for z in (0, 2, 4))), "no_position")
    refused(write(tmp_path / "unscaled", *(slice_at(z, PixelSpacing=None) for z in (0, 2, 4))), "no_spacing")


def test_a_missing_slice_is_noted(tmp_path: Path) -> None:
    result = volume(write(tmp_path, *(slice_at(z) for z in (0, 5, 10, 20))))
    np.testing.assert_array_equal(result.hu, expected(0, 5, 10, 20))
    assert result.spacing[0] == 5
    assert result.notes == ("uneven slice spacing 5.00 to 10.00 mm: the median 5.00 is used",)


def test_gantry_tilt_keeps_slices_as_acquired(tmp_path: Path) -> None:
    tilted = [1, 0, 0, 0, float(np.cos(np.radians(20))), float(-np.sin(np.radians(20)))]
    result = volume(write(tmp_path, *(slice_at(z, ImageOrientationPatient=tilted) for z in (0, 5, 10))))
    np.testing.assert_array_equal(result.hu, expected(0, 5, 10))
    assert result.spacing[0] == pytest.approx(5 * np.cos(np.radians(20)), rel=1e-4)
    assert result.notes == ("gantry tilt 20.0 degrees: slices kept as acquired",)


def test_a_turned_reformat_is_resampled(tmp_path: Path) -> None:
    """Unlike a tilted gantry, its slices lie straight behind each other."""
    c, s = float(np.cos(0.3)), float(np.sin(0.3))
    slices = [
        slice_at(n, ImageOrientationPatient=[1, 0, 0, 0, c, s], ImagePositionPatient=[0, -s * 2 * n, c * 2 * n])
        for n in range(5)
    ]
    result = volume(write(tmp_path, *slices))
    assert result.notes[0] == "oblique by 17.2 degrees: resampled onto the patient's axes, linear"
    assert result.hu.shape[0] > 5


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"Modality": "MR", "SOPClassUID": "1.2.840.10008.5.1.4.1.1.4"}, "not_ct"),
        ({"Modality": "PT", "SOPClassUID": "1.2.840.10008.5.1.4.1.1.128"}, "not_ct"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"}, "screen_save"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "localizer"),
        ({"ImageType": ["DERIVED", "SECONDARY", "PROJECTION IMAGE"]}, "derived"),
        ({"Modality": "RTDOSE", "SOPClassUID": "1.2.840.10008.5.1.4.1.1.481.2"}, "not_image"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.481.3", "PixelData": None, "Rows": None}, "not_image"),
    ],
)
def test_what_is_no_ct_image_is_named(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    write(tmp_path, *(slice_at(z, **changes) for z in (0, 2, 4)))
    found = list(find(tmp_path))
    assert {item.reason for item in found} == {reason}
    assert all(len(item.detail) > 20 for item in found)
    with pytest.raises(VolumeError):
        read(found[0])


def test_damaged_files_are_named_and_the_rest_is_read(tmp_path: Path) -> None:
    write(tmp_path, *(slice_at(z) for z in (0, 2, 4, 6)))
    whole = (tmp_path / "3.dcm").read_bytes()
    (tmp_path / "3.dcm").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "4.dcm").write_bytes(b"")
    found = {item.reason: item for item in find(tmp_path)}
    assert set(found) == {"", "unreadable", "empty"}
    assert found["unreadable"].source == "3.dcm"
    np.testing.assert_array_equal(read(found[""]).hu, expected(0, 2, 4))


def test_pixels_damaged_after_listing_are_refused_by_name(tmp_path: Path) -> None:
    found = only(write(tmp_path, *(slice_at(z) for z in (0, 2, 4))))
    whole = (tmp_path / "1.dcm").read_bytes()
    (tmp_path / "1.dcm").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(VolumeError, match=r"1\.dcm are cut short or damaged") as caught:
        read(found)
    assert caught.value.reason == "truncated"


def test_identifiers_are_few_and_hashable(tmp_path: Path) -> None:
    """No name leaves the headers; bytes of other character sets become text."""
    slices = [slice_at(z, SpecificCharacterSet="ISO_IR 100", PatientID="Müller 1") for z in (0, 2, 4)]
    found = only(write(tmp_path, *slices))
    assert found.patient.encode("utf-8")
    assert "Somebody" not in repr(found) + repr(read(found).notes)
