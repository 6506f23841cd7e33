"""A label map lies exactly where its image lies, whatever wrote the image's header; free text stays behind."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from scipy.spatial.transform import Rotation

from data_curation.volumes import load
from downstream.cases import RawCase
from downstream.geometry import LIMITS, Place, found_at, read_labelmap, read_scan, write_labelmap
from downstream.label_headers import label_header
from downstream.naming import ending
from downstream.reading import read_case
from tests.data_curation import test_metaimage, test_nifti, test_nrrd

SHEARED = [[-0.8, 0, 0, 3], [0, -0.7, 0.8, 4], [0, 0, 2.5, 5]]
OBLIQUE = np.column_stack([Rotation.from_euler("x", 17, degrees=True).as_matrix() * (-0.8, -0.7, 2.5), (3, 4, 5)])
HU = test_nifti.body()
NRRD, META = test_nrrd.HU.tobytes(), test_metaimage.HU.tobytes()


def second(sform: object, units: int = 2, order: str = "<", offset: int = 544) -> bytes:
    raw = bytearray(540)
    struct.pack_into(f"{order}i8s", raw, 0, 540, b"n+2\0\r\n\x1a\n")
    struct.pack_into(f"{order}hh8q", raw, 12, 4, 16, 3, *HU.shape[::-1], 1, 1, 1, 1)
    struct.pack_into(f"{order}8d", raw, 104, 1, 0.8, 0.7, 2.5, 0, 0, 0, 0)
    struct.pack_into(f"{order}q2d", raw, 168, offset, 2.0, -1024.0)
    raw[240:248] = b"Jane Doe"
    struct.pack_into(f"{order}2i", raw, 344, 0, 1)
    struct.pack_into(f"{order}12d", raw, 400, *np.ravel(sform))
    struct.pack_into(f"{order}i", raw, 500, units)
    return bytes(raw) + bytes(4)


def nifti(header: bytes, name: str = "a.nii.gz", order: str = "<") -> Callable[[Path], Path]:
    def made(folder: Path) -> Path:
        stored = HU.astype(f"{order}i2").tobytes()
        whole = header if name.endswith(".hdr") else header + stored
        (folder / name).write_bytes(gzip.compress(whole) if name.endswith(".gz") else whole)
        if name.endswith(".hdr"):
            (folder / "a.img").write_bytes(stored)
        return folder / name

    return made


def pair(header: bytes) -> bytes:
    """Its voxels in a file of their own."""
    at = 4 if len(header) > 540 else 344
    return header[:at] + b"ni" + header[at + 2 :]


MICRONS = np.array(SHEARED) * 1000
CRLF = test_nrrd.header(content="Jane Doe").replace(b"\n", b"\r\n") + b"\r\n" + NRRD[:40] + b"\n\n" + NRRD[42:]
META_TEXT = {"Comment": "Jane Doe", "DistanceUnits": "um", "ElementSpacing": "800 700 -2500"}
SOURCES = {
    "nifti, sheared": nifti(test_nifti.header(sform=SHEARED)),
    "nifti in microns": nifti(test_nifti.header(sform=OBLIQUE * 1000, units=3), "a.nii"),
    "pair, sheared": nifti(pair(test_nifti.header(sform=SHEARED, offset=0)), "a.hdr"),
    "pair, oblique": nifti(pair(test_nifti.header(sform=OBLIQUE, offset=0)), "a.hdr"),
    "nifti-2, sheared": nifti(second(SHEARED)),
    "nifti-2, oblique, plain": nifti(second(OBLIQUE), "a.nii"),
    "nifti-2, big endian": nifti(second(SHEARED, order=">"), order=">"),
    "nifti-2, microns": nifti(second(MICRONS, units=3)),
    "nifti-2, pair": nifti(pair(second(SHEARED, offset=0)), "a.hdr"),
    "nrrd with carriage returns": lambda folder: test_nrrd.write(folder, CRLF),
    "nhdr": lambda folder: test_nrrd.write(
        folder, test_nrrd.header(data_file="a.raw", space_units='"um" "um" "um"'), {"a.raw": NRRD}, "a.nhdr"
    ),
    "nhdr with a list": lambda folder: test_nrrd.write(
        folder,
        test_nrrd.header() + b"data file: LIST\n" + "\n".join(test_nrrd.SLICES).encode() + b"\n",
        test_nrrd.SLICES,
        "a.nhdr",
    ),
    "metaimage": lambda folder: test_metaimage.write(folder, test_metaimage.header(**META_TEXT) + META),
    "mhd": lambda folder: test_metaimage.write(folder, test_metaimage.header("a.raw"), {"a.raw": META}, "a.mhd"),
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_label_map_lies_where_its_image_lies(tmp_path: Path, name: str) -> None:
    image = SOURCES[name](tmp_path)
    found = found_at(image)
    grid = load(found, LIMITS)
    scan = read_scan(found)
    label = np.random.default_rng(1).integers(0, 200, scan.own.size[::-1]).astype(np.uint8)
    target = tmp_path / ("label" + ending(found))
    write_labelmap(target, label, scan.own, like=image)
    again = load(found_at(target), LIMITS)
    assert np.array_equal(again.affine, grid.affine)
    assert again.notes == grid.notes
    assert np.array_equal(again.voxels, label), "as the images' reader sees it"
    whole = target.read_bytes()
    assert b"Jane" not in (gzip.decompress(whole) if target.suffix == ".gz" else whole)
    header, new = (label_header(one, found.kind) for one in (image, target))
    assert header == new, "what a label map has of its image, it has of itself"
    if "sheared" not in name and "nifti-2" not in name:  # other readers, too
        assert np.array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(target))), label)
        assert np.array_equal(read_labelmap(target).array, label)


def test_a_header_of_another_kind_is_not_taken_over(tmp_path: Path) -> None:
    image = SOURCES["nifti, sheared"](tmp_path)
    assert label_header(image, "nrrd") is None
    assert label_header(image, "metaimage") is None
    assert label_header(SOURCES["nhdr"](tmp_path), "nifti") is None


def test_a_nifti_may_be_sheared_without_an_image_to_copy(tmp_path: Path) -> None:
    """The slices of a tilted gantry; ITK has no place for a shear."""
    affine = np.array([[0.8, 0, 0, -3], [0, 0.7, 0.9, -4], [0, 0, 2.5, 5.0]])
    label = np.random.default_rng(1).integers(0, 9, (6, 9, 12)).astype(np.uint8)
    write_labelmap(tmp_path / "a.nii.gz", label, Place((12, 9, 6), affine))
    raw = gzip.decompress((tmp_path / "a.nii.gz").read_bytes())
    rows = np.array(struct.unpack_from("<12f", raw, 280)).reshape(3, 4)
    assert np.allclose(np.diag([-1.0, -1.0, 1.0]) @ rows, affine)
    assert struct.unpack_from("<2h", raw, 252) == (0, 1)
    assert np.array_equal(read_labelmap(tmp_path / "a.nii.gz").array, label)


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha"])
def test_a_file_of_two_dimensions_is_one_slice(tmp_path: Path, suffix: str) -> None:
    image = sitk.GetImageFromArray(np.random.default_rng(0).integers(-900, 900, (40, 48), dtype=np.int16))
    image.SetSpacing((0.8, 0.7))
    image.SetOrigin((3.0, 4.0))
    sitk.WriteImage(image, str(tmp_path / f"a{suffix}"))
    scan = read_scan(found_at(tmp_path / f"a{suffix}"))
    assert scan.volume.hu.shape == (1, 40, 48)
    assert scan.volume.spacing == pytest.approx((1.0, 0.7, 0.8))
    label = np.random.default_rng(0).integers(0, 3, (1, 40, 48), dtype=np.uint8)
    write_labelmap(tmp_path / f"b{suffix}", label, scan.own, like=tmp_path / f"a{suffix}")
    back = sitk.ReadImage(str(tmp_path / f"b{suffix}"))
    assert back.GetSize() == (48, 40)
    assert back.GetSpacing() == pytest.approx((0.8, 0.7), abs=1e-7)
    assert back.GetOrigin() == (3.0, 4.0)
    assert np.array_equal(sitk.GetArrayFromImage(back), label[0])


LEANING = (
    "NRRD0004\ntype: {}\ndimension: 3\nspace: left-posterior-superior\nsizes: 8 8 6\nendian: little\nencoding: raw\n"
    "space directions: (1,0,0) (0,1,0) (0,0.8,3)\nspace origin: (0,0,0)\n"
)
PLAIN = "ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\nCompressedData = False\n{}"
LEANS = "TransformMatrix = 1 0 0 0 1 0 0 0.2588 0.9659\nOffset = 0 0 0\nElementSpacing = 1 1 3\n"
CENTIMETRES = "DistanceUnits = cm\nTransformMatrix = 1 0 0 0 1 0 0 0 1\nOffset = 0 0 0\nElementSpacing = .1 .1 .3\n"


@pytest.mark.parametrize(
    ("name", "header"),
    [
        ("nrrd", f"{LEANING}\n"),
        ("seg.nrrd", f"{LEANING}Segment0_Name:=liver\n\n"),
        ("mha", PLAIN.format(f"{LEANS}DimSize = 8 8 6\nElementType = {{}}\nElementDataFile = LOCAL\n")),
        ("cm.mha", PLAIN.format(f"{CENTIMETRES}DimSize = 8 8 6\nElementType = {{}}\nElementDataFile = LOCAL\n")),
    ],
)
def test_a_label_lies_where_an_image_with_its_header_does(tmp_path: Path, name: str, header: str) -> None:
    label = np.zeros((6, 8, 8), np.uint8)
    label[:, 2:5, 3:6] = 1
    plain = header.replace("Segment0_Name:=liver\n", "")
    kinds = ("int16", "uint8") if "nrrd" in name else ("MET_SHORT", "MET_UCHAR")
    image = tmp_path / f"image.{name.rpartition('.')[2]}"
    image.write_bytes(plain.format(kinds[0]).encode() + (400 * label.astype("<i2")).tobytes())
    (tmp_path / f"label.{name}").write_bytes(header.format(kinds[1]).encode() + label.tobytes())
    case = read_case(RawCase("a", (image,), tmp_path / f"label.{name}"), ["CT"])
    assert case.label.sum() == label.sum()
    assert ((case.label > 0) == (case.stored[0] > 200)).all()
    assert not [note for note in case.notes if "another grid" in note]
