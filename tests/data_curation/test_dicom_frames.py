"""Multi-frame CT: each frame is a slice with its own place, scale and type."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import uid
from pydicom.dataset import FileDataset

from data_curation.volumes import find, read
from tests.data_curation.test_dicom import expected, only, pixels, refused, slice_at, volume, write

PLACES = (0.0, 2.0, 4.0, 6.0)
ENHANCED, LEGACY = "1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2"


def dataset(**values: Any) -> pydicom.Dataset:
    made = pydicom.Dataset()
    for key, value in values.items():
        setattr(made, key, value)
    return made


def enhanced(
    places: Sequence[float],
    frames: Sequence[int],
    own: Mapping[int, Mapping[str, list[pydicom.Dataset]]] | None = None,
    sop: str = ENHANCED,
    rise: int = 0,
) -> FileDataset:
    """One multi-frame file; frame n of `frames` lies at places[n]. `own` adds functional groups to a frame."""
    data = slice_at(0, SOPClassUID=sop, ImageType=["ORIGINAL", "PRIMARY", "VOLUME", "NONE"])
    for key in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleSlope", "RescaleIntercept"):
        delattr(data, key)
    (shared,) = data.SharedFunctionalGroupsSequence = [pydicom.Dataset()]
    shared.PixelMeasuresSequence = [dataset(PixelSpacing=[0.8, 0.7], SliceThickness=2)]
    shared.PlaneOrientationSequence = [dataset(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])]
    shared.PixelValueTransformationSequence = [dataset(RescaleSlope=1, RescaleIntercept=-1024, RescaleType="HU")]
    groups = []
    for index, frame in enumerate(frames):
        plane = dataset(ImagePositionPatient=[-10, -20, places[frame]])
        groups.append(dataset(PlanePositionSequence=[plane], **(own or {}).get(index, {})))
    data.PerFrameFunctionalGroupsSequence = groups
    data.NumberOfFrames = len(frames)
    stored = [pixels(places[frame]) + 1024 + rise for frame in frames]
    data.PixelData = np.stack(stored).astype(np.int16).tobytes()
    return data


@settings(max_examples=12, deadline=None)
@given(frames=st.permutations(range(4)), sop=st.sampled_from([ENHANCED, LEGACY]))
def test_frames_in_any_order(tmp_path_factory: pytest.TempPathFactory, frames: list[int], sop: str) -> None:
    folder = write(tmp_path_factory.mktemp("order"), enhanced(PLACES, frames, sop=sop))
    found = only(folder)
    assert found.files == (folder / "0.dcm",)
    result = read(found)
    np.testing.assert_array_equal(result.hu, expected(*PLACES))
    assert result.spacing == pytest.approx((2, 0.8, 0.7))
    assert result.notes == ()


def test_a_frame_has_its_own_scale(tmp_path: Path) -> None:
    scale = [dataset(RescaleSlope=1, RescaleIntercept=-1000, RescaleType="HU")]
    data = enhanced(PLACES, (0, 1, 2, 3), {2: {"PixelValueTransformationSequence": scale}})
    result = volume(write(tmp_path, data))
    np.testing.assert_array_equal(result.hu[2], pixels(4.0) + 24)
    np.testing.assert_array_equal(result.hu[[0, 1, 3]], expected(0, 2, 6))


def test_compressed_frames(tmp_path: Path) -> None:
    data = enhanced(PLACES, (2, 0, 3, 1))
    data.compress(uid.RLELossless)
    np.testing.assert_array_equal(volume(write(tmp_path, data)).hu, expected(*PLACES))


def test_uneven_frames(tmp_path: Path) -> None:
    refused(write(tmp_path / "hole", enhanced((0, 2, 4, 20), (0, 1, 2, 3))), "not_a_volume")
    result = volume(write(tmp_path / "lost", enhanced((0, 2, 4, 8), (3, 2, 1, 0))))
    assert result.notes == ("uneven slice spacing 2.00 to 4.00 mm: the median 2.00 is used",)


def test_phases_inside_one_file_are_separate_volumes(tmp_path: Path) -> None:
    """Frames of two time points, one after the other at each place."""
    times = {index: {"FrameContentSequence": [dataset(TemporalPositionIndex=1 + index % 2)]} for index in range(8)}
    data = enhanced([z for z in PLACES for _ in range(2)], range(8), times)
    stored = np.frombuffer(data.PixelData, np.int16).reshape(8, -1).copy()
    stored[1::2] += 50
    data.PixelData = stored.tobytes()
    found = list(find(write(tmp_path, data)))
    assert len({item.source for item in found}) == 2
    np.testing.assert_array_equal(read(found[0]).hu, expected(*PLACES))
    np.testing.assert_array_equal(read(found[1]).hu, expected(*PLACES) + 50)


def test_frames_of_another_orientation_or_kind_are_set_apart(tmp_path: Path) -> None:
    coronal = [dataset(ImageOrientationPatient=[1, 0, 0, 0, 0, -1])]
    scout = [dataset(FrameType=["ORIGINAL", "PRIMARY", "LOCALIZER", "NONE"])]
    data = enhanced(
        (*PLACES, 3.0, 9.0),
        range(6),
        {4: {"PlaneOrientationSequence": coronal}, 5: {"CTImageFrameTypeSequence": scout}},
    )
    found = {item.reason: item for item in find(write(tmp_path, data))}
    assert set(found) == {"", "single_slice", "localizer"}
    assert found[""].frames == ((0, 0), (0, 1), (0, 2), (0, 3))
    np.testing.assert_array_equal(read(found[""]).hu, expected(*PLACES))


def test_one_stack_in_several_multi_frame_files(tmp_path: Path) -> None:
    folder = write(tmp_path, enhanced((2.0, 0.0), (0, 1)), enhanced((6.0, 4.0), (0, 1)))
    found = only(folder)
    assert found.frames == ((0, 1), (0, 0), (1, 1), (1, 0))
    np.testing.assert_array_equal(read(found).hu, expected(*PLACES))


def test_frames_without_places_are_refused(tmp_path: Path) -> None:
    data = slice_at(0)
    data.NumberOfFrames = 3
    data.PixelData = data.PixelData * 3
    del data.ImagePositionPatient
    refused(write(tmp_path, data), "no_position")
    cut = enhanced(PLACES, (0, 1, 2, 3))
    cut.PixelData = cut.PixelData[:-100]
    refused(write(tmp_path / "cut", cut), "unreadable")


def test_the_real_perfusion_map_is_derived(real_ct: Path) -> None:
    (found,) = find(real_ct / "edge_cases" / "enhanced_ct_perfusion_map")
    assert found.reason == "derived"
    assert "a perfusion map" in found.detail
