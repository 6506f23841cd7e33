"""Which runs a command line means: chains, sweeps and parts, with every mistake named before anything is begun."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launch.cli import main
from launch.plan import LONGEST, Plan, chain, one, parted, sweep
from launch.settings import SettingsError
from launch.verbs import VERBS, Verb

HERE = Path(__file__).parent
LINKED = Verb("linked", "linked_verb:main", "linked_verb:Settings", run=True, ranks=True)


@pytest.fixture(autouse=True)
def _toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), str(HERE.parents[1])]))
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setitem(VERBS, "linked", LINKED)
    monkeypatch.setitem(VERBS, "toy", Verb("a toy", "toy_verb:main", "toy_verb:Settings", run=True))
    monkeypatch.chdir(tmp_path)
    for name in "abc":
        Path(f"{name}.yaml").write_text(f"start: of_{name}\n")


def names(plan: Plan) -> list[str]:
    return [run.name for run in plan.runs]


def test_each_link_takes_up_what_the_one_before_it_made() -> None:
    plan = chain(LINKED, ["a.yaml", "b.yaml", "c.yaml"], ["folder=runs", "steps=7", "start=mine", "b.steps=9"])
    assert names(plan) == ["a", "b", "c"]
    assert [run.folder for run in plan.runs] == [Path("runs/a"), Path("runs/b"), Path("runs/c")]
    assert [run.needs for run in plan.runs] == [(), (Path("runs/a"),), (Path("runs/b"),)]
    # What is given for all is where the first begins; the others begin where the one before them has ended.
    assert [run.settings.start for run in plan.runs] == [Path("mine"), Path("runs/a"), Path("runs/b")]
    assert [run.settings.steps for run in plan.runs] == [7, 9, 7]
    assert plan.folder == Path("runs")


def test_a_word_for_one_link_wins_over_what_it_would_take_up() -> None:
    plan = chain(LINKED, ["a.yaml", "b.yaml"], ["folder=runs", "b.start=elsewhere"])
    assert plan.runs[1].settings.start == Path("elsewhere")


def test_every_mistake_of_every_link_is_told_at_once() -> None:
    Path("b.yaml").write_text("stepz: 3\n")
    with pytest.raises(SettingsError) as caught:
        chain(LINKED, ["a.yaml", "b.yaml", "c.yaml"], ["folder=runs", "c.steps=x"])
    text = str(caught.value)
    assert "b: 1 wrong setting(s)" in text
    assert "stepz: no such setting; did you mean 'steps'?  [b.yaml:1]" in text
    assert "c: 1 wrong setting(s)" in text
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["linked", "a.yaml", "b.yaml"], "axial linked: a chain needs folder=, in which its runs get folders"),
        (["linked", "a.yaml", "./a.yaml", "folder=r"], "axial linked: two links of a chain are called a; give each"),
        (["toy", "a.yaml", "b.yaml", "folder=r"], "axial: one CONFIG is expected, got a.yaml and b.yaml; settings"),
        (["linked", "a.yaml", "b.yaml", "folder=r", "--sweep=steps=1,2"], "axial: a chain is not swept"),
        (["linked", "folder=r", "--sweep"], "axial: --sweep needs key=a,b"),
        (["linked", "folder=r", "--sweep", "steps"], "axial linked: --sweep takes key=value,value, ..., got 'steps'"),
        (["linked", "folder=r", "--sweep", "steps=1,,2"], "axial linked: --sweep takes key=value,value"),
        (["linked", "folder=r", "--sweep", "folder=a,b"], "axial linked: --sweep of folder: every point has"),
        (["linked", "folder=r", "--sweep", "steps=1", "--sweep", "steps=2"], "axial linked: two --sweep are called"),
        (["linked", "folder=r", "--sweep", "start=a/b,a:b"], "axial linked: two points of a sweep are called"),
        (["linked", "folder=r", "--sweep", "stepz=1,2"], "axial linked: stepz=1: 1 wrong setting(s)"),
        (["status", "--sweep", "folder=a,b"], "axial: status has no runs to sweep; --sweep is for pretrain"),
        (["curate", "folder=a", "--sweep", "codec=a,b"], "axial: curate has no runs to sweep"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(capsys: pytest.CaptureFixture[str], words: list[str], text: str) -> None:
    assert main(words) == 2
    assert capsys.readouterr().err.startswith(text)
    assert not Path("r").exists()


def test_a_sweep_has_a_run_for_each_combination() -> None:
    plan = sweep(LINKED, "a.yaml", ["folder=runs", "steps=3"], ["steps=1,2", "numbers=[1,2],[3]"])
    assert names(plan) == [
        "steps=1,numbers=-1-2", "steps=1,numbers=-3", "steps=2,numbers=-1-2", "steps=2,numbers=-3",
    ]  # fmt: skip
    assert [run.folder for run in plan.runs] == [Path("runs") / name for name in names(plan)]
    assert [run.settings.numbers for run in plan.runs] == [(1, 2), (3,)] * 2
    assert {run.needs for run in plan.runs} == {()}


def test_names_of_points_are_safe_and_not_too_long() -> None:
    long = "x" * 300
    plan = sweep(LINKED, None, ["folder=runs"], [f"start=/a b/c*,'d,e',{long}1,{long}2"])
    assert names(plan)[:2] == ["start=-a-b-c", "start=-d-e"]
    assert [run.settings.start for run in plan.runs][:2] == [Path("/a b/c*"), Path("d,e")]
    assert all(len(name.encode()) <= LONGEST for name in names(plan))
    assert len(set(names(plan))) == 4


def test_a_run_is_cut_into_parts_where_its_verb_says_so() -> None:
    alone = one(LINKED, None, ["folder=runs", "cut=3"])
    plan = parted(alone, LINKED, 9)
    assert names(plan) == ["part_0", "part_1", "part_2", "all"]
    assert plan.runs[-1].needs == tuple(run.folder for run in plan.runs[:-1])
    assert plan.whole == plan.runs[-1:]
    assert names(parted(alone, LINKED, 2)) == ["part_0", "part_1", "all"]
    assert parted(one(LINKED, None, ["folder=runs"]), LINKED, 9).runs == one(LINKED, None, ["folder=runs"]).runs
    swept = parted(sweep(LINKED, None, ["folder=runs"], ["cut=2,1"]), LINKED, 9)
    assert names(swept) == ["cut=2/part_0", "cut=2/part_1", "cut=2", "cut=1"]
