"""The packaged settings: whole, with their story, the published numbers, and each of them trains."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data_curation import curate, phantom
from launch import cli
from launch.crew import Workers
from launch.settings import dump, find, load
from pretrain import train
from pretrain.checkpoint_files import newest, read_tensors
from pretrain.methods import SourceError
from pretrain.methods.multi_teacher import Settings as MultiTeacher
from pretrain.models.vit import VitSettings
from pretrain.schedule import Schedule
from pretrain.settings import Settings
from tests.pretrain.teacher_files import write_export

FILES = sorted(find("stage1.yaml").parent.glob("*.yaml"))
NAMES = [file.stem for file in FILES]
GIVEN = ["folder=runs/x", "data.corpus=corpus"]
RUNS = [name for name in NAMES if not name.startswith("demo")]  # the demo itself runs those of the demo
CONTINUES = [name for name in NAMES if "gram" in name or "hires" in name]
TAUGHT = [name for name in NAMES if "comad" in name]


def recipe(name: str, *words: str) -> Settings:
    """As the command line loads it; one that goes on from an earlier run is told from which."""
    if name in CONTINUES and name.startswith("demo"):
        words = ("init_from=before", "method.gram_teacher.path=before", *words)
    return load(Settings, find(f"{name}.yaml"), [*GIVEN, *words])


def term(settings: Settings, name: str) -> Any:
    return settings.method.active.get(name)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", NAMES)
def test_begins_with_its_story(name: str) -> None:
    assert recipe(name).steps
    story = find(f"{name}.yaml").read_text()
    for word in ("# Source:", "# Hardware:", "Loss:", f"# Command: axial pretrain {name}.yaml"):
        assert word in story, f"{name} does not say {word}"


# What the sources say. rate: learning rate at its peak as it is applied, after DINOv3's rule for the batch.
SEEN: dict[str, Callable[[Settings], Any]] = {
    "steps": lambda s: s.steps,
    "batch": lambda s: s.data.batch_size,
    "size": lambda s: s.model.size,
    "rate": lambda s: float(f"{s.optim.schedules(s.steps, s.data.batch_size).lr.peak:.3g}"),
    "crops": lambda s: [(c.global_size, c.local_size, c.gram_size) for c in s.data.crops.shapes],
    "momentum": lambda s: s.method.momentum,  # type: ignore[attr-defined]
    "gram": lambda s: getattr(getattr(term(s, "gram"), "weight", None), "peak", None),
    "koleo": lambda s: term(s, "koleo").weight.peak,
    "decay": lambda s: s.optim.weight_decay,
    "clip": lambda s: s.clip,
    "drop": lambda s: s.model.drop_path,
}
HIRES = [(512, 112, 768), (768, 112, 1152), (768, 160, 1152), (768, 224, 1152), (768, 336, 1152)]
V1: Any = {"form": "v1"}
PUBLISHED: dict[str, dict[str, Any]] = {
    "stage1": {
        "steps": 100_000, "batch": 512, "size": "b", "rate": 5.66e-4, "crops": [(256, 112, None)], "koleo": 0.1,
        "momentum": Schedule(peak=0.994), "gram": None, "decay": Schedule(peak=0.04), "clip": 3.0, "drop": 0.2,
    },
    "stage2_gram": {
        "steps": 10_000, "batch": 512, "size": "b", "rate": 1.41e-4, "crops": [(256, 112, 512)], "gram": 2.0,
        "momentum": Schedule(peak=0.999),
    },
    "stage3_hires": {
        "steps": 10_000, "batch": 512, "size": "b", "rate": 7.07e-5, "crops": HIRES, "gram": 1.5,
        "momentum": Schedule(peak=0.999),
    },
    "imagenet_vitl": {
        "steps": 125_000, "batch": 2048, "size": "l", "rate": 5.66e-3, "crops": [(224, 96, None)], "koleo": 0.1,
        "momentum": Schedule(peak=0.992, end=1.0, **V1), "decay": Schedule(peak=0.04, end=0.4, **V1), "clip": 3.0,
        "drop": 0.3,
    },
    "scratch_vitl": {"steps": 125_000, "batch": 2048, "size": "l", "rate": 5.66e-3, "crops": [(256, 112, None)]},
    "scratch_vitb": {"steps": 125_000, "batch": 2048, "size": "b", "rate": 5.66e-3, "drop": 0.2},
    "scratch_vits": {"steps": 62_500, "batch": 1024, "size": "s", "rate": 4e-3},
    "one_gpu": {"batch": 64, "size": "b", "rate": 2e-4, "momentum": Schedule(peak=0.99925)},
    "small_batch": {"batch": 32, "size": "b", "rate": 1.41e-4, "momentum": Schedule(peak=0.99962)},
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_has_the_numbers_of_its_source(name: str) -> None:
    settings = recipe(name)
    assert {key: SEEN[key](settings) for key in PUBLISHED[name]} == PUBLISHED[name]


def test_the_recipe_on_natural_images_is_the_official_one() -> None:
    """vitl_im1k_lin834.yaml, where the table above does not reach."""
    s = recipe("imagenet_vitl")
    assert s.model.shape == (1024, 24, 16)
    assert (s.model.registers, s.model.mask_k_bias, s.model.norm_eps, s.model.rope.rescale) == (0, False, 1e-6, None)
    assert (s.optim.betas, s.optim.layer_decay, s.optim.patch_embed_lr, s.optim.eps) == ((0.9, 0.999), 0.9, 0.2, 1e-8)
    assert s.data.crops.distortions.blur == (0.0, 0.9, 0.5)
    assert s.data.crops.flip == 0.5
    schedules = s.optim.schedules(s.steps, s.data.batch_size)
    assert schedules.freeze_last_layer == 1250
    assert [float(f"{schedules.lr(step):.3g}") for step in (0, 12_499, 12_500, 124_999)] == [0, 5.66e-3, 5.66e-3, 1e-6]
    for name in ("dino", "ibot"):
        warm = term(s, name).teacher_temperature.over(s.steps)
        assert [warm(step) for step in (0, 37_499, 100_000)] == pytest.approx([0.04, 0.07, 0.07])
        assert (term(s, name).head.prototypes, term(s, name).head.hidden, term(s, name).head.bottleneck) == (
            65536, 2048, 256,
        )  # fmt: skip


def test_comad_has_what_is_known_of_the_paper_and_for_ct_what_holds_up() -> None:
    paper, ct = (recipe(name).method for name in ("comad_paper", "comad_ct"))
    assert isinstance(paper, MultiTeacher)
    assert isinstance(ct, MultiTeacher)
    assert paper.shares == {"mae": 0.5, "moco_v3": 0.4, "ibot": 0.3}
    assert (paper.masks.student, paper.masks.nested, paper.masks.replace) == (0.75, False, True)
    assert (paper.adapter.kind, paper.adapter.affine, paper.cls.weight.peak) == ("joint", True, 0.0)
    assert [getattr(paper.gate, name).peak for name in ("affinity", "agreement", "temperature")] == [1, 1, 0.1]
    assert [(kl.weight.peak, kl.temperature) for kl in (paper.token, paper.spatial)] == [(1, 1), (1, 1)]
    assert (ct.adapter.kind, ct.masks.nested, ct.masks.replace, ct.cls.weight.peak) == ("gcca", True, False, 1.0)
    s = recipe("comad_paper")
    assert (s.model.shape, s.steps, s.data.batch_size, s.model.drop_path) == ((192, 12, 3), 93_825, 4096, 0.1)
    assert (s.data.crops.n_global, s.data.crops.n_local, s.data.crops.global_scale) == (1, 0, (0.2, 1.0))
    schedules = s.optim.schedules(s.steps, s.data.batch_size)
    assert [float(f"{schedules.lr(step):.2g}") for step in (0, 4691, 93_824)] == [0, 2.4e-3, 0]


@pytest.fixture(scope="module")
def vit_b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of the size of the published ones; its numbers do not matter."""
    folder = tmp_path_factory.mktemp("vit_b")
    return write_export(folder / "vit_b.safetensors", VitSettings(size="b"), 0)


