"""NIfTI, NRRD and MetaImage as they come: every orientation, every way of being damaged."""

from __future__ import annotations

import itertools
import os
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from data_curation.grid import Grid, to_lps
from data_curation.rules import Limits, oblique
from data_curation.volumes import Found, VolumeError, find, read
from tests.data_curation.reading import refused, volume

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


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".nrrd", ".mha", ".hdr", ".mhd", ".nhdr"])
def test_formats_hold_the_same_volume(tmp_path: Path, ending: str) -> None:
    result = volume(save(tmp_path / f"ct{ending}", orientation="RAS"))
    np.testing.assert_array_equal(result.hu, body())
    assert result.spacing == pytest.approx(SPACING, rel=1e-6)
    assert (result.rounding, result.notes, result.source) == (0.0, (), f"ct{ending}")
    assert result.hu.dtype == np.int16


@pytest.mark.parametrize("ending", [".NII.GZ", ".NII", ".MHA", ".NRRD"])
def test_upper_case_names(tmp_path: Path, ending: str) -> None:
    path = save(tmp_path / f"x{ending.lower()}")
    path.rename(tmp_path / f"CT{ending}")
    np.testing.assert_array_equal(volume(tmp_path / f"CT{ending}").hu, body())


def test_voxels_beside_a_header_are_part_of_the_image(tmp_path: Path) -> None:
    for ending, voxels in {".hdr": ".img", ".mhd": ".raw", ".nhdr": ".raw", ".mha": ""}.items():
        save(tmp_path / ending / f"ct{ending}")
        (found,) = find(tmp_path / ending)
        assert [path.suffix for path in found.files] == [ending, *([voxels] if voxels else [])]


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
    stored = Grid(field, np.column_stack([affine, made.GetOrigin()]))
    voxels, spacing, _ = to_lps(oblique.apply(stored, Limits()))
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


def test_absurd_spacing_is_not_resampled() -> None:
    axes = np.array(sitk.Euler3DTransform((0, 0, 0), 0.3, 0, 0).GetMatrix()).reshape(3, 3) * (0.7, 0.7, 9000.0)
    with pytest.raises(VolumeError, match="correct the spacing") as caught:
        oblique.apply(Grid(body(), np.column_stack([axes, np.zeros(3)])), Limits())
    assert caught.value.reason == "spacing"


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int32, np.uint32, np.float32, np.float64])
def test_every_number_type(tmp_path: Path, dtype: Any) -> None:
    hu = np.random.default_rng(0).integers(0, 120, SHAPE).astype(dtype)
    result = volume(save(tmp_path / "ct.nii.gz", hu))
    np.testing.assert_array_equal(result.hu, hu.astype(np.int16))
    assert result.rounding == 0.0


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


def test_header_without_its_voxels(tmp_path: Path) -> None:
    path = save(tmp_path / "ct.mhd")
    (voxels,) = (item for item in tmp_path.iterdir() if item != path)
    voxels.unlink()
    assert f"({voxels.name}) are missing" in refused(path, "unreadable")
    path.write_bytes(path.read_bytes().replace(voxels.name.encode(), b"LO\x02\xcd"))  # crashes ITK 5.4
    refused(path, "unreadable")
    nrrd = save(tmp_path / "n" / "ct.nhdr")
    for item in (tmp_path / "n").iterdir():
        if item != nrrd:
            item.unlink()
    refused(nrrd, "unreadable")


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
    assert [item.source for item in found] == ["a/broken.nii.gz", "a/CT.mhd", "b/ct.nii.gz"]
    assert skipped == {"hidden files": 2, ".md": 1, ".csv": 1, ".png": 1, ".raw": 1} | (
        {".zraw": 1, ".raw": 0} if (tmp_path / "a" / "CT.zraw").exists() else {}
    )
    with pytest.raises(VolumeError) as caught:
        read(found[0])
    assert caught.value.reason == "unreadable"


def test_pipes_and_self_links_do_not_hang(tmp_path: Path) -> None:
    save(tmp_path / "ct.nii.gz")
    os.mkfifo(tmp_path / "IM0001")
    os.symlink(tmp_path / "self.nii", tmp_path / "self.nii")
    assert {item.source: item.reason for item in find(tmp_path)} == {
        "IM0001": "unreadable",
        "self.nii": "unreadable",
        "ct.nii.gz": "",
    }


def test_names_that_are_no_text(tmp_path: Path) -> None:
    path = save(tmp_path / "ct.nii.gz")
    os.rename(path, os.fsencode(tmp_path) + b"/M\xfcller.nii.gz")
    (found,) = find(tmp_path)
    assert found.source == r"M\udcfcller.nii.gz"
    assert read(found).source.encode("utf-8")
    assert str(VolumeError("x", found.path.name)).encode("utf-8")


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
