"""Scores are taken of what can be compared; where nothing can, the reasons are told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from data_curation import phantom
from downstream import evaluate
from downstream.cases import CaseError


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
    given = evaluate.Settings(folder=tmp_path / "scores", predictions=predictions, labels=labels)
    with pytest.raises(CaseError, match=r"none of the 2 case\(s\) can be scored") as told:
        evaluate.main(given)
    assert "holds label values [9]" in str(told.value)
    assert "b: prediction and label lie on different grids: spacing" in str(told.value)
    assert not (tmp_path / "scores").exists()


def test_evaluation_of_perfect_empty_and_odd_predictions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = tmp_path / "data"
    phantom.write("nnunet", dataset, range(4), shape=(6, 48, 40), spacing=(20.0, 7.0, 8.0), organs=["liver", "spine"])
    labels, predictions = dataset / "labelsTr", tmp_path / "predictions"
    shutil.copytree(labels, predictions)
    given = evaluate.Settings(folder=tmp_path / "scores", predictions=predictions, labels=labels, draws=50)
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
