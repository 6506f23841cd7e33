"""The demo's seams; the demo itself runs as the README's first command."""

from __future__ import annotations

from pathlib import Path

import pytest

import downstream.demo as demo
from data_curation.curate import Settings as Curate
from downstream.finetune import Settings as Finetune
from launch import cli
from launch.settings import find, load
from pretrain.settings import Settings as Pretrain


@pytest.mark.parametrize("config", demo.CONFIGS)
def test_its_recipes_are_valid(config: str) -> None:
    words = ["folder=run", "data.corpus=corpus", "init_from=before"]
    if config != demo.CONFIGS[0]:
        words.append("method.gram_teacher.path=before")
    settings = load(Pretrain, find(f"{config}.yaml"), words)
    assert settings.model.in_channels == 1
    assert load(Finetune, find("demo.yaml"), ["folder=run", "dataset=data"]).steps > 0


def test_its_corpus_file_is_valid_in_a_folder_of_any_name(tmp_path: Path) -> None:
    folder = tmp_path / "köln: a, {b} #c"
    folder.mkdir()
    settings = load(Curate, demo._corpus_yaml(folder), [f"folder={tmp_path}/corpus"])
    assert [source.name for source in settings.datasets] == list(demo.LAYOUTS)
    assert [source.root for source in settings.datasets] == [folder / "ct" / layout for layout in demo.LAYOUTS]


def test_as_many_phantoms_as_were_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    monkeypatch.setattr(demo.phantom, "write", lambda layout, root, seeds, *_, **__: made.append(len(seeds)))
    demo._phantoms(demo.Settings(unlabelled=20, labelled=4, held_out=1), tmp_path, tmp_path / "labelled")
    assert made == [7, 7, 6, 5]


def test_phantoms_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "SHAPE", (3, 48, 48))
    settings = demo.Settings(folder=tmp_path, unlabelled=6, labelled=4, held_out=1)
    labelled = tmp_path / "Dataset001_Phantom"
    demo._phantoms(settings, tmp_path, labelled)
    assert len(list((labelled / "imagesTr").iterdir())) == 4
    assert len(list((labelled / "labelsTs").iterdir())) == 1
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    demo._phantoms(settings, tmp_path, labelled)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(demo.DemoError, match="another folder"):
        demo._phantoms(settings.model_copy(update={"seed": 5}), tmp_path, labelled)


def test_a_failing_command_ends_the_demo(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(demo.DemoError, match="exit code 2"):
        demo._axial("pretrain", "no_such_file.yaml")
    assert "no_such_file.yaml" in capsys.readouterr().err


def test_a_mistyped_setting_is_one_clear_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "labeled=3"]) == 2
    assert "did you mean 'labelled'" in capsys.readouterr().err
