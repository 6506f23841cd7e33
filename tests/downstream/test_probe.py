"""A probe of backbones: what its maps find in made-up features, the whole way on phantoms, what is refused and how."""

from __future__ import annotations

import csv
import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_curation import phantom
from downstream import probe, probe_cases, probe_features
from downstream.cases import CaseError
from downstream.probe_features import Looked
from downstream.probe_scores import Patches, discriminant, draw_patches, slice_dice
from launch import settings as launch_settings
from launch.cli import main as axial
from launch.documents import SettingsError
from pretrain.models.vit import VitSettings, build
from pretrain.watch.pairs import ProbeError
from pretrain.weights import write_weights

TINY = "model={size: custom, width: 32, depth: 2, heads: 2, in_channels: 1, patch_size: 8, layerscale: null}"
QUICK = ["size=64", "slices=2", "val_slices=2", "patches=400", "workers=1", "draws=2", "shots=[1, all]"]


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scans")
    phantom.write("nnunet", root, range(6), (8, 64, 64), organs=["liver", "lungs"])
    return root


def run(folder: Path, *words: str) -> int:
    return axial(["probe", f"folder={folder}", *QUICK, *words])


def results(folder: Path) -> list[dict[str, Any]]:
    return list(json.loads((folder / "probe.json").read_text())["results"])


def made_up(features: torch.Tensor, classes: torch.Tensor, shares: list[float]) -> Patches:
    return Patches(features.float(), classes, torch.tensor(shares))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.floats(0.02, 0.98))
def test_the_discriminant_of_two_gaussians_is_bayes_rule(seed: int, share: float) -> None:
    """Two classes of one covariance: the best border is known, and the found one is near it, whatever was drawn."""
    rng = np.random.default_rng(seed)
    root = np.array([[2.0, 0.0], [1.5, 0.5]])
    centres = np.array([[0.0, 0.0], [2.0, 1.0]])
    classes = rng.integers(0, 2, 20_000)
    x = centres[classes] + rng.normal(size=(20_000, 2)) @ root.T
    known = made_up(torch.from_numpy(x), torch.from_numpy(classes), [1 - share, share])
    found = discriminant(known, 1e-6)(known.features)
    inverse = np.linalg.inv(root @ root.T)
    ways = x @ inverse @ centres.T - 0.5 * np.einsum("cd,de,ce->c", centres, inverse, centres)
    expected = ways[:, 1] - ways[:, 0] + math.log(share / (1 - share))
    assert np.abs((found[:, 1] - found[:, 0]).numpy() - expected).max() < 0.06 * np.abs(expected).max()


def test_how_many_patches_of_a_class_were_drawn_changes_little() -> None:
    """A wide background and a narrow organ, once drawn half and half, once as common as they are."""
    rng = np.random.default_rng(0)

    def drawn(background: int, organ: int) -> tuple[np.ndarray[Any, Any], torch.Tensor]:
        wide, narrow = rng.normal(0, [3, 1], (background, 2)), rng.normal([3, 2], [0.3, 0.5], (organ, 2))
        return np.concatenate([wide, narrow]), torch.tensor([0] * background + [1] * organ)

    asked = torch.from_numpy(drawn(9000, 1000)[0]).float()
    said = []
    for counts in ((4000, 4000), (36_000, 4000)):
        x, classes = drawn(*counts)
        said.append(discriminant(made_up(torch.from_numpy(x), classes, [0.9, 0.1]), 1e-6)(asked).argmax(1))
    assert (said[0] != said[1]).float().mean() < 0.01
    assert said[0].float().mean() > 0.05


def test_a_class_that_was_never_seen_is_never_said() -> None:
    draw = torch.Generator().manual_seed(0)
    classes = torch.randint(2, (200,), generator=draw) * 2  # 0 and 2 of three
    known = made_up(torch.randn(200, 5, generator=draw) + classes[:, None], classes, [0.5, 0.0, 0.5])
    found = discriminant(known, 0.01)(known.features)
    assert torch.isneginf(found[:, 1]).all()
    assert torch.isfinite(found[:, [0, 2]]).all()
    assert set(found.argmax(1).tolist()) == {0, 2}


