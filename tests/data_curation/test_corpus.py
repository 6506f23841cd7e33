"""Random access to a corpus: the pixels that went in, for every kind of worker, and clear words for a damaged shard."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

import data_curation.corpus
from data_curation.corpus import Corpus, CorpusError
from data_curation.index import read_index
from data_curation.slices import content


@pytest.fixture
def copy(corpus: Path, tmp_path: Path) -> Path:
    shutil.copytree(corpus, tmp_path / "copy")
    return tmp_path / "copy"


def test_every_slice_comes_back(corpus: Path, scans: Path) -> None:
    sources = {
        line.split(",")[0]: scans / line.split(",")[2]
        for line in (corpus / "private" / "sources.csv").read_text().splitlines()[1:]
    }
    every = Corpus(corpus, None, duplicates=True, verify=True)
    index = read_index(corpus)
    boxed = Corpus(corpus, None, duplicates=True, frame=False)
    assert len(every) == len(index) == 97
    for i in range(len(every)):
        volume, z = index["volume"][i].as_py(), index["z"][i].as_py()
        scan = sitk.GetArrayFromImage(sitk.ReadImage(str(sources[volume])))[z]
        top, left, height, width = (index[name][i].as_py() for name in ("box_y", "box_x", "height", "width"))
        part = np.s_[top : top + height, left : left + width]
        expected = np.full_like(scan, -1024)
        expected[part] = scan[part]
        np.testing.assert_array_equal(every.hu(i), expected)
        np.testing.assert_array_equal(boxed.hu(i), scan[part])
        assert boxed.shape(i) == (height, width)
        assert every.spacing(i) == pytest.approx((0.8, 0.75))
        assert every.shape(i) == expected.shape
        assert every.key(i) == f"{volume}_{z:05d}"
        assert every.dataset(i) == "folder"


def test_splits_and_duplicates(corpus: Path) -> None:
    train, val, once = Corpus(corpus), Corpus(corpus, "val"), Corpus(corpus, None)
    assert len(train) + len(val) == len(once) == 89
    keys = [{one.key(i) for i in range(len(one))} for one in (train, val)]
    assert keys[0]
    assert keys[1]
    assert not keys[0] & keys[1]
    assert len({content(once.hu(i)) for i in range(len(once))}) == len(once)
    with pytest.raises(CorpusError, match="no split 'test'; it has: train, val"):
        Corpus(corpus, "test")


def test_a_pickled_corpus_reads_elsewhere(corpus: Path) -> None:
    one = Corpus(corpus, "val", verify=True)
    first = one.hu(0)
    again = pickle.loads(pickle.dumps(one))
    assert len(pickle.dumps(one)) < 1000
    assert again.verify
    np.testing.assert_array_equal(again.hu(0), first)
    code = "import pickle, sys; one = pickle.load(sys.stdin.buffer); print(one.key(0), int(one.hu(0).sum()))"
    done = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(one), capture_output=True, check=True)
    assert done.stdout.decode().split() == [one.key(0), str(int(first.sum()))]


def test_threads_and_few_descriptors(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_curation.corpus, "OPEN_SHARDS", 1)
    one = Corpus(corpus, None, verify=True)
    order = np.random.default_rng(0).permutation(np.repeat(np.arange(len(one)), 4)).tolist()
    expected = [one.hu(i) for i in range(len(one))]
    with ThreadPoolExecutor(8) as pool:
        for i, hu in zip(order, pool.map(one.hu, order), strict=True):
            np.testing.assert_array_equal(hu, expected[i])
    before = len(os.listdir("/proc/self/fd"))
    del one
    assert len(os.listdir("/proc/self/fd")) < before


def test_no_corpus(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"holds no corpus .*`axial curate`"):
        Corpus(tmp_path)


def test_an_absent_shard_is_named(copy: Path) -> None:
    one = Corpus(copy)
    shard = read_index(copy)["shard"][0].as_py()
    (copy / "shards" / shard).unlink()
    with pytest.raises(CorpusError, match=rf"{shard}, sample {one.key(0)}: cannot be read \(No such file"):
        one.hu(0)


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("opened", [True, False])
def test_a_short_shard_is_named(copy: Path, mapped: bool, opened: bool) -> None:
    one = Corpus(copy, None, duplicates=True, mapped=mapped)
    if opened:
        one.hu(0)
    index = read_index(copy)
    last = next(i for i in reversed(range(len(index))) if index["shard"][i].as_py() == index["shard"][0].as_py())
    path = copy / "shards" / index["shard"][0].as_py()
    os.truncate(path, index["offset"][last].as_py() + 5)
    one.hu(0)
    with pytest.raises(CorpusError, match=rf"{path.name}, sample {one.key(last)}: the shard is cut short"):
        one.hu(last)


@pytest.mark.parametrize("at", [0, 0.3, 0.999])
def test_damage_is_seen_before_it_is_decoded(copy: Path, at: float) -> None:
    one = Corpus(copy)
    index = read_index(copy)
    path = copy / "shards" / index["shard"][0].as_py()
    data = bytearray(path.read_bytes())
    data[index["offset"][0].as_py() + int(at * index["size"][0].as_py())] ^= 4
    path.write_bytes(data)
    with pytest.raises(CorpusError, match=rf"{path.name}, sample {one.key(0)}: .* damaged"):
        one.hu(0)


def test_verify_compares_the_pixels(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = data_curation.corpus.decode
    monkeypatch.setattr(data_curation.corpus, "decode", lambda data, codec: honest(data, codec) + np.int16(1))
    Corpus(copy).hu(0)
    with pytest.raises(CorpusError, match="not those that were curated"):
        Corpus(copy, verify=True).hu(0)


def test_a_missing_name_is_no_index_error(corpus: Path) -> None:
    with pytest.raises(IndexError):
        Corpus(corpus).hu(10**6)
