"""What is done in parts, elsewhere and at one time, is what one run makes of it all."""

from __future__ import annotations

import csv
import os
import shutil
from pathlib import Path
from typing import Any, NoReturn

import pytest

from data_curation import phantom
from downstream import finetune, predict
from downstream.record import read_record
from launch.perform import Performance
from launch.plan import one, parted
from launch.verbs import VERBS
from tests.downstream.random_models import saved
from tests.downstream.test_continuing import settings as finetuning


def nobody(*_: Any, **__: Any) -> NoReturn:
    raise AssertionError("it was done before")


def settings(folder: Path, model: Path, images: Path, **changes: Any) -> predict.Settings:
    return predict.Settings.model_validate({"folder": folder, "model": model, "images": images, **changes})


def maps(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.nii.gz"))}


def refused(folder: Path) -> list[str]:
    with (folder / "refused.csv").open(newline="") as file:
        return [row[0] for row in csv.reader(file)][1:]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return saved(tmp_path / "m.safetensors")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    phantom.write("nnunet", tmp_path / "data", range(5), shape=(4, 40, 40), spacing=(20.0, 8.0, 8.0), organs=["liver"])
    inside = tmp_path / "data" / "imagesTr"
    whole = sorted(inside.iterdir())[0]
    (inside / "cut_0000.nii.gz").write_bytes(whole.read_bytes()[:900])
    return inside


def test_the_whole_takes_up_what_its_parts_made(
    model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, whole = (settings(tmp_path / name, model, images, probabilities=True) for name in ("plain", "whole"))
    assert predict.main(plain).ok
    cut = predict.parts(whole, 3)
    assert [(part.share, part.folder) for part in cut] == [
        (f"{i}/3", tmp_path / "whole" / "parts" / f"00{i}") for i in range(3)
    ]
    assert all(predict.main(part).ok for part in cut)
    shared = [set(read_record(part.folder)) for part in cut]
    assert sum(map(len, shared)) == len(set().union(*shared)) == 6
    predicted: list[str] = []
    real = predict.predict_image

    def seen(ensemble: Any, founds: Any, path: Path, *more: Any) -> None:
        predicted.append(path.name)
        real(ensemble, founds, path, *more)

    monkeypatch.setattr(predict, "predict_image", seen)
    assert predict.main(whole).ok
    assert predicted == ["cut.nii.gz"]  # which nobody can read
    assert maps(tmp_path / "whole") == maps(tmp_path / "plain")
    assert len(list((tmp_path / "whole").glob("*.npz"))) == 5
    for name in ("predicted.csv", "notes.csv", "refused.csv", "dataset.json", "model.sha256"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes(), name
    assert [predict.parts(part, 3) for part in cut] == [[], [], []]


def test_what_a_part_did_not_make_the_whole_makes(model: Path, images: Path, tmp_path: Path) -> None:
    whole = settings(tmp_path / "whole", model, images)
    first, second = predict.parts(whole, 2)
    predict.main(first)
    mine = [name.removesuffix(".nii.gz") for name in maps(first.folder)]
    changed = images / f"{mine[0]}_0000.nii.gz"
    os.utime(changed, (1, 1))  # it is another file by now
    shutil.copy(images / f"{mine[1]}_0000.nii.gz", images / "anew_0000.nii.gz")
    assert predict.main(whole).ok
    assert len(maps(whole.folder)) == 6
    assert (whole.folder / f"{mine[1]}.nii.gz").samefile(first.folder / f"{mine[1]}.nii.gz")
    assert not (whole.folder / f"{mine[0]}.nii.gz").samefile(first.folder / f"{mine[0]}.nii.gz")
    predict.main(second)
    assert not maps(second.folder), "the whole has them all"


def test_another_number_of_parts_goes_on_with_what_is_there(
    model: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verb = VERBS["predict"]
    alone = one(verb, None, [f"model={model}", f"images={images}", f"folder={tmp_path / 'whole'}"])
    for most, names in ((2, ["parts/000"]), (3, ["parts/000", "parts/001", "parts/002", "all"])):
        work = Performance(parted(alone, verb, most), verb, ["axial", "predict"])
        runs = work.wanted() if most > 2 else work.wanted()[:1]
        assert [run.name for run in runs] == names
        for run in runs:
            assert work.opened(run)
            with work.noted(run):
                work.outcomes.append(predict.main(run.settings))
    assert len(maps(tmp_path / "whole")) == 5
    assert "no longer there" not in capsys.readouterr().out


def test_maps_of_another_model_are_not_taken_up(model: Path, images: Path, tmp_path: Path) -> None:
    whole = settings(tmp_path / "whole", model, images)
    part = predict.parts(whole, 2)[0]
    predict.main(part)
    saved(model, seed=3)
    predict.main(whole)
    made = maps(part.folder)
    assert made
    assert all(not (whole.folder / name).samefile(part.folder / name) for name in made)


def test_label_maps_may_go_below_the_images(model: Path, images: Path) -> None:
    whole = settings(images / "out", model, images)
    for part in predict.parts(whole, 2):
        predict.main(part)
        assert set(refused(part.folder)) <= {"cut_0000.nii.gz"}
    predict.main(whole)
    assert len(maps(whole.folder)) == 5
    assert [Path(name).name for name in refused(whole.folder)] == ["cut_0000.nii.gz"]


def test_one_image_is_not_cut(model: Path, images: Path, tmp_path: Path) -> None:
    assert predict.parts(settings(tmp_path / "a", model, sorted(images.iterdir())[0]), 9) == []
    assert predict.parts(settings(tmp_path / "a", model, images), 1) == []


def test_folds_that_were_done_elsewhere_are_found_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    phantom.write(
        "nnunet", tmp_path / "data", range(4), shape=(4, 40, 40), spacing=(30.0, 8.0, 8.0), organs=["liver", "spine"]
    )
    changes = {"split": {"fold": "all", "folds": 2}, "maps": "last"}
    plain, whole = (finetuning(tmp_path / name, tmp_path / "data", **changes) for name in ("plain", "whole"))
    finetune.main(plain)
    cut = finetune.parts(whole, 1)
    assert [(part.split.fold, part.folder.name) for part in cut] == [(0, "fold_0"), (1, "fold_1")]
    assert {part.cache for part in cut} == {tmp_path / "whole" / "cache"}
    assert [finetune.parts(part, 1) for part in cut] == [[], []]
    for part in cut:
        part.folder.mkdir()
        finetune.main(part)
    monkeypatch.setattr(finetune, "run", nobody)
    capsys.readouterr()
    finetune.main(whole)
    assert capsys.readouterr().out.count("done before") == 2
    for name in ("validation.json", "validation.csv"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    assert maps(tmp_path / "whole" / "validation") == maps(tmp_path / "plain" / "validation")
