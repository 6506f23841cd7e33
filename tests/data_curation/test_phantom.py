"""Phantoms: one patient a seed on any grid, true HU and labels, and files that read back as they were written."""

from __future__ import annotations

import json
from pathlib import Path

import imagecodecs
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk

from data_curation.phantom import ORGANS, PHASES, TISSUES, Phantom, make, write

SMALL = (10, 48, 48)
# The tissue whose mean an organ's median must show; kidney and spine are made of several.
TISSUE = {
    "liver": "liver",
    "spleen": "spleen",
    "pancreas": "pancreas",
    "aorta": "aorta",
    "inferior_vena_cava": "vein",
    "gallbladder": "bile",
    "stomach": "gut_fluid",
    "lungs": "lung",
}


def organ(phantom: Phantom, name: str) -> np.ndarray:
    return phantom.hu[phantom.labels == next(k for k, v in phantom.names.items() if v == name)]


def test_same_seed_same_bytes_other_seed_other_patient() -> None:
    one, again, other = make(3, SMALL), make(3, SMALL), make(4, SMALL)
    assert np.array_equal(one.hu, again.hu)
    assert np.array_equal(one.labels, again.labels)
    assert one.phase == again.phase
    assert (one.labels != other.labels).mean() > 0.02
    assert one.hu.dtype == np.int16
    assert one.labels.dtype == np.uint8


@pytest.mark.parametrize("phase", PHASES)
def test_hu_is_the_tissues(phase: str) -> None:
    phantom = make(5, phase=phase)
    column = PHASES.index(phase)
    assert phantom.phase == phase
    for name, tissue in TISSUE.items():
        assert np.median(organ(phantom, name)) == pytest.approx(TISSUES[tissue][column], abs=18), name
    low, high = sorted((TISSUES["renal_cortex"][column], TISSUES["renal_medulla"][column]))
    for name in ("kidney_right", "kidney_left"):
        assert low - 15 < np.median(organ(phantom, name)) < high + 15
    assert organ(phantom, "spine").max() > 500
    corner = phantom.hu[:, :12, :12]
    assert np.median(corner) == pytest.approx(-1000, abs=8)


def test_every_organ_is_there_and_patients_differ() -> None:
    volumes, liver = [], []
    for seed in range(20):
        phantom = make(seed, (32, 80, 80), (5.0, 4.4, 4.4), noise_hu=0.0)
        voxel = np.prod(phantom.spacing) / 1000
        ml = np.bincount(phantom.labels.ravel(), minlength=max(ORGANS) + 1) * voxel
        assert set(np.flatnonzero(ml)) == {0, *ORGANS}
        assert min(ml[1:]) > 8, (seed, ml)
        areas = (phantom.labels == 8).sum((1, 2))
        assert np.sqrt(np.median(areas[areas > 0])) * 4.4 / 2.2 > 6, "an aorta is at least 6 pixels wide at 160"
        volumes.append(ml)
        liver.append(np.argwhere(phantom.labels == 1).mean(0) * phantom.spacing)
    spread = np.std(volumes, axis=0) / np.mean(volumes, axis=0)
    assert (spread[1:] > 0.06).all()
    assert (np.std(liver, axis=0) > 2).all()


def test_labels_lie_on_their_tissue() -> None:
    """Away from edges a labelled voxel shows its own tissue: nothing was painted over it that left the label."""
    from scipy import ndimage

    phantom = make(8, noise_hu=0.0, phase="portal")
    for name in ("liver", "spleen", "aorta", "inferior_vena_cava"):
        label = next(k for k, v in phantom.names.items() if v == name)
        inside = phantom.hu[ndimage.binary_erosion(phantom.labels == label, iterations=2)]
        assert inside.size > 30
        wanted = TISSUES[TISSUE[name]][2]
        tolerance = 75 if name == "liver" else 22  # a liver holds its veins
        assert np.abs(inside - wanted).max() < tolerance, name


def test_a_patient_is_the_same_on_another_grid() -> None:
    coarse = make(2, (16, 80, 80), (8.0, 4.4, 4.4), noise_hu=0.0)
    fine = make(2, (48, 240, 240), (8 / 3, 4.4 / 3, 4.4 / 3), noise_hu=0.0)
    same = fine.labels[1::3, 1::3, 1::3] == coarse.labels
    assert same.mean() > 0.998  # the middle voxel of every 3 x 3 x 3 lies at the coarse voxel's centre
    either = (fine.labels[1::3, 1::3, 1::3] > 0) | (coarse.labels > 0)
    assert same[either].mean() > 0.99


def test_field_of_view_and_noise() -> None:
    near = make(1, (4, 64, 64), fov_mm=320.0)
    assert near.spacing == (5.0, 5.0, 5.0)
    clean, noisy = make(1, noise_hu=0.0), make(1, noise_hu=20.0)
    assert (noisy.hu.astype(int) - clean.hu)[clean.hu > -900].std() == pytest.approx(20, rel=0.25)


