"""Label maps go to the LPS order and back without a voxel moving, and files keep their geometry to the last byte."""

from __future__ import annotations

import gzip
import itertools
import struct
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from data_curation.finding import KINDS
from data_curation.grid import Grid
from data_curation.grid import to_lps as reader_to_lps
from data_curation.volumes import VolumeError, find, read
from downstream.cases import CaseError, case_name
from downstream.geometry import (
    Place,
    align,
    difference,
    found_at,
    from_lps,
    lps,
    read_labelmap,
    read_scan,
    to_lps,
    write_labelmap,
)
from downstream.naming import ending

SPACING = (0.7, 1.3, 2.9)  # x, y, z
ORDERS = [
    np.eye(3)[list(order)] * signs
    for order in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
]


def place(directions: NDArray[np.float64], size: tuple[int, int, int] = (4, 5, 6)) -> Place:
    return Place(size, np.column_stack([directions * np.array(SPACING), (-31.0, 7.25, 640.5)]))


def image(directions: NDArray[np.float64], array: NDArray[np.generic]) -> sitk.Image:
    made = sitk.GetImageFromArray(array)
    made.SetSpacing(SPACING)
    made.SetOrigin((-31.0, 7.25, 640.5))
    made.SetDirection(directions.ravel().tolist())
    return made


def geometry(path: Path) -> list[float]:
    header = sitk.ImageFileReader()
    header.SetFileName(str(path))
    header.ReadImageInformation()
    return [*header.GetSize(), *header.GetSpacing(), *header.GetOrigin(), *header.GetDirection()]


@pytest.mark.parametrize("tilt", [0.0, 3.0])
def test_turning_to_lps_is_the_readers_turn_and_has_an_inverse(tilt: float) -> None:
    array = np.arange(120, dtype=np.uint8).reshape(6, 5, 4)
    turn = Rotation.from_euler("xz", [tilt, tilt], degrees=True).as_matrix()
    for order in ORDERS:
        own = place(turn @ order)
        turned = to_lps(array, own)
        expected, spacing, _ = reader_to_lps(Grid(array, own.affine))
        assert np.array_equal(turned, expected)
        assert np.allclose(lps(own).spacing[::-1], spacing)
        assert np.array_equal(from_lps(turned, own), array)
        assert lps(own).size == turned.shape[::-1]
        assert (np.diag(lps(own).affine[:, :3]) > 0).all()


def test_turning_keeps_every_voxel_where_it_is() -> None:
    for order in ORDERS:
        own = place(Rotation.from_euler("y", 3, degrees=True).as_matrix() @ order)
        index = np.array([1.0, 3.0, 2.0])
        array = np.zeros(own.size[::-1], np.uint8)
        array[2, 3, 1] = 1
        z, y, x = (int(axis[0]) for axis in np.nonzero(to_lps(array, own)))
        assert np.allclose(lps(own).position(np.array([x, y, z], float)), own.position(index))


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".nrrd", ".mha"])
@pytest.mark.parametrize("degrees", [(0, 0, 0), (3, -2, 1), (30, 40, 10)])
def test_a_written_label_has_the_images_geometry_exactly(
    tmp_path: Path, suffix: str, degrees: tuple[int, int, int]
) -> None:
    turn = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix()
    for number, order in enumerate(ORDERS[::7]):
        source, target = tmp_path / f"{number}{suffix}", tmp_path / f"label_{number}{suffix}"
        sitk.WriteImage(image(turn @ order * np.linalg.det(order), np.zeros((6, 5, 4), np.int16)), str(source))
        found = found_at(source)
        label = np.random.default_rng(number).integers(0, 250, (6, 5, 4)).astype(np.uint8)
        write_labelmap(target, label, read_labelmap(source).place, like=source)
        assert target.name.endswith(ending(found))
        assert geometry(target) == geometry(source)
        again = sitk.ReadImage(str(target))
        assert again.GetPixelID() == sitk.sitkUInt8
        assert np.array_equal(sitk.GetArrayFromImage(again), label)
    assert not list(tmp_path.glob(".*")), "something was left beside the files"