def looked(folder: Path, features: torch.Tensor, labels: np.ndarray[Any, Any], patch: int) -> Looked:
    """A scan whose features are made up, [S, h, w, D], with labels [S, Y, X]."""
    from safetensors.numpy import save_file as save_numpy
    from safetensors.torch import save_file

    slices, height, width, _ = features.shape
    values = tuple(np.unique(labels).tolist())
    kept = probe_cases.Kept("a", folder / "kept", "key", labels.shape, values)
    save_numpy({"hu": labels.astype(np.int16), "labels": labels.astype(np.uint16)}, kept.path)
    classes = labels.reshape(slices, height, patch, width, patch)[:, :, 0, :, 0].reshape(slices, -1)
    tensors = {"block 0": features.flatten(1, 2).half().contiguous(), "classes": torch.from_numpy(classes.astype("i4"))}
    save_file(tensors, folder / "features")
    return Looked(kept, folder / "features", (height, width), patch)


def test_features_that_know_the_label_give_the_labels_back(tmp_path: Path) -> None:
    """Patches whose feature is their label: whole patches are told apart, at borders only the enlargement rounds."""
    rng = np.random.default_rng(0)
    coarse = np.kron(rng.choice([0, 4, 7, 9], (3, 3, 3)), np.ones((1, 2, 2), int))  # [S, 6, 6] patches
    labels = np.kron(coarse, np.ones((1, 8, 8), int))
    features = torch.nn.functional.one_hot(torch.from_numpy(coarse)).float() + 0.01 * torch.randn(3, 6, 6, 10)
    scan = looked(tmp_path, features, labels, 8)
    known = draw_patches([scan], 0, [0, 4, 7], 1000, np.random.default_rng(0))
    assert known.features.shape[1] == 10
    assert (known.shares > 0).all(), "the share of a class is that of all patches, drawn or not"
    counts = np.array([(coarse == value).sum() for value in (0, 4, 7)])
    assert known.shares.tolist() == pytest.approx((counts / counts.sum()).tolist())
    organs = {"four": [4], "seven": [7], "both": [4, 7], "none": [8]}
    maps = [discriminant(known, 0.01)] * 2
    found = slice_dice(scan, 0, maps, [0, 4, 7], organs)
    assert found.shape == (2, 4)
    assert np.array_equal(found[0], found[1], equal_nan=True)
    assert (found[0, :3] > 0.85).all(), "value 9 is none of the classes: its pixels are left out, also where 4 is said"
    assert math.isnan(found[0, 3])
    shuffled = replace(maps[0], weights=maps[0].weights.roll(1, 1))
    assert np.nanmean(slice_dice(scan, 0, [shuffled], [0, 4, 7], organs)) < 0.5


