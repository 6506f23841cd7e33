"""NRRD as SimpleITK writes and reads it, and headers that no writer of ours makes."""

from __future__ import annotations

import bz2
import gzip
import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from data_curation.grid import VolumeError, from_image
from data_curation.nrrd import load, parts

HU = np.random.default_rng(3).integers(-1000, 1500, (4, 5, 6)).astype("<i2")
RAW = HU.tobytes()
FIELDS = {
    "type": "short",
    "dimension": "3",
    "space": "left-posterior-superior",
    "sizes": "6 5 4",
    "space directions": "(0.8,0,0) (0,0.7,0) (0,0,2.5)",
    "endian": "little",
    "encoding": "raw",
    "space origin": "(1,2,-3)",
}
SLICES = {f"s{i}.raw": HU[i].tobytes() for i in range(4)}


def header(**changed: str | None) -> bytes:
    fields = FIELDS | {name.replace("_", " "): value for name, value in changed.items()}
    lines = ["NRRD0004", *(f"{name}: {value}" for name, value in fields.items() if value is not None)]
    return "\n".join(lines).encode() + b"\n"


def write(folder: Path, content: bytes, beside: dict[str, bytes] | None = None, name: str = "ct.nrrd") -> Path:
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
    for ending in (".nrrd", ".nhdr"):
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
            sitk.WriteImage(sitk.DICOMOrient(image, "".join(code)), str(tmp_path / "ct.nrrd"))
            agrees(tmp_path / "ct.nrrd")
    image.SetDirection(sitk.Euler3DTransform((0, 0, 0), 0.2, -0.15, 0.1).GetMatrix())
    sitk.WriteImage(image, str(tmp_path / "ct.nrrd"))
    agrees(tmp_path / "ct.nrrd")


TEXT = " ".join(map(str, HU.ravel())).encode()
ATTACHED: list[tuple[dict[str, str | None], bytes]] = [
    ({}, RAW),
    ({}, RAW + b"more"),
    ({"encoding": "gzip"}, gzip.compress(RAW, mtime=0)),
    ({"encoding": "gz"}, gzip.compress(RAW[:50], mtime=0) + gzip.compress(RAW[50:], mtime=0)),
    ({"encoding": "ascii"}, TEXT),
    ({"encoding": "txt", "endian": None}, TEXT.replace(b" ", b",\n")),
    ({"encoding": "hex"}, RAW.hex().encode()),
    ({"encoding": "hex", "byte_skip": "2"}, b"xy" + RAW.hex(" ", 7).encode()),
    ({"encoding": "ascii", "byte_skip": "2"}, b"xy" + TEXT),
    ({"endian": "big"}, HU.astype(">i2").tobytes()),
    ({"space": "RAS"}, RAW),
    ({"space": "right-anterior-superior"}, RAW),
    ({"space": "LAS"}, RAW),
    ({"space": "left-anterior-superior"}, RAW),
    ({"byte_skip": "7"}, b"1234567" + RAW),
    ({"byte_skip": "-1"}, b"1234567" + RAW),
    ({"line_skip": "2", "byte_skip": "3"}, b"ab\ncdef\n123" + RAW),
    ({"line_skip": "1", "byte_skip": "3", "encoding": "gzip"}, b"ab\n" + gzip.compress(b"123" + RAW, mtime=0)),
    ({"kinds": "domain domain domain"}, RAW),
    ({"kinds": "??? ??? ???"}, RAW),
    ({"dimension": "4", "sizes": "1 6 5 4", "space_directions": "none " + FIELDS["space directions"]}, RAW),
]


@pytest.mark.parametrize(("changed", "voxels"), ATTACHED, ids=lambda value: str(value)[:40])
def test_hand_written_headers_agree_with_itk(tmp_path: Path, changed: dict[str, str | None], voxels: bytes) -> None:
    more = {"kinds": "list domain domain domain"} if changed.get("dimension") else {}
    agrees(write(tmp_path, header(**changed, **more) + b"\n" + voxels))
    np.testing.assert_array_equal(load(tmp_path / "ct.nrrd").voxels, HU)


@pytest.mark.parametrize(
    ("data_file", "encoding", "beside"),
    [
        ("v.raw", "raw", {"v.raw": RAW}),
        ("./v 1.raw", "raw", {"v 1.raw": RAW}),
        ("deep/v.raw", "raw", {"deep/v.raw": RAW}),
        ("v.gz", "gzip", {"v.gz": gzip.compress(RAW, mtime=0)}),
        ("v.txt", "ascii", {"v.txt": TEXT}),
        ("s%d.raw 0 3 1", "raw", SLICES),
        ("s%d.raw 3 0 -1", "raw", SLICES),
        ("s%03d.raw 0 6 2 2", "raw", {f"s{2 * i:03d}.raw": HU[i].tobytes() for i in range(4)}),
        ("s%d.raw 0 3 1", "gzip", {name: gzip.compress(voxels, mtime=0) for name, voxels in SLICES.items()}),
        ("LIST\n" + "\n".join(SLICES), "raw", SLICES),
        ("LIST 3\na\nb", "raw", {"a": HU[:2].tobytes(), "b": HU[2:].tobytes()}),
    ],
)
def test_voxels_in_other_files_agree_with_itk(
    tmp_path: Path, data_file: str, encoding: str, beside: dict[str, bytes]
) -> None:
    path = write(tmp_path, header(encoding=encoding, data_file=data_file), beside, "ct.nhdr")
    agrees(path)
    assert set(parts(path)) == {path, *(tmp_path / name for name in beside)}


