"""The stream: order, resume, workers, ranks, corrupt slices, both places to make crops, settings that do not fit."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from data_curation import curate, phantom
from data_curation.corpus import Corpus, CorpusError
from launch.settings import SettingsError, load
from pretrain.data.batch import Batch
from pretrain.data.crops import CropSettings, CropShape
from pretrain.data.masks import MaskSettings
from pretrain.data.order import sample_order
from pretrain.data.stream import DataSettings, StreamError, batches
from tests.pretrain.made_up import CROPS, Phantoms, World, settings, stream, take


def same(first: Batch, second: Batch) -> bool:
    a, b = first.tensors(), second.tensors()
    return first.keys == second.keys and a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


def test_a_batch_has_the_agreed_layout() -> None:
    corpus = Phantoms(50)
    batch = take(corpus, settings(), 1)[0]
    assert batch.images == len(batch.keys) == 4
    assert batch.keys == tuple(f"slice-{i}" for i in sample_order(np.arange(4), 50, 3))
    assert batch.global_crops.shape == (8, 1, 32, 32)
    assert batch.local_crops.shape == (8, 1, 16, 16)
    assert batch.gram_crops is None
    assert batch.masks.shape == (8, 4)
    assert {t.dtype for t in batch.tensors().values()} == {torch.float32, torch.bool, torch.int64}
    moved = batch.to("meta")
    assert {t.device.type for t in moved.tensors().values()} == {"meta"}
    assert moved.keys == batch.keys


def test_crop_major_order() -> None:
    """Rows [k*B, (k+1)*B) are crop k of the images, for global, local and Gram crops: seen on flat slices."""

    class Flat(Phantoms):
        def hu(self, i: int, /) -> NDArray[np.int16]:
            return np.full((40, 40), i, np.int16)

    data = settings(crops=CropSettings(global_size=32, local_size=16, gram_size=48, n_local=3))
    for place in ("workers", "device"):
        batch = take(Flat(50), data.model_copy(update={"crop_on": place}), 1)[0]
        expected = torch.tensor([float(key.split("-")[1]) for key in batch.keys])
        assert batch.gram_crops is not None
        for crops, n in ((batch.global_crops, 2), (batch.local_crops, 3), (batch.gram_crops, 2)):
            values = crops.mean((1, 2, 3)) * data.window.std + data.window.mean
            assert (values - expected.repeat(n)).abs().max() < 0.01


@pytest.mark.parametrize(("place", "start_method"), [("workers", "fork"), ("device", "fork"), ("device", "spawn")])
def test_workers_change_nothing(place: str, start_method: str) -> None:
    data = settings(crop_on=place)
    expected = take(Phantoms(30), data, 6)
    busy = data.model_copy(update={"workers": 2 if start_method == "fork" else 1, "start_method": start_method})
    got = take(Phantoms(30, slow=0.002), busy, 6)
    assert all(same(a, b) for a, b in zip(got, expected, strict=True))


def test_resume_at_any_step() -> None:
    whole = take(Phantoms(11), settings(), 9)
    for start in (1, 4, 8):
        assert all(
            same(a, b) for a, b in zip(take(Phantoms(11), settings(), 9 - start, start), whole[start:], strict=True)
        )
    assert not same(whole[0], whole[1])


@pytest.mark.parametrize("ranks", [2, 4])
def test_other_ranks_continue_the_same_order(ranks: int) -> None:
    data = settings(batch_size=8, masks=MaskSettings(group=2))
    for step in (0, 5):
        whole = take(Phantoms(30), data, 1, step)[0]
        parts = [take(Phantoms(30), data, 1, step, World(rank, ranks))[0] for rank in range(ranks)]
        assert whole.keys == tuple(key for part in parts for key in part.keys)
        for name, n in (("global_crops", 2), ("local_crops", 2), ("masks", 2)):
            per_image = [getattr(part, name).unflatten(0, (n, -1)) for part in parts]
            assert getattr(whole, name).equal(torch.cat(per_image, 1).flatten(0, 1)), name


def test_both_places_make_the_same_batch() -> None:
    data = settings(crops=CROPS.model_copy(update={"gram_size": 48}))
    workers, device = (
        take(Phantoms(30), data.model_copy(update={"crop_on": place}), 2) for place in ("workers", "device")
    )
    for a, b in zip(workers, device, strict=True):
        assert a.keys == b.keys
        for name, tensor in a.tensors().items():
            assert (tensor.float() - b.tensors()[name].float()).abs().max() < 1e-4, name


def test_three_channels_repeat_the_one() -> None:
    one, three = (next(stream(Phantoms(9), settings(), channels=channels)) for channels in (1, 3))
    assert three.global_crops.shape == (8, 3, 32, 32)
    assert three.global_crops.is_contiguous()
    assert three.local_crops.equal(one.local_crops.repeat(1, 3, 1, 1))


def test_a_step_has_one_shape_on_all_ranks() -> None:
    mix = tuple(CropShape(global_size=g, local_size=16, gram_size=g, probability=0.5) for g in (32, 64))
    data = settings(crops=CropSettings(mix=mix, n_local=1))
    ranks = [take(Phantoms(30), data, 12, 0, World(rank, 2)) for rank in range(2)]
    shapes = [[batch.global_crops.shape for batch in rank] for rank in ranks]
    assert shapes[0] == shapes[1]
    assert len(set(shapes[0])) == 2
    assert {batch.masks.shape[1] for batch in ranks[0]} == {4, 16}


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_slices_are_named_counted_and_replaced(workers: int, caplog: pytest.LogCaptureFixture) -> None:
    corpus = Phantoms(30, bad=frozenset({2, 3, 25}))
    with caplog.at_level(logging.WARNING):
        made = stream(corpus, settings(batch_size=5, workers=workers))
        got = [next(made) for _ in range(6)]
        made.close()
    order = sample_order(np.arange(60), 30, 3).tolist()
    expected = [next(i for i in order[p:] if i not in corpus.bad) for p in range(30)]
    assert [key for batch in got for key in batch.keys] == [f"slice-{i}" for i in expected]
    assert made.unreadable["shard-000000.tar"] >= 2
    assert made.unreadable.total() == sum(len(batch.replaced) for batch in got)
    assert sum("said once a shard" in record.message for record in caplog.records) == 2
    assert "sample slice-25: checksum differs" in caplog.text
    again = take(corpus, settings(batch_size=5), 6)
    assert all(same(a, b) for a, b in zip(got, again, strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_unreadable_slices_stop_the_run(workers: int) -> None:
    corpus = Phantoms(30, bad=frozenset(range(30)))
    with pytest.raises(
        StreamError, match=r"4 slices in a row.*shard-00000\d\.tar, sample slice-\d+: checksum"
    ) as error:
        take(corpus, settings(workers=workers, max_unreadable=3), 1)
    assert "\n" not in str(error.value)


def test_a_corpus_smaller_than_a_batch_repeats_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    batch = take(Phantoms(3), settings(batch_size=6), 1)[0]
    assert "3 slices, fewer than the 6 of a batch" in caplog.text
    assert sorted(batch.keys) == sorted(f"slice-{i}" for i in (0, 1, 2) * 2)


@pytest.mark.parametrize(
    ("changes", "world", "message"),
    [
        ({"batch_size": 10}, World(0, 4), "data.batch_size: 10 cannot be divided over 4 ranks; 8 can"),
        ({"batch_size": 2}, World(0, 4), "batch_size: 2 cannot be divided over 4 ranks; 4 can"),
        ({"masks": MaskSettings(group=3)}, World(), "data.masks.group: 3 does not divide the 4 images of a rank"),
        ({"crops": CropSettings(global_size=40)}, World(), "data.crops.global_size: 40 is not a multiple of the patch"),
        ({"crops": CropSettings(gram_size=500)}, World(), "gram_size: 500"),
        ({"crops": CropSettings(mix=(CropShape(local_size=100),))}, World(), "data.crops.mix.0.local_size: 100"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, object], world: World, message: str) -> None:
    with pytest.raises(StreamError, match=message):
        stream(Phantoms(9), settings(**changes), world=world)


def test_channels_and_empty_corpora_are_refused() -> None:
    with pytest.raises(StreamError, match="in_channels: 2"):
        stream(Phantoms(9), settings(), channels=2)
    with pytest.raises(StreamError, match="no slice in split 'train'"):
        stream(Phantoms(0), settings())


def test_torchs_random_state_is_left_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    take(Phantoms(9), settings(workers=1), 2)
    assert torch.get_rng_state().equal(before)


def test_batches_and_errors_survive_pickling() -> None:
    batch = take(Phantoms(9), settings(), 1)[0]
    assert same(pickle.loads(pickle.dumps(batch)), batch)
    assert str(pickle.loads(pickle.dumps(StreamError("text")))) == "text"


@pytest.fixture(scope="module")
def curated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real corpus of two phantoms."""
    folder = tmp_path_factory.mktemp("stream")
    phantom.write("folder", folder / "source", [0, 1], shape=(6, 64, 64), spacing=(5.0, 4.0, 4.0))
    source = {"name": "folder", "root": folder / "source"}
    values = {"folder": folder / "corpus", "datasets": [source], "workers": 1, "split": {"train": 1, "val": 0}}
    (folder / "corpus").mkdir()
    curate.main(curate.Settings.model_validate(values))
    return folder / "corpus"


