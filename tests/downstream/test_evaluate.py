"""Scores are taken of what can be compared; where nothing can, the reasons are told."""

from __future__ import annotations

import base64
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from data_curation import phantom
from downstream import evaluate
from downstream.cases import CaseError
from downstream.metrics import Score
from launch import settings as launch_settings
from launch.documents import SettingsError


def write(path: Path, value: int, spacing: float = 1.0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(np.full((3, 4, 5), value, np.uint8))
    image.SetSpacing((spacing,) * 3)
    sitk.WriteImage(image, str(path))


def test_where_no_case_can_be_scored_every_reason_is_told(tmp_path: Path) -> None:
    labels, predictions = tmp_path / "labels", tmp_path / "predictions"
    for name in ("a", "b"):
        write(labels / f"{name}.nii.gz", 1)
    write(predictions / "a.nii.gz", 9)
    write(predictions / "b.nii.gz", 1, spacing=2.0)
    (labels / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "liver": 1}}))
    given = evaluate.Settings(folder=tmp_path / "scores", predictions=predictions, labels=labels, workers=1)
    with pytest.raises(CaseError, match=r"none of the 2 case\(s\) can be scored") as told:
        evaluate.main(given)
    assert "holds label values [9]" in str(told.value)
    assert "b: prediction and label lie on different grids: spacing" in str(told.value)
    assert not (tmp_path / "scores").exists()


def test_an_organ_without_a_dice_does_not_hide_the_worst_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three organs, the second in no label and no prediction: sorted among numbers its NaN would split them."""
    means = {"aorta": 0.9, "brain": math.nan, "colon": 0.2}
    row = {organ: Score(dice, dice, 1.0) for organ, dice in means.items()}
    summary = {"organs": {organ: {"dice": {"mean": dice}} for organ, dice in means.items()}}
    monkeypatch.setattr(evaluate, "shared", lambda function, tasks, names, *_: [task.organ for task in tasks])
    given = evaluate.Settings(folder=Path("a"), predictions=Path("b"), labels=Path("c"), worst=0, worst_organs=1)
    _, (figure,) = evaluate._worst({"a": row}, {"a": None}, summary, given)  # type: ignore[dict-item]
    assert figure.caption.startswith("colon, a: Dice 0.200")


def test_a_dicom_seg_is_not_called_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("labels/a.nii.gz", "labels/b.nii.gz", "predictions/a.nii.gz"):
        write(tmp_path / name, 1)
    (tmp_path / "predictions" / "b.dcm").touch()
    (tmp_path / "labels/dataset.json").write_text(json.dumps({"labels": {"background": 0, "liver": 1}}))
    given = {name: tmp_path / name for name in ("folder", "predictions", "labels")}
    assert evaluate.main(evaluate.Settings(**given, workers=1, draws=2)).ok  # type: ignore[arg-type]
    assert "left out: b: b.dcm is a DICOM SEG, which is not scored" in capsys.readouterr().out
    assert json.loads((tmp_path / "folder/summary.json").read_text())["without_prediction"] == []


def test_evaluation_of_perfect_empty_and_odd_predictions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = tmp_path / "data"
    phantom.write("nnunet", dataset, range(4), shape=(6, 48, 40), spacing=(20.0, 7.0, 8.0), organs=["liver", "spine"])
    labels, predictions = dataset / "labelsTr", tmp_path / "predictions"
    shutil.copytree(labels, predictions)
    given = evaluate.Settings(folder=tmp_path / "scores", predictions=predictions, labels=labels, draws=50, workers=1)
    assert evaluate.main(given).ok
    summary = json.loads((tmp_path / "scores/summary.json").read_text())
    assert summary["organs"]["liver"]["dice"]["mean"] == 1.0
    assert summary["organs"]["mean"]["hd95"]["mean"] == 0.0
    names = sorted(path.name for path in predictions.iterdir())
    first, second, third = (sitk.ReadImage(str(predictions / name)) for name in names[:3])
    sitk.WriteImage(first * 0, str(predictions / names[0]))
    second.SetOrigin([v + 3 for v in second.GetOrigin()])
    sitk.WriteImage(second, str(predictions / names[1]))
    sitk.WriteImage(third * 5, str(predictions / names[2]))
    (predictions / names[3]).rename(predictions / "extra.nii.gz")
    assert not evaluate.main(given).ok
    summary = json.loads((tmp_path / "scores/summary.json").read_text())
    liver = summary["organs"]["liver"]
    assert (liver["dice"]["mean"], liver["nsd"]["mean"], liver["hd95"]["mean"], liver["lost"]) == (0.0, 0.0, None, 1)
    printed = capsys.readouterr().out
    assert f"left out: {names[1].removesuffix('.nii.gz')}" in printed
    assert "different grids: origin" in printed
    assert "holds label values [5, 10]" in printed
    assert "1 without label: extra" in printed
    rows = (tmp_path / "scores/metrics.csv").read_text().splitlines()
    assert rows[0] == "case,organ,dice,nsd,hd95_mm"
    assert rows[1].endswith(",liver,0,0,inf")
    shutil.rmtree(predictions)
    predictions.mkdir()
    with pytest.raises(CaseError, match="no case in common"):
        evaluate.main(given)


SPACING = (20.0, 7.0, 8.0)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Two labelled phantoms, and predictions that are their labels moved by a voxel."""
    folder = tmp_path / "data"
    phantom.write("nnunet", folder, range(2), shape=(6, 48, 40), spacing=SPACING, organs=["liver", "spine"])
    (tmp_path / "predictions").mkdir()
    for path in sorted((folder / "labelsTr").iterdir()):
        image = sitk.ReadImage(str(path))
        moved = sitk.GetImageFromArray(np.roll(sitk.GetArrayFromImage(image), 1, 2))
        moved.CopyInformation(image)
        sitk.WriteImage(moved, str(tmp_path / "predictions" / path.name))
    return folder


