"""Every entry of the catalogue: its facts, and phantoms in its layout found, read, held out and refused as they are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from data_curation.catalogue import CATALOGUE, VALIDATION, Case, cases, missing
from data_curation.dataset import TEST_SET
from data_curation.folds import fold_of
from data_curation.phantom import make, write
from data_curation.phantom_files import numbered
from data_curation.phantom_layouts import LAYOUTS
from data_curation.volumes import read

SHAPE, SPACING = (4, 24, 24), (30.0, 15.0, 15.0)


@dataclass(frozen=True)
class Tree:
    """Phantoms written in a layout, and the patients that must be found in it; the last of `tests` are test cases."""

    seeds: tuple[int, ...]
    patients: tuple[str, ...]
    tests: int | None = None  # what the writer is told; None: the layout has no such option
    tested: tuple[str, ...] = ()
    refused: frozenset[str] = frozenset()


def msd(stem: str, wide: str = "{:03d}") -> Tree:
    first, second, third = (f"{stem}_{wide.format(n)}" for n in (1, 9, 200))
    return Tree((1, 9, 200), (first, second, third), 1, (third,), frozenset({"not_image"}))


ATLAS = Tree((1, 5196, 12), ("BDMAP_00000001", "BDMAP_00005196", "BDMAP_00000012"))
TREES = {
    "folder": Tree((0, 1, 2), ("case_0000", "case_0001", "case_0002")),
    "btcv": Tree((1, 22, 40, 61), ("0001", "0022", "0040", "0061"), 1, ("0061",)),
    "pancreas_ct": Tree((2, 25, 82), ("0002", "0082"), refused=frozenset({"known_bad", "label"})),
    "chaos": Tree((4, 5, 6), ("1", "2", "3"), 1, ("3",), frozenset({"not_image"})),
    "lits": Tree((0, 30, 130, 5), ("0", "30", "130", "test-volume-5"), 1, ("test-volume-5",)),
    "kits23": Tree((0, 299, 588), ("case_00000", "case_00299", "case_00588"), 0),
    "word": Tree((2, 3, 60), ("word_0002", "word_0003", "word_0060"), 1, ("word_0060",)),
    "abdomenct_1k": Tree((1, 78, 297), ("Case_00001", "Case_00078", "Case_00297"), 0),
    "amos22": Tree(
        (4, 410, 507, 600, 5001, 5437, 20),
        ("amos_0004", "amos_0410", "amos_5001", "amos_0020"),
        1,
        ("amos_0020",),
        frozenset({"not_ct", "known_bad", "label"}),
    ),
    "msd_liver": msd("liver", "{}"),
    "msd_lung": msd("lung"),
    "msd_pancreas": msd("pancreas"),
    "msd_hepatic_vessel": msd("hepaticvessel"),
    "msd_spleen": msd("spleen", "{}"),
    "msd_colon": msd("colon"),
    "ct_org": Tree((0, 20, 21, 139), ("0", "20", "21", "139"), 0, ("0", "20")),
    "totalsegmentator": Tree(
        (1, 184, 1429, 9), ("s0001", "s1429", "s0009"), 1, ("s0009",), frozenset({"known_bad", "label", "not_image"})
    ),
    "abdomenatlas_1_0_mini": ATLAS,
    "abdomenatlas_1_1_mini": ATLAS,
    "abdomenatlas_3_0_mini": ATLAS,
}
LOOSE = [name for name in CATALOGUE if name != "folder"]


def grow(
    name: str,
    root: Path,
    shape: tuple[int, int, int] = SHAPE,
    spacing: tuple[float, float, float] = SPACING,
) -> Path:
    """The phantoms of TREES below `root`, as they lie after unpacking; returns the data set's own folder."""
    tree, own = TREES[name], CATALOGUE[name].folder
    options = {} if tree.tests is None else {"tests": tree.tests}
    unpacked = root if own and name != "totalsegmentator" else root / (own or "data")
    write(name, unpacked, tree.seeds, shape, spacing, **options)
    return root / (own or "data")


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """By name the root and the data set's own folder. Not to be written to."""
    found = {}
    for name in CATALOGUE:
        root = tmp_path_factory.mktemp(name)
        found[name] = (root, grow(name, root))
    return found


@pytest.mark.parametrize("name", CATALOGUE)
def test_facts_are_complete(name: str) -> None:
    one = CATALOGUE[name]
    assert one.name == name
    assert one.title
    assert one.tree
    assert one.places
    assert one.licence == one.licences[0].text
    assert all(stated.text and stated.source for stated in one.licences)
    free = one.licence.startswith("CC BY") and not any(word in one.licence for word in ("NC", "ND", "terms"))
    assert one.commercial == free
    assert one.redistribution == (
        one.licence.startswith("CC BY") and not any(w in one.licence for w in ("ND", "terms"))
    )
    for number, organ in (one.labels or {}).items():
        assert number > 0
        assert organ
    if one.anything:
        return
    assert one.home_page.startswith("http")
    assert one.doi.startswith("10.")
    assert one.citation
    assert one.links
    assert all(link.name and link.url.startswith("https://") for link in one.links)
    assert one.counts is not None
    assert 0 < one.counts.of <= one.counts.train + one.counts.test
    assert one.counts.slices > 20 * one.counts.of
    for ids, count in ((one.train_ids, one.counts.train), (one.test_ids, one.counts.test)):
        assert len(ids) == len(set(ids))
        assert not ids or len(ids) == count
    assert not set(one.train_ids) & set(one.test_ids)
    assert not set(one.train_ids) & set(one.known_bad or {})
    assert one.bogus_spacing <= set(one.train_ids)
    assert {other for other, _ in one.overlaps} <= set(CATALOGUE) - {name}
    assert {target.partition("/")[0] for _, target in one.same} <= set(CATALOGUE) - {name}


