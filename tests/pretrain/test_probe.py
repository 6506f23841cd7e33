"""The probe: what separable and random features score, which scans belong together, what is refused and how."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from data_curation import phantom
from pretrain.data.window import HuWindow
from pretrain.models.vit import VisionTransformer, VitSettings, build
from pretrain.watch.labelled import Drawn, Labelled, balanced
from pretrain.watch.pairs import groups, read_pair
from pretrain.watch.probe import (
    Pair,
    ProbeError,
    ProbeSettings,
    class_scores,
    find_pairs,
    knn,
    label_patches,
    linear,
    patch_features,
    probe,
    score,
)

SMALL = ProbeSettings(size=96, slices=2)
CLASSES = 4


def vit(seed: int = 0) -> VisionTransformer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        settings = VitSettings(size="custom", width=32, depth=2, heads=2, in_channels=3, patch_size=8, layerscale=None)
        return build(settings).eval()


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scans")
    phantom.write("nnunet", root, range(4), (10, 64, 64), organs=["liver", "spleen"])
    return root


def made_up(features: Tensor, classes: Tensor) -> tuple[Tensor, Labelled]:
    fit = torch.arange(len(classes)) % 2 == 0
    return features, Labelled((), (), classes, fit, tuple(range(int(classes.max()) + 1)))


def test_separable_features_are_told_apart_and_random_ones_by_chance() -> None:
    draw = torch.Generator().manual_seed(0)
    classes = torch.randint(CLASSES, (2000,), generator=draw)
    noise = torch.randn(2000, 16, generator=draw)
    centres = 6 * torch.randn(CLASSES, 16, generator=draw)
    for features, low, high in ((centres[classes] + noise, 0.99, 1.0), (noise, 0.2, 0.3)):
        found = score(*made_up(features, classes), SMALL)
        assert set(found) == {f"{way}/{what}" for way in ("knn", "linear") for what in ("accuracy", "recall", "dice")}
        assert all(low <= value <= high for value in found.values()), found


def test_the_linear_map_takes_no_notice_of_how_common_a_class_is() -> None:
    draw = torch.Generator().manual_seed(1)
    classes = (torch.rand(4000, generator=draw) < 0.02).long()
    features = torch.randn(4000, 4, generator=draw)
    features[:, 0] += 3 * classes
    found = score(*made_up(features, classes), SMALL)
    assert found["linear/recall"] > 0.9
    assert found["knn/recall"] < found["linear/recall"]


def test_the_nearest_vote_by_their_cosine() -> None:
    known = torch.tensor([[1.0, 0.0], [0.0, 5.0], [-1.0, 0.1], [-1.0, -0.1]])
    classes = torch.tensor([0, 1, 2, 2])
    asked = torch.tensor([[9.0, 0.1], [0.1, 0.3], [-0.2, 0.0]])
    assert knn(known, classes, asked, 1, 0.07, 3).tolist() == [0, 1, 2]
    # With all of them and hardly any weight by distance, the commonest wins.
    assert knn(known, classes, asked, 20, 1e6, 3).tolist() == [2, 2, 2]
    assert knn(known, classes, asked, 20, 1e-3, 3).tolist() == [0, 1, 2]


def test_the_linear_map_is_ridge_regression() -> None:
    """Against numpy's least squares with the penalty as further rows, on classes of one size."""
    draw = np.random.default_rng(0)
    x, asked, classes = draw.normal(size=(60, 5)) * 3 + 1, draw.normal(size=(40, 5)), np.arange(60) % 3
    z = (x - x.mean(0)) / x.std(0)
    y = np.eye(3)[classes] - 1 / 3
    rows = np.vstack([z / 60**0.5, 0.1**0.5 * np.eye(5)])
    weights = np.linalg.lstsq(rows, np.vstack([y / 60**0.5, np.zeros((5, 3))]), rcond=None)[0]
    expected = ((asked - x.mean(0)) / x.std(0) @ weights).argmax(1)
    given_ = (torch.from_numpy(x), torch.from_numpy(classes), torch.from_numpy(asked))
    assert linear(*given_, 0.1, 3).tolist() == expected.tolist()


