"""A shard is a tar anyone can read, its rows point at the bytes, and nothing in it names a patient."""

from __future__ import annotations

import errno
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset

from data_curation.aside import aside, sweep
from data_curation.index import CorpusError, read_index
from data_curation.shards import Part, Shard, is_written, write_shard
from data_curation.slices import decode, sha256


def test_rows_point_at_the_bytes_of_the_tar(corpus: Path) -> None:
    rows = read_index(corpus).to_pylist()
    for shard in sorted({row["shard"] for row in rows}):
        with tarfile.open(corpus / "shards" / shard) as tar:
            members = tar.getmembers()
            places = {member.name: (member.offset_data, member.size) for member in members}
            assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {
                (0, 0, 0, "axial", "axial", 0o644)
            }
        mine = [row for row in rows if row["shard"] == shard]
        assert len(places) == 2 * len(mine)
        assert all(places[f"{row['key']}.{row['codec']}"] == (row["offset"], row["size"]) for row in mine)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_webdataset_reads_the_shards(corpus: Path) -> None:
    index = {row["key"]: row for row in read_index(corpus).to_pylist()}
    urls = [str(path) for path in sorted((corpus / "shards").glob("train-*.tar"))]
    met = set()
    for sample in webdataset.WebDataset(urls, shardshuffle=False):
        row, facts = index[sample["__key__"]], json.loads(sample["json"])
        hu = decode(sample["j2c"])
        assert sha256(hu) == row["sha256"] == facts["sha256"]
        assert facts["spacing_zyx_mm"] == pytest.approx([2.5, 0.8, 0.75])
        assert facts["shape_yx"] == list(hu.shape)
        assert facts["frame_yx"] == [row["frame_height"], row["frame_width"]]
        assert facts["box_yx"] == [row["box_y"], row["box_x"]]
        assert (facts["hu_min"], facts["hu_max"], facts["z"]) == (hu.min(), hu.max(), row["z"])
        met.add(sample["__key__"])
    assert met == {row["key"] for row in index.values() if row["split"] == "train" and not row["duplicate"]}


def test_nothing_names_a_patient(corpus: Path, scans: Path) -> None:
    public = [
        *(corpus / "shards").iterdir(),
        *(corpus / "rows").iterdir(),
        corpus / "index.parquet",
        corpus / "corpus.json",
    ]
    names = {part for path in scans.rglob("*") for part in path.relative_to(scans).parts if "." not in part}
    assert len(names) == 13
    for path in public:
        text = path.read_bytes()
        if path.suffix == ".parquet":
            text = json.dumps([str(pq.read_schema(path).metadata), pq.read_table(path).to_pylist()]).encode()
        for secret in (*names, str(scans), "Doe", "ct.nii"):
            assert secret.encode() not in text, f"{secret} in {path}"
    assert "Jane_Doe_0" in (corpus / "private" / "sources.csv").read_text()
    assert (corpus / "private").stat().st_mode & 0o077 == 0


def test_a_shard_mixes_its_volumes(corpus: Path) -> None:
    index = read_index(corpus)
    volumes = index["volume"].to_numpy(zero_copy_only=False)[
        index["shard"].to_numpy(zero_copy_only=False) == "train-000000.tar"
    ]
    assert len(set(volumes)) == 3
    assert np.count_nonzero(volumes[1:] != volumes[:-1]) > 6


def planned(**changes: Any) -> Shard:
    part = {"volume": "v", "stamp": "s", "rows": (0,), "split": "train", "duplicate_group": "v", "duplicate": False}
    return Shard("train-000000", (Part(**{**part, **changes}),), 0)


def test_the_plan_names_what_the_bytes_depend_on() -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"volume": "w"},
        {"stamp": "t"},
        {"rows": (0, 1)},
        {"split": "val"},
        {"duplicate": True},
    ]
    assert len({planned(**change).plan for change in changes}) == len(changes)


def test_a_shard_without_its_spool(tmp_path: Path) -> None:
    with pytest.raises((CorpusError, FileNotFoundError)):
        write_shard(tmp_path, planned())
    assert not is_written(tmp_path, planned())


def test_aside_leaves_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"

    def fail() -> None:
        with aside(path) as file:
            file.write(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []
    with aside(path) as file:
        file.write(b"whole")
        assert not path.exists()
    assert [(one.name, one.read_bytes()) for one in tmp_path.iterdir()] == [("file", b"whole")]


def test_a_full_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with (
        pytest.raises(
            OSError, match=r"No space left on device; make room .* run the same command again.*shard\.tar"
        ) as caught,
        aside(tmp_path / "shard.tar"),
    ):
        pass
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(tmp_path / "shard.tar")
    assert list(tmp_path.iterdir()) == []


def test_sweep_takes_only_what_was_left_aside(tmp_path: Path) -> None:
    for name in (".a.tar.17.part", "a.tar", ".hidden", "b.part"):
        (tmp_path / name).write_bytes(b"")
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", "a.tar", "b.part"]
