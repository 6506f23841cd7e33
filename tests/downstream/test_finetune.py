"""Fine-tuning as a user runs it, small: after a kill, on two ranks, fold by fold, tuned in every way, on bad input."""

from __future__ import annotations

import json
import shlex
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from safetensors.torch import load_file

from data_curation import phantom
from downstream import evaluate, finetune, training
from downstream.augment import Augmentation, off
from downstream.cases import CaseError, open_dataset
from downstream.channels import Channel
from downstream.context import Context
from downstream.inference import Window
from downstream.model import load_model
from downstream.prepared import prepare
from downstream.segmentation import Patches, PatchSettings, Source, batches, sample
from downstream.training import assemble
from downstream.validation import validate
from launch.distributed import World
from launch.settings import dump, load
from pretrain.data.window import HuWindow
from tests.gloo import run_ranks

VIT = {"size": "custom", "width": 24, "depth": 2, "heads": 2, "patch_size": 8, "in_channels": 1, "layerscale": None}
CT = (Channel(window=HuWindow()),)
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
        "maps": "none",
        **changes,
    }
    folder.mkdir(parents=True, exist_ok=True)
    return finetune.Settings.model_validate(given)


@pytest.fixture(scope="module")
def trained(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("a run")
    outcome = finetune.main(settings(folder, dataset))
    assert outcome.ok and shlex.split(outcome.next[0])[2] == f"model={folder}/model.safetensors"
    assert all(Path(path).exists() for path in outcome.made)
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
    changes = {"steps": 3, "validate_every": 0, "drop_path": 0.0, "maps": "last", "split": {"val_fraction": 0.5}}
    changes["context"] = {"slices": 1}
    one, two = settings(tmp_path / "one", dataset, **changes), settings(tmp_path / "two", dataset, **changes)
    finetune.main(one)
    run_ranks(f"{__file__}:tuned", 2, tmp_path, text=dump(two), folder=tmp_path / "two")
    rows = [json.loads((s.folder / "metrics.jsonl").read_text().splitlines()[-1]) for s in (one, two)]
    for term in ("term/ce", "term/dice"):
        assert rows[0][term] == pytest.approx(rows[1][term], rel=1e-4)
    assert load_model(tmp_path / "two/model.safetensors")[1].step == 3
    found = [json.loads((s.folder / "scores/summary.json").read_text()) for s in (one, two)]
    assert found[0]["cases"] == found[1]["cases"] == json.loads((two.folder / "validation.json").read_text())["cases"]
    assert len(found[0]["cases"]) == 2


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
        ({"split": {"fold": "all", "folds": 9}}, "cannot make 9 folds"),
        ({"backbone": "/nowhere.pth"}, "nowhere"),
        ({"normalisation": [{"low": -160, "high": 240, "mean": 0, "std": 100}] * 2}, r"lists 2 window\(s\)"),
        ({"optim": {"betas": [1.5, 0.9]}}, "less than 1"),
    ],
)
@pytest.mark.parametrize("run", [finetune.main, finetune.dry_run])
def test_mistakes_are_found_before_a_case_is_read(
    dataset: Path, tmp_path: Path, run: Any, changes: dict[str, Any], what: str
) -> None:
    with pytest.raises((ValueError, OSError), match=what):
        run(settings(tmp_path, dataset, **changes))
    assert not list(tmp_path.iterdir()), "the folder may be used with other settings"


def test_frozen_backbone_stays_and_decoder_moves(trained: Path, dataset: Path, tmp_path: Path) -> None:
    changes = {
        "steps": 2,
        "tuning": {"kind": "frozen"},
        "validate_every": 0,
        "split": {"val": []},
        "decoder": {"kind": "linear"},
    }
    outcome = finetune.main(settings(tmp_path, dataset, **changes))
    assert [Path(path).name for path in outcome.made] == ["model.safetensors"]
    found = load_file(tmp_path / "model.safetensors")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        given = settings(tmp_path, dataset, **changes)
        fresh = assemble(given, open_dataset(dataset), cached(dataset, tmp_path), print)[0]
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(tensor, found[name]) == name.startswith("backbone."), name


