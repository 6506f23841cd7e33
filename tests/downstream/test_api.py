"""`from downstream import load`: the same label map whatever the image comes as."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from data_curation import phantom
from data_curation.volumes import VolumeError
from downstream import load, predict
from downstream.cases import CaseError
from downstream.channels import ZSCORE, Channel
from downstream.model import ModelError
from tests.downstream.random_models import CT, saved

REPOSITORY = Path(__file__).resolve().parents[2]
SPACING = (20.0, 7.0, 8.0)


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    (path,) = phantom.write("nnunet", root, [0], shape=(6, 48, 40), spacing=SPACING, organs=["liver"])
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("model") / "model.safetensors", spacing=6.0)


def test_a_file_an_image_and_an_array_give_one_label_map(scan: Path, model: Path, tmp_path: Path) -> None:
    segment = load(model, device="cpu")
    assert segment.organs == {"liver": (1,), "spleen": (5,)}
    image = sitk.ReadImage(str(scan))
    told = segment(image)
    assert told.GetPixelID() == sitk.sitkUInt8
    for ask in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
        assert getattr(told, ask)() == getattr(image, ask)()
    expected = sitk.GetArrayFromImage(told)
    assert len(np.unique(expected)) > 1
    assert predict.main(predict.Settings(folder=tmp_path / "out", model=model, images=scan)).ok
    (written,) = (tmp_path / "out").glob("*.nii.gz")
    assert np.array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(written))), expected)
    for given in (scan, str(scan)):
        read = segment(given)
        assert np.array_equal(sitk.GetArrayFromImage(read), expected)
        assert np.allclose(read.GetOrigin(), image.GetOrigin(), atol=1e-4)
    lps = sitk.DICOMOrient(image, "LPS")
    array = segment(sitk.GetArrayFromImage(lps), spacing=lps.GetSpacing()[::-1])
    assert isinstance(array, np.ndarray)
    assert np.array_equal(array, sitk.GetArrayFromImage(sitk.DICOMOrient(told, "LPS")))
    floats = segment(sitk.GetArrayFromImage(lps).astype(np.float64), spacing=lps.GetSpacing()[::-1])
    assert np.array_equal(floats, array)


@pytest.mark.parametrize("order", ["RAS", "PIR", "LAS"])
def test_a_turned_image_is_told_the_same(scan: Path, model: Path, order: str) -> None:
    segment, image = load(model), sitk.ReadImage(str(scan))
    turned = sitk.DICOMOrient(image, order)
    own = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(image.GetDirection())
    back = sitk.DICOMOrient(segment(turned), own)
    assert np.array_equal(sitk.GetArrayFromImage(back), sitk.GetArrayFromImage(segment(image)))


def test_a_dicom_folder_and_one_slice(real_ct: Path, model: Path) -> None:
    segment = load(model, memory_gib=0.5, overlap=0.25)
    assert segment.window.memory_gib == 0.5
    told = segment(real_ct / "edge_cases/tiny16_axial_dicom")
    assert told.GetSize() == (16, 16, 5)
    with pytest.raises(VolumeError, match=r"uneven distances.*use axial predict with dicom=seg"):
        segment(real_ct / "edge_cases/irregular_spacing_noise_dicom")
    assert segment(real_ct / "edge_cases/dicom_seg_3slice").GetSize() == (512, 512, 3), "its SEG files are no images"
    with pytest.raises(CaseError, match=r"holds [0-9]+ images .*give one"):
        segment(real_ct / "sts_gtv")
    with pytest.warns(UserWarning, match="every voxel is 0"):
        assert segment(np.zeros((1, 20, 30), np.int16), spacing=(1, 1, 1)).shape == (1, 20, 30)


def test_several_channels(scan: Path, tmp_path: Path) -> None:
    pet = Channel(name="PET", kind="zscore", window=ZSCORE)
    segment = load(saved(tmp_path / "m.safetensors", channels=(CT, pet)))
    image = sitk.ReadImage(str(scan))
    by_image = sitk.GetArrayFromImage(segment([image, sitk.Cast(image, sitk.sitkFloat32)]))
    assert np.array_equal(sitk.GetArrayFromImage(segment([scan, scan])), by_image)
    with pytest.raises(CaseError, match=r"1 image\(s\) for a model of 2 channel\(s\): CT, PET"):
        segment(scan)


@pytest.mark.parametrize(
    ("image", "spacing", "what"),
    [
        (np.zeros((4, 5), np.int16), (1, 1, 1), r"an array \(4, 5\) of int16: numbers \[Z, Y, X\] in HU"),
        (np.zeros((4, 5, 6), bool), (1, 1, 1), "of bool"),
        (np.zeros((4, 5, 6), np.int16), None, r"spacing=None: an array needs its spacing=\(z, y, x\) in mm"),
        (np.zeros((4, 5, 6), np.int16), (1, 1), "needs its spacing"),
        (np.zeros((4, 5, 6), np.int16), (1, 0, 1), "needs its spacing"),
        (np.full((4, 5, 6), np.nan), (1, 1, 1), "NaN"),
        (sitk.Image(4, 5, sitk.sitkInt16), None, "three dimensions"),
        (sitk.Image([4, 5, 6], sitk.sitkVectorFloat32), None, "one value a voxel"),
        (sitk.Image(4, 5, 6, sitk.sitkInt16), (1, 1, 1), "this image has its own"),
        ("nowhere", None, "nowhere is not there"),
        (7, None, "int: a path, a SimpleITK.Image or a NumPy array is needed"),
    ],
)
def test_what_is_no_scan_is_told(model: Path, image: Any, spacing: Any, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        load(model)(image, spacing=spacing)


def test_models_and_settings_that_are_none(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file"):
        load(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="mirrored"):
        load(model, mirrored=True)


def test_importing_the_package_is_quick() -> None:
    """torch comes with the first model, not with the name."""
    code = "import sys; from downstream import load; assert 'torch' not in sys.modules and callable(load)"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)