def scored(dataset: Path, name: str, **changed: object) -> tuple[Path, dict[str, object]]:
    """The folder and the summary of an evaluation."""
    given = {"labels": dataset / "labelsTr", "predictions": dataset.parent / "predictions", "workers": 1, "draws": 50}
    folder = dataset.parent / name
    evaluate.main(evaluate.Settings(folder=folder, **(given | changed)))
    return folder, json.loads((folder / "summary.json").read_text())


@pytest.mark.parametrize("order", ["RAS", "PIR", "ASL"])
def test_the_order_in_which_voxels_are_stored_says_nothing(dataset: Path, order: str) -> None:
    straight, _ = scored(dataset, "straight")
    turned = dataset.parent / order
    turned.mkdir()
    for path in sorted((dataset.parent / "predictions").iterdir()):
        sitk.WriteImage(sitk.DICOMOrient(sitk.ReadImage(str(path)), order), str(turned / path.name))
    other, _ = scored(dataset, "turned", predictions=turned)
    rows = (straight / "metrics.csv").read_text()
    assert (other / "metrics.csv").read_text() == rows
    assert ",1,1,0" not in rows, "the predictions are not perfect, so a wrong turn would be seen"


def test_any_number_of_processes_gives_the_same_bytes(dataset: Path) -> None:
    one, _ = scored(dataset, "one")
    two, _ = scored(dataset, "two", workers=2)
    assert (one / "metrics.csv").read_bytes() == (two / "metrics.csv").read_bytes()
    assert (one / "scores.html").read_bytes() == (two / "scores.html").read_bytes()


def test_ignored_voxels_and_regions(dataset: Path, tmp_path: Path) -> None:
    """A case whose wrong voxels are all labelled `ignore` is perfect; a region is the union of its values."""
    for path in sorted((dataset / "labelsTr").glob("*.nii.gz")):
        label = sitk.ReadImage(str(path))
        said = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "predictions" / path.name)))
        voxels = sitk.GetArrayFromImage(label)
        voxels[voxels != said] = 3
        changed = sitk.GetImageFromArray(voxels)
        changed.CopyInformation(label)
        sitk.WriteImage(changed, str(path))
    described = json.loads((dataset / "dataset.json").read_text())
    described["labels"] = {"background": 0, "both": [1, 2], "liver": 1, "rest": 3}
    (dataset / "dataset.json").write_text(json.dumps(described))
    _, counted = scored(dataset, "counted")
    assert counted["organs"]["both"]["dice"]["mean"] < 1
    from downstream import cases

    labels = cases.Labels({"both": (1, 2), "liver": (1,)}, (0, 1, 2), ignore=3)
    folder = dataset.parent / "ignored"
    with pytest.MonkeyPatch.context() as context:
        context.setattr(cases, "read_labels", lambda path: labels)
        _, summary = scored(dataset, "ignored")
    assert [summary["organs"][organ]["dice"]["mean"] for organ in ("both", "liver")] == [1.0, 1.0]
    assert "Voxels labelled 3 (ignore) count on neither side" in (folder / "scores.html").read_text()