def test_a_nifti_header_keeps_its_geometry_bytes_and_loses_free_text(tmp_path: Path) -> None:
    source, target = tmp_path / "a.nii.gz", tmp_path / "b.nii.gz"
    sitk.WriteImage(image(np.eye(3), np.zeros((6, 5, 4), np.int16)), str(source))
    raw = bytearray(gzip.decompress(source.read_bytes()))
    raw[148:160] = b"Jane Doe 007"
    struct.pack_into("<2f", raw, 112, 2.0, -1024.0)  # a scale that must not be applied to labels
    source.write_bytes(gzip.compress(bytes(raw)))
    write_labelmap(target, np.full((6, 5, 4), 3, np.uint8), place(np.eye(3)), like=source)
    written = gzip.decompress(target.read_bytes())
    for start, end in ((40, 56), (76, 108), (120, 124), (252, 328)):  # dim, pixdim, units, qform and sform
        assert written[start:end] == raw[start:end]
    assert b"Jane" not in written
    assert (read_labelmap(target).array == 3).all()


def test_big_endian_nifti_keeps_its_byte_order(tmp_path: Path) -> None:
    source, target = tmp_path / "a.nii", tmp_path / "b.nii"
    sitk.WriteImage(image(np.eye(3), np.zeros((6, 5, 4), np.int16)), str(source))
    raw = bytearray(source.read_bytes())
    shorts = ((40, 56), (68, 76), (120, 122), (252, 256))
    longs = ((0, 4), (32, 36), (56, 68), (76, 120), (124, 148), (256, 328))
    for start, end, width in [(*span, 2) for span in shorts] + [(*span, 4) for span in longs]:
        for at in range(start, end, width):
            raw[at : at + width] = raw[at : at + width][::-1]
    source.write_bytes(bytes(raw))
    write_labelmap(target, np.full((6, 5, 4), 3, np.uint8), place(np.eye(3)), like=source)
    assert geometry(target) == geometry(source)
    assert (read_labelmap(target).array == 3).all()


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nii", "a.NII.GZ", "a_0000.Nii"])
@pytest.mark.parametrize("packed", [True, False])
def test_a_nifti_is_known_by_its_bytes_and_the_label_fits_its_own_name(tmp_path: Path, name: str, packed: bool) -> None:
    source = tmp_path / name
    sitk.WriteImage(image(np.eye(3), np.zeros((6, 5, 4), np.int16)), str(tmp_path / "b.nii"))
    raw = (tmp_path / "b.nii").read_bytes()
    source.write_bytes(gzip.compress(raw) if packed else raw)
    scan = read_scan(found_at(source))
    target = tmp_path / (case_name(source) + "_label" + ending(found_at(source)))
    write_labelmap(target, np.full((6, 5, 4), 3, np.uint8), scan.own, like=source)
    written = target.read_bytes()
    assert target.name in ("a_label.nii", "a_label.nii.gz")
    assert written.startswith(b"\x1f\x8b") == target.name.endswith(".gz")
    assert (gzip.decompress(written) if target.name.endswith(".gz") else written)[252:328] == raw[252:328]
    assert geometry(target) == geometry(tmp_path / "b.nii")


def test_every_kind_of_file_that_is_found_in_a_folder_is_known_by_its_name(tmp_path: Path) -> None:
    for ending_ in KINDS:
        (tmp_path / f"a{ending_}").touch()
        (tmp_path / f"B_0000{ending_.upper()}").touch()
    listed = list(find(tmp_path))
    assert len(listed) == 2 * len(KINDS)
    for found in listed:
        assert found_at(found.path).kind == found.kind
        assert case_name(found.path) in ("a", "B")
    with pytest.raises(VolumeError, match=r"\.nii\.gz, \.nii, .*\.nhdr"):
        found_at(tmp_path / "a.png")


