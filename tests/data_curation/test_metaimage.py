"""MetaImage as SimpleITK writes and reads it, and headers that no writer of ours makes."""

from __future__ import annotations

import gzip
import itertools
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from data_curation.grid import VolumeError, from_image
from data_curation.metaimage import load, parts
from data_curation.volumes import find

HU = np.random.default_rng(3).integers(-1000, 1500, (4, 5, 6)).astype("<i2")
RAW = HU.tobytes()
PACKED = zlib.compress(RAW)
TURN = "0 1 0 0 0 1 1 0 0"
FIELDS = {
    "ObjectType": "Image",
    "NDims": "3",
    "BinaryData": "True",
    "BinaryDataByteOrderMSB": "False",
    "TransformMatrix": TURN,
    "Offset": "1 2 -3",
    "ElementSpacing": "0.8 0.7 2.5",
    "DimSize": "6 5 4",
    "ElementType": "MET_SHORT",
}
SLICES = {f"s{i}.raw": HU[i].tobytes() for i in range(4)}


def header(data: str = "LOCAL", **changed: str | None) -> bytes:
    fields = FIELDS | changed | {"ElementDataFile": data}
    return "".join(f"{name} = {value}\n" for name, value in fields.items() if value is not None).encode()


def write(folder: Path, content: bytes, beside: dict[str, bytes] | None = None, name: str = "ct.mha") -> Path:
    for other, voxels in (beside or {}).items():
        (folder / other).parent.mkdir(exist_ok=True)
        (folder / other).write_bytes(voxels)
    (folder / name).write_bytes(content)
    return folder / name


def agrees(path: Path) -> None:
    """Ours and SimpleITK's reading of one file."""
    ours, theirs = load(path), from_image(sitk.ReadImage(str(path)))
    np.testing.assert_array_equal(ours.voxels, theirs.voxels)
    np.testing.assert_allclose(ours.affine, theirs.affine, rtol=1e-12, atol=1e-12)
    assert ours.voxels.dtype.newbyteorder("=") == theirs.voxels.dtype


def reason(path: Path, **limits: int) -> str:
    with pytest.raises(VolumeError) as caught:
        load(path, **limits)
    assert " " in caught.value.message
    return caught.value.reason


@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"])
@pytest.mark.parametrize("packed", [False, True])
def test_every_type_agrees_with_itk(tmp_path: Path, dtype: str, packed: bool) -> None:
    for ending in (".mha", ".mhd"):
        image = sitk.GetImageFromArray((HU % 100).astype(dtype))
        image.SetSpacing((0.8, 0.7, 2.5))
        image.SetOrigin((-10.5, 20.25, 300.0))
        sitk.WriteImage(image, str(tmp_path / f"ct{ending}"), useCompression=packed)
        agrees(tmp_path / f"ct{ending}")


def test_every_orientation_agrees_with_itk(tmp_path: Path) -> None:
    image = sitk.GetImageFromArray(HU)
    image.SetSpacing((0.8, 0.7, 2.5))
    for axes in itertools.permutations(("RL", "AP", "SI")):
        for code in itertools.product(*axes):
            sitk.WriteImage(sitk.DICOMOrient(image, "".join(code)), str(tmp_path / "ct.mha"))
            agrees(tmp_path / "ct.mha")
    image.SetDirection(sitk.Euler3DTransform((0, 0, 0), 0.2, -0.15, 0.1).GetMatrix())
    sitk.WriteImage(image, str(tmp_path / "ct.mha"))
    agrees(tmp_path / "ct.mha")


AT_300 = 300 - len(header(HeaderSize="300"))
ATTACHED: list[tuple[dict[str, str | None], bytes]] = [
    ({}, RAW),
    ({}, RAW + b"more"),
    ({"CompressedData": "True", "CompressedDataSize": str(len(PACKED))}, PACKED),
    ({"BinaryDataByteOrderMSB": "True"}, HU.astype(">i2").tobytes()),
    ({"BinaryDataByteOrderMSB": None, "ElementByteOrderMSB": "True"}, HU.astype(">i2").tobytes()),
    ({"BinaryDataByteOrderMSB": None, "BinaryData": None}, RAW),
    ({"HeaderSize": "-1"}, b"between" + RAW),
    ({"HeaderSize": "300"}, b"#" * AT_300 + RAW),
    ({"TransformMatrix": None, "Rotation": TURN}, RAW),
    ({"TransformMatrix": None, "Orientation": TURN}, RAW),
    ({"TransformMatrix": None, "AnatomicalOrientation": "RAS"}, RAW),
    ({"AnatomicalOrientation": "RAS", "CenterOfRotation": "0 0 0"}, RAW),
    ({"Offset": None, "Position": "1 2 3"}, RAW),
    ({"Offset": None, "Origin": "1 2 3"}, RAW),
    ({"Offset": None}, RAW),
    ({"ElementSpacing": None, "ElementSize": "0.8 0.7 2.5"}, RAW),
    ({"ElementSize": "9 9 9"}, RAW),
    ({"ElementType": "MET_LONG"}, HU.astype("<i4").tobytes()),
    ({"Some words": "of another program"}, RAW),
    ({"Offset": "1 2 3\r"}, RAW),
]


