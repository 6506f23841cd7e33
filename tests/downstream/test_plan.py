"""A plan says what is in the data, fits the memory, gives its reasons, and is a settings file that trains."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from data_curation.nifti import load as load_nifti
from data_curation.phantom import write
from downstream import fingerprint as facts_module
from downstream import plan as plan_module
from downstream.cases import CaseError, Labels, Split, open_dataset, split
from downstream.channels import ZSCORE
from downstream.decoders import pyramid
from downstream.fingerprint import Facts, orientation
from downstream.geometry import place_of
from downstream.plan import PlanError, Settings, main, sided, wanted_spacing
from downstream.plan_memory import Network, step_bytes
from downstream.prepared import channel_windows, prepare
from downstream.settings import Settings as FinetuneSettings
from downstream.tuning import frozen, full
from launch.cli import main as axial
from launch.settings import load
from pretrain.data.window import HuWindow
from pretrain.models.vit import VitSettings
from pretrain.models.vit import build as build_vit
from pretrain.weights import write_weights

TINY = VitSettings(size="custom", width=32, depth=4, heads=2, patch_size=8, in_channels=1)
LABELS = Labels({"a": (1,), "b": (2,), "c": (3,)}, (0, 1, 2, 3))
ORGANS = ("liver", "kidney_left", "kidney_right")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default backbone is a tiny one, and its steps are not counted: that takes a second each."""
    monkeypatch.setattr(FinetuneSettings.model_fields["model"], "default", TINY)
    monkeypatch.setattr(plan_module, "step_bytes", lambda network, patch, batch, **_: (patch * (1 + batch)) << 10)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write("nnunet", tmp_path / "data", range(6), (6, 40, 48), (25.0, 9.0, 8.0), organs=ORGANS)
    return tmp_path / "data"


def settings(dataset: Path, folder: Path, **changes: Any) -> Settings:
    return Settings(dataset=dataset, folder=folder, **{"patch": 64, "memory_gib": 1.0, **changes})


def test_a_plan_is_settings_with_reasons_that_train(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FinetuneSettings.model_fields["model"], "default", TINY)
    words = [f"dataset={folder}", f"folder={tmp_path / 'plans'}", "patch=64", "memory_gib=1"]
    assert axial(["plan", *words]) == 0
    shown = capsys.readouterr().out
    assert "6 of 6 cases can be used" in shown
    assert "kidney_left" in shown
    path = tmp_path / "plans/plan.yaml"
    text = path.read_text()
    planned = load(FinetuneSettings, path, ["folder=x"])
    assert planned.spacing == pytest.approx(384 / 64)
    assert "the median slice of 384 mm" in text
    assert planned.patches.size == 64
    assert planned.patches.batch_size == 12
    assert planned.augmentation.flip == ()
    assert "# flip: left and right are told apart (kidney_left, kidney_right" in text
    assert planned.split == Split(fold=0)
    for name in ("spacing", "patches", "precision", "parallel", "normalisation", "augmentation", "split"):
        assert text.splitlines()[[line.split(":")[0] for line in text.splitlines()].index(name) - 1].startswith("#")
    dataset = open_dataset(folder)
    training = split([case.name for case in dataset.cases], Split())[0]
    chosen = [case for case in dataset.cases if case.name in training]
    cases = prepare(chosen, dataset.labels, None, tmp_path / "cache", active=False)
    (given,) = planned.normalisation
    assert isinstance(given, HuWindow)
    (exact,) = channel_windows(cases, ["CT"])
    for name in ("low", "high", "mean", "std"):
        assert getattr(given, name) == pytest.approx(getattr(exact.window, name), abs=1e-3), "of training cases alone"
    tiny = "{size: custom, width: 32, depth: 4, heads: 2, patch_size: 8, in_channels: 1}"
    small = [f"folder={tmp_path / 'run'}", f"model={tiny}", "steps=2", "device=cpu", "patches.batch_size=2"]
    assert axial(["finetune", str(path), *small, "maps=none", "log.tensorboard=false"]) == 0
    assert (tmp_path / "run/model.safetensors").is_file()


