"""A data-set folder is understood, or refused with the case, the value and the remedy, before anything is trained."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray

from data_curation.catalogue import CATALOGUE
from data_curation.folds import fold_of
from downstream.cases import CaseError, Split, case_name, open_dataset, split
from downstream.prepared import channel_windows, prepare, prepare_case, resample, target_size

V2 = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1, "tumour": 2}, "file_ending": ".nii.gz"}


def write(path: Path, array: NDArray[Any], spacing: tuple[float, ...] = (1.0, 2.0, 4.0), origin: float = 0.0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing)
    image.SetOrigin((origin, origin, origin))
    sitk.WriteImage(image, str(path))


def arrays(seed: int) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
    rng = np.random.default_rng(seed)
    hu = rng.integers(-900, 400, (6, 20, 16)).astype(np.int16)
    label = np.zeros((6, 20, 16), np.uint8)
    label[1:5, 4:12, 3:9], label[2:4, 6:9, 4:6] = 1, 2
    return hu, label


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "Dataset001_X"
    for seed in range(3):
        hu, label = arrays(seed)
        write(root / f"imagesTr/case_{seed}_0000.nii.gz", hu)
        write(root / f"labelsTr/case_{seed}.nii.gz", label)
    (root / "dataset.json").write_text(json.dumps({**V2, "numTraining": 3}))
    return root


def describe(folder: Path, **changes: Any) -> None:
    (folder / "dataset.json").write_text(json.dumps({**V2, **changes}))


def test_version_2_and_version_1_are_read_alike(folder: Path) -> None:
    two = open_dataset(folder)
    assert [case.name for case in two.cases] == ["case_0", "case_1", "case_2"]
    assert two.labels.values == (0, 1, 2)
    one = {"modality": {"0": "CT"}, "labels": {"0": "background", "1": "liver", "2": "tumour"}, "numTraining": 3}
    (folder / "dataset.json").write_text(json.dumps(one))
    assert open_dataset(folder).labels == two.labels


def test_regions_and_gaps_in_the_values(folder: Path) -> None:
    describe(folder, labels={"background": 0, "kidney": [1, 2, 7], "masses": [2, 7], "tumour": 2})
    labels = open_dataset(folder).labels
    assert labels.values == (0, 1, 2, 7)
    assert labels.organs["kidney"] == (1, 2, 7)
    assert labels.names == ("background", "label 1", "tumour", "label 7")


def test_images_without_a_channel_number_are_taken(folder: Path) -> None:
    for path in list((folder / "imagesTr").iterdir()):
        path.rename(path.with_name(path.name.replace("_0000.", ".")))
    assert len(open_dataset(folder).cases) == 3


def test_every_missing_file_is_told_at_once(folder: Path) -> None:
    (folder / "imagesTr/case_0_0000.nii.gz").unlink()
    (folder / "labelsTr/case_2.nii.gz").unlink()
    with pytest.raises(CaseError) as told:
        open_dataset(folder)
    assert "case_0: case_0.nii.gz has no image; put case_0_0000.nii.gz into" in str(told.value)
    assert "case_2: case_2_0000.nii.gz has no label; put case_2.nii.gz into" in str(told.value)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"numTraining": 9}, "numTraining 9, the folder has 3"),
        ({"labels": {"background": 0}}, "no label beside the background"),
        ({"labels": {"background": 0, "ignore": 9}}, "no label beside"),
        ({"labels": {"liver": 300}}, "'liver' has value 300"),
        ({"labels": {"liver": "one"}}, "neither a number"),
        ({"labels": ["liver"]}, "no table `labels`"),
        ({"channel_names": {"0": "CT", "1": "PET"}}, "no image of 1 of 2 channels; put case_0_0001.nii.gz"),
        ({"file_ending": ".mha"}, r"no case; imagesTr needs files CASE_0000\.mha"),
    ],
)
def test_a_wrong_dataset_json_is_named(folder: Path, changes: dict[str, Any], what: str) -> None:
    describe(folder, **changes)
    with pytest.raises(CaseError, match=what):
        open_dataset(folder)


def test_missing_folders_and_files(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CaseError, match=r"dataset\.json is not there"):
        open_dataset(tmp_path / "nowhere")
    (folder / "dataset.json").write_text("{")
    with pytest.raises(CaseError, match="not JSON"):
        open_dataset(folder)
    describe(folder)
    shutil.rmtree(folder / "labelsTr")
    with pytest.raises(CaseError, match=r"labelsTr is not a folder"):
        open_dataset(folder)
    (folder / "labelsTr").mkdir()
    with pytest.raises(CaseError, match="has no label"):
        open_dataset(folder)


def test_unknown_label_values_and_bad_files_are_told_for_all_cases(folder: Path, tmp_path: Path) -> None:
    label = arrays(0)[1]
    label[0, 0, 0] = 9
    write(folder / "labelsTr/case_0.nii.gz", label)
    write(folder / "labelsTr/case_1.nii.gz", arrays(1)[1], origin=4000.0)
    (folder / "imagesTr/case_2_0000.nii.gz").write_bytes(b"")
    dataset = open_dataset(folder)
    with pytest.raises(CaseError) as told:
        prepare(dataset.cases, dataset.labels, None, tmp_path / "cache", active=False)
    text = str(told.value)
    assert "3 of 3 cases cannot be used" in text
    assert "case_0: case_0.nii.gz holds label value(s) [9], dataset.json knows [0, 1, 2]" in text
    assert "case_1: case_1.nii.gz: label (around" in text
    assert "do not overlap" in text
    assert "case_2: " in text
    assert "0 bytes" in text


def test_preparing_keeps_hu_and_classes(folder: Path, tmp_path: Path) -> None:
    describe(folder, labels={"background": 0, "liver": 1, "tumour": 7})
    hu, label = arrays(0)
    write(folder / "labelsTr/case_0.nii.gz", np.where(label == 2, 7, label).astype(np.uint8))
    dataset = open_dataset(folder)
    case = prepare_case(dataset.cases[0], dataset.labels, None, tmp_path)
    found_hu, found_label = case.volume()
    assert np.array_equal(found_hu[0], hu)
    assert np.array_equal(found_label, label), "7 is class 2"
    assert case.spacing == (4.0, 2.0, 1.0)
    assert np.array_equal(case.counts.sum(0), np.bincount(label.ravel()))
    assert np.array_equal(case.slice(3)[0][0], hu[3])
    assert sum(case.histograms[0].values()) == np.count_nonzero(label)


def test_a_label_in_another_order_and_grid_is_brought_over(folder: Path, tmp_path: Path) -> None:
    label = arrays(0)[1]
    image = sitk.ReadImage(str(folder / "labelsTr/case_0.nii.gz"))
    turned = sitk.DICOMOrient(image, "PIR")
    sitk.WriteImage(turned[2:-1, 1:-1, 3:], str(folder / "labelsTr/case_0.nii.gz"))
    dataset = open_dataset(folder)
    case = prepare_case(dataset.cases[0], dataset.labels, None, tmp_path)
    assert np.array_equal(case.volume()[1], label), "only background was cut away"
    assert any("another grid" in note for note in case.notes)


def test_the_cache_is_used_checked_and_repaired(folder: Path, tmp_path: Path) -> None:
    dataset = open_dataset(folder)
    first = prepare(dataset.cases, dataset.labels, None, tmp_path, active=False)
    when = {case.name: case.path.stat().st_mtime_ns for case in first}
    again = prepare(dataset.cases, dataset.labels, None, tmp_path, active=False)
    assert {case.name: case.path.stat().st_mtime_ns for case in again} == when
    assert [(c.shape, c.spacing, c.histograms) for c in again] == [(c.shape, c.spacing, c.histograms) for c in first]
    first[0].path.write_bytes(first[0].path.read_bytes()[:500])
    write(folder / "labelsTr/case_1.nii.gz", np.zeros((6, 20, 16), np.uint8))
    after = prepare(dataset.cases, dataset.labels, None, tmp_path, active=False)
    assert np.array_equal(after[0].volume()[1], arrays(0)[1])
    assert after[1].counts[:, 1:].sum() == 0
    assert after[2].path.stat().st_mtime_ns == when["case_2"]
    coarse = prepare_case(dataset.cases[2], dataset.labels, 2.0, tmp_path)
    assert coarse.shape == (6, 20, 8)
    assert coarse.spacing == (4.0, 2.0, 2.0)
    assert not list(tmp_path.glob(".*"))


def test_new_voxels_beside_an_old_header_are_seen(folder: Path, tmp_path: Path) -> None:
    describe(folder, file_ending=".mhd")
    header = folder / "imagesTr/case_0_0000.mhd"
    write(header, arrays(0)[0])
    write(folder / "labelsTr/case_0.mhd", arrays(0)[1])
    for voxels, text in (("case_0_0000.zraw", None), ("deep er/other.raw", "ElementDataFile = deep er/other.raw\n")):
        if text:  # not compressed, and called otherwise than the header
            kept = [line for line in header.read_text().splitlines(True) if "Compressed" not in line]
            header.write_text("".join(kept[:-1]) + text)
            (header.parent / voxels).parent.mkdir()
            (header.parent / voxels).write_bytes(arrays(0)[0].tobytes())
        (case,) = [one for one in open_dataset(folder).cases if one.name == "case_0"]
        labels = open_dataset(folder).labels
        assert np.array_equal(prepare_case(case, labels, None, tmp_path).volume()[0][0], arrays(0)[0])
        shutil.copy2(header, tmp_path / "header")
        if not text:
            write(header, arrays(1)[0])
        else:
            (header.parent / voxels).write_bytes(arrays(1)[0].tobytes())
        shutil.copy2(tmp_path / "header", header)  # with its time
        assert np.array_equal(prepare_case(case, labels, None, tmp_path).volume()[0][0], arrays(1)[0])


def test_a_slice_damaged_after_the_start_is_named(folder: Path, tmp_path: Path) -> None:
    dataset = open_dataset(folder)
    case = prepare_case(dataset.cases[0], dataset.labels, None, tmp_path)
    raw = bytearray(case.path.read_bytes())
    start = raw.index(raw[-int(case.bounds[-1]) :]) + int(case.bounds[3])
    raw[start + 20] ^= 1
    case.path.write_bytes(raw)
    assert np.array_equal(case.slice(2)[0][0], arrays(0)[0][2])
    with pytest.raises(CaseError, match=r"case_0\.\w+\.safetensors: slice 3 is damaged"):
        case.slice(3)


def test_the_dataset_window_is_nnunets(folder: Path, tmp_path: Path) -> None:
    dataset = open_dataset(folder)
    (channel,) = channel_windows(prepare(dataset.cases, dataset.labels, None, tmp_path, active=False), ["CT"])
    window = channel.window
    values = np.concatenate([arrays(seed)[0][arrays(seed)[1] > 0] for seed in range(3)]).astype(float)
    assert window.mean == pytest.approx(values.mean())
    assert window.std == pytest.approx(values.std())
    assert window.low == pytest.approx(np.percentile(values, 0.5), abs=15)
    assert window.high == pytest.approx(np.percentile(values, 99.5), abs=15)


def test_resampling_keeps_edges_range_and_identity() -> None:
    hu = np.zeros((2, 40, 60), np.int16)
    hu[:, 10:30, 15:45] = 100
    assert resample(hu, (40, 60)) is hu
    small = resample(hu, (20, 30))
    assert small.shape == (2, 20, 30)
    assert small[:, 7:13, 10:20].min() >= 95
    assert resample(hu, (80, 90)).min() >= 0
    assert resample(hu, (80, 90)).max() <= 100
    assert target_size((512, 512), (0.78125, 0.78125), 0.4464) == (896, 896)
    assert target_size((512, 400), (0.5, 0.6), None) == (512, 400)


def test_folds_are_disjoint_whole_and_the_same_in_any_order() -> None:
    names = [f"c{i:03d}" for i in range(23)]
    held = [split(names, Split(fold=fold))[1] for fold in range(5)]
    assert sorted(name for part in held for name in part) == names
    assert {len(part) for part in held} == {4, 5}
    for part in held:
        train, val = split(names[::-1], Split(fold=held.index(part)))
        assert val == part
        assert not set(train) & set(val)
        assert sorted(train + val) == names
    assert len(split(names, Split(val_fraction=0.1))[1]) == 2
    assert split(names, Split(val=("c003",)))[1] == ["c003"]
    assert split(names, Split(val=()))[1] == []


@pytest.mark.parametrize(
    ("name", "spelt"), [("lits", "liver_{}"), ("kits23", "KiTS2023_{:05d}"), ("btcv", "img{:04d}")]
)
def test_the_default_fold_of_a_benchmark_is_what_curation_holds_out(name: str, spelt: str) -> None:
    numbers = [int(re.findall("[0-9]+", patient)[-1]) for patient in CATALOGUE[name].train_ids]
    held = {int(re.findall("[0-9]+", patient)[-1]) for patient in fold_of(CATALOGUE[name].train_ids)}
    assert set(split([spelt.format(n) for n in numbers], Split())[1]) == {spelt.format(n) for n in held}


def test_splits_that_cannot_be_made_are_refused() -> None:
    with pytest.raises(CaseError, match="'nobody'"):
        split(["a", "b"], Split(val=("nobody",)))
    with pytest.raises(CaseError, match="cannot make 5 folds"):
        split(["a", "b"], Split())
    with pytest.raises(CaseError, match="none is left"):
        split(["a", "b"], Split(val=("a", "b")))
    with pytest.raises(ValueError, match="not both"):
        Split(val=("a",), val_fraction=0.5)
    with pytest.raises(ValueError, match="fold 5"):
        Split(fold=5)


@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("a_0000.nii.gz", "a"),
        ("a.b.nrrd", "a.b"),
        ("amos_0001.nii.gz", "amos_0001"),
        ("dicom", "dicom"),
        ("a.mha", "a"),
        ("a.nhdr", "a"),
        ("a_0000.NII.GZ", "a"),
        ("A.Mha", "A"),
        ("deep/a.hdr", "a"),
    ],
)
def test_case_names(name: str, case: str) -> None:
    assert case_name(Path(name)) == case


def test_the_folder_one_stands_in_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "patient/series").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "patient/series")
    assert case_name(Path(".")) == "series"
    assert case_name(Path("..")) == "patient"
    assert case_name(Path("/"))


def test_endings_in_capitals_are_paired_too(folder: Path) -> None:
    for path in [*(folder / "imagesTr").iterdir(), *(folder / "labelsTr").glob("case_0*")]:
        path.rename(path.with_name(path.name.replace(".nii.gz", ".NII.GZ")))
    assert [case.name for case in open_dataset(folder).cases] == ["case_0", "case_1", "case_2"]


def test_a_real_label_on_another_grid(real_ct: Path, tmp_path: Path) -> None:
    (tmp_path / "imagesTr").mkdir()
    (tmp_path / "labelsTr").mkdir()
    shutil.copy(real_ct / "ts_cta/aorta_ct.nii.gz", tmp_path / "imagesTr/x_0000.nii.gz")
    shutil.copy(real_ct / "ts_cta/heart_mask_other_grid.nii.gz", tmp_path / "labelsTr/x.nii.gz")
    mask = sitk.ReadImage(str(tmp_path / "labelsTr/x.nii.gz"))
    values = np.unique(sitk.GetArrayFromImage(mask)).tolist()
    describe(tmp_path, labels={"background": 0, **{f"part{v}": v for v in values if v}})
    dataset = open_dataset(tmp_path)
    case = prepare_case(dataset.cases[0], dataset.labels, None, tmp_path)
    image = sitk.DICOMOrient(sitk.ReadImage(str(tmp_path / "imagesTr/x_0000.nii.gz")), "LPS")
    expected = sitk.GetArrayFromImage(sitk.Resample(mask, image, sitk.Transform(), sitk.sitkNearestNeighbor))
    agree = np.count_nonzero((case.volume()[1] > 0) == (expected > 0)) / expected.size
    assert expected.any()
    assert agree > 0.9999