@pytest.mark.parametrize(
    "wrong", [{"shape": (0, 8, 8)}, {"spacing": (1.0, 0.0, 1.0)}, {"noise_hu": -1.0}, {"phase": "venous"}]
)
def test_wrong_requests_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"positive shape|none of native"):
        make(0, **{"shape": SMALL, **wrong})


@pytest.mark.parametrize("shape", [(1, 32, 32), (1, 1, 1)])
def test_one_slice_or_voxel_is_enough(shape: tuple[int, int, int]) -> None:
    assert make(0, shape).hu.shape == shape


def same_place(phantom: Phantom, path: Path, values: np.ndarray) -> None:
    """The file holds `values` [Z, Y, X] (LPS) at the same physical points, and as many voxels."""
    image = sitk.ReadImage(str(path)) if path.is_file() else read_series(path)
    straight = sitk.DICOMOrient(image, "LPS")
    corner = straight.GetOrigin()
    rng = np.random.default_rng(0)
    assert sorted(image.GetSize()) == sorted(values.shape)
    for z, y, x in rng.integers(0, values.shape, (200, 3)):
        point = [float(c + i * step) for c, i, step in zip(corner, (x, y, z), phantom.spacing[::-1], strict=True)]
        assert image[image.TransformPhysicalPointToIndex(point)] == values[z, y, x]


def read_series(folder: Path) -> sitk.Image:
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    return reader.Execute()


def test_folder_turns_the_axes_and_keeps_the_place(tmp_path: Path) -> None:
    seeds = [0, 1, 2, 3]
    paths = write("folder", tmp_path, seeds, SMALL)
    directions, spacings = set(), set()
    for seed, path in zip(seeds, paths, strict=True):
        image = sitk.ReadImage(str(path))
        spacing = sitk.DICOMOrient(image, "LPS").GetSpacing()[::-1]
        expected = make(seed, SMALL, spacing)
        same_place(expected, path, expected.hu)
        directions.add(image.GetDirection())
        spacings.add(spacing)
    assert len(directions) == len(spacings) == 4


def test_nnunet(tmp_path: Path) -> None:
    spacing = (16.0, 7.0, 7.0)
    made = write("nnunet", tmp_path, [0, 1, 2], SMALL, spacing, organs=["spleen", "liver"], tests=1)
    assert [str(p.relative_to(tmp_path)) for p in made] == [
        "imagesTr/phantom_0000_0000.nii.gz",
        "imagesTr/phantom_0001_0000.nii.gz",
        "imagesTs/phantom_0002_0000.nii.gz",
    ]
    described = json.loads((tmp_path / "dataset.json").read_text())
    assert described["labels"] == {"background": 0, "spleen": 1, "liver": 2}
    assert described["numTraining"] == 2
    assert described["channel_names"] == {"0": "CT"}
    phantom = make(1, SMALL, spacing)
    wanted = np.select([phantom.labels == 2, phantom.labels == 1], [1, 2], 0)
    same_place(phantom, made[1], phantom.hu)
    same_place(phantom, tmp_path / "labelsTr" / "phantom_0001.nii.gz", wanted)
    with pytest.raises(ValueError, match="no organ heart"):
        write("nnunet", tmp_path, [0], SMALL, spacing, organs=["heart"])


def test_msd(tmp_path: Path) -> None:
    spacing = (16.0, 7.0, 7.0)
    made = write("msd_spleen", tmp_path, [2, 3], SMALL, spacing, tests=1)
    described = json.loads((tmp_path / "Task09_Spleen" / "dataset.json").read_text())
    assert described["training"] == [{"image": "./imagesTr/spleen_2.nii.gz", "label": "./labelsTr/spleen_2.nii.gz"}]
    assert described["test"] == ["./imagesTs/spleen_3.nii.gz"]
    assert described["labels"] == {"0": "background", "1": "spleen"}
    phantom = make(2, SMALL, spacing)
    same_place(phantom, made[0], phantom.hu)
    same_place(phantom, tmp_path / "Task09_Spleen/labelsTr/spleen_2.nii.gz", phantom.labels == 2)
    assert (tmp_path / "Task09_Spleen/imagesTr/._spleen_2.nii.gz").is_file()


def test_kits_has_its_slices_along_the_first_stored_axis(tmp_path: Path) -> None:
    (image,) = write("kits23", tmp_path, [3], (6, 48, 40), (16.0, 7.0, 7.0))
    stored = sitk.ReadImage(str(image))
    assert stored.GetSize() == (6, 48, 40)
    assert stored.GetSpacing() == pytest.approx((16, 7, 7))
    phantom = make(3, (6, 48, 40), (16.0, 7.0, 7.0))
    same_place(phantom, image, phantom.hu)
    label = image.with_name("segmentation.nii.gz")
    same_place(phantom, label, np.isin(phantom.labels, (3, 4)))