def taught(name: str, teacher: Path) -> list[str]:
    """The recipe's teachers, all read from one file."""
    method = recipe(name).method
    if not isinstance(method, MultiTeacher):
        return []
    return [f"method.teachers.{n}={{kind: axial, weights: {teacher}, mask: {method.shares[n]}}}" for n in method.active]


@pytest.mark.parametrize("name", RUNS)
def test_says_its_rate_and_its_work_without_a_run(name: str, tmp_path: Path, vit_b: Path) -> None:
    words = [f"init_from.path={tmp_path}"] if recipe(name).init_from is not None else taught(name, vit_b)
    words += [f"method.gram_teacher.path={tmp_path}"] if name in CONTINUES else []
    settings = recipe(name, *words)
    said = train.dry_run(settings)
    rate = re.search(r"learning rate at its peak: (\S+) = ", said)
    assert rate is not None
    assert float(rate[1]) == SEEN["rate"](settings)
    work = re.search(r"a step: \d+ slices, (\S+) TFLOP", said)
    assert work is not None
    claimed = re.search(r"[Aa] step is (\d+(?:\.\d+)?) TFLOP", find(f"{name}.yaml").read_text())
    assert claimed is None or float(claimed[1]) == pytest.approx(float(work[1]), rel=0.01)


@pytest.mark.parametrize("name", RUNS)
def test_a_source_that_is_not_there_stops_it_at_once(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "flops_per_step", lambda _: 0.0)
    monkeypatch.setattr(train, "build_method", lambda *_: pytest.fail("built"))
    needs = {"init_from": recipe(name).source is not None, "method.gram_teacher": name in CONTINUES}
    method = recipe(name).method
    if isinstance(method, MultiTeacher):
        needs |= {f"method.teachers.{teacher}.weights": True for teacher in method.active}
    if not any(needs.values()):
        return recipe(name).check_sources()
    for flags in ([], ["--dry-run"]):
        assert cli.main(["pretrain", f"{name}.yaml", *GIVEN, *flags]) == 2
        said = capsys.readouterr().err
        assert f"{sum(needs.values())} source(s) of weights missing" in said
        assert [key for key in needs if f"  {key}: " in said] == [key for key, needed in needs.items() if needed]
        where = "dinov3-downloads" if "runs/" not in str(recipe(name).init_from) else "yaml into it first"
        hints = {"comad_paper": "mae_pretrain_vit_base.pth (CC-BY-NC", "comad_smoke": "run `axial demo folder=demo`"}
        assert hints.get(name, where) in said
    return None


