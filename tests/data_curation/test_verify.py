"""A clean corpus passes; every kind of damage is named, with its shard and sample."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from data_curation.curate import main as curate
from data_curation.index import CorpusError
from data_curation.slices import CODECS
from data_curation.verify import Settings, main, verify
from launch.cli import main as command
from launch.crew import Each, Lost, Workers
from tests.data_curation.conftest import WriteScan
from tests.data_curation.curated import settings
from tests.data_curation.damaging import TRAIN, flip, members, overwrite, put, rewrite, tar_of


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, write_scan: WriteScan) -> Path:
    """Train, val and duplicates; air slices; a file that was refused. Not to be written to."""
    root = tmp_path_factory.mktemp("verify")
    for seed in range(4):
        hu = write_scan(root / "scans" / "tmp.nrrd", seed, depth=6)
        hu[0] = -1000 if seed else hu[0]
        write_scan(root / "scans" / f"p{seed}" / "ct.nrrd", hu=hu)
    (root / "scans" / "tmp.nrrd").unlink()
    shutil.copytree(root / "scans" / "p1", root / "scans" / "twin")
    (root / "scans" / "broken.nii").write_bytes(b"nothing")
    curate(settings(root / "corpus", root / "scans", shard_slices=12, likeness=False))
    return root / "corpus"


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    """A copy to be damaged, as somebody else got it: without private/."""
    shutil.copytree(sound, tmp_path / "corpus", ignore=shutil.ignore_patterns("private"))
    return tmp_path / "corpus"


def told(folder: Path, **more: bool) -> list[str]:
    return [str(fault) for fault in verify(folder, **more)]


def test_a_sound_corpus_passes_also_without_what_is_private(sound: Path, folder: Path) -> None:
    assert {path.name.partition("-")[0] for path in (sound / "shards").iterdir()} == {"train", "val", "duplicates"}
    assert pq.read_table(sound / "left_out.parquet").num_rows == 4
    assert verify(sound) == verify(folder) == verify(folder, pixels=False) == ()


def test_the_command_says_so_and_nothing_is_changed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}
    assert command(["verify", f"folder={folder}", "workers=1"]) == 0
    assert "is sound" in capsys.readouterr().out
    assert before == {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}
    flip(tar_of(folder), members(folder)[4].offset_data + 9)
    assert command(["verify", f"folder={folder}", "workers=1"]) == 1
    key = members(folder)[4].name.partition(".")[0]
    assert f"shards/{TRAIN}.tar, sample {key}: the stored bytes are damaged" in capsys.readouterr().out


def test_shards_are_checked_by_any_number_of_workers(folder: Path) -> None:
    flip(tar_of(folder), members(folder)[0].offset_data)
    flip(tar_of(folder, "val-000000"), members(folder, "val-000000")[1].offset_data)
    alone = verify(folder)
    assert len(alone) == 2
    assert verify(folder, crew=Workers(2)) == alone


@hypothesis_settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_bit_is_found_in_its_sample(sound: Path, folder: Path, data: st.DataObject) -> None:
    """Anywhere but in the digits of the spacing, which the index has with fewer of them."""
    shutil.copy(tar_of(sound), tar_of(folder))
    one = data.draw(st.sampled_from(members(folder)))
    at = data.draw(st.integers(one.offset, one.offset_data + one.size - 1))
    text = tar_of(folder).read_bytes()[one.offset_data : one.offset_data + one.size]
    digits = text.find(b"spacing_zyx_mm") + one.offset_data
    if one.name.endswith("json") and digits <= at < digits + 70:
        at = one.offset_data
    flip(tar_of(folder), at, data.draw(st.integers(0, 7)))
    faults = verify(folder, pixels=False)
    assert faults
    assert {fault.file for fault in faults} == {f"shards/{TRAIN}.tar"}
    assert one.name.partition(".")[0] in {fault.sample for fault in faults}


def test_a_zeroed_header_does_not_end_the_shard(folder: Path) -> None:
    one = members(folder)[6]
    overwrite(tar_of(folder), one.offset, bytes(512))
    assert len(members(folder)) == 6  # what plain readers see
    (fault,) = verify(folder)
    assert (fault.file, fault.sample) == (f"shards/{TRAIN}.tar", one.name.partition(".")[0])
    assert fault.what.startswith("a header is overwritten by zeros, and plain tar readers stop there without an error")
    assert fault.what.endswith(f"(byte {one.offset:,}, {one.name})")
    assert fault.remedy.startswith("copy the shard again, or delete it")


@pytest.mark.parametrize("border", [True, False])
def test_a_cut_shard_names_every_lost_sample(folder: Path, border: bool) -> None:
    held = members(folder)
    with open(tar_of(folder), "r+b") as file:
        file.truncate(held[8].offset if border else held[8].offset_data + 3)
    faults = verify(folder)
    lost = {info.name.partition(".")[0] for info in held[8:]}
    assert {fault.sample for fault in faults} - {""} == lost
    assert sum("cut short" in fault.what for fault in faults) == 1
    assert sum("its rows say" in fault.what for fault in faults) == 1


def test_a_cut_end_mark_and_bytes_after_the_end_are_told(folder: Path) -> None:
    last = members(folder)[-1]
    end = last.offset_data + -(-last.size // 512) * 512
    overwrite(tar_of(folder), end + 1024, b"more")
    assert any("overwritten by zeros" in text for text in told(folder))
    with open(tar_of(folder), "r+b") as file:
        file.truncate(end + 512)
    assert any("end of the shard is cut off" in text for text in told(folder))


def renamed(held: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    held[2][0].name = "stranger.j2c"


def removed(held: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    del held[4:6]


def added(held: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    extra = tarfile.TarInfo(held[0][0].name.partition(".")[0] + ".pkl")
    held.append((extra, b"planted"))


def doubled(held: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    held += held[:2]


def owned(held: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    held[2][0].uname, held[2][0].mtime = "jane", 1_700_000_000


def linked(held: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    held[3][0].type, held[3][0].linkname = tarfile.SYMTYPE, "elsewhere"
    held[3] = (held[3][0], b"")


def moved(held: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    held[:] = held[2:] + held[:2]


@pytest.mark.parametrize(
    ("change", "number", "words"),
    [
        (renamed, 2, [r"stranger.j2c, which the index does not know", ".j2c cannot be found in the shard"]),
        (removed, 4, [".j2c and", "cannot be found in the shard"]),
        (added, 0, [".pkl is no part of a sample"]),
        (doubled, 0, [".j2c is there more than once", ".json is there more than once"]),
        (owned, 2, ["has another owner, time, mode or kind"]),
        (linked, 3, ["has another owner, time, mode or kind"]),
        (moved, 2, ["the index says", "later samples too"]),
    ],
)
def test_what_was_done_to_the_members_is_named(
    folder: Path, change: Callable[[list[tuple[tarfile.TarInfo, bytes]]], None], number: int, words: list[str]
) -> None:
    key = members(folder)[number].name.partition(".")[0]
    rewrite(folder, lambda held: None)
    assert told(folder) == []  # the same bytes
    rewrite(folder, change)
    text = "\n".join(told(folder))
    assert all(word in text for word in words), text
    assert f"sample {key}" in text


def edit(folder: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    index = pq.read_table(folder / "index.parquet")
    pq.write_table(change(index), folder / "index.parquet")


def test_a_lost_row_of_the_index_is_named(folder: Path) -> None:
    key = pq.read_table(folder / "index.parquet")["key"][3].as_py()
    edit(folder, lambda index: pa.concat_tables([index.slice(0, 3), index.slice(4)]))
    text = "\n".join(told(folder))
    assert f"index.parquet, sample {key}: the index has no such row" in text
    assert f"the shard holds {key}.j2c, which the index does not know" in text
    assert "corpus.json: fingerprint is" in text
    assert "corpus.json: slices is" in text
    assert "slices, 5 are stored or listed as left out" in text


def test_a_changed_value_of_the_index_is_named(folder: Path) -> None:
    edit(folder, lambda index: put(index, 2, body_fraction=0.25, sha256="0" * 64))
    key = pq.read_table(folder / "index.parquet")["key"][2].as_py()
    text = "\n".join(told(folder))
    assert f"sample {key}: sha256 is another one than in rows/" in text
    assert f"sample {key}: body_fraction is another one than in rows/" in text
    assert f"sample {key}: its JSON says something else than the index about body_fraction, sha256" in text
    assert f"sample {key}: the decoded pixels are not those that were curated" in text
    assert not any("decoded pixels" in line for line in told(folder, pixels=False))


def test_a_doubled_row_is_named(folder: Path) -> None:
    edit(folder, lambda index: pa.concat_tables([index.slice(0, 1), index]))
    text = "\n".join(told(folder))
    assert "1 rows have the key of another row" in text
    assert "in another order or number" in text


def test_swapped_shards_are_told_in_a_few_lines(folder: Path) -> None:
    other = tar_of(folder, "val-000000")
    os.rename(other, folder / "aside")
    os.rename(tar_of(folder), other)
    os.rename(folder / "aside", tar_of(folder))
    for name in (TRAIN, "val-000000"):
        mine = [fault for fault in verify(folder) if fault.file == f"shards/{name}.tar"]
        assert any("is another shard" in fault.what for fault in mine)
        assert len(mine) <= 2


def test_files_that_are_missing_or_too_many_are_named(folder: Path) -> None:
    tar_of(folder, "val-000000").unlink()
    (folder / "rows" / f"{TRAIN}.parquet").unlink()
    (folder / "shards" / "train-000099.tar").write_bytes(b"")
    (folder / "rows" / "duplicates-000000.parquet").write_bytes(b"PAR1")
    faults = {fault.file: fault.what for fault in verify(folder)}
    assert "cannot be read (No such file" in faults["shards/val-000000.tar"]
    assert faults[f"rows/{TRAIN}.parquet"] == "is missing"
    assert "does not know this file" in faults["shards/train-000099.tar"]
    assert "cannot be read" in faults["rows/duplicates-000000.parquet"]


def test_a_record_that_does_not_fit_is_told(folder: Path) -> None:
    facts = json.loads((folder / "corpus.json").read_text())
    changed = {**facts, "fingerprint": "feed", "patients": 99}
    changed["datasets"]["set0"]["refused"] = {}
    changed["datasets"]["set0"]["left_out"] = {"air": 1}
    (folder / "corpus.json").write_text(json.dumps(changed))
    text = "\n".join(told(folder))
    for words in ("fingerprint is 'feed'", "patients is 99", "set0: refused is {}", "set0: left_out is {'air': 1}"):
        assert f"corpus.json: {words}" in text or f"data set {words}" in text, words
    (folder / "corpus.json").write_text("{")
    assert any("corpus.json cannot be read" in line for line in told(folder))


def leaked(index: pa.Table, **same: str) -> pa.Table:
    """The first slice of val gets the values of the first of train."""
    train, val = (index["split"].to_pylist().index(name) for name in ("train", "val"))
    for column in same:
        index = put(index, val, **{column: index[column][train].as_py()})
    return index


@pytest.mark.parametrize(
    ("column", "what"),
    [("patient", "patients"), ("duplicate_group", "duplicate groups"), ("content", "slices by equal content")],
)
def test_a_leak_between_the_splits_is_a_fault(folder: Path, column: str, what: str) -> None:
    edit(folder, lambda index: leaked(index, **{column: ""}))
    assert any(what in line and "are both train and val" in line for line in told(folder))


def test_held_out_and_excluded_volumes_must_not_be_used(folder: Path) -> None:
    index = pq.read_table(folder / "index.parquet")
    volume = index["volume"][0].as_py()
    edit(folder, lambda index: put(index, 0, held_out="official test set", excluded="tied to"))
    refused = pq.read_table(folder / "refused.parquet").to_pylist()
    refused.append({"dataset": "set0", "volume": volume, "reason": "held_out_related"})
    pq.write_table(pa.Table.from_pylist(refused), folder / "refused.parquet")
    text = "\n".join(told(folder))
    assert f"1 volumes of official test sets are both held out and train or val, such as {volume}" in text
    assert f"1 volumes tied to a held-out one are both refused and train or val, such as {volume}" in text
    assert "and the reason for exclusion 'tied to'" in text


def test_an_extended_corpus_with_withdrawn_slices_passes(tmp_path: Path, write_scan: WriteScan) -> None:
    """A volume of a finished shard becomes tied to a case that models are scored on: excluded, and still sound."""
    hu = [write_scan(tmp_path / "first" / f"p{seed}" / "ct.nrrd", seed, depth=6) for seed in range(3)]
    one = settings(tmp_path / "corpus", tmp_path / "first", likeness=False)
    curate(one)
    write_scan(tmp_path / "scored" / "imagesTs" / "case_0000.nii.gz", hu=hu[1])
    scored = [{"root": tmp_path / "scored"}]
    curate(settings(tmp_path / "corpus", tmp_path / "first", likeness=False, extend=True, evaluation=scored))
    index = pq.read_table(tmp_path / "corpus" / "index.parquet")
    assert index["split"].to_pylist().count("excluded") == 6
    assert verify(tmp_path / "corpus") == ()
    edit(tmp_path / "corpus", lambda index: put(index, index["split"].to_pylist().index("excluded"), split="train"))
    text = "\n".join(told(tmp_path / "corpus"))
    assert "has the split 'train' and the reason for exclusion" in text
    assert "withdrawn, as they are tied to a held-out case and train or val" in text


def test_damaged_pixels_are_never_decoded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Damaged HTJ2K may not end: the checksum comes first."""
    one = next(info for info in members(folder) if info.name.endswith("j2c"))
    flip(tar_of(folder), one.offset_data + one.size // 2)
    good = CODECS["j2c"]
    seen: list[bytes] = []

    def watched(data: bytes) -> np.ndarray[tuple[int, ...], np.dtype[np.int16]]:
        seen.append(data)
        return good.decode(data)

    codec = type(good)(good.encode, watched)
    monkeypatch.setattr("data_curation.slices.CODECS", {"j2c": codec})
    assert len(verify(folder)) == 1
    assert len(seen) == pq.read_table(folder / "index.parquet").num_rows - 1


def test_a_folder_without_a_corpus_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="holds no corpus"):
        main(Settings(folder=tmp_path))
    assert command(["verify", f"folder={tmp_path}"]) == 2


class Losing:
    """A crew whose workers die."""

    @contextmanager
    def open(self) -> Iterator[Each]:
        yield lambda function, tasks, name: ((task, Lost("crashed", "ended two workers")) for task in tasks)

    def limited(self, timeout_s: float | None, memory_gib: float | None) -> Losing:
        return self


def test_a_shard_that_cannot_be_checked_is_a_fault(folder: Path) -> None:
    faults = verify(folder, crew=Losing())
    assert {fault.file for fault in faults} == {f"shards/{path.name}" for path in (folder / "shards").iterdir()}
    assert str(faults[-1]) == f"shards/{faults[-1].file[7:]}: checking it ended two workers; run the check again"
