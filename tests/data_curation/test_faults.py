"""Headers that lie or lack, and files that will not open: refused by name, never a traceback, never a wrong size."""

from __future__ import annotations

import stat
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from data_curation.catalogue import cases
from data_curation.nifti import load
from data_curation.volumes import VolumeError, find
from tests.data_curation.test_catalogue import dicom, totalsegmentator, touch
from tests.data_curation.test_dicom import slice_at, write
from tests.data_curation.test_nifti import LPS_SFORM, header


def reasons(folder: Path) -> set[str]:
    return {found.reason for found in find(folder)}


def test_numbered_folders_are_patients_and_numbered_parts_are_not(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "case_00000/imaging.nii.gz",
        "case_00001/imaging.nii.gz",
        "subset0/1.3.6.1.14519.0.mhd",
        "subset0/1.3.6.1.14519.1.mhd",
        "Training Batch 1/volume-0.nii",
        "patient12/ct/vol.nii.gz",
        "cases/one.nii",
    )
    found, _ = cases("folder", tmp_path)
    assert {case.source: case.patient for case in found} == {
        "case_00000/imaging.nii.gz": "case_00000",
        "case_00001/imaging.nii.gz": "case_00001",
        "subset0/1.3.6.1.14519.0.mhd": "1.3.6.1.14519.0",
        "subset0/1.3.6.1.14519.1.mhd": "1.3.6.1.14519.1",
        "Training Batch 1/volume-0.nii": "Training Batch 1",
        "patient12/ct/vol.nii.gz": "patient12",
        "cases/one.nii": "one",
    }


def test_the_detectors_spacing_is_not_the_patients(tmp_path: Path) -> None:
    """ImagerPixelSpacing (0018,1164) alone says nothing of the patient, and GDCM would read such a slice as 1 mm."""
    slices = [slice_at(z) for z in (0.0, 5.0, 10.0)]
    for one in slices:
        del one.PixelSpacing
        one.ImagerPixelSpacing = [15, 15]
    write(tmp_path, *slices)
    assert reasons(tmp_path) == {"no_spacing"}


def test_a_dicom_file_that_will_not_open_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, *(slice_at(z) for z in (0.0, 5.0, 10.0)))
    (tmp_path / "locked.dcm").write_bytes(b"nothing that GDCM knows")
    honest = Path.open

    def locked(path: Path, *more: object, **other: object) -> object:
        if path.name == "locked.dcm":
            raise PermissionError(13, "Permission denied")
        return honest(path, *more, **other)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", locked)
    found = {one.source: (one.reason, one.detail) for one in find(tmp_path)}
    assert found["locked.dcm"][0] == "unreadable"
    assert "allow reading it" in found["locked.dcm"][1]
    assert [reason for reason, _ in found.values()].count("") == 1


@pytest.mark.parametrize("offset", [-5, 2**40])
def test_an_absurd_offset_in_a_nifti_2_header(tmp_path: Path, offset: int) -> None:
    raw = bytearray(544)
    struct.pack_into("<i", raw, 0, 540)
    raw[4:12] = b"n+2\0\r\n\x1a\n"
    struct.pack_into("<h", raw, 12, 4)
    struct.pack_into("<8q", raw, 16, 3, 12, 9, 6, 1, 1, 1, 1)
    struct.pack_into("<q", raw, 168, offset)
    struct.pack_into("<2i", raw, 344, 0, 1)
    struct.pack_into("<12d", raw, 400, *np.asarray([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]], float).ravel())
    (tmp_path / "ct.nii").write_bytes(bytes(raw) + bytes(2 * 12 * 9 * 6))
    with pytest.raises(VolumeError, match=f"start at byte {offset}") as caught:
        load(tmp_path / "ct.nii")
    assert caught.value.reason == "unreadable"


def test_an_offset_that_is_no_number(tmp_path: Path) -> None:
    head = header((12, 9, 6), sform=LPS_SFORM, offset=float("nan"))
    (tmp_path / "ct.nii").write_bytes(head + bytes(2 * 12 * 9 * 6))
    with pytest.raises(VolumeError, match="start at byte nan"):
        load(tmp_path / "ct.nii")


def test_an_intercept_costs_no_64_bit_copy(tmp_path: Path) -> None:
    hu = np.arange(40 * 128 * 128, dtype=np.int16).reshape(40, 128, 128) % 3000
    head = header((128, 128, 40), sform=LPS_SFORM, slope=1.0, inter=-1024.0)
    (tmp_path / "ct.nii").write_bytes(head + hu.tobytes())
    tracemalloc.start()
    grid = load(tmp_path / "ct.nii")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(grid.voxels, hu.astype(np.int64) - 1024)
    assert peak < 3.5 * hu.nbytes


def test_labels_of_a_bad_image_are_not_told_to_fetch_it(tmp_path: Path) -> None:
    _, refused = cases("totalsegmentator", totalsegmentator(tmp_path))
    told = {source: detail for source, reason, detail in refused if reason == "label"}
    assert set(told.values()) == {"the label of an image that is left out"}


def test_a_split_table_in_another_character_set(tmp_path: Path) -> None:
    totalsegmentator(tmp_path)
    (tmp_path / "meta.csv").write_bytes("image_id;split;site\ns0002;test;Zürich\n".encode("latin-1"))
    found, _ = cases("totalsegmentator", tmp_path)
    assert {case.patient: case.held_out for case in found} == {"s0001": "", "s0002": "official test set"}


def test_what_cannot_be_opened_says_so_in_every_layout(tmp_path: Path) -> None:
    dicom(tmp_path, "Train_Sets/CT/1/DICOM_anon")
    (tmp_path / "Train_Sets/CT/2").mkdir(parents=True)
    (tmp_path / "Train_Sets/CT/2/scan.dcm").symlink_to(tmp_path / "gone.dcm")
    _, refused = cases("chaos", tmp_path)
    (fault,) = [row for row in refused if row[0].endswith("scan.dcm")]
    assert fault[1] != "outside_layout"
    assert "mend or remove it" in fault[2]
    assert stat.S_ISLNK((tmp_path / "Train_Sets/CT/2/scan.dcm").lstat().st_mode)
