"""How a tree is taken apart: places, tables, patients; and what happens when a root is not what it is said to be."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import data_curation.catalogue
from data_curation.catalogue import CatalogueError, cases
from data_curation.dataset import TEST_SET

TREES = {  # files of a faked tree; images, held out, patients that `cases` must find in it
    "msd_liver": ("Task03_Liver", "liver"),
    "msd_lung": ("Task06_Lung", "lung"),
    "msd_pancreas": ("Task07_Pancreas", "pancreas"),
    "msd_hepatic_vessel": ("Task08_HepaticVessel", "hepaticvessel"),
    "msd_spleen": ("Task09_Spleen", "spleen"),
    "msd_colon": ("Task10_Colon", "colon"),
}


def touch(root: Path, *names: str, content: bytes = b"x") -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def dicom(root: Path, *folders: str, modality: str = "CT", patient: str = "") -> Path:
    import numpy as np
    import SimpleITK as sitk

    for folder in folders:
        (root / folder).mkdir(parents=True, exist_ok=True)
        for index in range(3):
            image = sitk.GetImageFromArray(np.zeros((1, 8, 8), np.int16))
            image.SetOrigin((0, 0, 2.0 * index))
            tags = {"0008|0060": modality, "0020|000e": f"1.2.{len(folder)}", "0020|000d": "1.3", "0010|0020": patient}
            for key, value in (tags | {"0008|0008": "ORIGINAL\\PRIMARY\\AXIAL"}).items():
                image.SetMetaData(key, value)
            writer = sitk.ImageFileWriter()
            writer.KeepOriginalImageUIDOn()
            writer.SetFileName(str(root / folder / f"IM{index}.dcm"))
            writer.Execute(image)
    return root


@pytest.mark.parametrize(("name", "folder", "stem"), [(name, *tree) for name, tree in TREES.items()])
@pytest.mark.parametrize("given", ["parent", "own"])
def test_decathlon(tmp_path: Path, name: str, folder: str, stem: str, given: str) -> None:
    touch(
        tmp_path / folder,
        *(f"{part}/{stem}_{number}.nii.gz" for number in ("001", "12") for part in ("imagesTr", "labelsTr")),
        f"imagesTs/{stem}_3.nii.gz",
        f"imagesTr/._{stem}_001.nii.gz",
        "dataset.json",
    )
    touch(tmp_path, "Task01_BrainTumour/imagesTr/BRATS_001.nii.gz", "Task02_Heart/imagesTr/la_003.nii.gz")
    root = tmp_path if given == "parent" else tmp_path / folder
    prefix = f"{folder}/" if given == "parent" else ""
    found, refused = cases(name, root)
    assert [case.source for case in found] == [
        f"{prefix}imagesTr/{stem}_001.nii.gz",
        f"{prefix}imagesTr/{stem}_12.nii.gz",
        f"{prefix}imagesTs/{stem}_3.nii.gz",
    ]
    assert [case.patient for case in found] == [f"{stem}_001", f"{stem}_12", f"{stem}_3"]
    assert [case.held_out for case in found if case.label is None] == ["official test set"]
    assert found[0].label == tmp_path / folder / f"labelsTr/{stem}_001.nii.gz"
    assert found[2].label is None
    assert all(case.dataset == name and case.image.source == case.source for case in found)
    assert len({case.series for case in found}) == 3
    assert {reason for _, reason, _ in refused} == {"not_image"}


def test_decathlon_tells_orphans_and_strangers(tmp_path: Path) -> None:
    touch(tmp_path, "imagesTr/liver_0.nii.gz", "labelsTr/liver_9.nii.gz", "imagesTr/la_003.nii.gz")
    found, refused = cases("msd_liver", tmp_path)
    assert [case.label for case in found] == [None]
    assert {(source, reason) for source, reason, _ in refused} == {
        ("labelsTr/liver_9.nii.gz", "label"),
        ("imagesTr/la_003.nii.gz", "outside_layout"),
    }


def totalsegmentator(root: Path) -> Path:
    for name in ("s0001", "s0002", "s0864"):
        touch(root, f"{name}/ct.nii.gz", f"{name}/segmentations/liver.nii.gz", f"{name}/segmentations/aorta.nii.gz")
    table = "\ufeffimage_id;age;split\ns0001;50;train\ns0002;60;test\ns0864;70;train\n"
    (root / "meta.csv").write_text(table, encoding="utf-8")
    return root


def test_totalsegmentator(tmp_path: Path) -> None:
    found, refused = cases("totalsegmentator", totalsegmentator(tmp_path))
    assert [(case.patient, case.held_out) for case in found] == [("s0001", ""), ("s0002", "official test set")]
    assert found[0].label == tmp_path / "s0001" / "segmentations"
    assert [(source, reason) for source, reason, _ in refused] == [
        ("s0864/ct.nii.gz", "known_bad"),
        ("s0864/segmentations", "label"),
        ("*.csv", "not_image"),
    ]


def test_totalsegmentator_without_or_with_another_table(tmp_path: Path) -> None:
    totalsegmentator(tmp_path)
    (tmp_path / "meta.csv").unlink()
    found, refused = cases("totalsegmentator", tmp_path)
    assert [case.patient for case in found] == ["s0001", "s0002"]
    assert all("put that file beside the cases" in case.held_out for case in found)  # any may be a test case
    assert [reason for source, reason, _ in refused if source == "meta.csv"] == ["no_split"]
    (tmp_path / "meta.csv").write_text("image_id,split\ns0001,test\n")
    with pytest.raises(CatalogueError, match=r"meta\.csv: expected columns image_id and split"):
        cases("totalsegmentator", tmp_path)


def test_chaos(tmp_path: Path) -> None:
    dicom(tmp_path, "Train_Sets/CT/1/DICOM_anon", "Train_Sets/CT/21/DICOM_anon", "Test_Sets/CT/3/DICOM_anon")
    dicom(tmp_path, "Train_Sets/MR/2/T1DUAL/DICOM_anon/InPhase", modality="MR")
    touch(tmp_path, "Train_Sets/CT/1/Ground/liver_GT_000.png")
    found, refused = cases("chaos", tmp_path)
    assert {case.patient: (case.held_out, case.label) for case in found} == {
        "1": ("", tmp_path / "Train_Sets/CT/1/Ground"),
        "21": ("", None),
        "3": ("official test set", None),
    }
    assert {(source, reason) for source, reason, _ in refused} == {
        ("Train_Sets/MR/2/T1DUAL/DICOM_anon/InPhase", "not_ct"),
        ("*.png", "not_image"),
    }


def test_folder_names_patients(tmp_path: Path) -> None:
    touch(tmp_path, "alone.nii.gz", "P1/a/ct.nii.gz", "P1/b.mha", "imagesTr/case_7.nii.gz", "train/P2/ct.nrrd")
    dicom(tmp_path, "P3/study/series")
    dicom(tmp_path, "mixed", patient="ANON 5")
    found, refused = cases("folder", tmp_path)
    assert refused == []
    assert {case.source: case.patient for case in found} == {
        "alone.nii.gz": "alone",
        "P1/a/ct.nii.gz": "P1",
        "P1/b.mha": "P1",
        "imagesTr/case_7.nii.gz": "case_7",
        "train/P2/ct.nrrd": "P2",
        "P3/study/series": "P3",
        "mixed": "ANON 5",
    }
    assert {case.label for case in found} == {None}


def test_order_does_not_depend_on_the_file_system(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{name}/ct.nii.gz" for name in ("b", "a", "c", "B")))
    found, _ = cases("folder", tmp_path)
    assert [case.source for case in found] == ["B/ct.nii.gz", "a/ct.nii.gz", "b/ct.nii.gz", "c/ct.nii.gz"]


def test_a_wrong_root_says_what_was_expected_and_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(CatalogueError, match=r"does not exist; expected a folder with Task09_Spleen/imagesTr"):
        cases("msd_spleen", tmp_path / "none")
    touch(tmp_path, "file.txt")
    with pytest.raises(CatalogueError, match="is a file"):
        cases("folder", tmp_path / "file.txt")
    with pytest.raises(CatalogueError, match=r"no CT image found below .*; found file\.txt \(1 \.txt\)"):
        cases("folder", tmp_path)
    touch(tmp_path, "s0001/ct.nii.gz")
    with pytest.raises(CatalogueError, match=r"found file\.txt, s0001/ \(1 outside_layout, 1 \.txt\)"):
        cases("msd_spleen", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CatalogueError, match="an empty folder"):
        cases("chaos", tmp_path / "empty")
    with pytest.raises(CatalogueError, match="no data set is called 'litz'"):
        cases("litz", tmp_path)


def test_the_17th_entry_of_the_readme_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[2] / "data_curation" / "README.md").read_text()
    (block,) = re.findall(r"```py\n(.*?)```", text, flags=re.DOTALL)
    made: dict[str, Any] = {}
    exec(block, made)
    (entry,) = made["DATASETS"]
    monkeypatch.setattr(data_curation.catalogue, "CATALOGUE", {entry.name: entry})
    touch(tmp_path, "images/liver_0001.nii.gz", "labels/liver_0001.nii.gz", "test/liver_0900.nii.gz")
    found, refused = cases("ours", tmp_path)
    assert [(case.patient, case.held_out) for case in found] == [("liver_0001", ""), ("liver_0900", TEST_SET)]
    assert found[0].label == tmp_path / "labels" / "liver_0001.nii.gz"
    assert refused == []
