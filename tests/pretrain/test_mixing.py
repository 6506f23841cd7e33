"""Several corpora and weights of data sets, through the stream; what corpora must not share."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from data_curation import curate, phantom
from data_curation.corpus import Corpus
from data_curation.index import INDEX
from launch.settings import SettingsError, load
from pretrain.data.corpora import Corpora, order_of, overlaps
from pretrain.data.order import sample_order
from pretrain.data.stream import DataSettings, StreamError, batches
from tests.pretrain.made_up import World

CROPS = {"global_size": 32, "local_size": 16, "n_local": 1}


@dataclass(frozen=True)
class Sets:
    """Slices of named data sets, one after the other; slice i of them is called name/i."""

    name: str
    sets: tuple[tuple[str, int], ...]

    def __len__(self) -> int:
        return sum(number for _, number in self.sets)

    def stretches(self) -> list[tuple[str, int, int]]:
        ends = np.cumsum([number for _, number in self.sets]).tolist()
        return [(name, end - number, end) for (name, number), end in zip(self.sets, ends, strict=True)]

    def hu(self, i: int, /) -> NDArray[np.int16]:
        return np.full((32, 32), i, np.int16)

    def key(self, i: int, /) -> str:
        return f"{self.name}/{next(name for name, first, last in self.stretches() if i < last)}/{i}"


A = Sets("a", (("lits", 30), ("chaos", 10), ("lits", 10)))
B = Sets("b", (("amos", 20), ("chaos", 5)))


def settings(**changes: object) -> DataSettings:
    values: dict[str, object] = {"batch_size": 4, "workers": 0, "crops": CROPS, "seed": 3}
    return DataSettings.model_validate(values | ({"corpora": [{"path": "a"}, {"path": "b"}]} | changes))


def keys(data: DataSettings, samples: int, *corpora: Any) -> list[str]:
    order, slices = order_of(data, corpora), Corpora(corpora)
    found = [slices.of(i) for i in order.at(np.arange(samples)).tolist()]
    return [corpus.key(i) for corpus, i in found]


def tally(seen: list[str], part: int) -> Counter[str]:
    return Counter(key.split("/")[part] for key in seen)


def test_without_weights_every_slice_is_seen_equally_often() -> None:
    seen = keys(settings(), 150, A, B)
    assert set(Counter(seen).values()) == {2}
    one = DataSettings.model_validate({"corpus": "a", "batch_size": 4, "seed": 3})
    assert keys(one, 120, A) == [A.key(int(i)) for i in sample_order(np.arange(120), 50, 3)]


def test_weights_of_corpora_are_shares_of_the_samples() -> None:
    weighted = settings(corpora=[{"path": "a", "weight": 2}, {"path": "b"}])
    seen = keys(weighted, 300, A, B)
    assert tally(seen, 0) == {"a": 200, "b": 100}
    assert set(Counter(key for key in seen if key[0] == "a").values()) == {4}
    assert set(Counter(key for key in seen if key[0] == "b").values()) == {4}


def test_weights_of_data_sets_say_how_often_a_slice_is_seen() -> None:
    seen = keys(settings(weights={"lits": 2.0, "chaos": 0.5}), 2 * 215, A, B)  # 2 * 40 + 15 / 2 + 20 = 107.5
    assert tally(seen, 1) == {"lits": 320, "chaos": 30, "amos": 80}
    often = {name: set(Counter(key for key in seen if f"/{name}/" in key).values()) for name in ("lits", "chaos")}
    assert often == {"lits": {8}, "chaos": {2}}
    assert tally(keys(settings(weights={"lits": 0}), 350, A, B), 1) == {"chaos": 150, "amos": 200}


def test_both_weights_together() -> None:
    both = settings(corpora=[{"path": "a", "weight": 1}, {"path": "b", "weight": 3}], weights={"chaos": 3.0})
    seen = keys(both, 4 * 7 * 35, A, B)
    assert tally(seen, 0) == {"a": 245, "b": 735}
    assert tally([key for key in seen if key[0] == "a"], 1) == {"lits": 140, "chaos": 105}
    assert tally([key for key in seen if key[0] == "b"], 1) == {"amos": 420, "chaos": 315}


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_mix_is_resumed_anywhere_by_any_number_of_ranks(ranks: int) -> None:
    data = settings(corpora=[{"path": "a", "weight": 2}, {"path": "b"}], weights={"chaos": 3.0})

    def taken(start: int, steps: int, world: World) -> list[tuple[str, ...]]:
        made = batches(data, world=world, patch_size=16, in_channels=1, start=start, corpus=[A, B])
        return [next(made).keys for _ in range(steps)]

    whole = taken(0, 8, World())
    assert sum(whole, ()) == tuple(keys(data, 32, A, B))
    assert taken(5, 3, World()) == whole[5:]
    parts = [taken(3, 5, World(rank, ranks)) for rank in range(ranks)]
    assert [sum(step, ()) for step in zip(*parts, strict=True)] == whole[3:]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": {"lit": 1}}, r"no data set 'lit' in split 'train'; there are: amos, chaos, lits"),
        ({"weights": {"lits": 0, "chaos": 0, "amos": 0}}, r"data\.weights leave no slice of a, b"),
        ({"weights": {"lits": 1e9}}, r"less than one sample in 131,072; give them more weight, or 0"),
        ({"weights": {"lits": 1, "chaos": 1e-9}}, r"data\.weights\.chaos: its slices would be less than one"),
        (
            {"weights": {"chaos": 0, "amos": 0}, "corpora": [{"path": "a", "weight": 1}, {"path": "b"}]},
            r"leave no slice of b; take it out of data\.corpora",
        ),
    ],
)
def test_weights_that_cannot_be_met_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(StreamError, match=message):
        order_of(settings(**changes), [A, B])


def test_an_empty_corpus_among_others_is_refused() -> None:
    with pytest.raises(StreamError, match=r"data: b has no slice in split 'train'"):
        order_of(settings(), [A, Sets("b", ())])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["batch_size=4"], r"give corpus \(one folder\) or corpora"),
        (["batch_size=4", "corpus=a", "corpora=[{path: b}]"], r"give corpus \(one folder\) or corpora"),
        (["batch_size=4", "corpora=[{path: a}, {path: a, weight: 2}]"], "a is there twice"),
        (["batch_size=4", "corpora=[{path: a, weight: 0}]"], "corpora.0.weight"),
        (["batch_size=4", "corpus=a", "weights={lits: -1}"], "lits needs a number of 0 or more, got -1"),
    ],
)
def test_wrong_settings_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        load(DataSettings, None, words)


@pytest.fixture(scope="module")
def curated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two corpora of which the second holds one of the first's patients, under another name."""
    folder = tmp_path_factory.mktemp("mixing")
    made = []
    for name, cases, split in (("one", [0, 1], {"train": 1, "val": 0}), ("two", [1, 2], {"train": 1, "val": 0})):
        phantom.write("folder", folder / name / "source", cases, shape=(6, 64, 64), spacing=(5.0, 4.0, 3.0))
        source = {"name": "folder", "root": folder / name / "source"}
        values = {"folder": folder / name / "corpus", "datasets": [source], "workers": 1, "split": split}
        (folder / name / "corpus").mkdir()
        curate.main(curate.Settings.model_validate(values))
        made.append(folder / name / "corpus")
    return made[0], made[1]