def test_every_entry_has_a_layout_and_a_tree() -> None:
    assert set(LAYOUTS) == {*CATALOGUE, "nnunet"}
    assert set(TREES) == set(CATALOGUE)


@pytest.mark.parametrize("name", CATALOGUE)
def test_a_download_is_found_from_its_folder_and_from_the_one_above(
    name: str, grown: dict[str, tuple[Path, Path]]
) -> None:
    tree, (above, own) = TREES[name], grown[name]
    listings = []
    for root in (above, own):
        found, refused = cases(name, root)
        assert sorted(case.patient for case in found) == sorted(tree.patients)
        assert {case.patient for case in found if case.held_out == TEST_SET} == set(tree.tested)
        assert {reason for _, reason, _ in refused} == tree.refused
        assert len({(case.patient, case.study, case.series) for case in found}) == len(found)
        assert len({case.source for case in found}) == len(found)
        assert all((root / case.source).exists() and case.image.source == case.source for case in found)
        assert all(case.dataset == name for case in found)
        assert all(case.same_as[:1] == (f"{name}/{case.patient}",) for case in found if name != "folder")
        listings.append([(case.patient, case.held_out, case.label) for case in found])
    assert listings[0] == listings[1]


def by_seed(name: str, found: list[Case]) -> dict[int, Case]:
    tree = TREES[name]
    kept = [seed for seed in tree.seeds if seed not in (25, 184, 507, 600, 5437)]
    return dict(zip(kept, sorted(found, key=lambda case: tree.patients.index(case.patient)), strict=True))


@pytest.mark.parametrize("name", CATALOGUE)
def test_it_reads_as_the_phantom_that_was_written(name: str, grown: dict[str, tuple[Path, Path]]) -> None:
    """Whatever axes, rows and headers the layout stores it with."""
    one = CATALOGUE[name]
    for seed, case in by_seed(name, cases(name, grown[name][1])[0]).items():
        phantom, volume = make(seed, SHAPE, SPACING), read(case.image)
        y, x = (np.linspace(-1, 1, n) for n in SHAPE[1:])
        seen = np.broadcast_to((np.hypot(y[:, None], x) <= 1) | (name != "word"), SHAPE)
        assert np.array_equal(volume.hu[seen], phantom.hu[seen])
        assert name != "word" or (volume.hu[~seen] == -3024).all()
        lost = case.patient in one.bogus_spacing
        assert volume.spacing == pytest.approx((1.0, 1.0, 1.0) if lost else SPACING, abs=1e-4)
        if case.label is not None and case.label.is_file():
            label = sitk.GetArrayFromImage(sitk.DICOMOrient(sitk.ReadImage(str(case.label)), "LPS"))
            assert np.array_equal(label[seen], numbered(phantom, one.labels or {})[seen])
            assert not label[~seen].any()
        assert (case.label is None) == (name == "folder" or (case.patient in tree_without_labels(name)))


def tree_without_labels(name: str) -> tuple[str, ...]:
    """Test cases whose labels are not given out."""
    return () if name in ("word", "ct_org", "totalsegmentator") else TREES[name].tested


@pytest.mark.parametrize("name", LOOSE)
def test_a_missing_part_is_named(name: str, tmp_path: Path) -> None:
    tree = TREES[name]
    root = grow(name, tmp_path)
    first = next(case for case in cases(name, root)[0] if case.label is not None)
    before = missing(name, cases(name, root)[0])
    for file in first.image.files:
        file.unlink()
    found, refused = cases(name, root)
    assert sorted(case.patient for case in found) == sorted(set(tree.patients) - {first.patient})
    if name != "chaos":  # whose labels are PNG files, which nobody looks at
        assert "a label without its image: fetch the image" in {detail for _, _, detail in refused}
    known = first.patient in (*CATALOGUE[name].train_ids, *CATALOGUE[name].test_ids)
    assert set(missing(name, found)) - set(before) == ({first.patient} if known else set())


