"""What a finished or a killed fine-tuning does when it is started again: on the same data, on others."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import SimpleITK as sitk

from data_curation import phantom
from downstream import crossvalidation, evaluate, finetune
from downstream.cases import Dataset, Labels, RawCase
from downstream.model import load_model
from downstream.validation import Best
from launch.distributed import world
from pretrain.checkpoint import CheckpointError
from tests.downstream.small_models import header, made
from tests.gloo import run_ranks

VIT = {"size": "custom", "width": 24, "depth": 1, "heads": 2, "patch_size": 8, "in_channels": 1, "layerscale": None}


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    phantom.write(
        "nnunet", tmp_path / "data", range(4), shape=(4, 40, 40), spacing=(30.0, 8.0, 8.0), organs=["liver", "spine"]
    )
    return tmp_path / "data"


def settings(folder: Path, dataset: Path, **changes: Any) -> finetune.Settings:
    given: dict[str, Any] = {
        "folder": folder,
        "dataset": dataset,
        "model": VIT,
        "decoder": {"kind": "linear", "taps": 1},
        "steps": 2,
        "precision": "fp32",
        "split": {"val_fraction": 0.5},
        "patches": {"size": 16, "batch_size": 2, "workers": 1},
        "log": {"every": 1, "tensorboard": False},
        "validate_every": 0,
        "maps": "none",
        **changes,
    }
    folder.mkdir(parents=True, exist_ok=True)
    return finetune.Settings.model_validate(given)


def relabelled(dataset: Path, name: str) -> None:
    path = dataset / "labelsTr" / f"{name}.nii.gz"
    image = sitk.ReadImage(str(path))
    image[3, 3, 1] = 1 - image[3, 3, 1]
    sitk.WriteImage(image, str(path))


def test_other_cases_are_refused_by_name(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    finetune.main(settings(run, dataset))
    found = (run / "validation.json").read_text()
    validated = json.loads(found)["cases"]
    names = sorted(path.name.removesuffix(".nii.gz") for path in (dataset / "labelsTr").iterdir())
    taught = [name for name in names if name not in validated]
    finetune.main(settings(run, dataset))
    assert "done before" in capsys.readouterr().out
    folds = [{"train": validated, "val": taught}, {"train": taught, "val": validated}]
    (dataset / "splits_final.json").write_text(json.dumps(folds))
    with pytest.raises(CheckpointError, match=rf"training\.{taught[0]} is gone.*validation\.{taught[0]} is new"):
        finetune.main(settings(run, dataset, split={"fold": 0, "folds": 2}))
    finetune.main(settings(run, dataset, split={"fold": 1, "folds": 2}))  # the same cases by another rule
    for name, part in ((validated[0], "validation"), (taught[0], "training")):
        relabelled(dataset, name)
        with pytest.raises(CheckpointError, match=rf"{part}\.{name} is another"):
            finetune.main(settings(run, dataset))
    assert (run / "validation.json").read_text() == found


def test_the_best_may_be_the_last_and_its_maps_are_made_once(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "main", lambda given: None)
    run = tmp_path / "run"
    given = settings(run, dataset, maps="best")
    outcome = finetune.main(given)
    assert str(run / "best.safetensors") in outcome.next[0]
    assert load_model(run / "best.safetensors")[1].step == 2, "the final validation counts too"
    assert json.loads((run / "maps.json").read_text())["weights"] == "best.safetensors"
    first, second = sorted((run / "validation").iterdir())
    kept, left = first.stat().st_mtime_ns, run / "validation/.12345.x.nii.gz"
    second.unlink()
    left.write_bytes(b"half")
    (run / "validation.json").unlink()
    finetune.main(given)
    assert first.stat().st_mtime_ns == kept, "made before by the same weights"
    assert second.is_file()
    assert not left.exists()
    said = json.loads((run / "maps.json").read_text())
    (run / "maps.json").write_text(json.dumps(said | {"sha256": "of another"}))
    (run / "validation.json").unlink()
    finetune.main(given)
    assert first.stat().st_mtime_ns > kept


def test_a_table_of_paths_is_scored_or_said_not_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[evaluate.Settings] = []
    monkeypatch.setattr(evaluate, "main", asked.append)
    (tmp_path / "validation").mkdir()
    labels = Labels({"liver": (1,)}, (0, 1))

    def score(image: str, label: str) -> None:
        case = RawCase("p20", (tmp_path / "scans" / image,), tmp_path / "labels" / label)
        crossvalidation.score_maps(tmp_path, [tmp_path], Dataset("ours", tmp_path, labels, ("CT",), (case,)))

    score("p20_ct.nii.gz", "p20_seg.nii.gz")
    assert not asked
    assert "not scored" in capsys.readouterr().out
    score("p20_ct.nii.gz", "p20.nii.gz")
    score("p20_0000.nii.gz", "p20.nii.gz")
    assert [one.images for one in asked] == [None, tmp_path / "scans"], "the page shows what it would find"


def test_maps_of_folds_come_together_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(1, "no links here")

    monkeypatch.setattr(os, "link", refused)
    monkeypatch.setattr(evaluate, "main", lambda given: None)
    for fold in "01":
        (tmp_path / f"fold_{fold}/validation").mkdir(parents=True)
        (tmp_path / f"fold_{fold}/validation/case_{fold}.nii.gz").write_bytes(fold.encode())
    case = RawCase("a", (tmp_path / "a.nii.gz",), tmp_path / "a.nii.gz")
    data = Dataset("ours", tmp_path, Labels({"liver": (1,)}, (0, 1)), ("CT",), (case,))
    crossvalidation.score_maps(tmp_path, [tmp_path / "fold_0", tmp_path / "fold_1"], data)
    assert [path.read_bytes() for path in sorted((tmp_path / "validation").iterdir())] == [b"0", b"1"]


def marks(rank: int, size: int, folder: Path) -> float:
    with world("cpu"):
        said = header()
        return Best(folder / str(rank), made(said), said, 2).mark


def test_ranks_that_see_other_files_agree_on_the_best(tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    (tmp_path / "0/best.json").write_text('{"step": 2, "dice": 0.5}')
    assert run_ranks(f"{__file__}:marks", 2, tmp_path, folder=tmp_path) == [0.5, 0.5]


def test_a_dry_run_reads_no_voxel(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetune, "prepare", None)
    text = finetune.dry_run(settings(tmp_path, dataset))
    assert "2 cases to train, 2 to validate; labels that exclude one another: liver, spine" in text
    assert "blocks [0]" in text
    assert "a checkpoint is 0.00 GiB" in text
    assert "stem" not in text
    windows = [{"low": [-1000, -160], "high": [0, 240], "mean": [-500, 40], "std": [300, 100]}]
    assert "stem" in finetune.dry_run(settings(tmp_path, dataset, normalisation=windows)), "two channels for one"