def test_real_corpora_that_share_slices_are_told(curated: tuple[Path, Path]) -> None:
    paths = [{"path": path} for path in curated]
    (line,) = overlaps(settings(corpora=paths))
    assert f"{curated[0]} and {curated[1]} share {len(Corpus(curated[0])) // 2} slices" in line
    assert overlaps(settings(corpora=paths[:1])) == []


def test_what_corpora_must_not_share(tmp_path: Path) -> None:
    rows = {
        "a": [("train", "ann", 1), ("train", "bob", 2), ("train", "bob", 3), ("val", "eve", 4)],
        "b": [("train", "ann", 1), ("train", "eve", 5), ("val", "bob", 3), ("val", "bob", 4)],
    }
    for name, made in rows.items():
        (tmp_path / name).mkdir()
        splits, patients, pixels = zip(*made, strict=True)
        columns = {
            "sha256": [hashlib.sha256(bytes([number])).hexdigest() for number in pixels],
            "split": splits,
            "duplicate": [False] * len(made),
            "patient": patients,
        }
        pq.write_table(pa.table({name: list(values) for name, values in columns.items()}), tmp_path / name / INDEX)
    shared, leaked, people = overlaps(settings(corpora=[{"path": tmp_path / "a"}, {"path": tmp_path / "b"}]))
    assert "share 1 slices" in shared
    assert "1 slices of split 'train' in one are in another split" in leaked
    assert "2 patients of split 'train' in one" in people


def test_a_curated_corpus_knows_its_data_sets_and_spacing(curated: tuple[Path, Path]) -> None:
    corpus = Corpus(curated[0])
    assert corpus.stretches() == [("folder", 0, len(corpus))]
    assert corpus.spacing(0) == (4.0, 3.0)
    data = DataSettings.model_validate(
        {
            "corpora": [{"path": curated[0], "weight": 3}, {"path": curated[1]}],
            "weights": {"folder": 2.0},
            "batch_size": 4,
            "workers": 0,
            "crops": {**CROPS, "unit": "mm", "global_mm": [100, 150], "local_mm": [40, 80]},
        }
    )
    made = batches(data, world=World(), patch_size=16, in_channels=1, start=0)
    batch = next(made)
    assert batch.global_crops.shape == (8, 1, 32, 32)
    order = order_of(data, [corpus, Corpus(curated[1])])
    assert order.counts == (3, 1)