@pytest.mark.usefixtures("small")
def test_the_fingerprint_is_what_the_files_hold(folder: Path, tmp_path: Path) -> None:
    main(settings(folder, tmp_path / "plans"))
    found = json.loads((tmp_path / "plans/fingerprint.json").read_text())
    labels = [sitk.GetArrayFromImage(sitk.ReadImage(str(path))) for path in sorted((folder / "labelsTr").iterdir())]
    for value, organ in enumerate(ORGANS, 1):
        counts = [int((label == value).sum()) for label in labels]
        one = found["organs"][organ]
        assert one["voxels"] == sum(counts)
        assert one["cases"] == sum(map(bool, counts))
        assert one["median_ml"] == pytest.approx(np.median([n for n in counts if n]) * 25 * 9 * 8 / 1000)
    assert found["size_zyx"]["median"] == [6, 40, 48]
    assert found["spacing_zyx_mm"]["max"] == [25, 9, 8]
    assert found["view_mm"]["min"] == [384]
    assert found["axes"] == {"LPS": 6}


@pytest.mark.usefixtures("small")
def test_cases_are_read_once_and_again_when_they_change(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    original = facts_module.read_case

    def counting(case: Any, channels: Any) -> Any:
        read.append(case.name)
        return original(case, channels)

    monkeypatch.setattr(facts_module, "read_case", counting)
    main(settings(folder, tmp_path / "plans"))
    assert len(read) == 6
    (tmp_path / "plans/cases/phantom_0001.json").write_text('{"key": "')  # as a full disk would leave it
    write("nnunet", tmp_path / "other", [7], (6, 40, 48), (25.0, 9.0, 8.0), organs=ORGANS)
    os.replace(tmp_path / "other/labelsTr/phantom_0007.nii.gz", folder / "labelsTr/phantom_0002.nii.gz")
    read.clear()
    main(settings(folder, tmp_path / "plans"))
    assert read == ["phantom_0001", "phantom_0002"]
    read.clear()
    main(settings(folder, tmp_path / "plans", memory_gib=2.0))
    assert read == []
    main(settings(folder, tmp_path / "two", workers=2))
    main(settings(folder, tmp_path / "one"))
    assert (tmp_path / "two/fingerprint.json").read_bytes() == (tmp_path / "one/fingerprint.json").read_bytes()


@pytest.mark.usefixtures("small")
def test_bad_cases_are_named_and_the_others_are_planned_for(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    label = folder / "labelsTr/phantom_0003.nii.gz"
    image = sitk.ReadImage(str(label))
    image[0, 0, 0] = 77
    sitk.WriteImage(image, str(label))
    broken = folder / "imagesTr/phantom_0004_0000.nii.gz"
    broken.write_bytes(broken.read_bytes()[:-30])
    outcome = main(settings(folder, tmp_path / "plans"))
    assert not outcome.ok
    shown = capsys.readouterr().out
    assert "2 of 6 cases cannot be used" in shown
    assert "phantom_0003.nii.gz holds label value(s) [77], dataset.json knows [0, 1, 2, 3]" in shown
    found = json.loads((tmp_path / "plans/fingerprint.json").read_text())
    assert set(found["refused"]) == {"phantom_0003", "phantom_0004"}
    assert load(FinetuneSettings, tmp_path / "plans/plan.yaml", ["folder=x"]).patches.size == 64
    for path in (folder / "imagesTr").iterdir():
        path.write_bytes(b"")
    with pytest.raises(CaseError, match="no case to train on can be used"):
        main(settings(folder, tmp_path / "none"))


@pytest.mark.usefixtures("small")
def test_a_plan_that_was_changed_by_hand_stays(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(settings(folder, tmp_path))
    path = tmp_path / "plan.yaml"
    main(settings(folder, tmp_path, patch=32))
    assert "size: 32" in path.read_text(), "nobody changed it, so it is made anew"
    mine = path.read_text().replace("size: 32", "size: 40")
    path.write_text(mine)
    for patch in (64, 48):
        main(settings(folder, tmp_path, patch=patch))
        assert path.read_text() == mine
        assert f"size: {patch}" in (tmp_path / "plan.new.yaml").read_text()
    assert "was changed by hand and stays" in capsys.readouterr().out


@pytest.mark.usefixtures("small")
def test_other_channels_regions_and_splits_are_planned_for(folder: Path, tmp_path: Path) -> None:
    for path in list((folder / "imagesTr").iterdir()):
        image = sitk.Cast(sitk.ReadImage(str(path)), sitk.sitkFloat32)
        sitk.WriteImage(image * 0.001 + 3, str(path).replace("_0000.", "_0001."))
    described = json.loads((folder / "dataset.json").read_text())
    described["channel_names"] = {"0": "CT", "1": "PET"}
    described["labels"] = {"background": 0, "trunk": [1, 2, 3], "kidneys": [2, 3]}
    described["regions_class_order"] = [1, 2]
    (folder / "dataset.json").write_text(json.dumps(described))
    names = [f"phantom_{n:04d}" for n in range(6)]
    folds = [{"train": names, "val": []}, {"train": names[:3], "val": names[3:]}]
    (folder / "splits_final.json").write_text(json.dumps(folds))
    main(settings(folder, tmp_path / "plans"))
    planned = load(FinetuneSettings, tmp_path / "plans/plan.yaml", ["folder=x"])
    assert planned.normalisation[1] == ZSCORE
    assert planned.split == Split(fold=1, folds=2), "fold 0 has nothing to validate"
    assert planned.augmentation.flip == ("y", "x")
    found = json.loads((tmp_path / "plans/fingerprint.json").read_text())
    assert found["training"] == 3
    assert found["organs"]["trunk"]["voxels"] > found["organs"]["kidneys"]["voxels"] > 0


def test_a_backbone_of_several_windows_keeps_them(folder: Path, tmp_path: Path) -> None:
    window = HuWindow(low=(-1350.0, -160.0, -500.0), high=(150.0, 240.0, 1300.0))
    vit = TINY.model_copy(update={"in_channels": 3})
    header = {"axial": "0", "model": vit.model_dump(mode="json"), "window": window.model_dump(mode="json")}
    path = tmp_path / "backbone.safetensors"
    write_weights(path, build_vit(vit).state_dict(), {"format": "pt", "axial": json.dumps(header)})
    given = settings(folder, tmp_path / "plans", backbone=path, decoder={"kind": "linear"}, tuning={"kind": "frozen"})
    assert "batch_size 12" in plan_module.dry_run(given)
    main(given)
    planned = load(FinetuneSettings, tmp_path / "plans/plan.yaml", ["folder=x"])
    assert planned.normalisation == "pretraining"
    assert planned.backbone == path
    assert (planned.decoder.kind, planned.tuning.kind) == ("linear", "frozen")
    assert "the backbone was trained on 3 windows" in (tmp_path / "plans/plan.yaml").read_text()


def test_the_rule_for_spacing_is_meddinov3s() -> None:
    def case(side: int, mm: float) -> Facts:
        return Facts("a", (10, side, side), (3.0, mm, mm))

    kits = wanted_spacing([case(512, 0.6), case(512, 0.78125), case(512, 0.9)], 896)
    assert kits.value == pytest.approx(0.4464, abs=1e-4)
    assert "400 mm" in kits.why
    assert wanted_spacing([case(640, 0.712890625)], 896).value == pytest.approx(0.5092, abs=1e-4), "AMOS22"
    assert "a smaller patch is faster" in wanted_spacing([case(128, 3.0)], 896).why


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["left kidney", "right kidney", "liver"], ["left kidney", "right kidney"]),
        (["kidney_left", "liver"], ["kidney_left"]),
        (["LeftLung", "RightLung"], ["LeftLung", "RightLung"]),
        (["femur_L", "femur_R", "vertebrae_L1"], ["femur_L", "femur_R"]),
        (["vertebrae_L1", "vertebrae_L2", "T12"], []),
        (["cleft", "brightness", "L"], []),
        (["head of left femur"], ["head of left femur"]),
    ],
)
def test_left_and_right_are_known_by_their_names(names: list[str], found: list[str]) -> None:
    assert sided(names) == found


