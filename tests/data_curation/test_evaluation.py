"""Scans that models are scored on stay out of the corpus, whatever they are called there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_curation.curate import CurateError, Settings
from data_curation.folds import fold_of
from data_curation.index import read_index
from tests.data_curation.curated import main
from tests.data_curation.test_curate import refusals

WriteScan = Any  # the fixture of conftest.py


def given(tmp_path: Path, **evaluation: object) -> Settings:
    return Settings.model_validate(
        {
            "folder": tmp_path / "corpus",
            "datasets": [{"name": "folder", "root": tmp_path / "ours"}],
            "evaluation": [{"root": tmp_path / "Dataset007_Ours", **evaluation}],
            "workers": 1,
        }
    )


@pytest.fixture
def benchmark(tmp_path: Path, write_scan: WriteScan) -> list[str]:
    """Six labelled cases and a test case in nnU-Net's format, each also under another name among the scans."""
    names = [f"case_{number:03d}" for number in range(6)]
    for seed, name in enumerate([*names, "case_100"]):
        part = "imagesTs" if name == "case_100" else "imagesTr"
        write_scan(tmp_path / "Dataset007_Ours" / part / f"{name}_0000.nii.gz", seed)
        write_scan(tmp_path / "ours" / f"patient{seed}" / "ct.nrrd", seed)
    return names


def kept(tmp_path: Path) -> set[str]:
    rows = [line.split(",") for line in (tmp_path / "corpus" / "private" / "sources.csv").read_text().splitlines()]
    volumes = set(read_index(tmp_path / "corpus")["volume"].to_pylist())
    return {row[2].split("/")[0] for row in rows if row[0] in volumes}


def test_a_fold_and_the_test_cases_stay_out(tmp_path: Path, benchmark: list[str]) -> None:
    assert main(given(tmp_path, fold=1, folds=3)).ok
    held = {benchmark.index(name) for name in fold_of(benchmark, 1, 3)}
    assert len(held) == 2
    assert kept(tmp_path) == {f"patient{seed}" for seed in range(6) if seed not in held}
    told = {row["source"]: row["reason"] for row in refusals(tmp_path / "corpus") if row["dataset"] == "folder"}
    assert told == {f"patient{seed}/ct.nrrd": "held_out_related" for seed in (*held, 6)}
    named = {row["detail"] for row in refusals(tmp_path / "corpus") if row["dataset"] != "folder"}
    assert named == {"validation case of fold 1 of Dataset007_Ours", "test case of Dataset007_Ours"}


def test_nnunets_own_split_is_taken(tmp_path: Path, benchmark: list[str]) -> None:
    split = [{"train": benchmark[2:], "val": benchmark[:2]}, {"train": benchmark[:4], "val": benchmark[4:]}]
    (tmp_path / "Dataset007_Ours" / "splits_final.json").write_text(json.dumps(split))
    assert main(given(tmp_path, fold=1, folds=2)).ok
    assert kept(tmp_path) == {f"patient{seed}" for seed in range(4)}


def test_evaluation_cases_are_never_let_in(tmp_path: Path, benchmark: list[str]) -> None:
    settings = given(tmp_path).model_copy(update={"include_held_out": True})
    main(settings)
    assert len(kept(tmp_path)) == 6 - len(fold_of(benchmark))
    assert set(read_index(tmp_path / "corpus")["dataset"].to_pylist()) == {"folder"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "gives no validation cases of fold 0"),
        ("{", "gives no validation cases"),
        ('[{"val": ["case_9"]}]', "names case_9, which imagesTr does not hold"),
    ],
)
def test_a_wrong_split_file_stops_the_run(tmp_path: Path, benchmark: list[str], text: str, message: str) -> None:
    (tmp_path / "Dataset007_Ours" / "splits_final.json").write_text(text)
    with pytest.raises(CurateError, match=message):
        main(given(tmp_path))


def test_a_folder_without_images_stops_the_run(tmp_path: Path, benchmark: list[str]) -> None:
    (tmp_path / "bare").mkdir()
    with pytest.raises(CurateError, match=r"neither .*imagesTr nor imagesTs beside it holds an image"):
        main(given(tmp_path, root=tmp_path / "bare"))
    with pytest.raises(CurateError, match=r"evaluation 1: .* is not a folder"):
        main(given(tmp_path, root=tmp_path / "none"))
