"""NIfTI, NRRD and MetaImage as they come: every orientation, every way of being damaged."""

from __future__ import annotations

import gzip
import itertools
import os
import pickle
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from data_curation.grid import Grid, to_lps
from data_curation.volumes import Found, Volume, VolumeError, find, read

SHAPE = (6, 9, 12)
SPACING = (2.5, 0.7, 0.8)


def body(shape: tuple[int, ...] = SHAPE, dtype: Any = np.int16) -> np.ndarray:
    return np.random.default_rng(3).integers(-1000, 1500, shape).astype(dtype)


def image(hu: np.ndarray, orientation: str = "LPS") -> Any:
    made = sitk.GetImageFromArray(hu)
    made.SetSpacing(SPACING[::-1])
    made.SetOrigin((-10.5, 20.25, 300.0))
    return sitk.DICOMOrient(made, orientation)


def save(path: Path, hu: np.ndarray | None = None, orientation: str = "LPS") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image(body() if hu is None else hu, orientation), str(path))
    return path


def volume(path: Path) -> Volume:
    found = list(find(path.parent))
    assert len(found) == 1, found
    return read(found[0])


def refused(path: Path, reason: str) -> str:
    with pytest.raises(VolumeError) as caught:
        volume(path)
    assert caught.value.reason == reason
    return str(caught.value)


def header(
    shape: tuple[int, ...] = SHAPE[::-1],
    *,
    code: int = 4,
    slope: float = 0.0,
    inter: float = 0.0,
    order: str = "<",
    magic: bytes = b"n+1\0",
    sform: Any = None,
    qform: Any = None,
    units: int = 2,
    offset: float = 352.0,
    pixdim: tuple[float, ...] = (1, *SPACING[::-1]),
) -> bytes:
    """A NIfTI-1 header written field by field: what ITK's writer cannot be made to write. RAS, as the format has it."""
    raw = bytearray(348)
    struct.pack_into(order + "i", raw, 0, 348)
    struct.pack_into(order + "8h", raw, 40, len(shape), *shape, *(1,) * (7 - len(shape)))
    struct.pack_into(order + "h", raw, 70, code)
    struct.pack_into(order + "8f", raw, 76, *pixdim, 0, 0, 0, 0)
    struct.pack_into(order + "3f", raw, 108, offset, slope, inter)
    raw[123] = units
    struct.pack_into(order + "2h", raw, 252, int(qform is not None), int(sform is not None))
    if qform is not None:
        struct.pack_into(order + "6f", raw, 256, *qform)
    if sform is not None:
        struct.pack_into(order + "12f", raw, 280, *np.asarray(sform, float).ravel())
    raw[344:348] = magic
    return bytes(raw) + b"\0\0\0\0"


LPS_SFORM = [[-0.8, 0, 0, 0], [0, -0.7, 0, 0], [0, 0, 2.5, 0]]


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".nrrd", ".mha", ".hdr", ".mhd", ".nhdr"])
def test_formats_hold_the_same_volume(tmp_path: Path, ending: str) -> None:
    result = volume(save(tmp_path / f"ct{ending}", orientation="RAS"))
    np.testing.assert_array_equal(result.hu, body())
    assert result.spacing == pytest.approx(SPACING, rel=1e-6)
    assert (result.rounding, result.notes, result.source) == (0.0, (), f"ct{ending}")
    assert result.hu.dtype == np.int16
    assert result.hu.flags.c_contiguous


@pytest.mark.parametrize("ending", [".NII.GZ", ".NII", ".MHA", ".NRRD"])
def test_upper_case_names(tmp_path: Path, ending: str) -> None:
    path = save(tmp_path / f"x{ending.lower()}")
    path.rename(tmp_path / f"CT{ending}")
    np.testing.assert_array_equal(volume(tmp_path / f"CT{ending}").hu, body())


def test_all_48_orientations_agree_with_itk(tmp_path: Path) -> None:
    for axes in itertools.permutations(("RL", "AP", "SI")):
        for code in itertools.product(*axes):
            stored = image(body(), "".join(code))
            path = tmp_path / "".join(code) / "ct.nii"
            path.parent.mkdir()
            sitk.WriteImage(stored, str(path))
            result = volume(path)
            np.testing.assert_array_equal(result.hu, sitk.GetArrayFromImage(sitk.DICOMOrient(stored, "LPS")))
            assert result.spacing == pytest.approx(SPACING, rel=1e-5)