TUNINGS: list[dict[str, Any]] = [
    {"kind": "full", "layer_decay": 0.7},
    {"kind": "frozen"},
    {"kind": "lora", "rank": 2},
    {"kind": "adapter", "width": 4},
]


@pytest.mark.parametrize("tuned", TUNINGS, ids=lambda tuned: tuned["kind"])
def test_a_backbone_that_is_not_trained_whole_skips_no_branch(
    dataset: Path, tmp_path: Path, tuned: dict[str, Any]
) -> None:
    given = settings(tmp_path, dataset, tuning=tuned, drop_path=0.3)
    model, _ = assemble(given, open_dataset(dataset), cached(dataset, tmp_path), print)
    assert {block.drop_path for block in model.backbone.blocks} == {0.3 if tuned["kind"] == "full" else 0.0}


@pytest.mark.parametrize("tuned", TUNINGS, ids=lambda tuned: tuned["kind"])
def test_every_tuning_goes_on_bit_for_bit_and_the_file_is_the_model(
    dataset: Path, tmp_path: Path, tuned: dict[str, Any]
) -> None:
    changes = {"tuning": tuned, "steps": 4, "checkpoint": {"every": 2}, "validate_every": 0, "split": {"val": []}}
    finetune.main(settings(tmp_path / "whole", dataset, **changes))
    finetune.main(settings(tmp_path / "cut", dataset, **changes))
    (tmp_path / "cut/model.safetensors").unlink()
    shutil.rmtree(tmp_path / "cut/checkpoints/step_00000004")
    finetune.main(settings(tmp_path / "cut", dataset, **changes))
    whole, cut = (load_file(tmp_path / run / "model.safetensors") for run in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    _, header = load_model(tmp_path / "whole/model.safetensors")
    assert (header.adapters is not None) == (tuned["kind"] == "adapter")
    assert not [name for name in whole if "side" in name], "LoRA lies in the weights"


def test_five_folds_each_validate_once_and_share_the_cache(dataset: Path, tmp_path: Path) -> None:
    changes = {"steps": 2, "validate_every": 0, "split": {"fold": "all", "folds": 2}, "maps": "last"}
    outcome = finetune.main(settings(tmp_path, dataset, **changes))
    assert [Path(path).parent.name for path in outcome.made[:2]] == ["fold_0", "fold_1"]
    pooled, *folds = [
        json.loads((tmp_path / where / "validation.json").read_text()) for where in (".", "fold_0", "fold_1")
    ]
    assert sorted(folds[0]["cases"] + folds[1]["cases"]) == pooled["cases"]
    assert len(pooled["cases"]) == 4
    maps = sorted(path.name.removesuffix(".nii.gz") for path in (tmp_path / "validation").iterdir())
    assert maps == pooled["cases"] == json.loads((tmp_path / "scores/summary.json").read_text())["cases"]
    assert len(list((tmp_path / "cache").iterdir())) == 4
    when = (tmp_path / "fold_0/model.safetensors").stat().st_mtime_ns
    (tmp_path / "fold_1/validation.json").unlink()
    finetune.main(settings(tmp_path, dataset, **changes))
    assert (tmp_path / "fold_0/model.safetensors").stat().st_mtime_ns == when, "a finished fold stays"
    assert json.loads((tmp_path / "validation.json").read_text()) == pooled


def test_neighbours_and_several_windows_train_and_predict(dataset: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"steps": 2, "validate_every": 0, "context": {"slices": 1}, "maps": "last"}
    changes |= {"normalisation": [{"low": [-1000, -160], "high": [0, 240], "mean": [-500, 40], "std": [300, 100]}]}
    finetune.main(settings(tmp_path, dataset, **changes))
    _, header = load_model(tmp_path / "model.safetensors")
    assert header.context.slices == 1
    assert header.channels[0].window.channels == 2
    assert json.loads((tmp_path / "scores/summary.json").read_text())["cases"]


def test_regions_and_an_ignore_label_are_learnt_as_such(dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(dataset, tmp_path / "data")
    about = json.loads((tmp_path / "data/dataset.json").read_text())
    about["labels"] = {"background": 0, "both": [1, 2], "spine": 2, "ignore": 3}
    about["regions_class_order"] = [1, 2]
    (tmp_path / "data/dataset.json").write_text(json.dumps(about))
    for path in (tmp_path / "data/labelsTr").iterdir():
        stored = sitk.ReadImage(str(path))
        array = sitk.GetArrayFromImage(stored)
        array[:, :6] = 3
        changed = sitk.GetImageFromArray(array)
        changed.CopyInformation(stored)
        sitk.WriteImage(changed, str(path))
    finetune.main(settings(tmp_path / "run", tmp_path / "data", maps="best"))
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert {"term/dice", "term/bce", "dice/both"} <= set(rows[-1])
    _, header = load_model(tmp_path / "run/model.safetensors")
    assert header.order == (1, 2)
    assert header.ignore == 3
    values = {int(v) for path in (tmp_path / "run/validation").iterdir() for v in np.unique(_array(path))}
    assert values <= {0, 1, 2}, "nothing is ever called `ignore`"


def _array(path: Path) -> np.ndarray[Any, Any]:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def test_a_batch_in_parts_is_refused_where_it_cannot_be_cut(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be cut into accumulate=3"):
        settings(tmp_path, dataset, accumulate=3)
    finetune.main(settings(tmp_path, dataset, accumulate=2, steps=1, validate_every=0, split={"val": []}))


@pytest.mark.parametrize(("every", "looks"), [(3, 2), (4, 2), (0, 1)])
def test_the_last_validation_is_done_once(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int, looks: int
) -> None:
    calls = []
    monkeypatch.setattr(training, "validate", lambda *given: calls.append(1) or validate(*given))
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


def test_a_batch_depends_on_seed_and_step_only(dataset: Path, tmp_path: Path) -> None:
    cases = cached(dataset, tmp_path)
    take = PatchSettings(size=32, batch_size=4, workers=3)

    def made(world: World, start: int, count: int, seed: int = 0) -> list[Patches]:
        stream = batches(Source(cases, take, Augmentation(), CT, Context(), seed), world, start)
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


def test_the_cases_told_of_a_step_are_those_it_draws(dataset: Path, tmp_path: Path) -> None:
    asked = settings(tmp_path / "run", dataset, split={"fold": 1, "folds": 2})
    train = [case for case in cached(dataset, tmp_path) if case.name in finetune._cut(asked, open_dataset(dataset))[0]]
    source, size = Source(train, asked.patches, Augmentation(), CT, Context(), asked.seed), asked.patches.batch_size
    assert finetune.samples(asked, 2) == [sample(source, size + n)[2].partition("/")[0] for n in range(size)]


def test_forced_patches_hold_foreground(dataset: Path, tmp_path: Path) -> None:
    cases = cached(dataset, tmp_path)
    take = PatchSettings(size=8, batch_size=2, foreground=0.5)
    turned = off().model_copy(update={"rotate_p": 1.0, "scale_p": 1.0})
    for augmentation in (off(), turned):
        source = Source(cases, take, augmentation, CT, Context(), 0)
        found = [bool((sample(source, index)[1] > 0).any()) for index in range(60)]
        assert all(found[1::2])
        assert not all(found[0::2])


def test_evaluation_takes_the_names_from_the_model(trained: Path, dataset: Path, tmp_path: Path) -> None:
    given = evaluate.Settings(
        folder=tmp_path,
        predictions=dataset / "labelsTs",
        labels=dataset / "labelsTs",
        names=trained / "model.safetensors",
    )
    assert evaluate.main(given).ok
    assert set(json.loads((tmp_path / "summary.json").read_text())["organs"]) == {"liver", "spine", "mean"}
