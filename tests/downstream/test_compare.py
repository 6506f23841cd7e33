"""Paired scores: the test against scipy and by hand, files of ours and of nnU-Net, what is refused and how."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from downstream import compare
from downstream.cases import CaseError
from downstream.compare import holm, signed_rank
from downstream.score_files import read_scores
from launch.cli import main as axial


def write(folder: Path, rows: list[tuple[str, str, str, str, str]]) -> Path:
    folder.mkdir(parents=True)
    lines = ["case,organ,dice,nsd,hd95_mm", *(",".join(row) for row in rows)]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    (folder / "summary.json").write_text(json.dumps({"organs": {}, "values": {"liver": [1], "kidney": [2, 3]}}))
    return folder


def result(folder: Path) -> dict[tuple[str, str], dict[str, float]]:
    return {(row["measure"], row["organ"]): row for row in json.loads((folder / "compare.json").read_text())["rows"]}


def test_the_test_is_scipys_where_there_are_no_ties() -> None:
    rng = np.random.default_rng(0)
    for count in (5, 20, 50, 51, 200):
        values = rng.normal(0.2, 1, count)
        assert signed_rank(values) == pytest.approx(stats.wilcoxon(values).pvalue, rel=1e-9)
        assert signed_rank(-values) == pytest.approx(signed_rank(values))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=9))
def test_the_test_counts_all_signs_ties_and_zeros_included(values: list[int]) -> None:
    found = signed_rank(np.array(values, dtype=float) / 10)
    others = [value for value in values if value]
    if not others:
        assert found == 1.0
        return
    ranks = stats.rankdata(np.abs(others))
    sums = [sum(r for r, sign in zip(ranks, signs, strict=True) if sign) for signs in
            itertools.product((0, 1), repeat=len(ranks))]  # fmt: skip
    seen = sum(r for r, value in zip(ranks, others, strict=True) if value > 0)
    tails = [np.mean([s <= seen + 1e-9 for s in sums]), np.mean([s >= seen - 1e-9 for s in sums])]
    assert found == pytest.approx(min(1, 2 * min(tails)))


def test_differences_that_are_equal_on_paper_are_ties() -> None:
    """0.9 - 0.8 and 0.3 - 0.2 differ in their last bits."""
    assert signed_rank(np.array([0.9 - 0.8, 0.3 - 0.2, 0.2 - 0.3])) == 1.0
    assert math.isnan(signed_rank(np.empty(0)))


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, math.nan]) == pytest.approx([0.03, 0.06, 0.06, math.nan], nan_ok=True)
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_pairs_are_those_that_both_have(tmp_path: Path) -> None:
    first = write(tmp_path / "first", [
        ("a", "liver", "0.8", "0.7", "5"), ("a", "kidney", "0.5", "0.5", "inf"),
        ("b", "liver", "0.6", "0.7", "4"), ("b", "kidney", "", "", ""),
        ("c", "liver", "0.9", "0.7", "4"), ("c", "kidney", "0.5", "0.5", "3"),
        ("alone", "liver", "0.1", "0.1", "9"), ("alone", "kidney", "0.1", "0.1", "9"),
    ])  # fmt: skip
    second = write(tmp_path / "second", [
        ("a", "liver", "0.9", "0.7", "3"), ("a", "kidney", "0.6", "0.5", "2"),
        ("b", "liver", "0.7", "0.7", "3"), ("b", "kidney", "0.9", "0.9", "1"),
        ("c", "liver", "0.8", "0.7", "5"), ("c", "kidney", "0.5", "0.5", "2"), ("c", "new", "0.5", "0.5", "2"),
    ])  # fmt: skip
    assert axial(["compare", f"first={first}", f"second={second}", f"folder={tmp_path / 'out'}"]) == 0
    rows = result(tmp_path / "out")
    liver, kidney = rows["dice", "liver"], rows["dice", "kidney"]
    assert (liver["pairs"], liver["better"], liver["worse"], liver["equal"]) == (3, 2, 1, 0)
    assert (liver["first"], liver["second"]) == (pytest.approx(2.3 / 3), pytest.approx(2.4 / 3))
    assert liver["difference"] == pytest.approx(0.1 / 3)
    assert (kidney["pairs"], kidney["equal"], kidney["p"]) == (2, 1, 1.0)
    assert kidney["first"] == pytest.approx(0.5)
    far = rows["hd95", "kidney"]
    assert (far["pairs"], far["better"], far["difference"]) == (1, 1, -1.0)
    assert far["low"] is None
    assert rows["hd95", "liver"]["better"] == 2, "a smaller distance is better"
    mean = rows["dice", "mean"]
    assert mean["difference"] == pytest.approx((0.1 / 3 + 0.05) / 2)
    assert mean["p_holm"] is None
    text = (tmp_path / "out/compare.txt").read_text()
    assert "cases only in first: alone" in text
    assert "organs only in second: new" in text
    assert "zero differences are dropped" in text
    table = (tmp_path / "out/compare.csv").read_text().splitlines()
    assert table[0].startswith("measure,organ,pairs,first,second,difference,low,high")
    assert len(table) == 1 + 3 * 3


def nnunet(path: Path, dice: dict[str, dict[str, float]]) -> Path:
    rows = [
        {
            "reference_file": f"/data/labelsTr/{case}.nii.gz",
            "prediction_file": f"/data/out/{case}.nii.gz",
            "metrics": {key: {"Dice": value, "IoU": 0.1, "TP": 3} for key, value in row.items()},
        }
        for case, row in dice.items()
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"foreground_mean": {"Dice": 0.5}, "mean": {}, "metric_per_case": rows}))
    return path


def test_a_name_that_ends_like_a_channel_stays_whole(tmp_path: Path) -> None:
    theirs, _ = read_scores(nnunet(tmp_path / "summary.json", {"phantom_0000": {"1": 0.7}}))
    assert theirs.cases == {"phantom_0000"}


def test_scores_of_nnunet_are_called_by_the_names_of_the_other_side(tmp_path: Path) -> None:
    ours = write(tmp_path / "ours", [("a", "liver", "0.8", "0.7", "5"), ("a", "kidney", "0.5", "0.5", "1"),
                                     ("b", "liver", "0.7", "0.7", "5"), ("b", "kidney", "", "", "")])  # fmt: skip
    theirs = nnunet(tmp_path / "nn/summary.json", {"a": {"1": 0.7, "(2, 3)": 0.4}, "b": {"1": 0.5, "(2, 3)": math.nan}})
    for second in (theirs, theirs.parent):
        out = tmp_path / f"out_{second.name}"
        compare.main(compare.Settings(folder=out, first=ours, second=second, draws=20))
        rows = result(out)
        assert set(rows) == {("dice", "liver"), ("dice", "kidney"), ("dice", "mean")}, "nnU-Net has Dice alone"
        assert rows["dice", "liver"]["difference"] == pytest.approx(-0.15)
        assert rows["dice", "kidney"]["pairs"] == 1
    other = nnunet(tmp_path / "other/summary.json", {"a": {"1": 0.9}})
    compare.main(compare.Settings(folder=tmp_path / "two", first=theirs, second=other, draws=20))
    assert ("dice", "label 1") in result(tmp_path / "two")
    names = tmp_path / "dataset.json"
    names.write_text(json.dumps({"labels": {"background": 0, "spleen": 1}}))
    compare.main(compare.Settings(folder=tmp_path / "named", first=theirs, second=other, names=names, draws=20))
    assert ("dice", "spleen") in result(tmp_path / "named")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("case,organ,dice\na,liver,0.5\na,liver,0.6\n", r"metrics\.csv:3: a, liver stands there twice"),
        ("case,organ,dice\na,liver,0.5\nb,liv", r"metrics\.csv:3: dice is None, which is no number; the file was cut"),
        ("case,organ,dice\na,liver,good\n", r"metrics\.csv:2: dice is 'good', which is no number"),
        ("case,dice\na,0.5\n", r"the first line must name case, organ and one of dice, nsd, hd95_mm"),
        ("case,organ,dice\n", r"no case is in it; evaluate again"),
    ],
)
def test_a_broken_table_is_named_with_its_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "metrics.csv").write_text(text)
    with pytest.raises(CaseError, match=said):
        read_scores(tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", r"summary\.json: not JSON"),
        ("[]", r"summary\.json: no table of scores"),
        ('{"results": {}}', r"has no table `metric_per_case`, so it is no summary of nnU-Net"),
        ('{"metric_per_case": []}', r"metric_per_case is empty"),
        ('{"metric_per_case": [{"metrics": {"1": {"Dice": 1}}}]}', r"not as nnU-Net writes it \(KeyError"),
        (
            '{"metric_per_case": [{"reference_file": "a.nii", "metrics": {"x": {"Dice": 1}}}]}',
            r"a: 'x' is neither a label value nor a list",
        ),
    ],
)
def test_a_broken_summary_is_named(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "summary.json").write_text(text)
    with pytest.raises(CaseError, match=said):
        read_scores(tmp_path)


def test_nothing_in_common_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = write(tmp_path / "first", [("a", "liver", "0.8", "0.7", "5")])
    second = write(tmp_path / "second", [("b", "liver", "0.8", "0.7", "5")])
    third = write(tmp_path / "third", [("a", "spleen", "0.8", "0.7", "5")])
    for other, said in (
        (second, "no case in common"),
        (third, "no organ in common"),
        (tmp_path / "no", "is not there"),
    ):
        assert axial(["compare", f"first={first}", f"second={other}", f"folder={tmp_path / 'out'}"]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