def test_kits_keeps_slices_on_the_first_array_axis(tmp_path: Path) -> None:
    """KiTS: affine [[0, 0, -x], [0, -y, 0], [-z, 0, 0]]; the longest axis need not be last."""
    hu = body()
    stored = np.ascontiguousarray(hu[::-1].transpose(2, 1, 0))  # file order k, j, i = x, y, -z
    sform = [[0, 0, -0.8, 0], [0, -0.7, 0, 0], [-2.5, 0, 0, 0]]
    (tmp_path / "imaging.nii").write_bytes(header(SHAPE, sform=sform) + stored.tobytes())
    result = volume(tmp_path / "imaging.nii")
    np.testing.assert_array_equal(result.hu, hu)
    assert result.spacing == pytest.approx(SPACING)


def test_small_obliquity_is_relabelled_and_large_is_resampled(tmp_path: Path) -> None:
    made = image(np.full((20, 30, 30), 40, np.int16))
    results = {}
    for degrees in (3.0, 12.0):
        turn = sitk.Euler3DTransform((0, 0, 0), np.radians(degrees), 0, 0)
        made.SetDirection(turn.GetMatrix())
        sitk.WriteImage(made, str(tmp_path / f"{degrees}.nii.gz"))
    for found in find(tmp_path):
        results[found.path.name] = read(found)
    assert results["3.0.nii.gz"].notes == ()
    assert results["3.0.nii.gz"].hu.shape == (20, 30, 30)
    turned = results["12.0.nii.gz"]
    assert turned.notes[0] == "oblique by 12.0 degrees: resampled onto the patient's axes, linear"
    assert turned.spacing == pytest.approx(SPACING)
    assert turned.hu.shape[0] > 20
    assert turned.hu[turned.hu.shape[0] // 2, 15, 15] == 40


def test_resampling_puts_voxels_where_the_affine_says(tmp_path: Path) -> None:
    """A field that is linear in the patient's coordinates survives rotation and linear interpolation exactly."""
    made = image(np.zeros((20, 30, 30), np.float32))
    made.SetDirection(sitk.Euler3DTransform((0, 0, 0), 0.2, -0.15, 0.1).GetMatrix())
    k, j, i = np.mgrid[:20, :30, :30]
    affine = np.array(made.GetDirection()).reshape(3, 3) * np.array(made.GetSpacing())
    places = np.stack([i, j, k], -1) @ affine.T + made.GetOrigin()
    field = (places @ [7.0, -3.0, 5.0]).astype(np.float32)
    voxels, spacing, _ = to_lps(Grid(field, np.column_stack([affine, made.GetOrigin()])))
    inside = voxels[8:12, 12:18, 12:18]
    for axis, slope in ((2, 7.0), (1, -3.0), (0, 5.0)):
        np.testing.assert_allclose(np.diff(inside, axis=axis), slope * spacing[axis], rtol=1e-3)


def test_resampling_fills_with_air_and_lifts_padding(tmp_path: Path) -> None:
    hu = np.full((20, 30, 30), 40, np.int16)
    hu[:, :8] = -3024
    made = image(hu)
    made.SetDirection(sitk.Euler3DTransform((0, 0, 0), 0.3, 0, 0).GetMatrix())
    sitk.WriteImage(made, str(tmp_path / "ct.nii.gz"))
    result = volume(tmp_path / "ct.nii.gz")
    assert result.hu.min() == -1024
    assert result.hu[0, 0, 0] == -1024
    mask = image(np.ones((20, 30, 30), np.uint8))
    mask.SetDirection(made.GetDirection())
    (tmp_path / "mask").mkdir()
    sitk.WriteImage(mask, str(tmp_path / "mask" / "m.nii.gz"))
    assert set(np.unique(volume(tmp_path / "mask" / "m.nii.gz").hu)) <= {0, 1}


def test_sheared_affine_of_a_gantry_tilt(tmp_path: Path) -> None:
    sform = [[-0.8, 0, 0, 0], [0, -0.7, 0.7, 0], [0, 0, 2.5, 0]]
    (tmp_path / "ct.nii").write_bytes(header(sform=sform) + body().tobytes())
    result = volume(tmp_path / "ct.nii")
    np.testing.assert_array_equal(result.hu, body())
    assert result.spacing == pytest.approx(SPACING)
    assert result.notes == ("sheared by 15.6 degrees: slices kept as stored",)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int32, np.uint32, np.float32, np.float64])
