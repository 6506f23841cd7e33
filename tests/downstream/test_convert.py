"""Every catalogued set with labels becomes nnU-Net's raw format: nothing lost, moved, resampled or left unsaid."""

from __future__ import annotations

import csv
import gzip
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from data_curation.catalogue import CATALOGUE, VALIDATION, cases
from data_curation.folds import fold_of
from data_curation.nifti import load as load_nifti
from data_curation.phantom import make, write
from data_curation.phantom_files import numbered, write_nifti
from data_curation.volumes import find
from downstream.cases import RawCase, Split, open_dataset, split
from downstream.convert import REGIONS, ConvertError, Settings, dry_run, main
from downstream.convert_case import RECORDS
from downstream.geometry import Place, difference, found_at, lps, place_of, read_labelmap, read_scan, write_labelmap
from downstream.reading import read_case
from launch.cli import main as axial
from tests.data_curation.test_catalogue_entries import SHAPE, SPACING, TREES, grow

LABELLED = [name for name in CATALOGUE if name != "folder"]
LOST = {"lits": "30", "abdomenct_1k": "Case_00078"}  # of the trees, whose spacing is lost


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def settings(name: str, root: Path, folder: Path, **changes: Any) -> Settings:
    return Settings(name=name, root=root, folder=folder, **changes)