def test_memory_decides_batch_and_recomputation(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Network(TINY, pyramid.Settings(), full.Settings(), LABELS)

    def costs(each: dict[str, float]) -> None:  # GiB a patch, and one of weights
        def counted(network: Network, patch: int, batch: int, recompute: str = "none") -> int:
            return int((1 + batch * each[recompute]) * 2**30)

        monkeypatch.setattr(plan_module, "step_bytes", counted)

    costs({"none": 4, "blocks": 3.5})
    chosen = {gib: plan_module._fit(net, 64, gib) for gib in (6.25, 12, 24, 48, 80)}
    assert [fit.batch.value for fit in chosen.values()] == [1, 2, 4, 9, 12], "a fifth is left free"
    assert {fit.recompute.value for fit in chosen.values()} == {"none"}
    assert "a step needs 17.0 GiB of 24" in chosen[24].batch.why
    assert "batch_size 12 and accumulate 3" in chosen[24].batch.why
    with pytest.raises(PlanError, match=r"memory_gib=4: one patch of 64 px needs 5\.7 GiB"):
        plan_module._fit(net, 64, 4)
    assert plan_module._fit(net, 64, 6).recompute.value == "blocks", "the only way in which one fits"
    costs({"none": 4, "blocks": 2})
    fit = plan_module._fit(net, 64, 24)
    assert (fit.batch.value, fit.recompute.value) == (9, "blocks")
    assert plan_module._fit(net, 64, 80).recompute.value == "none", "nothing is gained where all fit"


def test_a_step_is_counted_by_what_lives_in_it() -> None:
    net = Network(TINY, pyramid.Settings(), full.Settings(), LABELS)
    two, four, six = (step_bytes(net, 64, batch) for batch in (2, 4, 6))
    assert 1.9 < (six - two) / (four - two) < 2.1, "every patch costs the same"
    assert four > step_bytes(net, 64, 4, recompute="blocks")
    assert four < step_bytes(net, 64, 4, bf16=False)
    still = Network(TINY, pyramid.Settings(), frozen.Settings(), LABELS)
    assert step_bytes(still, 64, 4) < four
    assert two > 16 * sum(p.numel() for p in net.built().parameters()), "weights, gradients and AdamW's averages"


_MEASURED = """
import ctypes, gc, sys
from pathlib import Path
import torch
from tests.downstream.test_plan import LABELS, MEDIUM
from downstream.decoders import pyramid
from downstream.losses import SegmentationLoss
from downstream.plan_memory import Network
from downstream.tuning import frozen, full
def bytes_of(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])
for tuned in (full, frozen):
    model = Network(MEDIUM, pyramid.Settings(), tuned.Settings(), LABELS).built()
    loss = SegmentationLoss(LABELS)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    def step(batch):
        terms = loss(model(torch.randn(batch, 1, 192, 192)), torch.randint(0, 4, (batch, 192, 192)))
        sum(terms.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
    step(1)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = bytes_of("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    step(6)
    held = sum(4 * p.numel() * (3 if p.requires_grad else 1) for p in model.parameters())
    print(bytes_of("VmHWM") - before + held)
"""
MEDIUM = VitSettings(size="custom", width=96, depth=4, heads=3, in_channels=1)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
def test_the_count_agrees_with_a_measured_step() -> None:
    """On a CPU, in a process of its own; scratch space of kernels, and what malloc keeps, is not counted."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _MEASURED]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    for tuned, measured in zip((full, frozen), map(int, done.stdout.split()), strict=True):
        network = Network(MEDIUM, pyramid.Settings(), tuned.Settings(), LABELS)
        counted = step_bytes(network, 192, 6, bf16=False)
        assert 0.95 < measured / counted < 1.6, (measured, counted)


def test_a_wrong_patch_and_a_lost_data_set_are_told(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(PlanError, match=r"patch 900 is no multiple of the backbone's 16; take 896"):
        main(settings(folder, tmp_path / "plans", patch=900))
    assert axial(["plan", f"dataset={tmp_path / 'no'}", "folder=x"]) == 2
    assert "dataset.json is not there" in capsys.readouterr().err
    assert axial(["plan", f"dataset={folder}", "folder=x", "memory=3"]) == 2
    assert "did you mean 'memory_gib'" in capsys.readouterr().err
    assert not (tmp_path / "plans").exists()


def test_axes_of_real_scans_are_named_as_the_manifest_has_them(real_ct: Path) -> None:
    with (real_ct / "MANIFEST.tsv").open(newline="") as file:
        listed = [row for row in csv.DictReader(file, delimiter="\t") if row["path"].endswith(".nii.gz")]
    checked = 0
    for row in listed:
        if "HARD" in row["notes"] or len(row["voxel_order"]) != 3 or "sts_gtv" in row["path"]:
            continue
        assert orientation(place_of(load_nifti(real_ct / row["path"]))) == row["voxel_order"], row["path"]
        checked += 1
    assert checked >= 6
