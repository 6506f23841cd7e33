"""A chain of pretraining runs: what each takes over from the one before it, on paper and in fact."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from data_curation import curate, phantom
from data_curation.corpus import Corpus
from launch.cli import main
from launch.distributed import World
from launch.plan import Plan, chain
from launch.settings import SettingsError, load
from launch.verbs import VERBS
from pretrain.data.stream import batches
from pretrain.settings import Settings
from pretrain.train import samples

CPU = torch.device("cpu")
MEDDINO = ["stage1.yaml", "stage2_gram.yaml", "stage3_hires.yaml"]


def planned(*words: str, configs: list[str] = MEDDINO) -> Plan:
    return chain(VERBS["pretrain"], configs, ["folder=runs", "data.corpus=corpus", *words])


def test_the_packaged_chain_reads_one_run_after_the_other(capsys: pytest.CaptureFixture[str]) -> None:
    one, two, three = (run.settings for run in planned().runs)
    assert one.init_from.path == Path("dinov3_vitb16_pretrain_lvd1689m-73cec8be.pth")
    assert [two.init_from.path, three.init_from.path] == [Path("runs/stage1"), Path("runs/stage2_gram")]
    gram = [run.method.gram_teacher for run in (two, three)]
    # Step 20000 of the first is kept for good, so the Gram teacher is that of the paper.
    assert [(g.path, g.step) for g in gram] == [(Path("runs/stage1"), 20000), (Path("runs/stage2_gram"), None)]
    assert capsys.readouterr().out == ""


def test_a_step_that_will_not_be_there_gives_way_to_the_newest(capsys: pytest.CaptureFixture[str]) -> None:
    two = planned("stage1.steps=30500", "stage1.checkpoint.keep_every=0").runs[1].settings
    assert two.method.gram_teacher.step is None
    text = "method.gram_teacher.step: runs/stage1 will keep no checkpoint of step 20000; its newest is read\n"
    assert capsys.readouterr().out == text
    for words in (["steps=20000"], ["steps=20500"], ["steps=22000"]):  # among the newest three
        found = planned(*(f"stage1.{word}" for word in words), "stage1.checkpoint.keep_every=0").runs[1].settings
        assert found.method.gram_teacher.step == 20000, words


def test_where_the_first_begins_is_not_where_the_others_do() -> None:
    own = ("init_from.heads=false", "method.gram_teacher.path=x")
    plan = planned("init_from.path=mine", *(f"stage3_hires.{word}" for word in own))
    one, two, three = (run.settings for run in plan.runs)
    assert one.init_from.path == Path("mine")
    assert (two.init_from.path, two.method.gram_teacher.path) == (Path("runs/stage1"), Path("runs/stage1"))
    assert (three.init_from.path, three.init_from.heads) == (Path("runs/stage2_gram"), False)
    assert three.method.gram_teacher.path == Path("x")
    one, two, _ = (run.settings for run in planned("init_from=scratch").runs)
    assert one.source is None
    assert two.init_from.path == Path("runs/stage1")


def test_a_run_of_another_method_takes_nothing_over() -> None:
    with pytest.raises(SettingsError, match="comad_ct: a run of multi_teacher takes no weights over from one of self"):
        planned(configs=["stage1.yaml", "comad_ct.yaml"])


HEAD = {"prototypes": 16, "hidden": 16, "bottleneck": 8}
TINY = {
    "steps": 2,
    "device": "cpu",
    "precision": "fp32",
    "model": {"size": "custom", "width": 16, "depth": 1, "heads": 2, "in_channels": 1},
    "data": {"batch_size": 2, "workers": 0, "crops": {"global_size": 32, "local_size": 16, "n_local": 1}},
    "method": {"terms": {"dino": {"head": HEAD}, "ibot": {"head": HEAD}}},
    "log": {"every": 1, "tensorboard": False},
}


def test_a_tiny_chain_goes_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    phantom.write("nnunet", Path("data"), range(2), shape=(8, 40, 40), spacing=(5.0, 2.0, 2.0), organs=["liver"])
    curate.main(
        curate.Settings.model_validate(
            {"folder": "corpus", "datasets": [{"name": "folder", "root": "data/imagesTr", "id": "made_up"}]}
        )
    )
    Path("first.yaml").write_text(json.dumps(TINY))
    second = {"base": "first.yaml", "data": {"crops": {"gram_size": 32}}, "init_from": "nowhere"}
    second["method"] = {"terms": {"gram": {"weight": 1.0}}, "gram_teacher": {"path": "nowhere"}}
    Path("second.yaml").write_text(json.dumps(second))
    words = ["pretrain", "first.yaml", "second.yaml", "folder=runs", "data.corpus=corpus"]
    assert main([*words, "--dry-run"]) == 0  # although the weights of the first are yet to come
    assert main([*words, "second.steps=0"]) == 2
    assert not Path("runs").exists()
    capsys.readouterr()
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "runs/first" in out
    assert "made: runs/second/checkpoints/step_00000002\n" in out
    assert "next: axial export folder=runs/second\n" in out
    for rank in (0, 1):
        samples_are_those_of_the_stream(load(Settings, Path("runs/first/settings.yaml")), World(rank, 2, rank, CPU))


def samples_are_those_of_the_stream(settings: Settings, here: World) -> None:
    """What is told of a step in which a job fails is what its ranks saw in it."""
    corpora = [Corpus(source.path, settings.data.split) for source in settings.data.sources]
    stream = batches(settings.data, world=here, patch_size=16, in_channels=1, start=0, corpus=corpora)
    seen = [next(stream).keys for _ in range(4)]
    stream.close()
    told = [samples(settings, step) for step in (1, 2, 3, 4)]
    assert [step[here.rank] for step in told] == [keys[0] for keys in seen]
    assert len({tuple(step) for step in told}) > 1
