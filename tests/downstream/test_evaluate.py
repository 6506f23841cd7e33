"""Scores are taken of what can be compared; where nothing can, the reasons are told."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

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