def test_every_number_type(tmp_path: Path, dtype: Any) -> None:
    hu = np.random.default_rng(0).integers(0, 120, SHAPE).astype(dtype)
    result = volume(save(tmp_path / "ct.nii.gz", hu))
    np.testing.assert_array_equal(result.hu, hu.astype(np.int16))
    assert result.rounding == 0.0


def test_big_endian_and_second_version(tmp_path: Path) -> None:
    (tmp_path / "ct.nii").write_bytes(header(order=">", sform=LPS_SFORM) + body().astype(">i2").tobytes())
    np.testing.assert_array_equal(volume(tmp_path / "ct.nii").hu, body())
    raw = bytearray(540)
    struct.pack_into("<i8s", raw, 0, 540, b"n+2\0\r\n\x1a\n")
    struct.pack_into("<hh8q", raw, 12, 4, 16, 3, *SHAPE[::-1], 1, 1, 1, 1)
    struct.pack_into("<8d", raw, 104, 1, *SPACING[::-1], 0, 0, 0, 0)
    struct.pack_into("<q", raw, 168, 544)
    struct.pack_into("<2i", raw, 344, 0, 1)
    struct.pack_into("<12d", raw, 400, *np.ravel(LPS_SFORM))
    struct.pack_into("<i", raw, 500, 2)
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "ct.nii").write_bytes(bytes(raw) + b"\0" * 4 + body().tobytes())
    result = volume(tmp_path / "two" / "ct.nii")
    np.testing.assert_array_equal(result.hu, body())
    assert result.spacing == pytest.approx(SPACING)


def test_slope_and_intercept(tmp_path: Path) -> None:
    stored = (body() + 1024).astype(np.int16)
    (tmp_path / "ct.nii").write_bytes(header(slope=1, inter=-1024, sform=LPS_SFORM) + stored.tobytes())
    result = volume(tmp_path / "ct.nii")
    np.testing.assert_array_equal(result.hu, body())
    assert result.rounding == 0.0
    for slope, inter in ((0.0, 7.0), (float("nan"), float("nan"))):  # slope 0 means: not scaled
        (tmp_path / "ct.nii").write_bytes(header(slope=slope, inter=inter, sform=LPS_SFORM) + body().tobytes())
        np.testing.assert_array_equal(volume(tmp_path / "ct.nii").hu, body())
    (tmp_path / "ct.nii").write_bytes(header(slope=0.25, inter=-1024, sform=LPS_SFORM) + stored.tobytes())
    result = volume(tmp_path / "ct.nii")
    np.testing.assert_array_equal(result.hu, np.rint(stored * 0.25 - 1024))
    assert result.rounding == pytest.approx(0.5)


def test_qform_is_used_without_sform_and_units_are_read(tmp_path: Path) -> None:
    quaternion = (0, 0, 1, 0, 0, 0)  # half a turn about z: RAS -> LPS
    (tmp_path / "ct.nii").write_bytes(header(qform=quaternion) + body().tobytes())
    result = volume(tmp_path / "ct.nii")
    np.testing.assert_array_equal(result.hu, body())
    assert result.spacing == pytest.approx(SPACING)
    metres = np.array(LPS_SFORM) / 1000
    (tmp_path / "ct.nii").write_bytes(header(sform=metres, units=1) + body().tobytes())
    assert volume(tmp_path / "ct.nii").spacing == pytest.approx(SPACING)


def test_floats_are_rounded_and_say_so(tmp_path: Path) -> None:
    hu = body(dtype=np.float32) + np.float32(0.25)
    result = volume(save(tmp_path / "ct.nii.gz", hu))
    np.testing.assert_array_equal(result.hu, body())
    assert result.rounding == pytest.approx(0.25)
    assert result.notes == ("float HU rounded to whole numbers, by at most 0.25",)


def test_metal_beyond_int16_is_cut_and_counted(tmp_path: Path) -> None:
    hu = body(dtype=np.int32)
    hu[0, 0, :3] = (40000, -50000, 27572)
    result = volume(save(tmp_path / "ct.nii.gz", hu))
    assert result.hu[0, 0, :3].tolist() == [32767, -32768, 27572]
    assert "2 voxels from -50000 to 40000 cut" in result.notes[0]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd", ".mha"])