def test_scores_by_hand() -> None:
    truth, guessed = torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([0, 0, 1, 1, 0, 0])
    found = class_scores(guessed, truth, 4)  # class 3 does not occur
    assert found["accuracy"] == pytest.approx(3 / 6)
    assert found["recall"] == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert found["dice"] == pytest.approx((4 / 7 + 2 / 4 + 0) / 3)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(2, 40))
def test_a_draw_is_bounded_and_small_classes_stay_whole(drawn: list[int], most: int) -> None:
    classes = np.array(drawn)
    kept = balanced(classes, most, np.random.default_rng(0))
    assert len(kept) <= most
    assert len(set(kept.tolist())) == len(kept)
    assert kept.tolist() == sorted(kept.tolist())
    counts, had = np.bincount(classes[kept], minlength=5), np.bincount(classes, minlength=5)
    assert counts[0] <= had[1:].sum()
    share = most // len(set(drawn))
    assert all(counts[value] >= min(had[value], share) for value in set(drawn) - {0})


def test_a_fresh_backbone_on_phantoms_gives_one_number(scans: Path) -> None:
    pairs = find_pairs(scans / "imagesTr", scans / "labelsTr")
    assert [pair.group for pair in pairs] == [f"phantom_{n:04d}" for n in range(4)]
    model, window = vit(), HuWindow()
    model.train()
    first = probe(model, window, pairs, SMALL)
    assert model.training
    torch.manual_seed(5)
    assert probe(vit(), window, pairs[::-1], SMALL) == first, "the order of the scans says nothing"
    assert probe(vit(1), window, pairs, SMALL) != first
    assert probe(vit(), window, pairs, SMALL.model_copy(update={"seed": 1})) != first
    assert 1 / 3 < first["knn/recall"] < 1


def test_patients_are_on_one_side_and_memory_is_bounded(scans: Path) -> None:
    pairs = find_pairs(scans / "imagesTr", scans / "labelsTr")
    settings = Drawn(size=96, slices=3, patches=40)
    drawn = label_patches(pairs, 8, HuWindow(), settings)
    assert max(drawn.counts) <= 40
    assert len(drawn.images) == 4
    assert all(image.shape == (3, 1, 96, 96) for image in drawn.images)
    ends = np.cumsum([len(part) for part in drawn.chosen])[:-1]
    sides = [set(part.tolist()) for part in np.split(drawn.fit.numpy(), ends)]
    assert all(len(side) == 1 for side in sides)
    assert sorted(side.pop() for side in sides) == [False, False, True, True]
    features = patch_features(vit(), drawn, 3, "cpu")
    assert features.shape == (sum(drawn.counts), 32)
    whole = vit()(drawn.images[0].expand(-1, 3, -1, -1)).patches.flatten(0, 1)
    assert torch.equal(features[: len(drawn.chosen[0])], whole[drawn.chosen[0]].detach())
    two = [Pair(pair.image, pair.label, f"patient {n // 2}") for n, pair in enumerate(pairs)]
    fits = [label_patches(two, 8, HuWindow(), settings).fit.sum() for _ in range(2)]
    assert fits[0] == fits[1] > 0


def test_a_list_is_as_good_as_two_folders(scans: Path) -> None:
    from pyarrow import Table, parquet

    rows = [
        {"image": f"imagesTr/phantom_{n:04d}_0000.nii.gz", "label": f"labelsTr/phantom_{n:04d}.nii.gz"}
        for n in range(4)
    ]
    (scans / "list.json").write_text(json.dumps(rows))
    parquet.write_table(Table.from_pylist(rows), scans / "list.parquet")
    expected = probe(vit(), HuWindow(), find_pairs(scans / "imagesTr", scans / "labelsTr"), SMALL)
    for name in ("list.json", "list.parquet"):
        assert probe(vit(), HuWindow(), find_pairs(listing=scans / name), SMALL) == expected


def test_files_of_one_name_in_several_folders_are_several_patients(tmp_path: Path) -> None:
    files = [tmp_path / name / "ct.nii.gz" for name in ("s0001", "s0002", "s0003")]
    labels = [file.with_name("seg.nii.gz") for file in files]
    alone = list(map(Pair, files, labels))
    twice = Pair(files[0], files[0].with_name("other.nii.gz"))
    assert [len(found) for found in groups([*alone, twice]).values()] == [2, 1, 1]
    named = [Pair(*files, patient) for *files, patient in zip(files, labels, "aba", strict=True)]
    assert list(groups(named)) == ["a", "b"]


