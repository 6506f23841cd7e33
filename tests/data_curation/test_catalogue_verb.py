"""`axial catalogue`: the table, the sheet of one data set, and what of it a folder holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_curation.catalogue import CATALOGUE, CatalogueError
from data_curation.folds import fold_of
from data_curation.obtain import Settings, main
from data_curation.phantom import write
from launch import cli

GRID = ((1, 8, 8), (30.0, 40.0, 40.0))


def told(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(["catalogue", *words]) == 0
    return capsys.readouterr().out


def test_the_table_has_a_line_for_every_data_set(capsys: pytest.CaptureFixture[str]) -> None:
    lines = told(capsys).splitlines()
    rows = {line.split()[0]: line for line in lines[1 : 1 + len(CATALOGUE)]}
    assert set(rows) == set(CATALOGUE)
    assert rows["lits"].split() == [
        "lits", "131", "+", "70", "58,638", "CC", "BY-NC-ND", "4.0", "no",
        "https://competitions.codalab.org/competitions/17094",
    ]  # fmt: skip
    assert rows["amos22"].split()[4] == "~39,000"
    assert all((" yes " in line) == CATALOGUE[name].commercial for name, line in rows.items())


@pytest.mark.parametrize("name", CATALOGUE)
def test_a_sheet_tells_all_that_is_known(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    one, text = CATALOGUE[name], " ".join(told(capsys, name).split())
    facts = [one.title, one.tree, one.home_page, one.doi, one.citation, *one.quirks]
    facts += [stated.text for stated in one.licences] + [stated.source for stated in one.licences]
    facts += [link.url for link in one.links] + [f"{other}: {how}" for other, how in one.overlaps]
    facts += [f"{number} {label}" for number, label in (one.labels or {}).items()]
    assert [fact for fact in facts if fact not in text] == []


def test_a_folder_is_compared_with_a_whole_download(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write("lits", tmp_path, [*range(10), 12, 39, 0], *GRID, tests=1)
    (tmp_path / "Training Batch 1" / "notes.txt").touch()
    text = " ".join(told(capsys, "lits", f"root={tmp_path}").split())
    assert "found 13 of 201 cases, 12 with labels" in text
    assert "missing 119 (to train on): 10 to 11, 13 to 38, 40 to 130" in text
    assert "69 (official test set): test-volume-1 to test-volume-69" in text
    validating = fold_of(CATALOGUE["lits"].train_ids) & {*map(str, range(10)), "12", "39"}
    assert f"held out {len(validating)}: validation fold 0 of 5 of the benchmark 1: official test set" in text
    assert "refused 1 not_image, such as *.txt: 1 file(s)" in text


def test_where_the_numbers_are_not_known_cases_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write("word", tmp_path, [1, 2, 3], *GRID, tests=1)
    text = " ".join(told(capsys, "word", f"root={tmp_path}").split())
    assert "found 3 of 150 cases" in text
    assert "missing 118 (to train on); which numbers there are is not known 29 (official test set)" in text


def test_a_whole_download_lacks_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (image,) = write("pancreas_ct", tmp_path, [1], (2, 8, 8), GRID[1])
    for patient in CATALOGUE["pancreas_ct"].train_ids[1:]:
        folder = tmp_path / "Pancreas-CT" / f"PANCREAS_{patient}" / "study" / "series"
        folder.mkdir(parents=True)
        for file in image.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
    text = " ".join(told(capsys, "pancreas_ct", f"root={tmp_path}").split())
    assert "found 80 of 80 cases, 1 with labels" in text
    assert "missing nothing" in text


def test_what_is_no_data_set_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["catalogue", "litz"]) == 2
    assert "no data set is called so; did you mean 'lits'? (there are: folder, " in capsys.readouterr().err
    assert cli.main(["catalogue", f"root={tmp_path}"]) == 2
    assert "root is the folder of one data set: say which" in capsys.readouterr().err
    with pytest.raises(CatalogueError, match="an empty folder"):
        main(Settings(name="lits", root=tmp_path))