@pytest.mark.parametrize("name", ["lits", "kits23", "btcv"])
def test_the_fold_of_a_known_benchmark_does_not_depend_on_what_is_there(
    name: str, grown: dict[str, tuple[Path, Path]]
) -> None:
    one = CATALOGUE[name]
    assert one.benchmark
    fold = fold_of(one.train_ids)
    assert len(fold) == -(-len(one.train_ids) // 5)
    found, _ = cases(name, grown[name][1])
    assert {case.patient for case in found if case.held_out == VALIDATION} == fold & set(TREES[name].patients)


def test_the_fold_of_amos_is_of_the_labelled_ct_scans(tmp_path: Path) -> None:
    write("amos22", tmp_path, [*range(1, 12), 507, 20], (1, 8, 8), (30.0, 40.0, 40.0), tests=1)
    bare = tmp_path / "amos22_unlabeled_ct_5000_5399" / "amos_5000.nii.gz"
    bare.parent.mkdir()
    bare.write_bytes((tmp_path / "amos22/imagesTr/amos_0001.nii.gz").read_bytes())
    found, _ = cases("amos22", tmp_path)
    fold = fold_of([f"amos_{n:04d}" for n in range(1, 12)])
    assert len(fold) == 3
    held = {case.patient: case.held_out for case in found if case.held_out}
    assert held == {**dict.fromkeys(fold, VALIDATION), "amos_0020": TEST_SET}


def test_ties_hold_between_data_sets_and_carry_what_is_held_out(tmp_path: Path) -> None:
    names: dict[str, Case] = {}
    for name, seeds in (
        ("lits", range(0, 131, 2)), ("msd_liver", range(131)), ("abdomenct_1k", (297, 928)),
        ("abdomenatlas_1_0_mini", (7,)), ("abdomenatlas_3_0_mini", (7,)),
    ):  # fmt: skip
        root = tmp_path / name
        for path in write(name, root, [seeds[0]], (1, 8, 8), (30.0, 40.0, 40.0)):
            content = path.read_bytes()
        template = {
            "lits": "Training Batch 2/volume-{}.nii", "msd_liver": "Task03_Liver/imagesTr/liver_{}.nii.gz",
            "abdomenct_1k": "Part/Case_{:05d}_0000.nii.gz", "abdomenatlas_1_0_mini": "BDMAP_{:08d}/ct.nii.gz",
            "abdomenatlas_3_0_mini": "image_only/BDMAP_{:08d}/ct.nii.gz",
        }[name]  # fmt: skip
        for n in seeds[1:]:
            (root / template.format(n)).parent.mkdir(parents=True, exist_ok=True)
            (root / template.format(n)).write_bytes(content)
        names |= {f"{name}/{case.patient}": case for case in cases(name, root)[0]}
    fold = fold_of(CATALOGUE["lits"].train_ids)
    for n in range(131):
        copy, original = names[f"msd_liver/liver_{n}"], names.get(f"lits/{n}")
        assert copy.same_as == (f"msd_liver/liver_{n}", f"lits/{n}")
        assert copy.held_out == (f"{VALIDATION} (the same scan as lits/{n})" if str(n) in fold else "")
        assert original is None or (original.held_out == VALIDATION) == (str(n) in fold)
    both = [names[f"abdomenct_1k/Case_{n:05d}"] for n in (297, 928)]
    assert all("lits/74" in case.same_as for case in (*both, names["lits/74"], names["msd_liver/liver_74"]))
    assert {bool(case.held_out) for case in both} == {"74" in fold}
    atlas = [set(names[f"abdomenatlas_{n}_mini/BDMAP_00000007"].same_as) for n in ("1_0", "3_0")]
    assert atlas[0] & atlas[1]


def test_kits_is_read_as_it_was_in_2019_and_2021(tmp_path: Path) -> None:
    for name in (
        "kits21/data/case_00003/imaging.nii.gz", "kits21/data/case_00003/aggregated_OR_seg.nii.gz",
        "kits21/data/case_00003/aggregated_MAJ_seg.nii.gz", "kits21/data/case_00003/segmentations/kidney_1.nii.gz",
        "kits19/data/case_00004/imaging.nii.gz", "kits19/data/case_00004/segmentation.nii.gz",
        "images/case_00400.nii.gz", "dataset/case_00400/instances/tumor_1.nii.gz",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found, refused = cases("kits23", tmp_path)
    assert {case.patient: case.label.name for case in found if case.label} == {
        "case_00003": "aggregated_MAJ_seg.nii.gz", "case_00004": "segmentation.nii.gz", "case_00400": "instances",
    }  # fmt: skip
    assert refused == []


def test_lits_and_ct_org_are_not_taken_for_each_other(tmp_path: Path) -> None:
    for name in ("volume-131.nii.gz", "labels-131.nii.gz", "volume-3.nii.gz", "labels-3.nii.gz"):
        (tmp_path / name).touch()
    found, refused = cases("lits", tmp_path)
    assert [case.label for case in found] == [None]
    assert len([reason for _, reason, _ in refused if reason == "outside_layout"]) == 3


def test_labels_without_images_are_told_once_a_case(tmp_path: Path) -> None:
    write("abdomenatlas_1_1_mini", tmp_path, [1, 2], SHAPE, SPACING)
    (tmp_path / "BDMAP_00000002/ct.nii.gz").unlink()
    _, refused = cases("abdomenatlas_1_1_mini", tmp_path)
    assert [(source, reason) for source, reason, _ in refused] == [
        ("BDMAP_00000002/combined_labels.nii.gz", "label"),
        ("BDMAP_00000002/segmentations", "label"),
    ]
