"""`extend`: data sets added later leave finished shards as they are, and can withdraw what must not be trained on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_curation.corpus import Corpus
from data_curation.curate import CurateError
from data_curation.finished import FINISHED, read_finished
from data_curation.index import read_index
from tests.data_curation.curated import main, settings, state

WriteScan = Any  # the fixture of conftest.py
PUBLIC = ("shards/", "rows/")
ALIKE = "private/alike.json"  # by the order in which volumes were compared, which an end of an extension changes


@pytest.fixture
def more(tmp_path: Path, write_scan: WriteScan, scans: Path) -> Path:
    """Four new patients, and the copy of one that the corpus has already."""
    for seed in range(20, 24):
        write_scan(tmp_path / "more" / f"New_{seed}" / "ct.nii.gz", seed)
    shutil.copytree(scans / "Jane_Doe_3", tmp_path / "more" / "Again_3")
    return tmp_path / "more"


def finished(folder: Path) -> dict[str, str]:
    return {name: digest for name, digest in state(folder).items() if name.startswith(PUBLIC)}


def test_finished_shards_stay_and_the_index_holds_both(tmp_path: Path, scans: Path, more: Path) -> None:
    folder = tmp_path / "corpus"
    main(settings(folder, scans))
    before, shards = finished(folder), read_finished(folder)[0]
    assert main(settings(folder, scans, more, extend=True)).ok
    after = finished(folder)
    assert {name: after[name] for name in before} == before
    assert len(after) > len(before)
    assert read_finished(folder)[0][: len(shards)] == shards
    index = read_index(folder)
    assert len(index) == 97 + 4 * 12 + 8
    again = [row for row in index.to_pylist() if row["dataset"] == "set1" and row["duplicate"]]
    assert len(again) == 8
    assert {row["shard"] for row in again} == {"duplicates-000001.tar"}
    both = Corpus(folder, None, duplicates=True, verify=True)
    for i in range(len(both)):
        both.hu(i)
    assert len(Corpus(folder, None, datasets=["set1"])) == 48


def test_an_extended_corpus_is_not_planned_anew(tmp_path: Path, scans: Path, more: Path) -> None:
    folder = tmp_path / "corpus"
    main(settings(folder, scans))
    main(settings(folder, scans, more, extend=True))
    expected = {name: digest for name, digest in state(folder).items() if name != ALIKE}
    main(settings(folder, scans, more))
    assert {name: digest for name, digest in state(folder).items() if name != ALIKE} == expected
    lost = folder / "shards" / read_finished(folder)[0][0].name
    lost.with_suffix(".tar").unlink()
    main(settings(folder, scans, more))
    assert {name: digest for name, digest in state(folder).items() if name != ALIKE} == expected


def test_an_interrupted_extension_goes_on_to_the_same_bytes(
    tmp_path: Path, scans: Path, more: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    undisturbed, folder = tmp_path / "undisturbed", tmp_path / "corpus"
    for one in (undisturbed, folder):
        main(settings(one, scans))
    main(settings(undisturbed, scans, more, extend=True))
    honest = os.fsync
    for room in (1, 4, 9, 4, 4):
        left = room

        def stop(descriptor: int) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            honest(descriptor)

        monkeypatch.setattr(os, "fsync", stop)
        with pytest.raises(KeyboardInterrupt):
            main(settings(folder, scans, more, extend=True))
        assert len(read_index(folder)) in (97, 153)  # the one or the other can be read all the while
        monkeypatch.undo()
    main(settings(folder, scans, more))  # also without extend=true, once it was begun
    assert state(folder) == state(undisturbed)


def test_what_an_extension_shows_to_be_a_test_case_is_withdrawn(tmp_path: Path, write_scan: WriteScan) -> None:
    for seed in range(4):
        write_scan(tmp_path / "ours" / f"p{seed}" / "ct.nii.gz", seed)
    spleen = tmp_path / "spleen" / "Task09_Spleen"
    write_scan(spleen / "imagesTr" / "spleen_2.nii.gz", 9)
    hidden = write_scan(spleen / "imagesTs" / "spleen_1.nii.gz", 2)
    folder = tmp_path / "corpus"
    main(settings(folder, tmp_path / "ours"))
    before = finished(folder)
    spleens = {"name": "msd_spleen", "root": tmp_path / "spleen", "id": "spleens"}
    given = settings(folder, tmp_path / "ours").model_dump()
    given |= {"datasets": [*given["datasets"], spleens], "extend": True}
    assert main(type(settings(folder, tmp_path / "ours")).model_validate(given)).ok
    assert {name: finished(folder)[name] for name in before} == before
    index = read_index(folder).to_pylist()
    gone = [row for row in index if row["split"] == "excluded"]
    assert len(gone) == 12
    assert {row["excluded"] for row in gone} == {"tied to a case that is held out for testing"}
    for split in ("train", "val"):
        corpus = Corpus(folder, split)
        assert not any(np.array_equal(corpus.hu(i), plane) for i in range(len(corpus)) for plane in hidden)


def test_an_extension_needs_all_that_was_there(tmp_path: Path, scans: Path, more: Path) -> None:
    folder = tmp_path / "corpus"
    main(settings(folder, scans))
    before = state(folder)
    with pytest.raises(CurateError, match=r"11 volume.* are gone or were changed.* restore them"):
        main(settings(folder, more, extend=True))
    assert {name: digest for name, digest in state(folder).items() if name in before} == before
    assert (folder / FINISHED).exists()
