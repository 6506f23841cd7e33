"""`axial curate` from files to corpus: what is kept, what is refused, and what is said."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import data_curation.scan
from data_curation.curate import CurateError, Settings, dry_run
from data_curation.index import CorpusError, read_index
from launch.settings import SettingsError, load
from tests.data_curation.curated import main, settings, state

WriteScan = Any  # the fixture of conftest.py


def refusals(folder: Path) -> list[dict[str, str]]:
    with (folder / "private" / "refused.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def refused(folder: Path) -> dict[str, str]:
    return {row["source"]: row["reason"] for row in refusals(folder)}


def test_what_a_corpus_holds(corpus: Path, scans: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sorted(path.name for path in corpus.iterdir()) == [
        "corpus.json", "held_out.parquet", "index.parquet", "left_out.parquet", "private", "refused.parquet", "rows",
        "shards",
    ]  # fmt: skip
    facts = json.loads((corpus / "corpus.json").read_text())
    assert (facts["slices"], facts["volumes"], facts["duplicate_slices"]) == (97, 11, 8)
    assert set(refused(corpus)) == {"Broken/ct.nii.gz", "Empty/ct.nii.gz"}
    listed = pq.read_table(corpus / "refused.parquet").to_pylist()
    assert [set(row) for row in listed] == [{"dataset", "volume", "reason"}] * 2
    names = {path.stem for path in (corpus / "shards").iterdir()}
    assert names == {path.stem for path in (corpus / "rows").iterdir()}
    assert names >= {"train-000000", "val-000000", "duplicates-000000"}
    index = read_index(corpus)
    assert set(index["licence"].to_pylist()) == {"CC0"}
    assert index.schema.field("z").metadata[b"description"].startswith(b"slice number")
    assert not list(corpus.rglob("*.slices"))


def test_twins_share_group_and_split(corpus: Path) -> None:
    sources = [line.split(",") for line in (corpus / "private" / "sources.csv").read_text().splitlines()]
    first, twin = (next(line[0] for line in sources if name in line[2]) for name in ("Jane_Doe_3", "Twin_of_3"))
    rows = [row for row in read_index(corpus).to_pylist() if row["volume"] in (first, twin)]
    assert {row["duplicate_group"] for row in rows} == {first}
    assert len({row["split"] for row in rows}) == 1
    assert {row["duplicate"] for row in rows if row["volume"] == first} == {False}
    assert {row["duplicate"] for row in rows if row["volume"] == twin} == {True}
    assert {row["shard"] for row in rows if row["volume"] == twin} == {"duplicates-000000.tar"}


def test_duplicates_can_be_dropped(tmp_path: Path, scans: Path) -> None:
    assert main(settings(tmp_path / "corpus", scans, duplicates="drop")).ok
    index = read_index(tmp_path / "corpus")
    assert (len(index), sum(index["duplicate"].to_pylist())) == (89, 0)
    row = next(r for r in refusals(tmp_path / "corpus") if r["reason"] == "duplicate")
    assert row["source"] == "Twin_of_3/ct.nrrd"
    assert "Jane_Doe_3/ct.nii.gz" in row["detail"]


def test_a_reader_that_fails_unexpectedly_costs_one_volume(
    tmp_path: Path, write_scan: WriteScan, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b", "c"):
        write_scan(tmp_path / "in" / name / "ct.nii.gz", ord(name))
    honest = data_curation.scan.read

    def read(found: Any, limits: Any) -> Any:
        if "/b/" in str(found.path):
            raise ZeroDivisionError("no slope\nat all")
        if "/c/" in str(found.path):
            raise MemoryError
        return honest(found, limits)

    monkeypatch.setattr(data_curation.scan, "read", read)
    assert main(settings(tmp_path / "corpus", tmp_path / "in")).ok
    rows = refusals(tmp_path / "corpus")
    assert [(row["source"], row["reason"]) for row in rows] == [
        ("b/ct.nii.gz", "unreadable"),
        ("c/ct.nii.gz", "memory"),
    ]
    assert rows[0]["detail"] == "ZeroDivisionError: no slope at all"
    monkeypatch.undo()
    main(settings(tmp_path / "corpus", tmp_path / "in"))  # looked at again, for the cause may have passed
    assert refused(tmp_path / "corpus") == {}


def test_a_mended_file_is_read_again(tmp_path: Path, write_scan: WriteScan) -> None:
    write_scan(tmp_path / "in" / "a" / "ct.nii.gz", 1)
    write_scan(tmp_path / "in" / "b" / "ct.nii.gz", 2)
    main(settings(tmp_path / "corpus", tmp_path / "in"))
    before = read_index(tmp_path / "corpus")
    write_scan(tmp_path / "in" / "b" / "ct.nii.gz", 3)
    main(settings(tmp_path / "corpus", tmp_path / "in"))
    after = read_index(tmp_path / "corpus")
    assert len(set(before["sha256"].to_pylist()) & set(after["sha256"].to_pylist())) == 12
    fresh = tmp_path / "fresh"
    main(settings(fresh, tmp_path / "in"))
    assert state(fresh) == state(tmp_path / "corpus")
    shutil.rmtree(tmp_path / "in" / "b")
    main(settings(tmp_path / "corpus", tmp_path / "in"))
    assert len(read_index(tmp_path / "corpus")) == 12


def test_held_out_cases_and_their_copies_stay_out(tmp_path: Path, write_scan: WriteScan) -> None:
    spleen = tmp_path / "Task09_Spleen"
    hu = {number: write_scan(spleen / "imagesTr" / f"spleen_{number}.nii.gz", number) for number in (1, 2)}
    secret = write_scan(spleen / "imagesTs" / "spleen_3.nii.gz", 3)
    write_scan(
        tmp_path / "other" / "repackaged" / "ct.nii.gz",
        hu=np.concatenate([secret[4:].clip(-1000, 1000), hu[1][:1] + 3]),
    )
    datasets = [{"name": "msd_spleen", "root": spleen}, {"name": "folder", "root": tmp_path / "other"}]
    given = {"datasets": datasets, "workers": 1}
    main(Settings.model_validate({"folder": tmp_path / "corpus", **given}))
    assert set(read_index(tmp_path / "corpus")["dataset"].to_pylist()) == {"msd_spleen"}
    assert len(read_index(tmp_path / "corpus")) == 24
    rows = refusals(tmp_path / "corpus")
    assert [(row["source"], row["reason"]) for row in rows] == [
        ("imagesTs/spleen_3.nii.gz", "held_out"),
        ("repackaged/ct.nii.gz", "held_out_related"),
    ]
    assert "msd_spleen: imagesTs/spleen_3.nii.gz" in rows[1]["detail"]
    main(Settings.model_validate({"folder": tmp_path / "all", **given, "include_held_out": True}))
    index = read_index(tmp_path / "all")
    assert len(index) == 45
    assert set(index["held_out"].to_pylist()) == {"", "official test set"}


def test_a_corpus_for_commercial_use(tmp_path: Path, write_scan: WriteScan) -> None:
    write_scan(tmp_path / "LiTS" / "Training Batch 1" / "volume-4.nii", 1)
    write_scan(tmp_path / "spleen" / "Task09_Spleen" / "imagesTr" / "spleen_2.nii.gz", 2)
    write_scan(tmp_path / "ours" / "p" / "ct.nii.gz", 3)
    datasets = [
        {"name": "lits", "root": tmp_path / "LiTS"},
        {"name": "msd_spleen", "root": tmp_path / "spleen"},
        {"name": "folder", "root": tmp_path / "ours", "licence": "ours", "commercial": True},
    ]
    given = {"datasets": datasets, "workers": 1}
    main(Settings.model_validate({"folder": tmp_path / "corpus", **given, "licence": "commercial"}))
    index = read_index(tmp_path / "corpus")
    assert set(index["dataset"].to_pylist()) == {"msd_spleen", "folder"}
    assert all(index["commercial"].to_pylist())
    (row,) = refusals(tmp_path / "corpus")
    assert (row["source"], row["reason"]) == ("Training Batch 1/volume-4.nii", "licence")
    assert "CC BY-NC-ND 4.0 does not allow it" in row["detail"]
    main(Settings.model_validate({"folder": tmp_path / "all", **given}))
    rows = read_index(tmp_path / "all").to_pylist()
    assert {row["dataset"]: row["commercial"] for row in rows} == {"lits": False, "msd_spleen": True, "folder": True}


def test_two_data_sets_need_two_names(tmp_path: Path, scans: Path) -> None:
    datasets = [{"name": "folder", "root": scans}, {"name": "folder", "root": tmp_path}]
    with pytest.raises(ValueError, match="two data sets are called folder: give each its own `id:`"):
        Settings.model_validate({"folder": tmp_path, "datasets": datasets})


def test_the_salt_changes_every_name(tmp_path: Path, write_scan: WriteScan) -> None:
    write_scan(tmp_path / "in" / "a" / "ct.nii.gz")
    names = []
    for salt in ("", "pepper"):
        main(settings(tmp_path / f"corpus{salt}", tmp_path / "in", salt=salt))
        index = read_index(tmp_path / f"corpus{salt}")
        names.append({index[name][0].as_py() for name in ("volume", "patient", "study")})
    assert not names[0] & names[1]
    assert "pepper" not in (tmp_path / "corpuspepper" / "corpus.json").read_text()


def test_a_missing_root_stops_before_any_work(tmp_path: Path, scans: Path) -> None:
    with pytest.raises(CurateError, match=rf"set1: {tmp_path}/none is not a folder"):
        main(settings(tmp_path / "corpus", scans, tmp_path / "none"))
    assert not list((tmp_path / "corpus" / "private" / "scan").iterdir())
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match=r"no CT image found below .*bare"):
        main(settings(tmp_path / "corpus", scans, tmp_path / "bare"))
    assert not list((tmp_path / "corpus" / "private" / "scan").iterdir())


def test_nothing_kept_is_not_ok(tmp_path: Path) -> None:
    (tmp_path / "in" / "a").mkdir(parents=True)
    (tmp_path / "in" / "a" / "ct.nii.gz").write_bytes(b"no image at all")
    outcome = main(settings(tmp_path / "corpus", tmp_path / "in"))
    assert not outcome.ok
    assert "refused.csv" in outcome.next[0]
    assert len(read_index(tmp_path / "corpus")) == 0
    assert set(refused(tmp_path / "corpus")) == {"a/ct.nii.gz"}


def test_wrong_settings_are_all_named(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(
        "folder: x\ndatasets: [{name: fodler, root: y}]\nsplit: {train: 0.9, val: 0.9}\ncodec: pkl\nshard_slices: 0\n"
    )
    with pytest.raises(SettingsError) as caught:
        load(Settings, tmp_path / "bad.yaml")
    for part in (
        "no data set is called 'fodler'",
        "train + val must be 1",
        "no codec 'pkl'",
        "shard_slices",
        "bad.yaml:5",
    ):
        assert part in str(caught.value)


def test_a_dry_run_counts_and_writes_nothing(tmp_path: Path, scans: Path) -> None:
    assert (
        dry_run(settings(tmp_path / "corpus", scans))
        == "set0: 13 volumes to read, 0 files refused by their place or header"
    )
    assert not (tmp_path / "corpus").exists()


def test_real_scans(tmp_path: Path, real_ct: Path) -> None:
    """A slice of the real folder: DICOM and NIfTI of one patient, MR, PET, masks."""
    main(settings(tmp_path / "corpus", real_ct / "sts_002_multimodal"))
    index = read_index(tmp_path / "corpus")
    assert (len(index), sum(index["duplicate"].to_pylist())) == (96, 48)
    assert set(index["n_slices"].to_pylist()) == {48}
    assert len(set(index["split"].to_pylist())) == len(set(index["duplicate_group"].to_pylist())) == 1
    reasons = refused(tmp_path / "corpus")
    assert reasons["MR_T1_image.nii.gz"] == reasons["PET_image.nii.gz"] == "not_ct"
    assert reasons["CT_mask.nii.gz"] == "label"


def test_files_of_others_are_not_taken_for_stale_shards(tmp_path: Path, scans: Path) -> None:
    foreign = tmp_path / "corpus" / "shards" / "imagenet-000.tar"
    foreign.parent.mkdir(parents=True)
    foreign.write_bytes(b"somebody's")
    with pytest.raises(CurateError, match="no `axial curate` made"):
        main(settings(tmp_path / "corpus", scans))
    foreign.unlink()
    assert main(settings(tmp_path / "corpus", scans)).ok
    foreign.write_bytes(b"put there later")
    assert main(settings(tmp_path / "corpus", scans)).ok
    assert foreign.read_bytes() == b"put there later"


def test_what_is_tied_to_an_unreadable_held_out_case_is_held_out_too(tmp_path: Path, write_scan: WriteScan) -> None:
    """spleen_2 lies in both folders; the test scan is cut short, and still holds the other one out."""
    task = tmp_path / "set" / "Task09_Spleen"
    for seed, place in enumerate(("imagesTr/spleen_2", "imagesTr/spleen_3", "imagesTs/spleen_2")):
        write_scan(task / f"{place}.nii.gz", seed)
    held = task / "imagesTs" / "spleen_2.nii.gz"
    held.write_bytes(held.read_bytes()[:400])
    main(settings(tmp_path / "corpus", tmp_path / "set", name="msd_spleen"))
    reasons = {source.removeprefix("Task09_Spleen/"): why for source, why in refused(tmp_path / "corpus").items()}
    assert reasons["imagesTs/spleen_2.nii.gz"] == "held_out"
    assert reasons["imagesTr/spleen_2.nii.gz"] == "held_out_related"
    assert len(read_index(tmp_path / "corpus")) == 12


@pytest.mark.parametrize("part", ["rows/train-000000.parquet", "private/scan"])
def test_a_damaged_part_is_named_with_the_remedy(tmp_path: Path, scans: Path, part: str) -> None:
    folder = tmp_path / "corpus"
    main(settings(folder, scans))
    path = folder / part
    path = path if path.is_file() else max(path.glob("*.parquet"), key=lambda one: one.stat().st_size)
    whole = path.read_bytes()
    path.write_bytes(whole[:4] + bytes(len(whole) // 3) + whole[4 + len(whole) // 3 :])
    with pytest.raises(CorpusError, match=rf"{path.name} cannot be read .*: delete it and run the same command"):
        main(settings(folder, scans))
    path.unlink()
    assert main(settings(folder, scans)).ok


def test_slices_read_again_are_counted(tmp_path: Path, scans: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(settings(tmp_path / "corpus", scans))
    (tmp_path / "corpus" / "shards" / "train-000000.tar").unlink()
    capsys.readouterr()
    main(settings(tmp_path / "corpus", scans))
    told = capsys.readouterr().out
    assert "slices read" in told
    assert ", 0 slices read" not in told