def test_not_finite_is_refused_with_the_count(tmp_path: Path, value: float, ending: str) -> None:
    hu = body(dtype=np.float32)
    hu[1, 2, 3] = hu[4, 5, 6] = value
    assert "2 of 648 voxels are NaN or infinite" in refused(save(tmp_path / f"ct{ending}", hu), "not_finite")


def test_normalised_and_pet_floats_are_no_ct(tmp_path: Path) -> None:
    unit = np.random.default_rng(0).random(SHAPE, np.float32)
    assert "with fractions, so they are not HU" in refused(save(tmp_path / "a" / "x.nii.gz", unit), "not_ct")
    refused(save(tmp_path / "b" / "suv.nii.gz", unit * 22), "not_ct")


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".mha", ".nrrd", ".hdr"])
@pytest.mark.parametrize("lost", [1, 200])
def test_truncation_never_passes(tmp_path: Path, ending: str, lost: int) -> None:
    """ITK reads a cut NIfTI file without a word and makes the rest up."""
    path = save(tmp_path / f"ct{ending}")
    data = path.with_suffix(".img") if ending == ".hdr" else path
    data.write_bytes(data.read_bytes()[:-lost])
    with pytest.raises(VolumeError) as caught:
        volume(path)
    assert caught.value.reason in ("truncated", "unreadable")
    assert "again" in str(caught.value)


def test_flipped_bit_in_gzip_is_found(tmp_path: Path) -> None:
    path = save(tmp_path / "ct.nii.gz", body((30, 64, 64)))
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0x10
    path.write_bytes(raw)
    refused(path, "truncated")


def test_gzip_of_several_members_and_plain_content(tmp_path: Path) -> None:
    plain = save(tmp_path / "a" / "ct.nii").read_bytes()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "ct.nii.gz").write_bytes(gzip.compress(plain[:500]) + gzip.compress(plain[500:]))
    np.testing.assert_array_equal(volume(tmp_path / "b" / "ct.nii.gz").hu, body())
    (tmp_path / "b" / "ct.nii.gz").write_bytes(plain)  # never compressed
    np.testing.assert_array_equal(volume(tmp_path / "b" / "ct.nii.gz").hu, body())
    (tmp_path / "a" / "ct.nii").write_bytes(gzip.compress(plain))  # compressed without saying so
    np.testing.assert_array_equal(volume(tmp_path / "a" / "ct.nii").hu, body())


def test_shapes_that_are_no_volume(tmp_path: Path) -> None:
    one = sitk.JoinSeries([image(body())])
    assert one.GetDimension() == 4
    for ending in (".nii.gz", ".nrrd", ".mha"):
        folder = tmp_path / ending[1:]
        folder.mkdir()
        sitk.WriteImage(one, str(folder / f"one{ending}"))
        np.testing.assert_array_equal(volume(folder / f"one{ending}").hu, body())
        (folder / f"one{ending}").unlink()
        sitk.WriteImage(sitk.JoinSeries([image(body())] * 2), str(folder / f"two{ending}"))
        assert "12 x 9 x 6 x 2 voxels" in refused(folder / f"two{ending}", "4d")
        (folder / f"two{ending}").unlink()
        sitk.WriteImage(sitk.Compose([image(body())] * 2), str(folder / f"v{ending}"))
        refused(folder / f"v{ending}", "vector")
        (folder / f"v{ending}").unlink()
        sitk.WriteImage(image(body())[:, :, 0], str(folder / f"flat{ending}"))
        refused(folder / f"flat{ending}", "single_slice")


def test_slicer_segmentation_is_a_label_by_its_header(tmp_path: Path) -> None:
    made = image(body())
    made.SetMetaData("Segment0_ID", "liver")
    sitk.WriteImage(made, str(tmp_path / "ct.seg.nrrd"))
    refused(tmp_path / "ct.seg.nrrd", "label")


