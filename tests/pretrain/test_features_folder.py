"""The folder of kept features: plain samples, the same bytes after any kill and on two ranks, refused when damaged."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset
from safetensors.torch import load as load_tensors

from data_curation.tarwalk import Member, walk
from pretrain import features, train
from pretrain.data.cached import FeaturesError, Kept
from pretrain.data.stream import StreamError
from tests.gloo import run_ranks
from tests.pretrain.feature_runs import (
    FIXED,
    NAMES,
    REPOSITORY,
    SHARDS,
    SLICES,
    bytes_of,
    copied,
    make,
    run,
    settings,
    small,
    write_all,
    write_corpus,
)  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_all(tmp_path_factory.mktemp("features"))


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_shards_are_plain_samples(root: Path) -> None:
    cache = root / "cache"
    paths = sorted((cache / "shards").iterdir())
    assert len(paths) == SHARDS
    samples = list(webdataset.WebDataset([str(path) for path in paths], shardshuffle=False))
    assert len(samples) == SLICES * FIXED
    assert len({sample["__key__"] for sample in samples}) == len(samples)
    kept = Kept(cache, NAMES)
    for entry, sample in enumerate(samples):
        parts = load_tensors(sample["safetensors"])
        assert set(parts) == {f"{name}.{kind}" for name in NAMES for kind in ("patches", "cls")}
        for name, read in zip(NAMES, kept.read([entry], [None] * 3), strict=True):
            assert torch.equal(read[0], torch.cat([parts[f"{name}.cls"][None], parts[f"{name}.patches"]]))
        assert parts["three.patches"].shape == (64, 32)
    for path in paths:
        with path.open("rb") as file:
            found = list(walk(file.fileno(), path.stat().st_size, []))
        assert all(isinstance(member, Member) and member.plain and member.padded for member in found)


# A fresh interpreter, whose children run one after the other, each killed at its n-th call of one function.
DRIVER = """
import os, signal, sys
from pathlib import Path
from tests.pretrain.feature_runs import settings, small
from tests.pretrain.test_features_folder import fatal
from pretrain import features

small()
root, folder, *points = sys.argv[1:]
features.dry_run(settings(Path(root), Path(folder)))  # what it imports is then there for all
for name, _, point in (text.partition(":") for text in points):
    child = os.fork()
    if not child:
        fatal(name, int(point))
        features.main(settings(Path(root), Path(folder)))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert name or status == 0, status
    print("killed" if status else "ended", name, point, flush=True)