@pytest.mark.parametrize(("changed", "voxels"), ATTACHED, ids=lambda value: str(value)[:40])
def test_hand_written_headers_agree_with_itk(tmp_path: Path, changed: dict[str, Any], voxels: bytes) -> None:
    agrees(write(tmp_path, header(**changed) + voxels))
    np.testing.assert_array_equal(load(tmp_path / "ct.mha").voxels, HU)


@pytest.mark.parametrize(
    ("data", "changed", "beside"),
    [
        ("v.raw", {}, {"v.raw": RAW}),
        ("v 1.raw", {}, {"v 1.raw": RAW}),
        ("deep/v.raw", {}, {"deep/v.raw": RAW}),
        ("v.raw", {"HeaderSize": "5"}, {"v.raw": b"12345" + RAW}),
        ("v.raw", {"HeaderSize": "-1"}, {"v.raw": b"12345" + RAW}),
        ("v.zraw", {"CompressedData": "True", "CompressedDataSize": str(len(PACKED))}, {"v.zraw": PACKED}),
        ("s%d.raw", {}, {f"s{i + 1}.raw": HU[i].tobytes() for i in range(4)}),
        ("s%d.raw 5", {}, {f"s{i + 5}.raw": HU[i].tobytes() for i in range(4)}),
        ("s%d.raw 0 3 1", {}, SLICES),
        ("s%03d.raw 0 6 2", {}, {f"s{2 * i:03d}.raw": HU[i].tobytes() for i in range(4)}),
        ("LIST\n" + "\n".join(SLICES), {}, SLICES),
        ("LIST 2D\n" + "\n".join(SLICES), {}, SLICES),
        ("LIST\n" + "\n".join(SLICES), {"CompressedData": "True"}, {k: zlib.compress(v) for k, v in SLICES.items()}),
    ],
)
def test_voxels_in_other_files_agree_with_itk(
    tmp_path: Path, data: str, changed: dict[str, Any], beside: dict[str, bytes]
) -> None:
    path = write(tmp_path, header(data, **changed), beside, "ct.mhd")
    agrees(path)
    assert set(parts(path)) == {path, *(tmp_path / name for name in beside)}


def test_what_itk_does_not_read_or_reads_wrongly(tmp_path: Path) -> None:
    """It makes voxels up where the compressed size is missing or too small, and takes centimetres for millimetres."""
    for changed, voxels in (
        ({"CompressedData": "True"}, PACKED),
        ({"CompressedData": "True"}, gzip.compress(RAW, mtime=0)),
        ({"BinaryData": "False"}, " ".join(map(str, HU.ravel())).encode()),
        ({"BinaryData": "False", "BinaryDataByteOrderMSB": "True"}, "\n".join(map(str, HU.ravel())).encode()),
    ):
        np.testing.assert_array_equal(load(write(tmp_path, header(**changed) + voxels)).voxels, HU)
    metres = load(write(tmp_path, header(DistanceUnits="cm") + RAW))
    np.testing.assert_allclose(metres.affine[:, 3], [10, 20, -30])
    fourth = {"NDims": "4", "DimSize": "6 5 4 1", "ElementSpacing": "1 2 3 1", "Offset": "1 2 3 0"}
    grid = load(write(tmp_path, header(**fourth, TransformMatrix="1 0 0 0 0 1 0 0 0 0 1 0 0 0 0 1") + RAW))
    np.testing.assert_allclose(grid.affine, [[1, 0, 0, 1], [0, 2, 0, 2], [0, 0, 3, 3]])
    assert load(write(tmp_path, header(TransformMatrix=None) + RAW)).notes == ("no TransformMatrix: axes taken as LPS",)


