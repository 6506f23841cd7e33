"""Several channels, regions, ignored voxels and nnU-Net's own tables, from dataset.json to the cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray

from data_curation.volumes import Found, VolumeError, find
from downstream.cases import IGNORE, CaseError, Dataset, Split, open_dataset, read_labels, split
from downstream.channels import SCALE, ZSCORE, Channel
from downstream.context import Context
from downstream.geometry import found_at
from downstream.images import read_image
from downstream.prepared import Prepared, channel_windows, prepare, prepare_case
from launch.settings import load
from pretrain.data.window import HuWindow

SPACING = (1.5, 1.25, 4.0)


def write(
    path: Path, array: NDArray[Any], spacing: tuple[float, ...] = SPACING, origin: tuple[float, ...] = (5, -7, 30)
) -> sitk.Image:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    sitk.WriteImage(image, str(path))
    return image


def arrays(seed: int) -> tuple[NDArray[np.int16], NDArray[np.float32], NDArray[np.uint8]]:
    """CT, another channel, label values with some to ignore (9)."""
    rng = np.random.default_rng(seed)
    hu = rng.integers(-900, 400, (6, 20, 16)).astype(np.int16)
    pet = rng.gamma(2.0, 1.7, (6, 20, 16)).astype(np.float32)
    label = np.zeros((6, 20, 16), np.uint8)
    label[1:5, 4:12, 3:9], label[2:4, 6:9, 4:6], label[5] = 1, 2, 9
    return hu, pet, label


def describe(folder: Path, **changes: Any) -> None:
    described = {
        "channel_names": {"0": "CT", "1": "PET"},
        "labels": {"background": 0, "liver": 1, "tumour": 2, "ignore": 9},
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps({**described, **changes}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "Dataset002_PetCt"
    for seed in range(3):
        hu, pet, label = arrays(seed)
        write(root / f"imagesTr/case_{seed}_0000.nii.gz", hu)
        write(root / f"imagesTr/case_{seed}_0001.nii.gz", pet)
        write(root / f"labelsTr/case_{seed}.nii.gz", label)
    describe(root)
    return root


def prepared(dataset: Dataset, cache: Path, spacing: float | None = None) -> list[Prepared]:
    return prepare(dataset.cases, dataset.labels, spacing, cache, active=False, channels=dataset.channels)


def test_two_channels_and_an_ignore_label_reach_the_cache(folder: Path, tmp_path: Path) -> None:
    dataset = open_dataset(folder)
    assert dataset.channels == ("CT", "PET")
    assert dataset.labels.ignore == 9
    assert dataset.labels.values == (0, 1, 2)
    case = prepared(dataset, tmp_path / "cache")[0]
    hu, pet, label = arrays(0)
    stored, classes = case.volume()
    assert stored.shape == (2, 6, 20, 16)
    assert np.array_equal(stored[0], hu)
    wanted = (pet - pet.mean(dtype=np.float64)) / pet.std(dtype=np.float64)
    assert np.abs(stored[1] / SCALE - wanted).max() <= 0.51 / SCALE
    assert np.array_equal(classes, np.where(label == 9, IGNORE, label))
    assert np.array_equal(case.counts[:, 1], (label == 1).sum((1, 2)))
    assert case.counts[5].sum() == 0, "the last slice is to be ignored"
    foreground = (label > 0) & (label < 9)
    assert sum(case.histograms[0].values()) == foreground.sum()
    assert case.histograms[1] == {}
    one, marks = case.slice(3)
    assert np.array_equal(one, stored[:, 3])
    assert np.array_equal(marks, classes[3])
    coarse = prepared(dataset, tmp_path / "coarse", 2.5)[0]
    assert coarse.slice(0)[0].shape == (2, 10, 10)
    ct, other = channel_windows([case], dataset.channels)
    assert ct.window.mean == pytest.approx(hu[foreground].mean())
    assert (other.kind, other.window) == ("zscore", ZSCORE)


def test_a_channel_on_another_grid_is_brought_over_by_position(folder: Path, tmp_path: Path) -> None:
    dataset = open_dataset(folder)
    z, y, x = np.meshgrid(np.arange(9), np.arange(30), np.arange(30), indexing="ij")
    ramp = (10.0 * x + 3.0 * y + z).astype(np.float32)
    path = dataset.cases[0].images[1]
    image = write(path, ramp, (1.0, 1.0, 3.0), (4.0, -9.0, 28.0))
    sitk.WriteImage(sitk.DICOMOrient(image, "RIP"), str(path))
    kinds = ("zscore", "zscore")
    found = read_image([found_at(one) for one in dataset.cases[0].images], kinds, ("CT", "PET"))
    assert found.stored.shape == (2, 6, 20, 16)
    assert any("PET: lies on another grid" in note for note in found.scan.volume.notes)
    at = np.stack(np.meshgrid(np.arange(6), np.arange(20), np.arange(16), indexing="ij"), -1)[..., ::-1]
    mm = at * SPACING + (5, -7, 30)
    i, j, k = np.moveaxis((mm - (4, -9, 28)) / (1, 1, 3), -1, 0)
    expected = (10 * i + 3 * j + k - ramp.mean(dtype=np.float64)) / ramp.std(dtype=np.float64) * SCALE
    inside = (i <= 29) & (j <= 29) & (k <= 8)
    assert inside.mean() > 0.7
    assert np.abs(found.stored[1] - expected)[inside].max() < 1.5
    write(path, ramp, (1.0, 1.0, 3.0), (900.0, -9.0, 28.0))
    with pytest.raises(CaseError, match=r"case_0: .*channel PET covers 0% of CT"):
        prepare_case(dataset.cases[0], dataset.labels, None, tmp_path, dataset.channels)


def test_values_that_no_ct_has_are_read_as_another_kind_only(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    suv = rng.random((5, 9, 9)).astype(np.float32)
    write(tmp_path / "suv.nii.gz", suv)
    found = found_at(tmp_path / "suv.nii.gz")
    with pytest.raises(VolumeError, match="not HU"):
        read_image([found], ["ct"], ["CT"])
    stored = read_image([found], ["zscore"], ["MR"]).stored
    assert abs(float(stored.mean())) < 1
    assert float(stored.std()) == pytest.approx(SCALE, rel=1e-3)
    shifted = read_image([_written(tmp_path / "low.nii.gz", suv - 5000)], ["zscore"], ["MR"]).stored
    assert np.abs(shifted - stored).max() <= 4, "only float32's own rounding of the file"
    flat = read_image([_written(tmp_path / "flat.nii.gz", np.full_like(suv, 3))], ["zscore"], ["MR"])
    assert not flat.stored.any()
    assert "tells nothing" in flat.scan.volume.notes[0]
    suv[0, 0, 0] = np.nan
    with pytest.raises(VolumeError, match="1 voxels are NaN"):
        read_image([_written(tmp_path / "nan.nii.gz", suv)], ["zscore"], ["MR"])


def _written(path: Path, array: NDArray[Any]) -> Found:
    write(path, array)
    return found_at(path)


def test_an_oblique_mr_below_air_keeps_its_values(tmp_path: Path) -> None:
    """The rules of grids lift what lies below -1024 to air, which is right for CT alone."""
    x = np.broadcast_to(np.arange(20), (20, 20, 20))
    image = sitk.GetImageFromArray((x * 20.0 - 9000).astype(np.float32))
    turn = sitk.Euler3DTransform((0, 0, 0), 0.0, 0.0, 0.3)
    image.SetDirection(turn.GetMatrix())
    sitk.WriteImage(image, str(tmp_path / "a.nii.gz"))
    found = read_image([found_at(tmp_path / "a.nii.gz")], ["zscore"], ["MR"])
    middle = found.stored[0, 10, found.stored.shape[2] // 2]
    assert (np.diff(middle[8:-8].astype(int)) > 100).all(), "the ramp is there"


def test_real_ct_pet_and_mr_of_one_patient(real_ct: Path) -> None:
    folder = real_ct / "sts_002_multimodal"
    names = ("CT", "PET", "MR_T1")
    found = read_image([found_at(folder / f"{name}_image.nii.gz") for name in names], ("ct", "zscore", "zscore"), names)
    assert found.stored.shape == (3, 48, 143, 161)
    notes = " ".join(found.scan.volume.notes)
    assert "PET: lies on another grid" in notes
    assert "MR_T1: lies on another grid" in notes
    body = found.stored[0] > -300
    assert found.stored[1][body].mean() > found.stored[1][~body].mean() + 100, "uptake is in the body, not beside it"
    alone = read_image([found_at(folder / "CT_image.nii.gz")], ["ct"], ["CT"])
    assert np.array_equal(alone.stored[0], found.stored[0])


def test_an_mr_series_of_dicom_files_is_an_image(real_ct: Path) -> None:
    (found,) = find(real_ct / "edge_cases/mr_dicom_4slices")
    assert found.reason == "not_ct"
    assert read_image([found], ["zscore"], ["T1"]).stored.ndim == 4
    with pytest.raises(VolumeError, match="not CT"):
        read_image([found], ["ct"], ["CT"])


def test_missing_and_surplus_channels_are_named(folder: Path) -> None:
    (folder / "imagesTr/case_0_0001.nii.gz").unlink()
    (folder / "imagesTr/case_1_0001.nii.gz").rename(folder / "imagesTr/case_1_0002.nii.gz")
    (folder / "labelsTr/case_2.nii.gz").unlink()
    with pytest.raises(CaseError) as told:
        open_dataset(folder)
    text = str(told.value)
    assert "4 fault(s)" in text
    assert "case_0: case_0.nii.gz has no image of 1 of 2 channels; put case_0_0001.nii.gz" in text
    assert "put case_1_0001.nii.gz" in text
    assert "case_1_0002.nii.gz is a channel that dataset.json does not name, it names 0000 CT, 0001 PET" in text
    assert "case_2: case_2_0000.nii.gz has no label" in text


REGIONS = {"background": 0, "kidney": [1, 2, 3], "masses": [2, 3], "tumour": 2}


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"channel_names": {"0": "noNorm"}}, "'noNorm', a normalisation that is not supported"),
        ({"channel_names": {"0": "rgb_to_0_1"}}, "bring|brought to mean 0"),
        ({"channel_names": {"0": "CT", "2": "PET"}}, "numbered from 0"),
        ({"channel_names": ["CT"]}, "a table of numbers and names"),
        ({"file_ending": ".png"}, r"'\.png' is not read here"),
        ({"labels": {"background": 0, "a": 1, "b": 3, "ignore": 2}}, "3 is in use; it must be the highest value"),
        ({"labels": {"background": 0, "a": 1, "ignore": [2]}}, "it is one number"),
        ({"labels": {"background": 0, "a": 1.5}}, "neither a number"),
        ({"labels": {"background": 0, "a": 1, "ignore": 300}}, "use 0 to 255"),
        ({"labels": {"background": [0], "a": 1}}, "the background is the number 0"),
        ({"labels": {"0": "background", "1": "a", "2": "a"}}, "two labels are called 'a'"),
        ({"labels": REGIONS, "regions_class_order": [1, 3]}, r"2 value\(s\) for 3 organ\(s\)"),
        ({"labels": REGIONS, "regions_class_order": [0, 1, 3, 2]}, r"4 value\(s\) for 3 organ\(s\)"),
        ({"labels": REGIONS, "regions_class_order": [1, 2, 3]}, "writes 3 where 'tumour' is found"),
        ({"labels": REGIONS, "regions_class_order": 1}, "give a list"),
        ({"labels": REGIONS, "regions_class_order": ["x", 1, 2]}, "neither a number nor a list"),
        ({"dataset": ["case_0"]}, "is no table"),
        ({"dataset": {"case_0": {"images": "a", "label": "b"}}}, "its entry in `dataset`"),
        ({"dataset": {"a/b": {"images": ["a", "b"], "label": "c"}}}, "a/b: a case is called as its files will be"),
        ({"dataset": {"case_0": {"images": ["$AXIAL_NOWHERE/a.nii.gz"], "label": "b"}}}, "is not set"),
    ],
)
def test_a_wrong_dataset_json_is_named(folder: Path, changes: dict[str, Any], what: str) -> None:
    describe(folder, **changes)
    with pytest.raises(CaseError, match=what):
        open_dataset(folder)


def test_regions_with_an_order_are_the_networks_outputs(folder: Path) -> None:
    describe(folder, labels=REGIONS, regions_class_order=[1, 3, 2])
    labels = open_dataset(folder).labels
    assert labels.heads == ((1, 2, 3), (2, 3), (2,))
    assert labels.order == (1, 3, 2)
    assert labels.values == (0, 1, 2, 3)
    describe(folder, labels=REGIONS)
    labels = read_labels(folder / "dataset.json")
    assert labels.order == ()
    assert labels.heads == ((0,), (1,), (2,), (3,)), "without an order they exclude one another"
    describe(folder, labels={"background": 0, "a": 1, "b": 2}, regions_class_order=[1, 2])
    assert read_labels(folder / "dataset.json").order == (), "no region: nnU-Net does not read the order either"


def test_nnunets_table_of_paths_is_read(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELSEWHERE", str(tmp_path / "elsewhere"))
    (folder / "imagesTr").rename(tmp_path / "elsewhere")
    table = {
        f"patient {seed}": {
            "images": [f"$ELSEWHERE/case_{seed}_0000.nii.gz", f"../elsewhere/case_{seed}_0001.nii.gz"],
            "label": f"labelsTr/case_{seed}.nii.gz",
        }
        for seed in range(2)
    }
    describe(folder, dataset=table, numTraining=2)
    dataset = open_dataset(folder)
    assert [case.name for case in dataset.cases] == ["patient 0", "patient 1"]
    assert np.array_equal(prepared(dataset, tmp_path / "cache")[1].volume()[0][0], arrays(1)[0])
    describe(folder, dataset={**table, "gone": {"images": ["a.nii.gz", "b.nii.gz"], "label": "c.nii.gz"}})
    with pytest.raises(CaseError, match=r"gone: .*a\.nii\.gz.*b\.nii\.gz.*c\.nii\.gz is not there"):
        open_dataset(folder)


def test_nnunets_splits_are_followed(tmp_path: Path) -> None:
    names = ["a", "b", "c", "d"]
    path = tmp_path / "splits_final.json"
    path.write_text(json.dumps([{"train": ["a", "b"], "val": ["c"]}, {"train": ["c"], "val": ["a"]}]))
    assert split(names, Split(fold=1, folds=2), tmp_path) == (["c"], ["a"])
    assert split(names, Split(file=path, folds=2)) == (["a", "b"], ["c"]), "d is in neither"
    assert split(names, Split(val=("d",)), tmp_path)[1] == ["d"], "what is named goes before the file"
    with pytest.raises(CaseError, match=r"has 2 fold\(s\) and split\.folds is 5; set split\.folds=2"):
        split(names, Split(), tmp_path)
    with pytest.raises(CaseError, match="fold 0 names b, c, which"):
        split(["a", "d"], Split(folds=2), tmp_path)
    with pytest.raises(CaseError, match="is not there"):
        split(names, Split(file=tmp_path / "x.json", folds=2))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # as Windows' editors write it
    assert split(names, Split(fold=1, folds=2), tmp_path) == (["c"], ["a"])
    for text, what in (
        ('[{"train": ["a"], "val": ["a"]}]', "both to train on and to validate"),
        ('[{"train": [], "val": ["a"]}]', "no case to train on"),
        ('[{"train": ["a"]}]', "fold 0 is no"),
        ("[3]", "fold 0 is no"),
        ("{", "not JSON"),
    ):
        path.write_text(text)
        with pytest.raises(CaseError, match=what):
            split(names, Split(folds=1), tmp_path)


def test_a_bad_second_channel_is_told_under_its_own_name(folder: Path, tmp_path: Path) -> None:
    (folder / "imagesTr/case_0_0001.nii.gz").write_bytes(b"")
    with pytest.raises(VolumeError, match=r"^case_0: channel PET \(case_0_0001\.nii\.gz\): (?!.*_0000)"):
        prepare_case(open_dataset(folder).cases[0], open_dataset(folder).labels, None, tmp_path, ("CT", "PET"))


def test_only_ct_is_told_as_hu() -> None:
    window = HuWindow(low=-1000, high=1000, mean=0, std=500)
    assert Channel(window=window).said() == "HU -1000 to 1000, 0.0 becomes 0 and 500.0 one"
    assert Channel(name="MR", kind="zscore", window=ZSCORE).said() == (
        "each image's own mean becomes 0 and its deviation one"
    )
    assert Channel(name="MR", kind="zscore", window=window).said().startswith("thousandths of a deviation -1000 to")


def test_the_distance_of_neighbours_needs_neighbours() -> None:
    assert Context(slices=1, mm=3.0).size == 3
    with pytest.raises(ValueError, match=r"mm=3 .*set slices=1"):
        Context(mm=3.0)


def test_the_fold_is_a_number_or_all() -> None:
    assert load(Split, None, ["fold=all"]).fold == "all"
    for words in (["fold=al"], ["fold=-1"], ["fold=all", "val=[a]"], ["file=a", "val=[a]"], ["fold=7"]):
        with pytest.raises(ValueError, match=r"fold|not both"):
            load(Split, None, words)
    with pytest.raises(AssertionError):
        split(["a", "b"], Split(fold="all"))
