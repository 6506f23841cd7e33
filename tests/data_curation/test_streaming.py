"""The stream: the same slices as the index, nothing runs, nothing is lost in silence, nothing is read twice."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from data_curation.corpus import Corpus, CorpusError
from data_curation.slices import checksum, encode, sha256
from data_curation.streaming import Sample, stream

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="webdataset")
        yield


@pytest.fixture
def folder(corpus: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    shutil.copytree(corpus, tmp_path / "corpus", ignore=shutil.ignore_patterns("private"))
    return tmp_path / "corpus"


def read(*given: object, **more: object) -> list[Sample]:
    return list(stream(*given, **more))  # type: ignore[arg-type]


def keys(samples: list[Sample]) -> list[str]:
    return [sample.key for sample in samples]


def shards(folder: Path, group: str = "train") -> list[str]:
    return [str(path) for path in sorted((folder / "shards").glob(f"{group}-*.tar"))]


@pytest.mark.parametrize("split", ["train", "val", None])
@pytest.mark.parametrize("duplicates", [False, True])
@pytest.mark.parametrize("frame", [False, True])
def test_the_stream_is_the_corpus(corpus: Path, split: str | None, duplicates: bool, frame: bool) -> None:
    by_index = Corpus(corpus, split, duplicates=duplicates, frame=frame)
    samples = read(corpus, split, duplicates=duplicates, frame=frame)
    assert keys(samples) == [by_index.key(i) for i in range(len(by_index))]
    for i, sample in enumerate(samples):
        assert np.array_equal(sample.hu, by_index.hu(i))
        assert sample.hu.dtype == np.int16
        assert sample.facts["spacing_zyx_mm"][1:] == pytest.approx(by_index.spacing(i))


def test_shards_are_also_read_without_a_corpus_folder(corpus: Path) -> None:
    whole = keys(read(corpus))
    assert keys(read(shards(corpus))) == whole
    assert keys(read([f"file://{path}" for path in shards(corpus)])) == whole
    assert len(shards(corpus)) > 1
    braces = str(corpus / "shards" / f"train-{{000000..{len(shards(corpus)) - 1:06d}}}.tar")
    assert keys(read(braces)) == whole
    assert keys(read(braces, corpus=corpus)) == whole
    everything = [*shards(corpus), *shards(corpus, "val")]
    assert keys(read(everything)) == whole
    assert keys(read(everything, "val")) == keys(read(corpus, "val"))


@pytest.mark.skipif(shutil.which("curl") is None, reason="webdataset reads http by curl, which is not here")
def test_shards_are_read_over_http(corpus: Path) -> None:
    import threading
    from functools import partial
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(corpus))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/shards/"
        urls = [url + Path(path).name for path in shards(corpus)]
        assert keys(read(urls, corpus=corpus)) == keys(read(corpus))
        with pytest.raises(CorpusError, match=r"none\.tar: cannot be read"):
            read([f"{url}none.tar"])
        server.shutdown()


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return os.system, (f"touch {self.path}",)


def pack(path: Path, *held: tuple[str, bytes]) -> str:
    with tarfile.open(path, "w") as tar:
        for name, data in held:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def slice_of(key: str = "a", **more: object) -> list[tuple[str, bytes]]:
    hu = np.arange(12, dtype=np.int16).reshape(3, 4)
    facts = {"split": "train", "sha256": sha256(hu), "frame_yx": [5, 6], "box_yx": [1, 1], **more}
    return [(f"{key}.j2c", encode(hu)), (f"{key}.json", json.dumps(facts).encode())]


@pytest.mark.parametrize(
    "ending", ["pkl", "pyd", "pickle", "pth", "npy", "j2c.pkl", "PKL", "__bad__", "__x.pth", "txt"]
)
def test_a_planted_member_never_runs(tmp_path: Path, ending: str) -> None:
    planted, evidence = pickle.dumps(Touch(tmp_path / "ran")), tmp_path / "ran"
    pickle.loads(planted)
    assert evidence.exists()  # it would
    evidence.unlink()
    shard = pack(tmp_path / "a.tar", *slice_of("a"), (f"b.{ending}", planted), *slice_of("b"))
    with pytest.raises(CorpusError, match=rf"a\.tar, sample b: the member b\.{re.escape(ending)} is refused"):
        read([shard])
    assert not evidence.exists()


@pytest.mark.parametrize(
    "url", ["pipe:touch {}", "PIPE:touch {}", "{{a.tar,pipe:touch {}}}", "exec:touch {}", "-", "s3://bucket/a.tar"]
)
def test_an_address_that_runs_something_is_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(CorpusError, match=r"is refused: give files, or URLs of http"):
        stream([url.format(tmp_path / "ran")])
    with pytest.raises(CorpusError, match="is refused"):
        stream(url.format(tmp_path / "ran"))
    assert not (tmp_path / "ran").exists()


def test_the_environment_turns_no_file_into_a_command(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOPEN_REWRITE", f".*=pipe:touch {tmp_path / 'ran'};")
    assert keys(read(shards(corpus))) == keys(read(corpus))
    assert not (tmp_path / "ran").exists()


def test_a_zeroed_header_is_told_where_the_index_is_at_hand(folder: Path) -> None:
    path = shards(folder)[0]
    with tarfile.open(path) as tar:
        at = tar.getmembers()[4].offset
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(bytes(512))
    assert len(read(path)) == 2  # nobody can tell
    with pytest.raises(CorpusError, match=r"train-000000\.tar: 2 of \d+ samples came, the first that did not is \w+_"):
        read(folder)
    with open(path, "r+b") as file:
        file.write(bytes(512))
    with pytest.raises(CorpusError, match=r"train-000000\.tar: 0 of \d+ samples came"):
        read(path, corpus=folder)


def test_damage_is_told_with_shard_and_sample(folder: Path) -> None:
    path = shards(folder)[0]
    with tarfile.open(path) as tar:
        one = tar.getmembers()[2]
    whole = bytearray(Path(path).read_bytes())
    whole[one.offset_data + one.size // 2] ^= 4
    Path(path).write_bytes(whole)
    key = one.name.partition(".")[0]
    with pytest.raises(CorpusError, match=rf"train-000000\.tar, sample {key}: the stored bytes are damaged"):
        read(folder)
    Path(path).write_bytes(whole[: one.offset_data + 5])
    with pytest.raises(CorpusError, match=r"train-000000\.tar: cannot be read"):
        read(path)
    os.rename(shards(folder, "val")[0], path)
    with pytest.raises(CorpusError, match=r"train-000000\.tar, sample \w+: is not known to the index"):
        read(folder)
    with pytest.raises(CorpusError, match=r"no shard other\.tar"):
        read(pack(folder / "other.tar", *slice_of()), corpus=folder)


def test_a_stream_without_an_index_trusts_the_samples_own_hashes(tmp_path: Path) -> None:
    shard = pack(tmp_path / "a.tar", *slice_of("a", crc32=checksum(slice_of()[0][1])))
    (sample,) = read(shard, frame=True)
    assert sample.hu.shape == (5, 6)
    assert sample.hu[0, 0] == -1024
    assert sample.hu[1:4, 1:5].tolist() == np.arange(12).reshape(3, 4).tolist()
    with pytest.raises(CorpusError, match=r"sample a: the stored bytes are damaged"):
        read(pack(tmp_path / "b.tar", *slice_of("a", crc32=1)))
    with pytest.raises(CorpusError, match=r"sample a: the decoded pixels are not those"):
        read(pack(tmp_path / "b.tar", *slice_of("a", sha256="")))
    with pytest.raises(CorpusError, match=r"sample a: holds j2c, not one slice and its JSON"):
        read(pack(tmp_path / "b.tar", slice_of("a")[0]))
    with pytest.raises(CorpusError, match=r"sample a: its JSON cannot be read"):
        read(pack(tmp_path / "b.tar", slice_of("a")[0], ("a.json", b"{")))
    with pytest.raises(CorpusError, match=r"sample a: its JSON does not fit \(KeyError"):
        read(pack(tmp_path / "b.tar", slice_of("a")[0], ("a.json", b'{"split": "train"}')))
    with pytest.raises(CorpusError, match=r"b\.tar: cannot be read \(a\.j2c: duplicate"):
        read(pack(tmp_path / "b.tar", slice_of("a")[0], slice_of("a")[0]))
    assert read(shard, "val") == []


def test_excluded_slices_stay_out(folder: Path) -> None:
    index = pq.read_table(folder / "index.parquet")
    volume = index["volume"][0].as_py()
    gone = [name == volume for name in index["volume"].to_pylist()]
    split = [("excluded" if out else name) for out, name in zip(gone, index["split"].to_pylist(), strict=True)]
    at = index.schema.get_field_index("split")
    pq.write_table(index.set_column(at, index.schema.field(at), pa.array(split)), folder / "index.parquet")
    left = keys(read(folder))
    assert left
    assert not [key for key in left if key.startswith(volume)]
    assert len(left) + sum(gone) == len(read(shards(folder)))
    assert {key.partition("_")[0] for key in keys(read(folder, "excluded"))} == {volume}


def test_shuffling_is_drawn_from_seed_and_epoch(corpus: Path) -> None:
    plain = keys(read(corpus))
    mixed = stream(corpus, shuffle=50, seed=3)
    once = keys(list(mixed))
    assert once == keys(list(mixed)) == keys(read(corpus, shuffle=50, seed=3))
    assert once != plain
    assert sorted(once) == sorted(plain)
    assert once != keys(read(corpus, shuffle=50, seed=3, epoch=1))
    assert once != keys(read(corpus, shuffle=50, seed=4))


@pytest.mark.parametrize("shuffle", [0, 20])
def test_ranks_and_workers_share_the_shards(corpus: Path, monkeypatch: pytest.MonkeyPatch, shuffle: int) -> None:
    from torch.utils.data import DataLoader

    whole = sorted(keys(read(corpus)))
    seen: list[str] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        data = stream(corpus, shuffle=shuffle)
        loader = DataLoader(data, batch_size=None, num_workers=2 if rank else 0)  # type: ignore[arg-type, var-annotated]
        mine = [sample.key for sample in loader]
        assert 0 < len(mine) < len(whole)
        seen += mine
    assert sorted(seen) == whole


def test_a_split_that_is_not_there(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="no slice of the split 'test'"):
        stream(corpus, "test")
    with pytest.raises(CorpusError, match="holds no corpus"):
        stream(tmp_path)


EXAMPLES = re.findall(r"```python\n(.*?)```", (REPOSITORY / "data_curation" / "README.md").read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda text: text.splitlines()[1].split()[1])
def test_the_examples_of_the_readme_run_as_written(corpus: Path, tmp_path: Path, example: str) -> None:
    assert len(EXAMPLES) == 4
    assert len([line for line in example.splitlines() if not line.startswith("#")]) <= 5
    (tmp_path / "corpus").symlink_to(corpus)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-W", "ignore", "-c", example]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    index = pq.read_table(corpus / "index.parquet")
    if "duckdb" in example:
        assert sorted({line.split()[1] for line in lines}) == ["train", "val"]
        assert sum(int(line.split()[2]) for line in lines) == index.num_rows
    else:
        expected = set(index.filter(pc.equal(index["split"], "train"))["key"].to_pylist())
        assert {line.split()[0] for line in lines} <= expected
        assert lines
