"""What a corpus would leave out is predicted all the same, on its own grid, and what is odd about it is told."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from scipy.spatial.transform import Rotation

from data_curation.grid import VolumeError
from downstream import dicom_seg, load, predict
from downstream.channels import ZSCORE, Channel
from downstream.geometry import HARDLY_CT, found_at, read_labelmap, read_scan
from downstream.images import read_image
from downstream.notes import add_notes, gathered_notes
from tests.data_curation.test_checks import ct
from tests.data_curation.test_dicom import only, slice_at, write
from tests.data_curation.test_dicom_frames import enhanced
from tests.downstream.random_models import CT, saved

MR = Channel(name="MR", kind="zscore", window=ZSCORE)


def run(folder: Path, channel: Channel = CT, **changes: Any) -> dict[str, str]:
    """Predicts folder/in; the notes of each label map in folder/out. Everything must have one."""
    model = saved(folder / "m.safetensors", channels=(channel,))
    given = {"folder": folder / "out", "model": model, "images": folder / "in", "device": "cpu"}
    assert predict.main(predict.Settings.model_validate(given | changes)).ok
    assert (folder / "out/refused.csv").read_text().splitlines() == ["image,reason,detail"]
    with (folder / "out/notes.csv").open(newline="") as file:
        return dict(list(csv.reader(file))[1:])


def series(folder: Path, places: list[float], lean: float = 0.0, **changes: Any) -> Path:
    slices = [slice_at(z, ImagePositionPatient=[-10, -20 + lean * z, z], **changes) for z in places]
    return write(folder, *slices)


def maps(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "out").iterdir() if path.name.endswith((".nii.gz", ".dcm")))


@pytest.mark.parametrize("kind", ["auto", "seg"])
def test_a_dicom_series_of_another_modality(tmp_path: Path, kind: str) -> None:
    series(tmp_path / "in", [0, 3, 6, 9], Modality="MR", SOPClassUID="1.2.840.10008.5.1.4.1.1.4")
    run(tmp_path, MR, dicom=kind)
    assert maps(tmp_path) == ["in.nii.gz" if kind == "auto" else "in.dcm"]


def test_slices_of_another_modality_that_are_no_volume_are_told(tmp_path: Path) -> None:
    mixed = [slice_at(0, Modality="MR"), slice_at(3, Modality="MR", ImageOrientationPatient=[0, 1, 0, 0, 0, -1])]
    with pytest.raises(VolumeError, match="not parallel"):
        read_image([only(write(tmp_path / "mixed", *mixed))], ["zscore"], ["MR"])
    lost = [slice_at(z, Modality="MR", ImagePositionPatient=None) for z in (0, 3)]
    with pytest.raises(VolumeError, match="no usable ImagePositionPatient"):
        read_image([only(write(tmp_path / "lost", *lost))], ["zscore"], ["MR"])


def test_a_hole_and_phases_in_a_series(tmp_path: Path) -> None:
    series(tmp_path / "in/hole", [0, 3, 6, 9, 12, 60, 63])
    slices = [slice_at(z, InstanceNumber=n + 1) for n, z in enumerate((0, 3, 6))]
    slices += [slice_at(z, InstanceNumber=n + 11, hu=np.full((40, 40), n, np.int16)) for n, z in enumerate((0, 3, 6))]
    for number, one in enumerate(slices):
        one.SeriesInstanceUID, one.SOPInstanceUID = "1.2.77", f"1.2.77.{number}"
    write(tmp_path / "in/phases", *slices)
    notes = run(tmp_path)
    assert maps(tmp_path) == ["hole.dcm", "phases.nii.gz"]
    assert "uneven slice spacing 3.00 to 48.00 mm" in notes["hole"]
    assert "3 slices of further phases left out" in notes["phases"]
    source = {pydicom.dcmread(path).SOPInstanceUID for path in (tmp_path / "in/hole").iterdir()}
    seg = pydicom.dcmread(tmp_path / "out/hole.dcm")
    told = {one.ReferencedSOPInstanceUID for one in seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence}
    assert told == source


@pytest.mark.parametrize("kind", ["auto", "nifti"])
def test_a_tilt_is_a_seg_or_a_sheared_nifti(tmp_path: Path, kind: str) -> None:
    series(tmp_path / "in", [0, 3, 6, 9], lean=0.4)
    notes = run(tmp_path, dicom=kind)["in"]
    assert "gantry tilt 21.8 degrees: slices kept as acquired" in notes
    assert ("sheared sform" in notes) == (kind == "nifti")
    assert maps(tmp_path) == ["in.dcm" if kind == "auto" else "in.nii.gz"]
    told = load(tmp_path / "m.safetensors")(tmp_path / "in")
    assert told.TransformIndexToPhysicalPoint((0, 0, 3)) == pytest.approx((-10, -20 + 0.4 * 9, 9))
    if kind == "nifti":
        assert np.array_equal(read_labelmap(tmp_path / "out/in.nii.gz").array, sitk.GetArrayFromImage(told))


def test_two_files_of_many_frames_cannot_be_a_seg(tmp_path: Path) -> None:
    """Each holds half of a stack that leans."""
    for half, places in enumerate(([0.0, 2.0, 4.0], [6.0, 8.0, 10.0])):
        data = enhanced(places, (0, 1, 2))
        data.SOPInstanceUID = f"1.2.9.{half}"
        for z, groups in zip(places, data.PerFrameFunctionalGroupsSequence, strict=True):
            groups.PlanePositionSequence[0].ImagePositionPatient = [-10, -20 + 0.4 * z, z]
        write(tmp_path / "in", data, names=f"{half}.dcm")
    notes = run(tmp_path)
    (name,) = maps(tmp_path)
    assert name.endswith(".nii.gz")
    (text,) = notes.values()
    assert "several multi-frame files" in text
    assert "sheared sform" in text
    label = read_labelmap(tmp_path / "out" / name)
    assert label.array.shape == (6, 40, 40)


ANONYMISED = {  # what a header says, and what an anonymiser made of it
    "PatientBirthDate": ("19010203", "19xx0203"),
    "StudyDate": ("20010203", "00000000"),
    "StudyTime": ("112233", "25:99:"),
    "PatientSex": ("UNKNOWN", "UNKNOWN"),
    "SliceThickness": ("345", "abc"),
    "SpecificCharacterSet": ("ISO_IR 100", "ISO_IR 999"),
}
MISSING = ("StudyInstanceUID", "SeriesInstanceUID", "SOPClassUID", "SOPInstanceUID", "SliceThickness")


@pytest.mark.parametrize("name", [*ANONYMISED, *(f"no {name}" for name in MISSING), "\\ISO 2022 IR 87"])
def test_a_seg_of_headers_that_anonymisers_leave(tmp_path: Path, name: str) -> None:
    good = {keyword: value for keyword, (value, _) in ANONYMISED.items()} | {"FrameOfReferenceUID": "1.2.8"}
    if name.startswith("\\"):
        good |= {"SpecificCharacterSet": name.split("\\"), "PatientName": "Yamada^Tarou=山田^太郎"}
    if name != "PatientSex":
        good["PatientSex"] = "O"
    for path in series(tmp_path / "in", [0, 3, 6], lean=0.4, **good).iterdir():
        if name.startswith("no "):
            data = pydicom.dcmread(path)
            delattr(data, name[3:])
            data.save_as(path)
        elif name in ANONYMISED:
            one, other = (text.encode() for text in ANONYMISED[name])
            assert one in path.read_bytes()
            path.write_bytes(path.read_bytes().replace(one, other))
    notes = run(tmp_path)["in"].removeprefix("gantry tilt 21.8 degrees: slices kept as acquired")
    assert maps(tmp_path) == ["in.dcm"]
    quiet = name in ("no SOPClassUID", "no SliceThickness", "SpecificCharacterSet") or name.startswith("\\")
    what = "drawn, missing in the series" if name.startswith("no ") else "left empty in the segmentation"
    assert notes == "" if quiet else f"; {name.removeprefix('no ')}: {what}" in notes
    seg = highdicom.seg.segread(tmp_path / "out/in.dcm")
    assert seg.number_of_segments == 2
    if name.startswith("\\"):
        assert str(seg.PatientName) == "Yamada^Tarou=山田^太郎"


def test_one_slice_without_a_thickness_gets_a_seg(tmp_path: Path) -> None:
    series(tmp_path / "in", [0], SliceThickness=None)
    run(tmp_path, dicom="seg")
    assert maps(tmp_path) == ["in.dcm"]


def test_what_a_library_stumbles_over_is_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    series(tmp_path / "in", [0, 3, 6])

    def broken(*_: object) -> None:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(dicom_seg, "_segmentation", broken)
    model = saved(tmp_path / "m.safetensors")
    given = predict.Settings(folder=tmp_path / "out", model=model, images=tmp_path / "in", dicom="seg", device="cpu")
    assert not predict.main(given).ok
    assert "no_seg,the series' headers make no segmentation (RuntimeError" in (tmp_path / "out/refused.csv").read_text()


@pytest.mark.parametrize("slices", [1, 3])
def test_few_oblique_slices_stay_as_acquired(tmp_path: Path, slices: int) -> None:
    image = sitk.GetImageFromArray(np.tile(ct((1, 64, 64)), (slices, 6, 6)))
    image.SetSpacing((0.8, 0.8, 3.0))
    image.SetDirection(Rotation.from_euler("x", 17, degrees=True).as_matrix().ravel().tolist())
    (tmp_path / "in").mkdir()
    sitk.WriteImage(image, str(tmp_path / "in/a.nii.gz"))
    scan = read_scan(found_at(tmp_path / "in/a.nii.gz"))
    assert scan.volume.hu.shape == (slices, 384, 384)
    assert "oblique by 17.0 degrees and thin: slices kept as acquired" in run(tmp_path)["a"]
    back = sitk.ReadImage(str(tmp_path / "out/a.nii.gz"))
    assert back.GetSize() == image.GetSize()
    assert np.allclose(back.GetDirection(), image.GetDirection())


def test_a_lost_intercept_is_put_back_and_what_is_hardly_ct_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hu = np.clip(ct(), -1024, 3000)
    mr = np.random.default_rng(0).integers(0, 900, hu.shape).astype(np.int16)
    picture = np.random.default_rng(0).integers(0, 255, hu.shape).astype(np.uint8)
    (tmp_path / "in").mkdir()
    for name, array in {"good": hu, "lost": hu + 1024, "mr": mr, "picture": picture, "mask": picture // 128}.items():
        image = sitk.GetImageFromArray(array)
        image.SetSpacing((3.0, 3.0, 5.0))
        sitk.WriteImage(image, str(tmp_path / f"in/{name}.nii.gz"))
    notes = run(tmp_path)
    assert set(notes) == {"lost", "mr", "picture", "mask"}
    assert notes["lost"] == "rescale intercept was missing: -1024 added to every voxel"
    for name in ("mr", "picture", "mask"):
        assert f"WARNING: {name}: {HARDLY_CT}, taken as it is: " in capsys.readouterr().out or HARDLY_CT in notes[name]
    good, lost = (read_labelmap(tmp_path / f"out/{name}.nii.gz").array for name in ("good", "lost"))
    assert np.array_equal(good, lost)
    segment = load(tmp_path / "m.safetensors")
    with pytest.warns(UserWarning, match="rescale intercept was missing"):
        assert np.array_equal(segment(hu + 1024, spacing=(5, 3, 3)), lost)
    with pytest.warns(UserWarning, match=HARDLY_CT):
        segment(mr, spacing=(5, 3, 3))


def test_notes_of_a_killed_run_are_kept_and_newer_ones_count(tmp_path: Path) -> None:
    add_notes(tmp_path, 0, "a", ("one", "two"))
    add_notes(tmp_path, 1, "b", ("old",))
    with (tmp_path / ".notes_1.csv").open("a") as file:
        file.write('c,"half of')
    assert gathered_notes(tmp_path) == {"a": "one; two", "b": "old"}
    add_notes(tmp_path, 0, "b", ())
    add_notes(tmp_path, 0, "d", ("new, with a comma",))
    assert gathered_notes(tmp_path) == {"a": "one; two", "d": "new, with a comma"}
    assert [path.name for path in tmp_path.iterdir()] == ["notes.csv"]