def test_some_of_lits_has_lost_its_header(tmp_path: Path) -> None:
    whole, bare = write("lits", tmp_path, [27, 28], SMALL, (16.0, 7.0, 7.0))
    assert whole.parent.name == "Training Batch 1"
    assert bare.parent.name == "Training Batch 2"
    assert sorted(sitk.ReadImage(str(whole)).GetSpacing()) == pytest.approx([7, 7, 16])
    lost = sitk.ReadImage(str(bare))
    assert (lost.GetSpacing(), lost.GetOrigin()) == ((1, 1, 1), (0, 0, 0))
    assert lost.GetDirection() == (-1, 0, 0, 0, -1, 0, 0, 0, 1)  # the identity, in NIfTI's axes
    affine = np.frombuffer(bare.read_bytes()[280:328], np.float32).reshape(3, 4)
    assert np.array_equal(affine, np.eye(4)[:3])


def test_pancreas_ct_has_rows_from_back_to_front(tmp_path: Path) -> None:
    (folder,) = write("pancreas_ct", tmp_path, [7], SMALL, (16.0, 7.0, 7.0))
    phantom = make(7, SMALL, (16.0, 7.0, 7.0))
    same_place(phantom, folder, phantom.hu)
    files = [pydicom.dcmread(file) for file in sorted(folder.iterdir())]
    assert {tuple(file.ImageOrientationPatient) for file in files} == {(1, 0, 0, 0, -1, 0)}
    stored = files[4].pixel_array * float(files[4].RescaleSlope) + float(files[4].RescaleIntercept)
    assert np.array_equal(stored, phantom.hu[4, ::-1])
    label = tmp_path / "TCIA_pancreas_labels-02-05-2017/label0007.nii.gz"
    same_place(phantom, label, phantom.labels == 7)


def test_totalsegmentator(tmp_path: Path) -> None:
    spacing = (16.0, 7.0, 7.0)
    made = write("totalsegmentator", tmp_path, [7], SMALL, spacing)
    assert made == [tmp_path / "s0007" / "ct.nii.gz"]
    phantom = make(7, SMALL, spacing)
    same_place(phantom, made[0], phantom.hu)
    same_place(phantom, tmp_path / "s0007/segmentations/aorta.nii.gz", phantom.labels == 8)
    assert (tmp_path / "meta.csv").read_text(encoding="utf-8-sig").splitlines()[1].startswith("s0007;")


def test_chaos_is_valid_dicom_with_masks_in_file_order(tmp_path: Path) -> None:
    spacing = (16.0, 7.0, 7.0)
    made = write("chaos", tmp_path, [0, 1, 2], SMALL, spacing, tests=1)
    assert [str(p.relative_to(tmp_path)) for p in made] == [
        "Train_Sets/CT/1/DICOM_anon",
        "Train_Sets/CT/2/DICOM_anon",
        "Test_Sets/CT/3/DICOM_anon",
    ]
    assert not (tmp_path / "Test_Sets/CT/3/Ground").exists()
    identifiers = set()
    for seed, folder in enumerate(made[:2]):
        phantom = make(seed, SMALL, spacing)
        same_place(phantom, folder, phantom.hu)
        files = [pydicom.dcmread(file) for file in sorted(folder.iterdir())]
        heights = [float(file.ImagePositionPatient[2]) for file in files]
        assert heights == sorted(heights, reverse=bool(seed))
        assert len({file.SeriesInstanceUID for file in files}) == 1
        for i, file in enumerate(files):
            z = len(files) - 1 - i if seed else i
            assert (file.Modality, file.SOPClassUID.name, file.RescaleType) == ("CT", "CT Image Storage", "HU")
            assert list(file.ImageOrientationPatient) == [1, 0, 0, 0, 1, 0]
            assert (float(file.SliceThickness), list(file.PixelSpacing)) == (16.0, [7.0, 7.0])
            stored = file.pixel_array * float(file.RescaleSlope) + float(file.RescaleIntercept)
            assert np.array_equal(stored, phantom.hu[z])
            mask = imagecodecs.png_decode((folder.parent / "Ground" / f"liver_GT_{i:03d}.png").read_bytes())
            assert np.array_equal(mask == 255, phantom.labels[z] == 1)
            identifiers.add(file.SOPInstanceUID)
    assert len(identifiers) == 2 * SMALL[0]


def test_unknown_layouts_and_options_name_the_known(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="folder, nnunet, btcv, lits"):
        write("bids", tmp_path, [0])
    with pytest.raises(ValueError, match="layout chaos has no organs; it has tests"):
        write("chaos", tmp_path, [0], SMALL, organs=["liver"])
    with pytest.raises(ValueError, match="kits23 has no place of its own for test cases"):
        write("kits23", tmp_path, [0], SMALL, tests=1)
    with pytest.raises(ValueError, match="20 training and 20 test cases, asked for 0 and 21"):
        write("chaos", tmp_path, range(21), (1, 4, 4), tests=21)


def test_files_are_the_same_bytes_again(tmp_path: Path) -> None:
    for layout in ("folder", "chaos"):
        one = write(layout, tmp_path / "a" / layout, [1], SMALL)[0]
        again = write(layout, tmp_path / "b" / layout, [1], SMALL)[0]
        files = [one] if one.is_file() else sorted(one.iterdir())
        for file in files:
            twin = again if again.is_file() else again / file.name
            assert file.read_bytes() == twin.read_bytes()
