"""Fine-tuning, prediction and evaluation as a user runs them, small: after a kill, on two ranks, on bad input."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from safetensors.torch import load_file

from data_curation import phantom
from data_curation.volumes import read
from downstream import evaluate, finetune, predict
from downstream.augment import Augmentation, off
from downstream.cases import CaseError, open_dataset
from downstream.geometry import found_at
from downstream.inference import Window, predict_volume
from downstream.model import ModelError, SegmentationModel, load_model, save_model
from downstream.prepared import prepare
from downstream.segmentation import Patches, PatchSettings, batches, sample
from downstream.validation import validate
from launch.distributed import World
from launch.settings import dump, load
from pretrain.data.window import HuWindow
from tests.gloo import run_ranks

VIT = {"size": "custom", "width": 24, "depth": 2, "heads": 2, "patch_size": 8, "in_channels": 1, "layerscale": None}
ALONE = World(0, 1, 0, torch.device("cpu"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    phantom.write(
        "nnunet", root, range(5), shape=(6, 48, 40), spacing=(20.0, 7.0, 8.0), organs=["liver", "spine"], tests=1
    )
    return root


def settings(folder: Path, dataset: Path, **changes: Any) -> finetune.Settings:
    given: dict[str, Any] = {
        "folder": folder,
        "dataset": dataset,
        "model": VIT,
        "decoder": {"kind": "pyramid", "taps": 2, "min_channels": 8},
        "steps": 6,
        "precision": "fp32",
        "split": {"val_fraction": 0.25},
        "patches": {"size": 32, "batch_size": 4, "workers": 2},
        "checkpoint": {"every": 3},
        "log": {"every": 3, "tensorboard": False},
        "validate_every": 3,
        "optim": {"lr": 3e-3, "backbone_lr": 1e-3},
        **changes,
    }
    folder.mkdir(parents=True, exist_ok=True)
    return finetune.Settings.model_validate(given)


@pytest.fixture(scope="module")
def trained(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    outcome = finetune.main(settings(folder, dataset))
    assert outcome.ok
    assert all(Path(path).is_file() for path in outcome.made)
    return folder


def test_the_run_leaves_what_it_should(trained: Path) -> None:
    validation = json.loads((trained / "validation.json").read_text())
    assert set(validation["dice"]) == {"liver", "spine", "mean"}
    assert len(validation["cases"]) == 1
    steps = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps] == [3, 6]
    assert {"term/dice", "term/ce", "dice/mean"} <= set(steps[-1])
    assert steps[0]["lr"] == pytest.approx(3e-3 * (1 - 2 / 6)), "the third of six steps of a linear fall"
    model, header = load_model(trained / "model.safetensors")
    assert header.step == 6
    assert header.values == (0, 1, 2)
    assert not model.training
    assert load_model(trained / "best.safetensors")[1].step in (3, 6)


def test_a_run_that_was_cut_continues_bit_for_bit(trained: Path, dataset: Path, tmp_path: Path) -> None:
    finetune.main(settings(tmp_path, dataset))
    for path in ("model.safetensors", "best.safetensors", "validation.json"):
        (tmp_path / path).unlink()
    shutil.rmtree(tmp_path / "checkpoints/step_00000006")
    finetune.main(settings(tmp_path, dataset))
    whole, cut = (load_file(folder / "model.safetensors") for folder in (trained, tmp_path))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [3, 6]
    assert (tmp_path / "validation.json").read_text() == (trained / "validation.json").read_text()


def tuned(rank: int, size: int, text: str, folder: Path) -> None:
    source = folder / f"settings_{rank}.yaml"
    source.write_text(text)
    finetune.main(load(finetune.Settings, source))


def test_two_ranks_train_as_one(dataset: Path, tmp_path: Path) -> None:
    """Equal but for Dice, which each rank takes over its own part of the batch; so the other term is nearly equal."""
    changes = {"steps": 3, "validate_every": 0, "drop_path": 0.0}
    one, two = settings(tmp_path / "one", dataset, **changes), settings(tmp_path / "two", dataset, **changes)
    finetune.main(one)
    run_ranks(f"{__file__}:tuned", 2, tmp_path, text=dump(two), folder=tmp_path / "two")
    rows = [json.loads((s.folder / "metrics.jsonl").read_text().splitlines()[-1]) for s in (one, two)]
    assert rows[0]["term/ce"] == pytest.approx(rows[1]["term/ce"], rel=0.02)
    assert load_model(tmp_path / "two/model.safetensors")[1].step == 3
    assert len(json.loads((tmp_path / "two/validation.json").read_text())["cases"]) == 1


def test_other_settings_in_the_same_folder_are_refused(trained: Path, dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "checkpoints", tmp_path / "checkpoints")
    with pytest.raises(ValueError, match="other settings"):
        finetune.main(settings(tmp_path, dataset, patches={"size": 40, "batch_size": 4}))


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"patches": {"size": 30}}, "no multiple of the backbone's 8"),
        ({"decoder": {"kind": "pyramid"}}, "reads 4 blocks, the backbone has 2"),
        ({"split": {"val": ["nobody"]}}, "nobody"),
    ],
)
def test_mistakes_are_found_before_training(dataset: Path, tmp_path: Path, changes: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        finetune.main(settings(tmp_path, dataset, **changes))


def test_frozen_backbone_stays_and_decoder_moves(trained: Path, dataset: Path, tmp_path: Path) -> None:
    changes = {
        "steps": 2,
        "freeze_backbone": True,
        "validate_every": 0,
        "split": {"val": []},
        "decoder": {"kind": "linear"},
    }
    outcome = finetune.main(settings(tmp_path, dataset, **changes))
    assert [Path(path).name for path in outcome.made] == ["model.safetensors"]
    found = load_file(tmp_path / "model.safetensors")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fresh = finetune._model(
            settings(tmp_path, dataset, **changes), open_dataset(dataset), cached(dataset, tmp_path)
        )[0]
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(tensor, found[name]) == name.startswith("backbone."), name


@pytest.mark.parametrize("freeze", [True, False])
def test_a_frozen_backbone_skips_no_branch(dataset: Path, tmp_path: Path, freeze: bool) -> None:
    given = settings(tmp_path, dataset, freeze_backbone=freeze, drop_path=0.3)
    model, _ = finetune._model(given, open_dataset(dataset), cached(dataset, tmp_path))
    assert {block.drop_path for block in model.backbone.blocks} == {0.0 if freeze else 0.3}


@pytest.mark.parametrize(("every", "looks"), [(3, 2), (4, 2), (0, 1)])
def test_the_last_validation_is_done_once(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int, looks: int
) -> None:
    calls = []
    monkeypatch.setattr(finetune, "validate", lambda *given: calls.append(1) or validate(*given))
    finetune.main(settings(tmp_path, dataset, validate_every=every))
    assert len(calls) == looks
    found = json.loads((tmp_path / "validation.json").read_text())
    model, header = load_model(tmp_path / "model.safetensors")
    (case,) = [case for case in cached(dataset, tmp_path) if case.name in found["cases"]]
    again = validate(model, header, [case], Window(), ALONE).means()
    assert found["step"] == 6
    assert found["dice"]["mean"]["mean"] == again["mean"]


def test_a_rank_with_a_bad_case_keeps_no_other_waiting(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(dataset, tmp_path / "data")
    bad = sorted((tmp_path / "data/labelsTr").iterdir())[1]
    bad.write_bytes(b"")
    waited = []
    monkeypatch.setattr(finetune, "barrier", lambda: waited.append(1))
    for rank in range(2):
        here = World(rank, 2, rank, torch.device("cpu"))
        with pytest.raises(CaseError, match=rf"1 of 4 cases cannot be used:\n.*{bad.name}"):
            finetune._prepared(open_dataset(tmp_path / "data"), settings(tmp_path / "run", tmp_path / "data"), here)
        assert len(waited) == rank + 1


def cached(dataset: Path, folder: Path) -> list[Any]:
    opened = open_dataset(dataset)
    return prepare(opened.cases, opened.labels, None, folder / "cache", active=False)


def test_a_dry_run_reads_no_voxel(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetune, "prepare", None)
    text = finetune.dry_run(settings(tmp_path, dataset))
    assert "3 cases to train, 1 to validate; liver, spine" in text
    assert "blocks [0, 1]" in text


def test_a_batch_depends_on_seed_and_step_only(dataset: Path, tmp_path: Path) -> None:
    cases = cached(dataset, tmp_path)
    take = PatchSettings(size=32, batch_size=4, workers=3)

    def made(world: World, start: int, count: int, seed: int = 0) -> list[Patches]:
        stream = batches(cases, take, Augmentation(), HuWindow(), seed, world, start)
        found = list(islice(stream, count))
        stream.close()
        return found

    whole = made(ALONE, 0, 4)
    assert all(torch.equal(a.images, b.images) for a, b in zip(whole[2:], made(ALONE, 2, 2), strict=True))
    assert not torch.equal(whole[0].images, made(ALONE, 0, 1, seed=1)[0].images)
    for step in range(2):
        parts = [made(World(rank, 2, rank, torch.device("cpu")), step, 1)[0] for rank in range(2)]
        assert torch.equal(torch.cat([part.images for part in parts]), whole[step].images)
        assert torch.equal(torch.cat([part.labels for part in parts]), whole[step].labels)


def test_forced_patches_hold_foreground(dataset: Path, tmp_path: Path) -> None:
    cases = cached(dataset, tmp_path)
    take = PatchSettings(size=8, batch_size=2, foreground=0.5)
    turned = off().model_copy(update={"rotate_p": 1.0, "scale_p": 1.0})
    for augmentation in (off(), turned):
        found = [bool((sample(cases, take, augmentation, HuWindow(), 0, index)[1] > 0).any()) for index in range(60)]
        assert all(found[1::2])
        assert not all(found[0::2])


def test_prediction_keeps_geometry_resumes_and_reports(trained: Path, dataset: Path, tmp_path: Path) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    (images / "deep").mkdir(parents=True)
    source = sitk.ReadImage(str(next((dataset / "imagesTs").iterdir())))
    for orientation, name in (("PIR", "a_0000.nii.gz"), ("LSA", "deep/b.mha"), ("RAS", "c.nrrd")):
        sitk.WriteImage(sitk.DICOMOrient(source, orientation), str(images / name))
    (images / "broken_0000.nii.gz").write_bytes(b"not a nifti file")
    given = predict.Settings(folder=out, model=trained / "model.safetensors", images=images, device="cpu")
    assert predict.main(given).ok
    made = sorted(path.name for path in out.glob("*.*") if not path.name.startswith("."))
    assert made == ["a.nii.gz", "c.nrrd", "deep_b.mha", "model.sha256", "refused.csv"]
    assert "broken_0000.nii.gz,unreadable" in (out / "refused.csv").read_text()
    labels = {}
    for name, label in (("a_0000.nii.gz", "a.nii.gz"), ("deep/b.mha", "deep_b.mha"), ("c.nrrd", "c.nrrd")):
        image, found = sitk.ReadImage(str(images / name)), sitk.ReadImage(str(out / label))
        for what in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
            assert getattr(image, what)() == getattr(found, what)(), f"{name}: {what}"
        labels[name] = sitk.GetArrayFromImage(sitk.DICOMOrient(found, "LPS"))
    same = list(labels.values())
    assert np.array_equal(same[0], same[1])
    assert np.array_equal(same[0], same[2]), "the same patient, stored in three orders, has the same labels"
    when = (out / "a.nii.gz").stat().st_mtime_ns
    (out / "c.nrrd").unlink()
    assert predict.main(given).ok
    assert (out / "a.nii.gz").stat().st_mtime_ns == when, "done ones are not done again"
    assert (out / "c.nrrd").is_file()


def test_two_models_do_not_share_a_folder_and_nothing_predicted_is_a_failure(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    given = predict.Settings(
        folder=tmp_path / "out", model=trained / "model.safetensors", images=tmp_path / "images", device="cpu"
    )
    with pytest.raises(CaseError, match="no image"):
        predict.main(given)
    (tmp_path / "images/x.nii.gz").write_bytes(b"")
    assert not predict.main(given).ok
    model, header = load_model(given.model)
    save_model(tmp_path / "other.safetensors", model, header.model_copy(update={"step": 7}))
    with pytest.raises(CaseError, match="another model"):
        predict.main(given.model_copy(update={"model": tmp_path / "other.safetensors"}))
    with pytest.raises(CaseError, match="nowhere is not there"):
        predict.main(given.model_copy(update={"images": tmp_path / "nowhere"}))


def test_memory_limit_spacing_and_mirroring_do_not_change_the_shape(
    trained: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, header = load_model(trained / "model.safetensors")
    volume = read(found_at(next((dataset / "imagesTs").iterdir())))
    whole = predict_volume(model, header, volume)
    assert whole.shape == volume.hu.shape
    assert set(np.unique(whole)) <= {0, 1, 2}
    monkeypatch.setattr("downstream.inference.LOGIT_BYTES", 1)
    assert np.array_equal(predict_volume(model, header, volume), whole), "slice by slice gives the same"
    coarse = header.model_copy(update={"spacing": 11.0})
    assert predict_volume(model, coarse, volume, Window(mirror=True)).shape == volume.hu.shape
    renamed = header.model_copy(update={"values": (0, 7, 200)})
    assert np.array_equal(predict_volume(model, renamed, volume), np.array([0, 7, 200], np.uint8)[whole])


def test_mirroring_is_the_mean_over_the_four_images(trained: Path) -> None:
    from downstream.inference import predict_slices

    model, header = load_model(trained / "model.safetensors")
    hu = np.random.default_rng(0).integers(-900, 900, (2, 32, 32)).astype(np.int16)

    def logits(array: np.ndarray[Any, Any], mirror: bool = False) -> torch.Tensor:
        return predict_slices(model, header.window, 32, np.ascontiguousarray(array), Window(mirror=mirror))

    parts = [logits(np.flip(hu, axes)).flip([axis + 1 for axis in axes]) for axes in ((), (1,), (2,), (1, 2))]
    assert torch.allclose(logits(hu, mirror=True), torch.stack(parts).mean(0), atol=1e-5)


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda path: path.unlink(), "no such file"),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "not a whole safetensors file"),
        (lambda path: path.write_bytes(b"garbage"), "not a whole safetensors file"),
    ],
)
def test_damaged_models_are_refused(trained: Path, tmp_path: Path, damage: Callable[[Path], Any], what: str) -> None:
    path = tmp_path / "model.safetensors"
    shutil.copy(trained / "model.safetensors", path)
    damage(path)
    with pytest.raises(ModelError, match=what):
        load_model(path)


def test_a_model_comes_back_as_it_was_written(trained: Path) -> None:
    model, _ = load_model(trained / "model.safetensors")
    stored = load_file(trained / "model.safetensors")
    assert isinstance(model, SegmentationModel)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in model.state_dict().items())


def test_evaluation_takes_the_names_from_the_model(trained: Path, dataset: Path, tmp_path: Path) -> None:
    given = evaluate.Settings(
        folder=tmp_path,
        predictions=dataset / "labelsTs",
        labels=dataset / "labelsTs",
        names=trained / "model.safetensors",
    )
    assert evaluate.main(given).ok
    assert set(json.loads((tmp_path / "summary.json").read_text())["organs"]) == {"liver", "spine", "mean"}