REFUSED: list[tuple[str, dict[str, str | None]]] = [
    ("no_spacing", {"ElementSpacing": None}),
    ("no_spacing", {"ElementSpacing": "inf 1 1"}),
    ("no_spacing", {"Offset": "nan 0 0"}),
    ("unreadable", {"ElementSpacing": "1 1"}),
    ("unreadable", {"ElementSpacing": "1 1 one"}),
    ("unreadable", {"TransformMatrix": "1 0 0 1"}),
    ("unreadable", {"NDims": None}),
    ("unreadable", {"NDims": "99999"}),
    ("unreadable", {"DimSize": "6 5"}),
    ("unreadable", {"DimSize": "6 5 0"}),
    ("unreadable", {"DimSize": "-6 -5 4"}),
    ("unreadable", {"DimSize": "6 5 " + "9" * 5000}),
    ("unreadable", {"ElementType": None}),
    ("vector", {"ElementType": "MET_FLOAT_ARRAY"}),
    ("vector", {"DimSize": "3 5 4", "ElementNumberOfChannels": "2"}),
    ("single_slice", {"NDims": "2", "DimSize": "6 20"}),
    ("4d", {"NDims": "4", "DimSize": "6 5 2 2"}),
    ("too_large", {"DimSize": "100000 100000 100000"}),
    ("truncated", {"DimSize": "6 5 5"}),
    ("truncated", {"DimSize": "1000 1000 1000"}),
    ("truncated", {"CompressedData": "True"}),
    ("truncated", {"CompressedData": "True", "DimSize": "1000 1000 1000"}),
    ("truncated", {"CompressedData": "True", "CompressedDataSize": "99999"}),
    ("unreadable", {"CompressedData": "True", "CompressedDataSize": "-5"}),
    ("unreadable", {"HeaderSize": "-2"}),
    ("truncated", {"HeaderSize": "999999999999999999"}),
    ("unreadable", {"BinaryData": "False"}),
    ("unreadable", {"Broken": "field\nwithout a sign"}),
]


@pytest.mark.parametrize(("expected", "changed"), REFUSED, ids=lambda value: str(value)[:60])
def test_refused(tmp_path: Path, expected: str, changed: dict[str, Any]) -> None:
    assert reason(write(tmp_path, header(**changed) + RAW)) == expected


@pytest.mark.parametrize(
    "data",
    ["gone.raw", "/etc/hostname", "../v.raw", "a/../../v.raw", r"C:\v.raw", "pipe", "LIST", "s%d.raw 0 99999999"],
)
def test_voxels_that_are_missing_or_outside_the_folder(tmp_path: Path, data: str) -> None:
    """Nor is a pipe opened, which would wait for ever."""
    (tmp_path / "v.raw").write_bytes(RAW)
    (tmp_path / "in").mkdir()
    os.mkfifo(tmp_path / "in" / "pipe")
    assert reason(write(tmp_path / "in", header(data), name="ct.mhd")) == "unreadable"


def test_other_damage(tmp_path: Path) -> None:
    assert reason(write(tmp_path, b"")) == "empty"
    assert reason(write(tmp_path, b"hello")) == "unreadable"
    assert reason(write(tmp_path, b"Comment = x\n" * 200_000)) == "unreadable"
    assert reason(write(tmp_path, header(DimSize="6 5 4\nOffset = 7 7 7") + RAW)) == "unreadable"
    cut = header(CompressedData="True", CompressedDataSize=str(len(PACKED) - 20)) + PACKED
    assert reason(write(tmp_path, cut)) == "truncated"
    assert reason(write(tmp_path, header() + RAW), max_voxels=119) == "too_large"
    assert load(tmp_path / "ct.mha", max_voxels=120).voxels.size == 120


def test_files_of_an_image_are_found_with_it(tmp_path: Path) -> None:
    """So that a scan is read again when one of its slices was exchanged."""
    path = write(tmp_path, header("LIST\n" + "\n".join(SLICES)), SLICES, "ct.mhd")
    (found,) = find(tmp_path)
    assert found.files == (path, *(tmp_path / name for name in SLICES))
    path.write_bytes(b"damaged")
    (tmp_path / "ct.raw").write_bytes(RAW)
    (found,) = find(tmp_path)
    assert found.files == (path, tmp_path / "ct.raw")