def test_without_orientation(tmp_path: Path) -> None:
    (tmp_path / "ct.nii").write_bytes(header() + body().tobytes())
    assert "neither qform nor sform" in refused(tmp_path / "ct.nii", "no_orientation")
    analyze = tmp_path / "analyze"
    analyze.mkdir()
    (analyze / "ct.hdr").write_bytes(header(magic=b"\0\0\0\0", offset=0.0)[:348])
    (analyze / "ct.img").write_bytes(body().tobytes())
    refused(analyze / "ct.hdr", "no_orientation")
    (analyze / "ct.img").unlink()
    assert "ct.img, are missing" in refused(analyze / "ct.hdr", "unreadable")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"hello" * 200, "unreadable"),
        (b"\x1f\x8b\x08 not gzip at all", "truncated"),
        (header((0, 5, 5), sform=LPS_SFORM), "unreadable"),
        (header((30000, 30000, 30000), sform=LPS_SFORM), "truncated"),
        (header(sform=LPS_SFORM, code=128) + body().tobytes(), "vector"),
        (header(sform=LPS_SFORM, offset=float("nan")) + body().tobytes(), "unreadable"),
        (header(sform=np.full((3, 4), np.nan)) + body().tobytes(), "no_orientation"),
        (header(qform=(0, 0, 1, 0, 0, 0), pixdim=(1, 0.8, 0.0, 2.5)) + body().tobytes(), "no_spacing"),
    ],
)
def test_damaged_headers(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "ct.nii.gz").write_bytes(content)
    refused(tmp_path / "ct.nii.gz", reason)


def test_walk_skips_and_counts_what_is_no_image(tmp_path: Path) -> None:
    save(tmp_path / "b" / "ct.nii.gz")
    save(tmp_path / "a" / "CT.mhd")
    for name in ("._ct.nii.gz", ".DS_Store", "notes.md", "table.csv", "b/pic.png", "__MACOSX/ct.nii.gz", ".git/ct.nii"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"\0")
    os.symlink(tmp_path, tmp_path / "a" / "loop")
    os.symlink(tmp_path / "nowhere", tmp_path / "a" / "broken.nii.gz")
    skipped: Counter[str] = Counter()
    found = list(find(tmp_path, skipped))
    assert [item.source for item in found] == ["a/CT.mhd", "a/broken.nii.gz", "b/ct.nii.gz"]
    assert skipped == {"hidden files": 2, ".md": 1, ".csv": 1, ".png": 1, ".raw": 1} | (
        {".zraw": 1, ".raw": 0} if (tmp_path / "a" / "CT.zraw").exists() else {}
    )
    with pytest.raises(VolumeError) as caught:
        read(found[1])
    assert caught.value.reason == "unreadable"


def test_linked_folder_outside_is_followed(tmp_path: Path) -> None:
    save(tmp_path / "store" / "ct.nii.gz")
    (tmp_path / "root").mkdir()
    os.symlink(tmp_path / "store", tmp_path / "root" / "linked")
    assert [item.source for item in find(tmp_path / "root")] == ["linked/ct.nii.gz"]


def test_locked_files_and_folders_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated, since the tests may run as root, whom nothing locks out."""
    save(tmp_path / "open" / "ct.nii.gz")
    (tmp_path / "open" / "IM1").write_bytes(b"x")
    (tmp_path / "locked").mkdir()
    list_folder = os.scandir

    def scandir(path: Any) -> Any:
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied")
        return list_folder(path)

    def locked(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", scandir)
    monkeypatch.setattr(Path, "open", locked)
    monkeypatch.setattr(Path, "read_bytes", locked)
    found = list(find(tmp_path))
    assert [item.source for item in found] == ["locked", "open/IM1", "open/ct.nii.gz"]
    for item in found:
        with pytest.raises(VolumeError, match="allow reading") as caught:
            read(item)
        assert caught.value.reason == "unreadable"


def test_errors_and_findings_travel_between_processes(tmp_path: Path) -> None:
    error = pickle.loads(pickle.dumps(VolumeError("4d", "two")))
    assert (error.reason, str(error)) == ("4d", "two")
    found = Found(tmp_path, (tmp_path,), "nifti", "x")
    assert pickle.loads(pickle.dumps(found)) == found


def test_itk_stays_quiet(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shown = sitk.ProcessObject.GetGlobalWarningDisplay()
    (tmp_path / "junk.nrrd").write_bytes(b"NRRD0004\nnonsense")
    (tmp_path / "junk.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"\xff" * 100)
    for found in find(tmp_path):
        with pytest.raises(VolumeError):
            read(found)
    assert capfd.readouterr().err == ""
    assert sitk.ProcessObject.GetGlobalWarningDisplay() == shown
