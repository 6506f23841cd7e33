"""`axial predict`: which images there are, what becomes of each, and that nothing is lost when it is stopped."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from pydantic import ValidationError

from data_curation import phantom
from downstream import predict
from downstream.cases import CaseError
from downstream.channels import ZSCORE, Channel
from downstream.ensemble import load_models, model_files
from downstream.inference import Window, predict_volume
from downstream.model import ModelError
from downstream.naming import cases, ending
from tests.downstream.random_models import CT, saved

REPOSITORY = Path(__file__).resolve().parents[2]
PET = Channel(name="PET", kind="zscore", window=ZSCORE)


def settings(folder: Path, model: Any, images: Path, **changes: Any) -> predict.Settings:
    return predict.Settings.model_validate({"folder": folder, "model": model, "images": images, **changes})


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def refused(folder: Path) -> list[list[str]]:
    with (folder / "refused.csv").open(newline="") as file:
        return list(csv.reader(file))[1:]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    phantom.write("nnunet", root, range(3), shape=(6, 48, 40), spacing=(20.0, 7.0, 8.0), organs=["liver"])
    return root / "imagesTr"


def test_a_folder_of_images_one_image_and_one_that_cannot_be_read(images: Path, tmp_path: Path) -> None:
    inside = tmp_path / "in"
    shutil.copytree(images, inside)
    whole = sorted(inside.iterdir())
    (inside / "cut_0000.nii.gz").write_bytes(whole[0].read_bytes()[:900])
    assert predict.main(settings(tmp_path / "out", saved(tmp_path / "m.safetensors"), inside)).ok
    assert {path.name for path in (tmp_path / "out").glob("*.nii.gz")} == {
        path.name.replace("_0000.nii", ".nii") for path in whole
    }
    assert [row[:2] for row in refused(tmp_path / "out")] == [["cut_0000.nii.gz", "truncated"]]
    got = sitk.ReadImage(str(tmp_path / "out" / whole[0].name.replace("_0000.nii", ".nii")))
    given = sitk.ReadImage(str(whole[0]))
    assert (got.GetSize(), got.GetSpacing(), got.GetOrigin(), got.GetDirection()) == (
        (given.GetSize(), given.GetSpacing(), given.GetOrigin(), given.GetDirection())
    )
    assert set(np.unique(sitk.GetArrayFromImage(got))) <= {0, 1, 5}
    assert predict.main(settings(tmp_path / "one", tmp_path / "m.safetensors", whole[0])).ok
    name = whole[0].name.replace("_0000.nii", ".nii")
    assert bytes_of(tmp_path / "one")[name] == bytes_of(tmp_path / "out")[name]


def test_several_models_are_a_folder_of_folds_or_a_list(images: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    for fold in range(2):
        saved(runs / f"fold_{fold}" / "model.safetensors", fold)
    listed = [runs / "fold_0", runs / "fold_1" / "model.safetensors"]
    assert predict.main(settings(tmp_path / "a", runs, images)).ok
    assert predict.main(settings(tmp_path / "b", listed, images)).ok
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")
    assert predict.main(settings(tmp_path / "one", listed[0], images)).ok
    assert bytes_of(tmp_path / "one").keys() == bytes_of(tmp_path / "a").keys()
    assert bytes_of(tmp_path / "one") != bytes_of(tmp_path / "a")
    ensemble = load_models(runs)
    case = next(images.iterdir())
    array = sitk.GetArrayFromImage(sitk.ReadImage(str(case)))
    stored = predict_volume(ensemble.models, ensemble.headers, array[None], (20.0, 7.0, 8.0))
    assert stored.shape == array.shape


def test_models_that_cannot_decide_together_are_told(tmp_path: Path) -> None:
    first = saved(tmp_path / "fold_0" / "model.safetensors")
    with pytest.raises(ModelError, match="named twice"):
        model_files([first, first])
    (tmp_path / "fold_1").mkdir()
    with pytest.raises(ModelError, match=r"fold_1 have no model\.safetensors yet; .* model=\[.*fold_0\]"):
        model_files(tmp_path)
    with pytest.raises(ModelError, match="has neither model"):
        model_files(tmp_path / "fold_1")
    with pytest.raises(ModelError, match="model= is empty"):
        model_files([])
    saved(tmp_path / "fold_1" / "model.safetensors", organs={"liver": (1,), "lungs": (5,)})
    with pytest.raises(ModelError, match=r"other organs than .*lungs"):
        load_models(tmp_path)
    with pytest.raises(ModelError, match="no such file"):
        load_models(tmp_path / "nothing.safetensors")


def test_another_model_or_a_data_set_is_no_input(images: Path, tmp_path: Path) -> None:
    one, two = (saved(tmp_path / f"{seed}.safetensors", seed) for seed in (1, 2))
    assert predict.main(settings(tmp_path / "out", one, images)).ok
    with pytest.raises(CaseError, match="holds label maps of another model"):
        predict.main(settings(tmp_path / "out", two, images))
    with pytest.raises(CaseError, match="is a data set with labels; give its imagesTs"):
        predict.main(settings(tmp_path / "out", one, images.parent))
    with pytest.raises(CaseError, match="nowhere is not there"):
        predict.main(settings(tmp_path / "out", one, tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CaseError, match="no image; "):
        predict.main(settings(tmp_path / "out", one, tmp_path / "empty"))
    with pytest.raises(ValidationError, match="dicom"):
        settings(tmp_path / "out", one, images, dicom="rtstruct")


def test_channels_come_from_their_files_and_what_lies_elsewhere_is_refused(images: Path, tmp_path: Path) -> None:
    model = saved(tmp_path / "m.safetensors", channels=(CT, PET))
    inside = tmp_path / "in"
    inside.mkdir()
    for case in sorted(images.iterdir())[:2]:
        scan = sitk.ReadImage(str(case))
        small = sitk.Resample(
            scan, [20, 24, 6], sitk.Transform(), sitk.sitkLinear, scan.GetOrigin(), [16.0, 14.0, 20.0]
        )
        if case == sorted(images.iterdir())[1]:
            small.SetOrigin((5000.0, 0.0, 0.0))
        shutil.copy(case, inside / case.name)
        sitk.WriteImage(small, str(inside / case.name.replace("_0000.nii", "_0001.nii")))
    assert predict.main(settings(tmp_path / "out", model, inside)).ok
    assert len(list((tmp_path / "out").glob("*.nii.gz"))) == 1
    ((_, reason, detail),) = refused(tmp_path / "out")
    assert reason == "channels"
    assert "channel PET covers 0% of CT" in detail


def test_probabilities_are_those_of_the_label_map(images: Path, tmp_path: Path) -> None:
    model = saved(tmp_path / "m.safetensors")
    turned = tmp_path / "in" / "turned.nii.gz"
    turned.parent.mkdir()
    scan = sitk.ReadImage(str(next(images.iterdir())))
    sitk.WriteImage(sitk.DICOMOrient(scan, "PIR"), str(turned))
    given = settings(tmp_path / "out", model, turned.parent, probabilities=True)
    assert predict.main(given).ok
    first = bytes_of(tmp_path / "out")
    with np.load(tmp_path / "out" / "turned.npz") as archive:
        found = archive["probabilities"]
    labels = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out" / "turned.nii.gz")))
    assert found.shape == (3, *labels.shape)
    assert np.allclose(found.sum(0), 1, atol=1e-5)
    assert np.array_equal(np.array([0, 1, 5])[found.argmax(0)], labels)
    (tmp_path / "out" / "turned.npz").unlink()
    assert predict.main(given).ok, "made again where one of the two is missing"
    assert bytes_of(tmp_path / "out") == first


def test_nnunets_tools_know_the_folder(images: Path, tmp_path: Path) -> None:
    regions = {"organs": {"kidney": (1, 2), "tumour": (2,)}, "values": (0, 1, 2), "order": (1, 2), "ignore": 3}
    assert predict.main(settings(tmp_path / "out", saved(tmp_path / "m.safetensors", **regions), images)).ok
    described = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert described["labels"] == {"background": 0, "kidney": [1, 2], "tumour": 2, "ignore": 3}
    assert described["regions_class_order"] == [1, 2]
    assert described["file_ending"] == ".nii.gz"
    assert described["channel_names"] == {"0": "CT"}
    assert json.loads((tmp_path / "out" / "plans.json").read_text())["label_manager"] == "LabelManager"


def test_a_killed_prediction_goes_on_and_ends_as_if_it_had_not_been(images: Path, tmp_path: Path) -> None:
    model = saved(tmp_path / "m.safetensors")
    inside = tmp_path / "in"
    inside.mkdir()
    for case in images.iterdir():
        for copy in range(8):
            shutil.copy(case, inside / case.name.replace("_0000.nii", f"_{copy}_0000.nii"))
    words = [f"model={model}", f"images={inside}", "window.overlap=0.9", "device=cpu"]
    code = "import sys; from launch.cli import main; sys.exit(main(sys.argv[1:]))"
    out = tmp_path / "out"
    child = subprocess.Popen([sys.executable, "-c", code, "predict", f"folder={out}", *words], cwd=REPOSITORY)
    try:
        until = time.monotonic() + 120
        while len(list(out.glob("*.nii.gz"))) < 3:
            assert child.poll() is None, "ended before it could be killed"
            assert time.monotonic() < until
            time.sleep(0.01)
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    made_before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.nii.gz")}
    assert len(made_before) < 24
    (out / ".4711.left.nii.gz").write_bytes(b"half a file of the killed one")
    window = Window(overlap=0.9)
    given = {folder: settings(tmp_path / folder, model, inside, window=window) for folder in ("out", "whole")}
    assert all(predict.main(each).ok for each in given.values())
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("*.nii.gz")}.items() >= made_before.items()
    ours, whole = (bytes_of(tmp_path / folder) for folder in ("out", "whole"))
    assert {name: ours[name] for name in whole} == whole
    assert not [name for name in ours if name.startswith(".")]


def voxels_lie_where_they_lay(mask: Path, image: Path) -> None:
    """To the last digit of the headers, byte for byte where the format is the same."""
    if image.name.endswith(".nii.gz"):
        import gzip

        one, two = (gzip.decompress(path.read_bytes())[:348] for path in (mask, image))
        for start, end in ((40, 56), (76, 108), (123, 124), (252, 328)):  # dim, pixdim, units, qform and sform
            assert one[start:end] == two[start:end]
        return
    one, two = (sitk.ReadImage(str(path)) for path in (mask, image))
    for ask in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
        assert np.allclose(getattr(one, ask)(), getattr(two, ask)(), rtol=0, atol=1e-12)


UNPLACED = {"edge_cases/irregular_spacing_noise_dicom"}  # no affine says where its slices lie


def test_real_scans_keep_their_geometry_or_are_refused(real_ct: Path, tmp_path: Path) -> None:
    with (real_ct / "MANIFEST.tsv").open() as file:
        listed = [row["path"] for row in csv.DictReader(file, delimiter="\t")]
    inside = tmp_path / "in"
    for path in listed:
        (inside / path).parent.mkdir(parents=True, exist_ok=True)
        (inside / path).symlink_to(real_ct / path)
    model = saved(tmp_path / "m.safetensors", spacing=8.0)
    assert predict.main(settings(tmp_path / "out", model, inside, dicom="nifti")).ok
    found, left = cases(inside)
    without = set()
    for name, (image,) in found.items():
        mask = tmp_path / "out" / (name + ending(image))
        if not mask.is_file():
            without.add(image.source or image.path.relative_to(inside).as_posix())
        elif image.kind != "dicom":
            voxels_lie_where_they_lay(mask, image.path)
    assert without >= UNPLACED
    reasons = {row[0]: row[1] for row in refused(tmp_path / "out")}
    assert {reasons[name] for name in UNPLACED} == {"misplaced"}
    assert len(reasons) == len(without) + len(left)
    assert len(found) - len(without) >= 24


@pytest.mark.slow
def test_two_thousand_slices_stay_within_the_memory_allowed(tmp_path: Path) -> None:
    """512 x 512 x 2000 under half a gibibyte beside the volume and its label map."""
    code = """
import resource, sys
import numpy as np
from downstream.inference import Window, predict_volume
from tests.downstream.random_models import made
volume = np.random.default_rng(0).integers(-300, 300, (1, 2000, 512, 512), dtype=np.int16)
model, header = made(patch=128, spacing=2.0)
predict_volume([model], header, volume[:, :2], (1.0, 0.5, 0.5))
before = int(open("/proc/self/statm").read().split()[1]) * 4096
open("/proc/self/clear_refs", "w").write("5")
labels = predict_volume([model], header, volume, (1.0, 0.5, 0.5), Window(memory_gib=0.5))
peak = next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(peak - before - labels.nbytes)
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True, env=environment
    )
    assert int(done.stdout) < 0.5 * 2**30 + 64 * 2**20