def test_each_organ_may_have_its_tolerance(dataset: Path) -> None:
    _, wide = scored(dataset, "wide", tolerance=8.0)
    folder, some = scored(dataset, "some", tolerance={"liver": 8.0, "default": 1.0})
    assert some["tolerance_mm"] == {"liver": 8.0, "spine": 1.0}
    assert some["organs"]["liver"]["nsd"] == wide["organs"]["liver"]["nsd"]
    assert some["organs"]["spine"]["nsd"]["mean"] < wide["organs"]["spine"]["nsd"]["mean"]
    assert "mm by organ: liver 8, spine 1" in (folder / "scores.html").read_text()
    with pytest.raises(CaseError, match=r"tolerance names \['livr'\], which are no organs; there are liver, spine"):
        scored(dataset, "typed", tolerance={"livr": 2.0, "default": 1.0})
    with pytest.raises(CaseError, match=r"tolerance says nothing of spine; name each organ, or add `default`"):
        scored(dataset, "partly", tolerance={"liver": 2.0})
    words = ["folder=a", "predictions=b", "labels=c", "tolerance={liver: -1}"]
    with pytest.raises(SettingsError, match=r"tolerance.*greater than 0"):
        launch_settings.load(evaluate.Settings, None, words)
    assert launch_settings.load(evaluate.Settings, None, [*words[:3], "tolerance={liver: 2}"]).tolerance == {"liver": 2}


def pictures(page: str) -> list[bytes]:
    return [base64.b64decode(found) for found in re.findall(r'src="data:image/png;base64,([^"]+)"', page)]


def test_the_page_needs_nothing_else_and_shows_the_worst(dataset: Path) -> None:
    import matplotlib.image

    images = dataset / "imagesTr"
    name = sorted(images.iterdir())[0].name.removesuffix("_0000.nii.gz")
    with (dataset / "dataset.json").open() as file:
        described = json.load(file)
    described["labels"] = {"background": 0, "<b>$liver$</b>": 1, "spine": 2}
    (dataset / "dataset.json").write_text(json.dumps(described))
    folder, _ = scored(dataset, "page", images=images, worst=2)
    page = (folder / "scores.html").read_text()
    assert "&lt;b&gt;$liver$&lt;/b&gt;" in page
    assert "<b>$liver$</b>" not in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert not re.findall(r"url\(|@import|<script", page)
    assert f"<figcaption>{name}: mean Dice" in page or "phantom_0001: mean Dice" in page
    found = pictures(page)
    assert len(found) == 1 + 2 + 2, "box plots, two cases, two organs"
    import io

    shown = matplotlib.image.imread(io.BytesIO(found[1]))
    assert shown.shape[-1] >= 3
    assert shown[..., :3].std() > 0.05
    without, _ = scored(dataset, "without", worst=1, worst_organs=0)
    plain = (without / "scores.html").read_text()
    assert len(pictures(plain)) == 2
    assert "no image" in plain
    assert "no image" not in page


def test_an_image_on_another_grid_lies_where_it_belongs(dataset: Path, tmp_path: Path) -> None:
    """The plane that is shown is looked up by position: an image of half the spacing shows the same body."""
    from data_curation.volumes import find
    from downstream import geometry
    from downstream.score_pictures import _plane

    source = sorted((dataset / "imagesTr").iterdir())[0]
    image = sitk.ReadImage(str(source))
    place = geometry.lps(geometry.read_labelmap(sorted((dataset / "labelsTr").glob("*.nii.gz"))[0]).place)
    size = [2 * n for n in image.GetSize()]
    origin = image.TransformContinuousIndexToPhysicalPoint([-0.25] * 3)
    finer = sitk.Resample(
        image, size, sitk.Transform(), sitk.sitkNearestNeighbor, origin, [s / 2 for s in image.GetSpacing()],
        image.GetDirection(),
    )  # fmt: skip
    (tmp_path / "finer").mkdir()
    sitk.WriteImage(sitk.DICOMOrient(finer, "RPI"), str(tmp_path / "finer/a.nrrd"))
    own, other = (_plane(next(iter(find(folder))), place, 3) for folder in (dataset / "imagesTr", tmp_path / "finer"))
    assert own.std() > 100
    assert np.array_equal(own, other)


def test_images_of_other_cases_are_refused(dataset: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(CaseError, match=r"images=.*has no scan of any case: it has none"):
        scored(dataset, "images", images=empty)
    with pytest.raises(CaseError, match=r"is not a folder; give that of the scans"):
        scored(dataset, "nowhere", images=tmp_path / "nowhere")


def test_only_the_cases_asked_for_are_scored_and_a_missing_one_is_told(tmp_path: Path) -> None:
    labels, predictions = tmp_path / "labels", tmp_path / "predictions"
    for name in ("a", "b"):
        write(labels / f"{name}.nii.gz", 1)
        write(predictions / f"{name}.nii.gz", 1)
    (labels / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "liver": 1}}))
    given = evaluate.Settings(folder=tmp_path / "s", predictions=predictions, labels=labels, workers=1, cases=("b",))
    assert evaluate.main(given).ok
    summary = json.loads((tmp_path / "s/summary.json").read_text())
    assert summary["cases"] == ["b"]
    assert summary["without_prediction"] == []
    with pytest.raises(CaseError, match="has no label map of c, which cases= names"):
        evaluate.main(given.model_copy(update={"cases": ("b", "c")}))