def files(folder: Path) -> dict[str, bytes]:
    """All that nnU-Net sees, and the accounts."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def seed_of(name: str, case: str) -> int:
    number = int(re.findall(r"\d+", case)[-1])
    return {1: 4, 2: 5, 3: 6}[number] if name == "chaos" else number


@pytest.mark.parametrize("name", LABELLED)
def test_every_catalogued_set_is_converted(name: str, tmp_path: Path) -> None:
    root, folder = tmp_path / "root", tmp_path / "Dataset007_X"
    root.mkdir()
    grow(name, root)
    main(settings(name, root, folder))
    dataset, entry, tree = open_dataset(folder), CATALOGUE[name], TREES[name]
    found, _ = cases(name, root)
    expected = {case.patient for case in found if case.patient not in tree.tested} - {LOST.get(name)}
    assert {case.name for case in dataset.cases} == {f"{name}_{p}" if p and p.isdigit() else p for p in expected}
    values = {organ: number for number, organ in (entry.labels or {}).items()}
    if not values:
        described = json.loads((folder / "dataset.json").read_text())["labels"]
        assert list(described) == ["background", *sorted(set(described) - {"background"})]
        plain = "_" if name == "totalsegmentator" else " "  # a phantom's own names, or those of the other two releases
        values = {organ.replace("_", plain): number for organ, number in described.items() if number}
    tests = sorted((folder / "imagesTs").iterdir()) if (folder / "imagesTs").is_dir() else []
    assert len(tests) == len(tree.tested)
    everything = [*dataset.cases]
    for image in tests:
        label = folder / "labelsTs" / image.name.replace("_0000.", ".")
        everything += [RawCase(image.name.split("_0000.")[0], (image,), label)] if label.is_file() else []
    for case in everything:
        phantom = make(seed_of(name, case.name), SHAPE, SPACING)
        read = read_case(case, ["CT"])
        truth = numbered(phantom, {number: organ for organ, number in values.items()})
        body = read.stored[0] > -3000  # WORD has padding outside the circle that the scanner sees
        assert np.array_equal(read.stored[0][body], phantom.hu[body])
        assert np.array_equal(read.label, np.where(body, truth, 0))
        label, image = read_labelmap(case.label), read_scan_of(case.images[0])
        assert not difference(label.place, image.own), "nnU-Net wants image and label on one grid, voxel by voxel"
    sources = {row["source"] for row in rows(folder / "refused.csv")} | {r["image"] for r in rows(folder / "cases.csv")}
    assert {case.source for case in found} <= sources, "what was found is converted, or refused with a reason"
    assert all(row["reason"] and row["detail"] for row in rows(folder / "refused.csv"))


def read_scan_of(path: Path) -> Any:
    return read_scan(found_at(path))


@pytest.mark.parametrize("name", ["kits23", "lits", "btcv", "amos22", "msd_liver"])
def test_fold_0_is_what_curation_holds_out(name: str, tmp_path: Path) -> None:
    ids = CATALOGUE[name].train_ids or tuple(f"amos_{n:04d}" for n in range(1, 40))
    every = sorted(ids, key=lambda one: int(re.findall(r"\d+", one)[-1]))[::11][:9]
    seeds = [int(re.findall(r"\d+", one)[-1]) for one in every]
    write(name, tmp_path / "root", seeds, (2, 8, 8), (60.0, 40.0, 40.0))
    main(settings(name, tmp_path / "root", tmp_path / "out"))
    found, _ = cases(name, tmp_path / "root")
    dataset = open_dataset(tmp_path / "out")
    names = [case.name for case in dataset.cases]
    held = split(names, Split(), tmp_path / "out")[1]
    patients = {one.removeprefix(f"{name}_") for one in held}
    bogus = CATALOGUE[name].bogus_spacing
    if CATALOGUE[name].benchmark:
        assert patients == {case.patient for case in found if case.held_out == VALIDATION} - bogus
    assert patients == (fold_of(CATALOGUE[name].train_ids or every) & set(every)) - bogus
    parts = [split(names, Split(fold=fold), tmp_path / "out")[1] for fold in range(5)]
    assert sorted(one for part in parts for one in part) == sorted(names)


def test_kits_has_the_regions_that_the_challenge_scores(tmp_path: Path) -> None:
    grow("kits23", tmp_path / "root")
    main(settings("kits23", tmp_path / "root", tmp_path / "out"))
    described = json.loads((tmp_path / "out/dataset.json").read_text())
    assert described["labels"] == {"background": 0, "kidney": [1, 2, 3], "masses": [2, 3], "tumour": 2}
    assert described["regions_class_order"] == [1, 3, 2]
    assert described["overwrite_image_reader_writer"] == "NibabelIOWithReorient", "slices lie along the first axis"
    labels = open_dataset(tmp_path / "out").labels
    assert labels.heads == tuple(REGIONS["kits23"].organs.values())
    known = CATALOGUE["kits23"].labels or {}
    assert {value for values in labels.heads for value in values} == set(known)


def test_files_are_linked_or_copied_as_they_are(tmp_path: Path) -> None:
    grow("msd_liver", tmp_path / "root")
    for link in (True, False):
        folder = tmp_path / f"link {link}"
        outcome = main(settings("msd_liver", tmp_path / "root", folder, link=link))
        assert [shlex.split(line)[2] for line in outcome.next] == [f"dataset={folder}"] * 2, "a shell can read them"
        for case in open_dataset(folder).cases:
            source = tmp_path / "root/Task03_Liver/imagesTr" / f"{case.name}.nii.gz"
            assert case.images[0].samefile(source) == link
            assert case.images[0].read_bytes() == source.read_bytes()
            assert case.label.samefile(source.parents[1] / "labelsTr" / source.name) == link
    linked = {path: data for path, data in files(tmp_path / "link_True").items() if RECORDS not in path}
    assert linked == {path: data for path, data in files(tmp_path / "link_False").items() if RECORDS not in path}


def test_mixed_endings_become_one(tmp_path: Path) -> None:
    grow("lits", tmp_path / "root")
    main(settings("lits", tmp_path / "root", tmp_path / "plain"))
    assert json.loads((tmp_path / "plain/dataset.json").read_text())["file_ending"] == ".nii"
    source = next((tmp_path / "root").rglob("volume-0.nii"))
    packed = gzip.compress(source.read_bytes())
    source.with_name("volume-0.nii.gz").write_bytes(packed)
    plain = source.read_bytes()
    source.unlink()
    main(settings("lits", tmp_path / "root", tmp_path / "mixed"))
    dataset = open_dataset(tmp_path / "mixed")
    assert {path.name for case in dataset.cases for path in case.images} == {
        "lits_0_0000.nii.gz",
        "lits_130_0000.nii.gz",
    }
    assert dataset.cases[0].images[0].read_bytes() == packed
    assert (
        gzip.decompress(dataset.cases[1].images[0].read_bytes())
        == next((tmp_path / "root").rglob("volume-130.nii")).read_bytes()
    )
    assert gzip.decompress(packed) == plain


def test_lost_spacing_is_refused_unless_wanted(tmp_path: Path) -> None:
    grow("lits", tmp_path / "root")
    main(settings("lits", tmp_path / "root", tmp_path / "out"))
    (row,) = [row for row in rows(tmp_path / "out/refused.csv") if row["reason"] == "unknown_spacing"]
    assert "volume-30" in row["source"]
    assert "set unknown_spacing=true" in row["detail"]
    main(settings("lits", tmp_path / "root", tmp_path / "all", unknown_spacing=True))
    assert "lits_30" in {case.name for case in open_dataset(tmp_path / "all").cases}


def test_organs_of_totalsegmentator_are_chosen_ordered_and_their_overlaps_told(tmp_path: Path) -> None:
    own = grow("totalsegmentator", tmp_path / "root")
    masks = own / "s0001/segmentations"
    phantom = make(1, SHAPE, SPACING)
    both = np.maximum(numbered(phantom, {1: "liver"}), numbered(phantom, {1: "stomach"}))
    write_nifti(both, phantom, masks / "stomach.nii.gz", "LPI")
    (own / "s1429/segmentations/stomach.nii.gz").unlink()
    main(settings("totalsegmentator", tmp_path / "root", tmp_path / "out", structures=("stomach", "liver")))
    dataset = open_dataset(tmp_path / "out")
    assert dict(dataset.labels.organs) == {"stomach": (1,), "liver": (2,)}
    found = read_case(dataset.cases[0], ["CT"]).label
    assert np.array_equal(found, both), "what both claim is the first one's"
    notes = {row["case"]: row["notes"] for row in rows(tmp_path / "out/cases.csv")}
    shared = np.count_nonzero(numbered(phantom, {1: "liver"}))
    assert f"stomach and liver share {shared:,} voxels, kept as stomach" in notes["s0001"]
    assert "stomach lies on another grid" in notes["s0001"]
    assert "no file of stomach: taken as absent" in notes["s1429"]
    with pytest.raises(ConvertError, match=r"no case has a file of livr; did you mean 'liver'"):
        main(settings("totalsegmentator", tmp_path / "root", tmp_path / "x", structures=("livr",)))
    (own / "meta.csv").unlink()
    with pytest.raises(ConvertError, match=r"meta\.csv is missing"):
        main(settings("totalsegmentator", tmp_path / "root", tmp_path / "x"))


def test_pictures_that_lie_the_other_way_are_turned_and_others_refused(tmp_path: Path) -> None:
    write("chaos", tmp_path / "root", [4, 5], (12, 48, 48), (14.0, 8.0, 8.0))
    ground = next((tmp_path / "root").rglob("1/Ground"))
    pictures = sorted(ground.iterdir())
    data = [path.read_bytes() for path in pictures]
    for path, one in zip(pictures, data[::-1], strict=True):
        path.write_bytes(one)
    main(settings("chaos", tmp_path / "root", tmp_path / "out"))
    dataset = open_dataset(tmp_path / "out")
    for seed, case in zip((4, 5), dataset.cases, strict=True):
        phantom = make(seed, (12, 48, 48), (14.0, 8.0, 8.0))
        assert np.array_equal(read_case(case, ["CT"]).label, numbered(phantom, {1: "liver"}))
    notes = {row["case"]: row["notes"] for row in rows(tmp_path / "out/cases.csv")}
    assert notes["chaos_1"] == "the pictures lie in reverse order: turned"
    assert notes["chaos_2"] == ""
    pictures[0].unlink()
    main(settings("chaos", tmp_path / "root", tmp_path / "out"))
    assert [case.name for case in open_dataset(tmp_path / "out").cases] == ["chaos_2"], "the old file is gone too"
    (row,) = [row for row in rows(tmp_path / "out/refused.csv") if row["reason"] == "label"]
    assert "11 pictures for 12 slices" in row["detail"]


@pytest.mark.parametrize("series", ["sts_002_multimodal/CT_dicom", "ge_head_tilt_dicom"])
def test_a_real_series_becomes_a_file_with_its_label_in_place(real_ct: Path, tmp_path: Path, series: str) -> None:
    """One of them is tilted, with slices at uneven distances."""
    root = tmp_path / "root"
    shutil.copytree(real_ct / series, root / "Pancreas-CT/PANCREAS_0001/study/series")
    (found,) = [one for one in find(root) if not one.reason]
    scan = read_scan(found)
    label = (scan.volume.hu > 200).astype(np.uint8)
    (root / "labels").mkdir()
    write_labelmap(root / "labels/label0001.nii.gz", label[::-1, :, ::-1], turned(scan.place))
    main(settings("pancreas_ct", root, tmp_path / "out"))
    (case,) = open_dataset(tmp_path / "out").cases
    image, found_label = load_nifti(case.images[0]), read_labelmap(case.label)
    assert image.voxels.dtype == np.int16
    assert np.array_equal(image.voxels, scan.volume.hu), "as acquired, in LPS, also where it is tilted"
    assert np.array_equal(found_label.array, label)
    for place in (place_of(image), found_label.place):
        assert place.size == scan.place.size
        assert np.abs(place.corners - scan.place.corners).max() < 1e-2


def turned(place: Place) -> Place:
    """The same grid counted from the other end along x and z."""
    last = place.position(np.array([place.size[0] - 1.0, 0.0, place.size[2] - 1.0]))
    return Place(place.size, np.column_stack([place.affine[:, :3] * (-1, 1, -1), last]))


def test_bad_cases_are_listed_and_the_others_go_on(tmp_path: Path) -> None:
    grow("amos22", tmp_path / "root")
    phantom = make(4, SHAPE, SPACING)
    image = next((tmp_path / "root").rglob("imagesTr/amos_5001.nii.gz"))
    image.write_bytes(image.read_bytes()[:-40])
    label = next((tmp_path / "root").rglob("labelsTr/amos_0410.nii.gz"))
    write_nifti(np.full(SHAPE, 99, np.uint8), phantom, label)
    main(settings("amos22", tmp_path / "root", tmp_path / "out"))
    assert [case.name for case in open_dataset(tmp_path / "out").cases] == ["amos_0004"]
    told = {Path(row["source"]).name: row for row in rows(tmp_path / "out/refused.csv")}
    assert told["amos_5001.nii.gz"]["reason"] == "truncated"
    assert "label value(s) [99]" in told["amos_0410.nii.gz"]["detail"]
    next((tmp_path / "root").rglob("labelsTr/amos_0004.nii.gz")).unlink()
    with pytest.raises(ConvertError, match=r"none of 3 case\(s\)"):
        main(settings("amos22", tmp_path / "root", tmp_path / "other"))
    assert "unlabelled" in (tmp_path / "other/refused.csv").read_text()


def test_a_label_on_another_grid_is_brought_onto_its_images(tmp_path: Path) -> None:
    grow("btcv", tmp_path / "root")
    label = next((tmp_path / "root").rglob("label0001.nii.gz"))
    turned = sitk.DICOMOrient(sitk.ReadImage(str(label)), "PIR")
    sitk.WriteImage(turned[1:, :, :], str(label))
    main(settings("btcv", tmp_path / "root", tmp_path / "out", link=True))
    case = open_dataset(tmp_path / "out").cases[0]
    image, found = read_scan_of(case.images[0]), read_labelmap(case.label)
    assert not difference(found.place, image.own)
    truth = numbered(make(1, SHAPE, SPACING), CATALOGUE["btcv"].labels or {})
    assert np.array_equal(read_case(case, ["CT"]).label[:, 1:], truth[:, 1:])
    assert "on another grid" in rows(tmp_path / "out/cases.csv")[0]["notes"]
    assert not label.samefile(case.label)
    assert lps(image.own).size == lps(found.place).size


def test_what_cannot_be_converted_is_refused_with_the_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grow("btcv", tmp_path / "root")
    with pytest.raises(ConvertError, match="knows no labels"):
        main(settings("folder", tmp_path / "root", tmp_path / "out"))
    with pytest.raises(ConvertError, match="choose a folder beside it"):
        main(settings("btcv", tmp_path / "root", tmp_path / "root/out"))
    with pytest.raises(ConvertError, match="has label maps: leave it out"):
        main(settings("btcv", tmp_path / "root", tmp_path / "out", structures=("liver",)))
    assert "3 cases to train on, 1 of the official test set" in dry_run(
        settings("btcv", tmp_path / "root", tmp_path / "out")
    )
    assert not (tmp_path / "out").exists()
    words = [f"root={tmp_path / 'root'}", f"folder={tmp_path / 'out'}"]
    assert axial(["convert", "btvc", *words]) == 2
    assert "did you mean 'btcv'" in capsys.readouterr().err
    assert axial(["convert", "btcv", *words, "lnik=true"]) == 2
    assert "did you mean 'link'" in capsys.readouterr().err
    assert axial(["convert", "btcv", *words]) == 0
    assert "next: axial plan dataset=" in capsys.readouterr().out
    assert axial(["convert", "btcv", *words, "unknown_spacing=true"]) == 2
    assert "other settings" in capsys.readouterr().err