def test_what_itk_does_not_read(tmp_path: Path) -> None:
    for changed, voxels in (
        ({"encoding": "bzip2"}, bz2.compress(RAW)),
        ({"encoding": "bz2", "byte_skip": "3"}, bz2.compress(b"123" + RAW[:9]) + bz2.compress(RAW[9:])),
    ):
        np.testing.assert_array_equal(load(write(tmp_path, header(**changed) + b"\n" + voxels)).voxels, HU)
    grid = load(write(tmp_path, header(space_units='"cm" "cm" "cm"') + b"\n" + RAW))
    np.testing.assert_allclose(grid.affine[:, 3], [10, 20, -30])
    tilted = load(write(tmp_path, header(space_directions="(0.8,0,0) (0,0.7,0) (0,0.7,2.5)") + b"\n" + RAW))
    assert tilted.as_acquired
    assert tilted.notes == ("sheared by 15.6 degrees: slices kept as stored",)
    np.testing.assert_allclose(tilted.affine[:, 2], [0, 0, 2.5], atol=1e-12)


REFUSED: list[tuple[str, dict[str, str | None]]] = [
    ("no_orientation", {"space": "3D-right-handed"}),
    ("no_orientation", {"space": "scanner-xyz"}),
    ("no_orientation", {"space": None, "space_dimension": "3"}),
    ("no_orientation", {"space": None, "space_directions": None, "space_origin": None, "spacings": "0.8 0.7 2.5"}),
    ("no_spacing", {"space_directions": "(nan,0,0) (0,0.7,0) (0,0,2.5)"}),
    ("no_spacing", {"space_origin": "(1e300,0,0)"}),
    ("unreadable", {"space_directions": "(0.8,0) (0,0.7) (0,0)"}),
    ("unreadable", {"space_directions": "(0.8,0,0) (0,0.7,0)"}),
    ("unreadable", {"sizes": "6 5"}),
    ("unreadable", {"sizes": "6 5 -4"}),
    ("unreadable", {"sizes": "6 5 0"}),
    ("unreadable", {"sizes": "6 5 " + "9" * 5000}),
    ("unreadable", {"dimension": "3.5"}),
    ("unreadable", {"endian": None}),
    ("unreadable", {"encoding": "zrl"}),
    ("unreadable", {"type": None}),
    ("vector", {"type": "block"}),
    ("vector", {"dimension": "4", "sizes": "2 3 5 4", "kinds": "vector domain domain domain",
                "space_directions": "none (1,0,0) (0,1,0) (0,0,1)"}),
    ("4d", {"dimension": "4", "sizes": "6 5 2 2", "kinds": "domain domain domain time",
            "space_directions": "(1,0,0) (0,1,0) (0,0,1) none"}),
    ("single_slice", {"dimension": "2", "sizes": "6 20", "space_directions": "(1,0,0) (0,1,0)"}),
    ("too_large", {"sizes": "100000 100000 100000"}),
    ("truncated", {"sizes": "6 5 5"}),
    ("truncated", {"sizes": "1000 1000 1000"}),
    ("truncated", {"sizes": "1000 1000 1000", "encoding": "ascii"}),
    ("truncated", {"sizes": "1000 1000 1000", "encoding": "hex"}),
    ("truncated", {"encoding": "gzip"}),
    ("truncated", {"encoding": "bzip2", "sizes": "1000 1000 1000"}),
    ("unreadable", {"encoding": "ascii"}),
    ("truncated", {"line_skip": "1000000"}),
    ("unreadable", {"line_skip": "-1"}),
    ("truncated", {"byte_skip": "10"}),
    ("truncated", {"byte_skip": "999999999999999999"}),
    ("truncated", {"byte_skip": "999999999999999999", "encoding": "hex"}),
    ("unreadable", {"byte_skip": "-2"}),
    ("unreadable", {"byte_skip": "99999999999", "encoding": "gzip"}),
    ("unreadable", {"data_file": "gone.raw"}),
    ("unreadable", {"data_file": "../ct.raw"}),
    ("unreadable", {"data_file": "s%d.raw 0 999999999 1"}),
    ("unreadable", {"data_file": "s%d.raw 0 9 0"}),
    ("unreadable", {"data_file": "LIST"}),
]  # fmt: skip


@pytest.mark.parametrize(("expected", "changed"), REFUSED, ids=lambda value: str(value)[:60])
def test_refused(tmp_path: Path, expected: str, changed: dict[str, Any]) -> None:
    assert reason(write(tmp_path, header(**changed) + b"\n" + RAW)) == expected


def test_other_damage(tmp_path: Path) -> None:
    assert reason(write(tmp_path, b"")) == "empty"
    assert reason(write(tmp_path, b"NRRD0009\n")) == "unreadable"
    assert reason(write(tmp_path, b"NRRD0004\ncontent: " + b"x" * 5_000_000)) == "unreadable"
    assert reason(write(tmp_path, header() + b"type: float\n\n" + RAW)) == "unreadable"
    assert reason(write(tmp_path, header() + b"Segment0_ID:=liver\n\n" + RAW)) == "label"
    assert reason(write(tmp_path, header() + b"\n" + RAW), max_voxels=119) == "too_large"
    assert load(tmp_path / "ct.nrrd", max_voxels=120).voxels.size == 120


@pytest.mark.parametrize("name", ["/etc/hostname", "../v.raw", "a/../../v.raw", r"C:\v.raw", r"..\v.raw", "pipe"])
def test_voxels_outside_the_folder_are_not_read(tmp_path: Path, name: str) -> None:
    """Nor is a pipe opened, which would wait for ever."""
    (tmp_path / "v.raw").write_bytes(RAW)
    (tmp_path / "in").mkdir()
    os.mkfifo(tmp_path / "in" / "pipe")
    assert reason(write(tmp_path / "in", header(data_file=name), name="ct.nhdr")) == "unreadable"