def test_differences_are_named() -> None:
    one = place(np.eye(3))
    assert difference(one, place(np.eye(3))) == ""
    assert "size" in difference(one, place(np.eye(3), (4, 5, 7)))
    moved = Place(one.size, one.affine + np.array([[0, 0, 0, 0.5]] * 3))
    assert "origin" in difference(one, moved)
    turned = place(Rotation.from_euler("z", 90, degrees=True).as_matrix())
    assert "direction" in difference(one, turned)
    assert difference(one, Place(one.size, one.affine + 1e-4)) == ""


def test_a_label_on_another_grid_is_brought_over_by_position() -> None:
    target = place(np.eye(3), (8, 8, 8))
    finer = Place((16, 16, 16), target.affine * np.array([0.5, 0.5, 0.5, 1.0]))
    array = np.zeros((16, 16, 16), np.uint8)
    array[4:8, 2:10, 6:12] = 2
    found = align(array, finer, target, "case")
    expected = np.zeros((8, 8, 8), np.uint8)
    expected[2:4, 1:5, 3:6] = 2
    assert np.array_equal(found, expected)


def test_labels_that_do_not_overlap_are_refused() -> None:
    target = place(np.eye(3))
    away = Place(target.size, target.affine + np.array([[0, 0, 0, 500.0]] * 3))
    with pytest.raises(CaseError, match=r"case_7.*do not overlap"):
        align(np.ones((6, 5, 4), np.uint8), away, target, "case_7")
    half = Place(target.size, target.affine + np.array([[0, 0, 0, 2.1], [0, 0, 0, 0], [0, 0, 0, 0]]))
    only_outside = np.zeros((6, 5, 4), np.uint8)
    only_outside[:, :, 3] = 1
    with pytest.raises(CaseError, match="0% of the label's foreground"):
        align(only_outside, half, target, "case_7")


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ([0.0, 1.5], "whole numbers"),
        ([0.0, 2.000001], r"30 .*such as 2\.00000095"),
        ([0.0, np.nan], "NaN"),
        ([-1.0, 2.0], "-1.0 to 2.0"),
        ([0.0, 300.0], "300"),
    ],
)
def test_label_files_with_wrong_values_are_refused(tmp_path: Path, values: list[float], what: str) -> None:
    array = np.resize(np.array(values, np.float32), (3, 4, 5))
    sitk.WriteImage(sitk.GetImageFromArray(array), str(tmp_path / "a.nii.gz"))
    with pytest.raises(CaseError, match=what):
        read_labelmap(tmp_path / "a.nii.gz")


def test_a_label_file_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.nii.gz"
    noise = np.random.default_rng(0).integers(0, 9, (20, 30, 30)).astype(np.uint8)
    sitk.WriteImage(sitk.GetImageFromArray(noise), str(path))
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(CaseError, match=r"a\.nii\.gz.*(cut short|damaged)"):
        read_labelmap(path)


def marked(volume: NDArray[np.int16], low: int) -> NDArray[np.uint8]:
    """A label that depends on the image alone, so that it shows where each voxel went."""
    return (volume > low).astype(np.uint8)


REAL = (
    "tptbox_spine/sub-ct_label-22_ct.nii.gz",
    "slicer_ctchest4/CTChest4.nrrd",
    "elastix_lung/3DCT_lung_baseline_small.mha",
    "ts_example/ct_sm.nii.gz",
)


@pytest.mark.parametrize("source", REAL)
def test_real_orientations_come_back_voxel_for_voxel(real_ct: Path, tmp_path: Path, source: str) -> None:
    path = real_ct / source
    scan = read_scan(found_at(path))
    target = tmp_path / ("label" + ending(found_at(path)))
    write_labelmap(target, from_lps(marked(scan.volume.hu, 100), scan.own), scan.own, like=path)
    assert geometry(target) == geometry(path)[: len(geometry(target))]
    voxels = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
    assert np.array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(target))), voxels > 100)