def test_a_curated_corpus_streams_and_names_its_damage(curated: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = settings(corpus=curated, workers=2)
    clean = Corpus(curated)
    whole = take(clean, data, 3)
    assert {key for batch in whole for key in batch.keys} == {clean.key(i) for i in range(len(clean))}
    shard = next((curated / "shards").iterdir())
    stored = shard.read_bytes()
    first = int(sample_order(np.arange(1), len(clean), data.seed)[0])
    damaged = clean.encoded(first)
    shard.write_bytes(stored.replace(damaged, bytes(len(damaged))))
    try:
        made = stream(Corpus(curated), data)
        got = next(made)
        made.close()
    finally:
        shard.write_bytes(stored)
    assert got.keys[0] == whole[0].keys[1]
    assert got.keys[1:] == whole[0].keys[1:]
    assert made.unreadable == {str(shard): 1}
    assert got.replaced[0].startswith(f"{shard}, sample {clean.key(first)}: ")
    assert str(shard) in caplog.text


def test_a_missing_corpus_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=str(tmp_path)):
        batches(settings(corpus=tmp_path), world=World(), patch_size=16, in_channels=1, start=0)


@pytest.mark.parametrize("wrong", ["batch_size=0", "workers=-1", "seed=-1", "crop_on=gpu", "start_method=thread"])
def test_wrong_settings_are_refused(wrong: str) -> None:
    with pytest.raises(SettingsError, match=wrong.partition("=")[0]):
        load(DataSettings, None, ["corpus=x", "batch_size=4", wrong])
