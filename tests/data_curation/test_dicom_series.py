"""Which slices are one stack: series spread over folders, copies, phases and kernels under one UID."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_curation.rules import Limits
from data_curation.volumes import VolumeError, find, read
from tests.data_curation.test_dicom import SERIES, expected, pixels, slice_at, write

PLACES = (0, 2, 4, 6, 8, 10)


@settings(max_examples=15, deadline=None)
@given(parts=st.lists(st.integers(0, 2), min_size=6, max_size=6))
def test_a_series_over_several_folders_is_one_stack(tmp_path_factory: pytest.TempPathFactory, parts: list[int]) -> None:
    root = tmp_path_factory.mktemp("spread")
    for index, z in enumerate(PLACES):
        write(root / f"part{parts[index]}" / "sub", slice_at(z), names=f"{z}.dcm")
    (whole,) = find(root)
    np.testing.assert_array_equal(read(whole).hu, expected(*PLACES))
    assert whole.path == (root if len(set(parts)) > 1 else root / f"part{parts[0]}" / "sub")
    assert (root / whole.source).exists()


def test_folders_one_after_the_other_and_alternating(tmp_path: Path) -> None:
    for name, split in {"halves": (3, 3), "odd": (1, 5), "turns": None}.items():
        for index, z in enumerate(PLACES):
            part = index % 2 if split is None else int(index >= split[0])
            write(tmp_path / name / f"{part}", slice_at(z), names=f"{z}.dcm")
        (found,) = find(tmp_path / name)
        np.testing.assert_array_equal(read(found).hu, expected(*PLACES))


@pytest.mark.parametrize(
    "changes",
    [
        {"PatientID": "patient 8"},
        {"StudyInstanceUID": "1.2.4"},
        {"FrameOfReferenceUID": "7.7"},
        {"PixelSpacing": [0.9, 0.9]},
        {"ImageOrientationPatient": [1, 0, 0, 0, -1, 0]},
        {"ConvolutionKernel": "B70f"},
    ],
)
def test_one_uid_for_all_does_not_mix_patients(tmp_path: Path, changes: dict[str, object]) -> None:
    """Slices that would lie neatly between those of the other folder."""
    write(tmp_path / "a", *(slice_at(z) for z in (0, 2, 4)))
    write(tmp_path / "b", *(slice_at(z, **changes) for z in (1, 3, 5)))
    found = list(find(tmp_path))
    assert [len(item.files) for item in found] == [3, 3]
    assert [item.series for item in found] == [SERIES, SERIES]
    assert [item.source for item in found] == ["a", "b"]


def test_copies_and_other_ranges_stay_apart(tmp_path: Path) -> None:
    for name, places in {"copy": (0, 2, 4), "between": (0.7, 2.7, 4.7), "far": (300, 302, 304)}.items():
        write(tmp_path / name / "a", *(slice_at(z) for z in (0, 2, 4)))
        write(tmp_path / name / "b", *(slice_at(z) for z in places))
        found = list(find(tmp_path / name))
        assert [item.source for item in found] == ["a", "b"], name
        np.testing.assert_array_equal(read(found[1]).hu, expected(*places))


@pytest.mark.parametrize(
    ("tag", "values"),
    [
        ("TemporalPositionIdentifier", (1, 2)),
        ("TriggerTime", (100, 600)),
        ("ContentTime", ("101500.000", "101530.000")),
        ("AcquisitionTime", ("101500", "101530")),
        ("ImageType", (["ORIGINAL", "PRIMARY", "AXIAL"], ["DERIVED", "SECONDARY", "MPR"])),
    ],
)
def test_phases_are_split_by_the_first_tag_that_tells(tmp_path: Path, tag: str, values: tuple[object, object]) -> None:
    """Instance times that differ from slice to slice do not hide the tag that splits."""
    slices = []
    for rise, value in zip((0, 50), values, strict=True):
        slices += [slice_at(z, AcquisitionNumber=z // 4, **{tag: value}, hu=pixels(z) + rise) for z in PLACES]
    found = list(find(write(tmp_path, *slices)))
    assert [item.series for item in found] == [SERIES, f"{SERIES}/2"]
    for item, rise in zip(found, (0, 50), strict=True):
        np.testing.assert_array_equal(read(item).hu, expected(*PLACES) + rise)


def test_a_time_that_changes_with_every_turn_makes_no_crumbs(tmp_path: Path) -> None:
    """Two slices a turn of the tube, and one place scanned twice."""
    slices = [slice_at(z, ContentTime=f"1015{z // 4:02d}", InstanceNumber=z) for z in PLACES]
    again = slice_at(10, ContentTime="101530", InstanceNumber=99, hu=pixels(3))
    more = slice_at(12, ContentTime="101530", InstanceNumber=100)
    (found,) = find(write(tmp_path, *slices, again, more))
    assert read(found, Limits(phases="first")).hu.shape[0] == 7


def test_two_kernels_under_one_uid_are_two_stacks(tmp_path: Path) -> None:
    soft = [slice_at(z, ConvolutionKernel="B30f") for z in PLACES]
    sharp = [slice_at(z, ConvolutionKernel=["B70f", "3"], hu=pixels(z) + 7) for z in PLACES]
    found = list(find(write(tmp_path, *soft, *sharp)))
    np.testing.assert_array_equal(read(found[0]).hu, expected(*PLACES))
    np.testing.assert_array_equal(read(found[1]).hu, expected(*PLACES) + 7)


def test_the_first_of_phases_that_nothing_tells_apart(tmp_path: Path) -> None:
    pairs = [(number, z, 50 * (number // len(PLACES))) for number, z in enumerate(2 * PLACES)]
    folder = write(tmp_path, *(slice_at(z, InstanceNumber=number, hu=pixels(z) + rise) for number, z, rise in pairs))
    (found,) = find(folder)
    with pytest.raises(VolumeError, match=r"limits\.phases=first"):
        read(found)
    result = read(found, Limits(phases="first"))
    np.testing.assert_array_equal(result.hu, expected(*PLACES))
    assert result.notes == ("6 slices of further phases left out",)


def test_no_pixel_is_read_of_what_is_too_large(tmp_path: Path) -> None:
    folder = write(tmp_path, *(slice_at(z) for z in PLACES))
    (found,) = find(folder)
    with pytest.raises(VolumeError, match=r"6 x 40 x 40 are 9,600 voxels, more than limits.max_voxels=9,599") as caught:
        read(found, Limits(max_voxels=9599))
    assert caught.value.reason == "too_large"
    assert read(found, Limits(max_voxels=9600)).hu.size == 9600


def test_damaged_headers_never_escape_as_another_error(tmp_path: Path) -> None:
    """Bytes turned over one by one through a whole header."""
    write(tmp_path, *(slice_at(z) for z in (0, 2)))
    whole = (tmp_path / "0.dcm").read_bytes()
    head = len(whole) - 2 * 40 * 40
    draw = np.random.default_rng(0)
    for at in draw.integers(0, head, 300):
        damaged = bytearray(whole)
        damaged[at] ^= int(draw.integers(1, 256))
        (tmp_path / "0.dcm").write_bytes(bytes(damaged))
        for found in find(tmp_path):
            with suppress(VolumeError):
                read(found)