def test_a_label_of_one_half_alone_is_left_out_and_told(scans: Path, tmp_path: Path) -> None:
    import SimpleITK as sitk

    (first, *others) = find_pairs(scans / "imagesTr", scans / "labelsTr")
    other = sitk.ReadImage(str(first.label))
    pixels = sitk.GetArrayFromImage(other)
    pixels[pixels == 2] = 7
    changed = sitk.GetImageFromArray(pixels)
    changed.CopyInformation(other)
    sitk.WriteImage(changed, str(tmp_path / "changed.nii.gz"))
    whole = label_patches([first, *others], 8, HuWindow(), SMALL)
    some = label_patches([Pair(first.image, tmp_path / "changed.nii.gz"), *others], 8, HuWindow(), SMALL)
    assert (whole.values, whole.left_out) == ((0, 1, 2), ())
    assert (some.values, some.left_out) == ((0, 1, 2), (7,))


def test_image_and_label_may_be_stored_along_other_axes(scans: Path, tmp_path: Path) -> None:
    import SimpleITK as sitk

    (first, *_) = find_pairs(scans / "imagesTr", scans / "labelsTr")
    turned = sitk.DICOMOrient(sitk.ReadImage(str(first.label)), "PIR")
    sitk.WriteImage(turned, str(tmp_path / "turned.nrrd"))
    hu, labels = read_pair(first)
    for one, other in zip((hu, labels), read_pair(Pair(first.image, tmp_path / "turned.nrrd")), strict=True):
        assert np.array_equal(one, other)
    assert hu.shape == (10, 64, 64)


def broken(folder: Path, what: str, scans: Path) -> dict[str, Any]:
    """A source with one fault, as the arguments of find_pairs."""
    import SimpleITK as sitk

    image, label = scans / "imagesTr/phantom_0000_0000.nii.gz", scans / "labelsTr/phantom_0000.nii.gz"
    if what == "damaged":
        label = folder / "cut.nii.gz"
        label.write_bytes((scans / "labelsTr/phantom_0000.nii.gz").read_bytes()[:-40])
    elif what == "moved":
        moved = sitk.ReadImage(str(label))
        moved.SetOrigin([value + 30 for value in moved.GetOrigin()])
        label = folder / "moved.nii.gz"
        sitk.WriteImage(moved, str(label))
    elif what == "image":
        label = image
    elif what == "gone":
        label = folder / "gone.nii.gz"
    if what == "empty":
        return {"images": folder, "labels": scans / "labelsTr"}
    if what == "nowhere":
        return {"images": folder / "nowhere", "labels": folder}
    (folder / "list.json").write_text(
        "{" if what == "text" else json.dumps([{"image": str(image), "label": str(label)}])
    )
    return {"listing": folder / "list.json"}


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("damaged", r"cut\.nii\.gz cannot be used by the probe: .*; copy it again, or leave the pair out"),
        ("moved", r"moved\.nii\.gz does not lie on the grid of .*0000_0000\.nii\.gz: .*voxels apart; bring the label"),
        ("image", r"phantom_0000_0000\.nii\.gz: label values run from -\d+ to"),
        ("gone", r"list\.json: entry 0 names .*gone\.nii\.gz, which is not there; correct the list"),
        ("text", r"list\.json is not a JSON or Parquet list"),
        ("empty", r"no label map in .*labelsTr .*has the name of an image in .*\(nothing\)"),
        ("nowhere", r"nowhere is not a folder; give watch\.probe\.images"),
        ("one patient", r"two classes that both halves of the patients have, and has 0 \(patients: 1"),
    ],
)
def test_what_cannot_be_used_is_named_with_what_to_do(tmp_path: Path, scans: Path, what: str, said: str) -> None:
    with pytest.raises(ProbeError, match=said):
        label_patches(find_pairs(**broken(tmp_path, what, scans)), 8, HuWindow(), SMALL)