def test_the_whole_way_and_again(tmp_path: Path, scans: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Several blocks, two draws of one case and all; a second start reads what the first kept, and ends the same."""
    words = ["backbone=random", TINY, f"dataset={scans}", "blocks=[0, -1]"]
    assert run(tmp_path / "a", *words) == 0
    printed = capsys.readouterr().out
    assert "4 cases fit, 2 are scored, 2 organs" in printed
    assert "pixel Dice" in printed
    found = results(tmp_path / "a")
    assert [(row["block"], row["shots"], row["cases"], row["draws"]) for row in found] == [
        (0, 1, 1, 2), (0, "all", 4, 1), (1, 1, 1, 2), (1, "all", 4, 1),
    ]  # fmt: skip
    for row in found:
        assert 0 < row["pixel/dice"]["mean"] <= 1
        assert (row["pixel/dice"]["sd"] is None) == (row["draws"] == 1)
        assert set(row["organs"]) == {"liver", "lungs"}
        organs = [one["mean"] for one in row["organs"].values()]
        assert row["draws"] > 1 or row["pixel/dice"]["mean"] == pytest.approx(np.mean(organs))
    with (tmp_path / "a/probe.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["measure"] for row in rows} >= {"knn/dice", "linear/recall", "pixel/dice"}
    assert (tmp_path / "a/probe.png").read_bytes().startswith(b"\x89PNG")
    first = {path: path.read_bytes() for path in sorted((tmp_path / "a").glob("probe.*"))}
    features = sorted((tmp_path / "a/features").rglob("*.safetensors"))
    assert len(features) == 6
    stamps = [path.stat().st_mtime_ns for path in features]
    features[0].write_bytes(features[0].read_bytes()[:-100])  # as a full disk may leave it
    (tmp_path / "a/probe.csv").unlink()
    next((tmp_path / "a/results").iterdir()).unlink()
    assert run(tmp_path / "a", *words) == 0
    assert {path: path.read_bytes() for path in first} == first
    assert [path.stat().st_mtime_ns for path in features][1:] == stamps[1:]
    assert features[0].stat().st_mtime_ns != stamps[0]
    assert run(tmp_path / "b", *words, "workers=2") == 0
    for path, data in first.items():
        other = (tmp_path / "b" / path.name).read_bytes()
        assert other == data or path.suffix == ".json"  # probe.json names the folder


def test_a_backbone_of_a_file_beside_random_weights_of_its_shape(tmp_path: Path, scans: Path) -> None:
    model = build(VitSettings(size="custom", width=32, depth=2, heads=2, in_channels=3, patch_size=8))
    header = {"axial": "1", "model": model.settings.model_dump(mode="json"), "window": {"low": -150, "high": 250}}
    weights = {f"backbone.{name}": tensor for name, tensor in model.state_dict().items()}
    write_weights(tmp_path / "export.safetensors", weights, {"axial": json.dumps(header)})
    given = [f"backbone=[{tmp_path / 'export.safetensors'}, random]", f"dataset={scans}", "shots=all"]
    assert run(tmp_path / "run", *given) == 0
    found = results(tmp_path / "run")
    assert [Path(row["backbone"]).name for row in found] == ["export.safetensors", "random"]
    marks = sorted(path.name for path in (tmp_path / "run/features").iterdir())
    assert len(marks) == 2


def test_two_folders_without_names(tmp_path: Path, scans: Path) -> None:
    """Organs are then called by their values."""
    for name in ("imagesTr", "labelsTr"):
        (tmp_path / name).mkdir()
        for path in (scans / name).iterdir():
            os.link(path, tmp_path / name / path.name)
    given = ["backbone=random", TINY, f"images={tmp_path}/imagesTr", f"labels={tmp_path}/labelsTr"]
    assert run(tmp_path / "run", *given, "leave_out=[phantom_0000]", "split.val=[phantom_0001]") == 0
    found = json.loads((tmp_path / "run/probe.json").read_text())
    assert found["organs"] == ["label 1", "label 2"]
    assert found["validation"] == ["phantom_0001"]
    assert len(found["training"]) == 4


def test_real_scans_of_other_orders(tmp_path: Path, real_ct: Path) -> None:
    """TotalSegmentator's examples (RAS), a spine stored as PIR and a DICOM series, as one list of pairs."""
    rows = [
        {"image": f"{real_ct}/{image}", "label": f"{real_ct}/{label}", "patient": name}
        for name, image, label in (
            ("ts", "ts_example/ct.nii.gz", "ts_example/ct_seg.nii.gz"),
            ("small", "ts_example/ct_sm.nii.gz", "ts_example/ct_sm_seg.nii.gz"),
            ("thigh", "sts_002_multimodal/CT_dicom", "sts_002_multimodal/CT_mask.nii.gz"),
            (
                "spine",
                "tptbox_spine/sub-ct_label-22_ct.nii.gz",
                "tptbox_spine/sub-ct_seg-vert_label-22_msk.nii.gz",
            ),
        )
    ]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    given = ["backbone=random", TINY, f"pairs={tmp_path}/list.json", "split.val=[small]"]
    assert run(tmp_path / "run", *given) == 0
    found = results(tmp_path / "run")
    assert found[-1]["cases"] == 3
    assert found[-1]["organs"]["label 5"]["mean"] is not None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["dataset={scans}", "images=x"], "give one of: dataset; images and labels; pairs"),
        (["images=x"], "give both images and labels"),
        (["dataset={scans}", "backbone=[random, random]"], "names one of .* twice"),
        (["dataset={scans}", "shots=[0]"], r"shots\.0: .*greater than or equal to 1"),
        (["dataset={scans}", "shot=1"], "no such setting; did you mean 'shots'"),
        (["dataset={scans}", "blocks=[5]"], r"blocks: random has 2 blocks, 0 to 1, and no \[5\]"),
        (["dataset={scans}", "leave_out=[me]"], r"leave_out names \['me'\], which are no cases"),
        (["dataset={scans}", "shots=[50]"], r"all are more than the 4 training cases; add `all`"),
        (["dataset={scans}", "backbone=nowhere.pth"], r"nowhere\.pth does not exist; give a run folder"),
        (["images={scans}/nowhere", "labels={scans}"], r"nowhere is not a folder; give images and labels two"),
    ],
)
def test_mistakes_are_told(
    tmp_path: Path, scans: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    import re

    given = ["backbone=random"] if not any(word.startswith("backbone") for word in words) else []
    code = run(tmp_path / "run", TINY, *given, *(word.replace("{scans}", str(scans)) for word in words))
    assert code == 2
    assert re.search(said, capsys.readouterr().err)
    assert not list((tmp_path / "run").glob("probe.*"))


def test_broken_scans_are_named_together(tmp_path: Path, scans: Path) -> None:
    import shutil

    shutil.copytree(scans, tmp_path / "data")
    first, second, *_ = sorted((tmp_path / "data/labelsTr").iterdir())
    first.write_bytes(first.read_bytes()[:200])
    described = json.loads((scans / "dataset.json").read_text())
    described["labels"] = {"background": 0, "liver": 1}
    (tmp_path / "data/dataset.json").write_text(json.dumps(described))
    given = ["folder=" + str(tmp_path / "run"), "backbone=random", TINY, f"dataset={tmp_path / 'data'}", *QUICK]
    with pytest.raises(CaseError, match="6 of 6 scans cannot be used") as told:
        probe.main(launch_settings.load(probe.Settings, None, given))
    assert "phantom_0000: " in str(told.value)
    assert "cannot be used by the probe" in str(told.value)
    assert f"{second} holds label value(s) [2], dataset.json knows [0, 1]" in str(told.value)


def test_one_name_of_two_patients_is_refused(tmp_path: Path, scans: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        os.link(scans / "imagesTr/phantom_0000_0000.nii.gz", tmp_path / name / "ct.nii.gz")
        os.link(scans / "labelsTr/phantom_0000.nii.gz", tmp_path / name / "seg.nii.gz")
    rows = [{"image": f"{name}/ct.nii.gz", "label": f"{name}/seg.nii.gz"} for name in ("one", "two")]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    with pytest.raises(ProbeError, match=r"are both called ct; give a list of pairs= with the name of each patient"):
        probe_cases.patients(None, None, None, tmp_path / "list.json", None)
    two = [row | {"patient": "same"} for row in rows]
    (tmp_path / "list.json").write_text(json.dumps(two))
    found = probe_cases.patients(None, None, None, tmp_path / "list.json", None)
    kept = probe_cases.keep(found, {"same": 2}, tmp_path / "slices", 0, 1)
    assert [one.name for one in kept["same"]] == ["same_0", "same_1"]
    found = probe_cases.Patients({"A": found.pairs["same"], "A_1": found.pairs["same"][:1]}, None)
    kept = probe_cases.keep(found, {"A": 2, "A_1": 1}, tmp_path / "slices", 0, 1)
    assert len({one.path for some in kept.values() for one in some}) == 3, "patient A's second scan is not patient A_1"


def test_settings_are_one_backbone_or_several() -> None:
    given = ["folder=a", "dataset=b"]
    one = launch_settings.load(probe.Settings, None, [*given, "backbone=x", "shots=5", "blocks=3"])
    assert (one.backbone, one.shots, one.blocks) == (("x",), (5,), (3,))
    assert launch_settings.load(probe.Settings, None, [*given, "backbone=[x, random]"]).backbone == ("x", "random")
    with pytest.raises(SettingsError, match="backbone"):
        launch_settings.load(probe.Settings, None, [*given, "backbone=[]"])
    assert probe_features.RANDOM == "random"