def test_a_dicom_series_comes_back_where_itk_puts_it(real_ct: Path, tmp_path: Path) -> None:
    (found,) = find(real_ct / "sts_002_multimodal/CT_dicom")
    scan = read_scan(found)
    assert np.array_equal(read(found).hu, scan.volume.hu)
    target = tmp_path / "label.nii.gz"
    write_labelmap(target, from_lps(marked(scan.volume.hu, 100), scan.own), scan.own)
    series = sitk.ReadImage([str(path) for path in found.files])
    back = sitk.Resample(sitk.ReadImage(str(target)), series, sitk.Transform(), sitk.sitkNearestNeighbor)
    assert np.array_equal(sitk.GetArrayFromImage(back), sitk.GetArrayFromImage(series) > 100)


def test_an_oblique_volume_goes_through_the_readers_grid_and_back(tmp_path: Path) -> None:
    turn = Rotation.from_euler("xz", [15, 10], degrees=True).as_matrix()
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in (40, 50, 60)), indexing="ij")
    hu = np.where(x**2 + y**2 + z**2 < 0.5, 50, -1000).astype(np.int16)
    made = image(turn, hu)
    made.SetSpacing((1.0, 1.2, 1.5))
    sitk.WriteImage(made, str(tmp_path / "a.nii.gz"))
    scan = read_scan(found_at(tmp_path / "a.nii.gz"))
    assert scan.place.size != scan.own.size
    back = align(marked(scan.volume.hu, -500), scan.place, scan.own, "a")
    overlap = 2 * np.count_nonzero(back & (hu > -500)) / (np.count_nonzero(back) + np.count_nonzero(hu > -500))
    assert overlap > 0.98


@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd", ".mha"])
def test_one_slice_is_an_image_and_comes_back_on_its_own_grid(tmp_path: Path, ending: str) -> None:
    image = sitk.GetImageFromArray(np.arange(20, dtype=np.int16).reshape(1, 4, 5))
    image.SetSpacing((0.5, 0.75, 5.0))
    image.SetOrigin((1.0, 2.0, 3.0))
    path = tmp_path / f"a{ending}"
    sitk.WriteImage(image, str(path))
    scan = read_scan(found_at(path))
    assert scan.volume.hu.shape == (1, 4, 5)
    assert scan.volume.spacing == (5.0, 0.75, 0.5)
    write_labelmap(tmp_path / f"b{ending}", from_lps(np.ones((1, 4, 5), np.uint8), scan.own), scan.own, like=path)
    back = read_labelmap(tmp_path / f"b{ending}")
    assert difference(back.place, scan.own) == ""


def test_one_dicom_slice_is_as_thick_as_its_header_says(real_ct: Path) -> None:
    (found,) = find(real_ct / "edge_cases/single_slice_128")
    scan = read_scan(found)
    assert scan.volume.hu.shape == (1, 128, 128)
    assert scan.volume.spacing == pytest.approx((5.0, 0.661468, 0.661468))
    assert scan.volume.hu.min() == -896


@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".nrrd"])
def test_a_label_map_is_written_without_a_copy_of_it(tmp_path: Path, ending: str) -> None:
    """A turned view of 8 MiB, in less than half of that; the voxels and their order are the view's."""
    import tracemalloc

    array = np.random.default_rng(0).integers(0, 2, (128, 256, 256), dtype=np.uint8).T[::-1]
    source, target = tmp_path / f"image{ending}", tmp_path / f"map{ending}"
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros(array.shape, np.int16)), str(source))
    where = read_labelmap(source).place
    tracemalloc.start()
    write_labelmap(target, array, where, like=source)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20
    assert np.array_equal(read_labelmap(target).array, array)