"""


def fatal(name: str, point: int) -> None:
    """Kill this process before its `point`-th call of a function that changes the disk."""
    place: Any = webdataset.TarWriter if name == "write" else os
    if not name:
        return
    honest, calls = getattr(place, name), [0]

    def call(*args: Any, **more: Any) -> Any:
        calls[0] += 1
        if calls[0] == point:
            os.kill(os.getpid(), signal.SIGKILL)
        return honest(*args, **more)

    setattr(place, name, call)


def test_killed_anywhere_and_run_again_gives_the_same_bytes(tmp_path: Path, root: Path) -> None:
    points = ["replace:1", "write:1", "write:3", "fsync:1", "fsync:2", "replace:1", "fsync:3", "replace:2", "write:6"]
    points += ["replace:4", "fsync:4", "replace:7", "fsync:2"]
    command = [sys.executable, "-P", "-c", DRIVER, str(root), str(tmp_path / "cache"), *points, ":0"]
    ours = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=ours, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    told = [line.split()[0] for line in done.stdout.splitlines() if line.startswith(("killed", "ended"))]
    assert told == ["killed"] * len(points) + ["ended"]
    assert bytes_of(tmp_path / "cache") == bytes_of(root / "cache")
    assert not list((tmp_path / "cache" / "shards").glob(".*"))


def one_of_two(rank: int, size: int, root: Path, folder: Path) -> None:
    small()
    features.main(settings(root, folder))


def test_two_ranks_write_what_one_does(tmp_path: Path, root: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    run_ranks(f"{__file__}:one_of_two", 2, tmp_path, root=root, folder=cache)
    assert bytes_of(cache) == bytes_of(root / "cache")
    run(root, tmp_path / "run", f"method.cache={cache}")


@pytest.mark.parametrize(
    ("word", "named"),
    [
        ("data.crops.global_scale=[0.2, 1]", r"data.crops.global_scale: \[0.32, 1.0\] there, \[0.2, 1.0\] here"),
        ("data.crops.fixed=3", "data.crops.fixed: 2 there, 3 here"),
        ("data.seed=1", "data.seed: 0 there, 1 here"),
        ("data.crops.flip=0", "data.crops.flip: 0.5 there, 0.0 here"),
        ("method.teachers.two.size=32", r"teachers.two.size: 64 there, 32 here\n *teachers.two.grid: 4 there, 2 here"),
        ("method.teachers.two.norm=false", "teachers.two.norm: true there, false here"),
        ("method.teachers.two.block=0", "teachers.two.block: -1 there, 0 here"),
        ("method.teachers.two.window={low: -160, high: 240}", "teachers.two.window.low: -1000.0 there, -160.0 here"),
        ("method.teachers.two.weights={root}/one.safetensors", "teachers.two.digest: [0-9a-f]{12} there, [0-9a-f]{12}"),
        ("precision=bf16", 'precision: "fp32" there, "bf16" here'),
        ("data.corpus={root}/other/corpus", "corpus.fingerprint: [0-9a-f]{12} there"),
        ("data.split=val", "corpus.slices: 15 there, 0 here"),
        ("method.teachers.four={kind: axial, weights: {root}/one.safetensors}", "has no features of four; it has"),
    ],
)
def test_features_of_another_recipe_are_refused_by_name(tmp_path: Path, root: Path, word: str, named: str) -> None:
    if "other" in word and not (root / "other").exists():
        write_corpus(root / "other", range(3, 6))
    more = (word.replace("{root}", str(root)), f"method.cache={root / 'cache'}")
    with pytest.raises(FeaturesError, match=named):
        run(root, tmp_path / "run", *more)
    if "four" not in word and "split" not in word:
        with pytest.raises(FeaturesError, match=named):
            make(root, copied(root, tmp_path), more[0])


def test_an_unfinished_folder_says_how_far_it_is_and_what_ends_it(tmp_path: Path, root: Path) -> None:
    cache = copied(root, tmp_path)
    with pytest.raises(FeaturesError, match=r"holds no features \(features.json is missing\)"):
        run(root, tmp_path / "run", f"method.cache={tmp_path}")
    (cache / "index.parquet").unlink()
    (cache / "rows" / "shard-000003.parquet").unlink()
    (cache / "shards" / "shard-000005.tar").unlink()
    command = ["axial", "features", "recipe.yaml", f"folder={cache}"]
    text = rf"is not finished, 6 of 8 shards are there; run `axial features CONFIG folder={cache}` to the end"
    for said in (text, text.replace("CONFIG", "recipe.yaml")):
        with pytest.raises(FeaturesError, match=said):
            run(root, tmp_path / "run", f"method.cache={cache}")
        with pytest.raises(FeaturesError, match=said):
            train.dry_run(settings(root, tmp_path / "run", f"method.cache={cache}"))
        (cache / "run.json").write_text(json.dumps({"starts": [{"command": command}]}))
    make(root, cache)
    assert bytes_of(cache) == bytes_of(root / "cache")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_shard_is_refused_and_made_again(tmp_path: Path, root: Path, workers: int) -> None:
    cache = copied(root, tmp_path)
    shard = cache / "shards" / "shard-000002.tar"
    data = bytearray(shard.read_bytes())
    data[3000] ^= 1
    shard.write_bytes(data)
    words = (f"method.cache={cache}", f"data.workers={workers}")
    with pytest.raises(
        StreamError, match=r"shard-000002.tar, entry 8: .*damaged.*delete that shard and run the same `ax"
    ):
        run(root, tmp_path / "run", *words)
    shard.write_bytes(data[:4000])
    with pytest.raises(StreamError, match=r"shard-000002.tar, entry \d+: the shard is cut short"):
        run(root, tmp_path / "run", *words)
    shard.unlink()
    with pytest.raises(StreamError, match=r"shard-000002.tar, entry \d+: cannot be read \(No such file"):
        run(root, tmp_path / "run", *words)
    make(root, cache)
    assert bytes_of(cache) == bytes_of(root / "cache")


def test_a_recipe_that_reads_features_makes_them_too(tmp_path: Path, root: Path) -> None:
    assert features.dry_run(settings(root, tmp_path, "method.cache=nowhere")) == (
        "features: 30 crops of 15 slices, 13 KiB each, 0.00 GiB in 1 shards"
    )
    cache = make(root, tmp_path / "cache", "method.cache=nowhere", "steps=3", "optim.lr.peak=1")
    assert bytes_of(cache) == bytes_of(root / "cache")


def test_a_slice_that_cannot_be_read_has_no_features(tmp_path: Path, root: Path) -> None:
    shutil.copytree(root / "corpus", tmp_path / "corpus")
    (shard,) = (tmp_path / "corpus" / "shards").glob("*.tar")
    data = bytearray(shard.read_bytes())
    data[600] ^= 1
    shard.write_bytes(data)
    with pytest.raises(StreamError, match=r"cannot be read; .*damaged.*Run `axial curate` on \S+ again$"):
        make(root, tmp_path / "cache", f"data.corpus={tmp_path / 'corpus'}")