def test_a_run_with_a_gram_teacher_begins_from_something_or_says_that_it_does_not(tmp_path: Path) -> None:
    words = [*GIVEN, "steps=1", "data.batch_size=1", "method.terms.gram.weight=2", "method.gram_teacher.path=before"]
    with pytest.raises(SourceError, match=r"init_from: a run with method\.gram_teacher goes on.*init_from=scratch"):
        load(Settings, None, words).check_sources()
    meant = load(Settings, None, [*words, "init_from=scratch"])
    assert meant.source is None
    (tmp_path / "settings.yaml").write_text(dump(meant))
    assert load(Settings, tmp_path / "settings.yaml") == meant


def test_a_run_that_goes_on_needs_no_source(tmp_path: Path) -> None:
    begun = recipe("stage1", f"folder={tmp_path}")
    with pytest.raises(ValueError, match="1 source"):
        begun.check_sources()
    (tmp_path / "checkpoints" / "step_00000010").mkdir(parents=True)
    begun.check_sources()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("phantoms")
    phantom.write("folder", root / "scans", [0, 1, 2], (4, 48, 48), (20.0, 8.0, 8.0))
    given = {"folder": root / "corpus", "datasets": [{"name": "folder", "root": root / "scans"}]}
    curate.main(curate.Settings.model_validate(given), Workers(0))
    return root / "corpus"


def shrunk(settings: Settings, folder: Path, corpus: Path, source: Path | None) -> Settings:
    """The recipe with everything that costs made small, and nothing left out."""
    folder.mkdir()
    data: Any = settings.model_dump(mode="json")
    data |= {"folder": str(folder), "steps": 2, "device": "cpu"}
    data["model"] |= {"size": "custom", "width": 32, "depth": 2, "heads": 2, "patch_size": 16}
    crops = data["data"]["crops"]
    for shape in (crops, *crops["mix"]):
        for name in ("global_size", "local_size", "gram_size"):
            shape[name] = shape[name] and max(1, round(shape[name] / 128)) * 16
    data["data"] |= {"corpus": str(corpus), "batch_size": 4, "workers": 0, "split": None, "crops": crops}
    data["data"]["masks"]["group"] = data["data"]["masks"]["group"] and 2
    for part in data["method"].get("terms", {}).values():
        if "head" in part:
            part["head"] |= {"prototypes": 32, "hidden": 16, "bottleneck": 8}
    if "teachers" in data["method"]:
        _small_teachers(data, folder.parent)
    data["parallel"]["compile"] = False
    data["log"] |= {"every": 1, "tensorboard": False}
    if source is not None and data["init_from"] is not None:
        data["init_from"]["path"] = str(source)
    if source is not None and data["method"].get("gram_teacher") is not None:
        data["method"]["gram_teacher"] |= {"path": str(source), "step": 1}
    return Settings.model_validate(data)


def _small_teachers(data: dict[str, Any], folder: Path) -> None:
    """The recipe's teachers as small files of our own, with their shares, floors and masks."""
    if (positions := data["model"]["positions"]) is not None:
        positions["grid"] = data["data"]["crops"]["global_size"] // 16
    data["method"]["adapter"]["slices"] = 40
    for seed, (name, teacher) in enumerate(data["method"]["teachers"].items()):
        size = VitSettings(size="custom", width=32, depth=1, heads=2, layerscale=None)
        path = write_export(folder / f"{name}.safetensors", size, seed)
        data["method"]["teachers"][name] = {
            **{key: teacher[key] for key in ("mask", "floor", "size", "block", "norm")}, "kind": "axial",
            "weights": str(path),
        }  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_trains(name: str, tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "flops_per_step", lambda _: 0.0)
    settings = shrunk(recipe(name), tmp_path / "run", corpus, tmp_path / "source")
    if settings.source is not None:
        begin = shrunk(recipe("smoke"), tmp_path / "source", corpus, None)
        train.main(begin.model_copy(update={"steps": 1, "model": settings.model}))
    train.main(settings)
    found = newest(settings.folder)
    assert found is not None
    assert found.name == "step_00000002"
    weights = read_tensors(found, "method.")
    assert all(torch.isfinite(x).all() for x in weights.values() if x.is_floating_point())
    parts = {"student", "teacher", *["gram_teacher"] * (name in CONTINUES)}
    if name in TAUGHT:
        parts = {"student", "marks", *["adapters"] * (name != "comad_paper")}
    assert {key.split(".")[0] for key in weights} == parts
