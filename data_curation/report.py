"""`axial report folder=CORPUS`: what is in a corpus, what was refused and why, and the proof that its splits are apart.

Reads index.parquet, refused.parquet and corpus.json as `axial curate` left them, and a few slices; writes report.html
(one file, readable without a network) and report.png beside them. Nothing in the corpus is changed.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import Field

from data_curation.aside import aside
from data_curation.corpus import Corpus
from data_curation.index import INDEX, SCHEMA, CorpusError, fingerprint, read_index
from launch.run import Outcome
from launch.settings import Settings as Base

__all__ = ["DataSetFacts", "Facts", "Proof", "Refusals", "Settings", "SplitFacts", "Tile", "gather", "main"]

HU_EDGES = np.linspace(-1100, 1300, 121)


class Settings(Base):
    """Which corpus, and how much of it is shown."""

    folder: Path = Field(description="corpus folder, as made by `axial curate`; the report is written into it")
    tiles: int = Field(8, ge=1, le=64, description="slices of each data set on the contact sheet")
    sample: int = Field(48, ge=1, le=10_000, description="slices of each data set that are read for the HU histogram")
    listing: int = Field(50, ge=0, description="refused files listed for each reason; refused.parquet has them all")


@dataclass(frozen=True)
class DataSetFacts:
    """One row of the table of data sets. Spacings are (lowest, highest) in mm over its volumes."""

    name: str
    licence: str
    patients: int
    volumes: int
    slices: int
    duplicates: int  # slices whose content occurs earlier in the corpus
    held_out: int  # volumes of official test sets that were let in
    size: int  # bytes of the stored slices
    between: tuple[float, float]  # slices
    within: tuple[float, float]  # pixels


@dataclass(frozen=True)
class SplitFacts:
    """One row of the table of splits."""

    name: str
    slices: int
    volumes: int
    patients: int
    groups: int


@dataclass(frozen=True)
class Proof:
    """`shared` of `total` different values of one column occur in more than one split; 0 is what is claimed."""

    what: str
    shared: int
    total: int


@dataclass(frozen=True)
class Refusals:
    """What was refused for one reason: how many entries, and the first (data set, source, detail)."""

    reason: str
    count: int
    rows: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class Tile:
    """A slice for the contact sheet; hu is [Y, X], spacing (y, x) in mm."""

    key: str
    hu: NDArray[np.int16]
    spacing: tuple[float, float]


@dataclass(frozen=True)
class Facts:
    """All that the report shows."""

    folder: Path
    fingerprint: str
    recorded: Mapping[str, Any]  # corpus.json
    sets: tuple[DataSetFacts, ...]
    splits: tuple[SplitFacts, ...]
    proofs: tuple[Proof, ...]
    refusals: tuple[Refusals, ...]
    refused: Mapping[str, int]  # entries of each data set
    between: Mapping[str, NDArray[np.float32]]  # per data set, of its volumes: mm between slices
    within: Mapping[str, NDArray[np.float32]]  # mm between columns
    depth: Mapping[str, NDArray[np.int64]]  # stored slices
    hu: Mapping[str, NDArray[np.float64]]  # share of the sampled pixels in HU_EDGES, tails in the outer bins
    tiles: Mapping[str, tuple[Tile, ...]]

    def catalogue_name(self, name: str) -> str:
        """What the catalogue calls this data set of the corpus: corpus.json knows, else the name is the same."""
        listed = self.recorded.get("datasets")
        entry = listed.get(name) if isinstance(listed, dict) else None
        return str(entry.get("catalogue", name)) if isinstance(entry, dict) else name

    @property
    def wrong(self) -> tuple[str, ...]:
        """What contradicts the corpus's own claims; empty for a sound one."""
        found = [f"{proof.shared} {proof.what} in more than one split" for proof in self.proofs if proof.shared]
        recorded = self.recorded.get("fingerprint", self.fingerprint)
        if recorded != self.fingerprint:
            found.append(f"corpus.json names the fingerprint {recorded}, the index has {self.fingerprint}")
        return tuple(found)


def main(settings: Settings) -> Outcome:
    """Writes report.html and report.png into the corpus folder. Not ok if the corpus breaks its own claims."""
    from data_curation.report_page import page
    from data_curation.report_pictures import overview

    facts = gather(settings)
    made = []
    for name, content in (("report.html", page(facts).encode()), ("report.png", overview(facts))):
        with aside(settings.folder / name) as file:
            file.write(content)
        made.append(str(settings.folder / name))
    return Outcome(made=tuple(made), next=tuple(f"look into it: {text}" for text in facts.wrong), ok=not facts.wrong)


def gather(settings: Settings) -> Facts:
    """Reads the corpus. Raises CorpusError, naming file and command, where it is missing, empty, partial or damaged."""
    folder = settings.folder
    index = _index(folder)
    recorded = _recorded(folder)
    refusals, refused = _refusals(folder, settings.listing)
    if not len(index):
        reasons = ", ".join(f"{refusal.count} {refusal.reason}" for refusal in refusals) or "nothing was found"
        raise CorpusError(
            f"{folder / INDEX} lists no slice ({reasons}): see refused.csv, then run `axial curate` again"
        )
    names, dataset = _codes(index, "dataset")
    _, volume = _codes(index, "volume")
    _, first, depth = np.unique(volume, return_index=True, return_counts=True)
    own = {name: dataset[first] == code for code, name in enumerate(names)}
    between, within = index["spacing_z"].to_numpy()[first], index["spacing_x"].to_numpy()[first]
    counted = index.select(["volume", "patient", "licence", "held_out", "duplicate", "size", "spacing_z", "spacing_x"])
    corpus = Corpus(folder, split=None, duplicates=True)
    hu, tiles = {}, {}
    for code, name in enumerate(names):
        hu[name], tiles[name] = _look(corpus, np.flatnonzero(dataset == code), settings)
    return Facts(
        folder,
        fingerprint(index),
        recorded,
        tuple(_set(counted.filter(pa.array(dataset == code)), name) for code, name in enumerate(names)),
        _splits(index),
        _proofs(index),
        refusals,
        refused,
        {name: between[mask] for name, mask in own.items()},
        {name: within[mask] for name, mask in own.items()},
        {name: depth[mask] for name, mask in own.items()},
        hu,
        tiles,
    )


def _index(folder: Path) -> pa.Table:
    """The index, its columns and shards checked: a corpus half copied must not look like a small one."""
    index = read_index(folder)
    missing = [name for name in SCHEMA.names if name not in index.column_names]
    if missing:
        raise CorpusError(f"{folder / INDEX} has no column {', '.join(missing)}: run `axial curate` again")
    ends = index.group_by("shard").aggregate([("offset", "max")]).to_pylist()
    for row in sorted(ends, key=lambda row: str(row["shard"])):
        shard = folder / "shards" / row["shard"]
        size = shard.stat().st_size if shard.is_file() else -1
        if size <= row["offset_max"]:
            what = "is missing" if size < 0 else f"is cut short ({size:,} bytes)"
            raise CorpusError(f"{shard} {what}: run the same `axial curate` again or copy the shard again")
    return index


def _recorded(folder: Path) -> Mapping[str, Any]:
    path = folder / "corpus.json"
    try:
        recorded = json.loads(path.read_text())
    except FileNotFoundError:
        raise CorpusError(
            f"{path} is missing, so the corpus is not finished: run the same `axial curate` again"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CorpusError(f"{path} is damaged ({error}): run the same `axial curate` again") from None
    if not isinstance(recorded, dict):
        raise CorpusError(f"{path} is damaged (not a JSON object): run the same `axial curate` again")
    return recorded


def _refusals(folder: Path, listing: int) -> tuple[tuple[Refusals, ...], Mapping[str, int]]:
    """By reason, the most frequent first; and how many there are of each data set."""
    path = folder / "refused.parquet"
    try:
        table = pq.read_table(path, columns=["dataset", "source", "reason", "detail"])
    except FileNotFoundError:
        raise CorpusError(
            f"{path} is missing, so the corpus is not finished: run the same `axial curate` again"
        ) from None
    except (pa.ArrowInvalid, OSError) as error:
        raise CorpusError(f"{path} cannot be read ({error}): run the same `axial curate` again") from None
    found = []
    counted = table.group_by("reason").aggregate([([], "count_all")]).to_pylist()
    for row in sorted(counted, key=lambda row: (-row["count_all"], row["reason"])):
        mask = pc.equal(table["reason"], row["reason"])
        listed = table.filter(mask).sort_by([("dataset", "ascending"), ("source", "ascending")]).slice(0, listing)
        rows = tuple((str(r["dataset"]), str(r["source"]), str(r["detail"])) for r in listed.to_pylist())
        found.append(Refusals(str(row["reason"]), int(row["count_all"]), rows))
    return tuple(found), Counter(table["dataset"].to_pylist())


def _codes(table: pa.Table, column: str) -> tuple[list[str], NDArray[np.int64]]:
    """The different texts of a column, sorted, and for each row which of them it has."""
    encoded = table[column].combine_chunks().dictionary_encode()
    texts = np.array(encoded.dictionary.to_pylist(), object)
    order = np.argsort(texts)
    rank = np.empty(len(texts), np.int64)
    rank[order] = np.arange(len(texts))
    return texts[order].tolist(), rank[encoded.indices.to_numpy()]


def _set(rows: pa.Table, name: str) -> DataSetFacts:
    _, volume = _codes(rows, "volume")
    _, first = np.unique(volume, return_index=True)
    between, within = rows["spacing_z"].to_numpy()[first], rows["spacing_x"].to_numpy()[first]
    return DataSetFacts(
        name=name,
        licence=", ".join(_codes(rows, "licence")[0]),
        patients=len(_codes(rows, "patient")[0]),
        volumes=len(first),
        slices=len(rows),
        duplicates=int(np.count_nonzero(rows["duplicate"].to_numpy())),
        held_out=sum(bool(text) for text in rows["held_out"].take(pa.array(first)).to_pylist()),
        size=int(rows["size"].to_numpy().astype(np.int64).sum()),
        between=(float(between.min()), float(between.max())),
        within=(float(within.min()), float(within.max())),
    )


def _splits(index: pa.Table) -> tuple[SplitFacts, ...]:
    columns = ("volume", "patient", "duplicate_group")
    codes = {name: _codes(index, name)[1] for name in columns}
    names, split = _codes(index, "split")
    found = []
    for code, name in enumerate(names):
        here = split == code
        found.append(SplitFacts(name, int(here.sum()), *(len(np.unique(codes[column][here])) for column in columns)))
    return tuple(sorted(found, key=lambda split: -split.slices))


def _proofs(index: pa.Table) -> tuple[Proof, ...]:
    """Counted from the rows; the last two trust the hashes of the pixels alone, not how the groups were made."""
    found = []
    telling = index.filter(pc.not_equal(index["content"], ""))  # a uniform slice says nothing about where it comes from
    for column, what, rows in (
        ("patient", "patients", index),
        ("duplicate_group", "duplicate groups", index),
        ("sha256", "slices with equal pixels", telling),
        ("content", "slices with equal content (HU clipped to ±1000)", telling),
    ):
        splits = rows.group_by(column).aggregate([("split", "count_distinct")])["split_count_distinct"].to_numpy()
        found.append(Proof(what, int((splits > 1).sum()), len(splits)))
    return tuple(found)


def _look(corpus: Corpus, rows: NDArray[np.int64], settings: Settings) -> tuple[NDArray[np.float64], tuple[Tile, ...]]:
    """Reads slices at even distances through a data set: HU histogram of `sample` of them, `tiles` of them to show."""
    counts = np.zeros(len(HU_EDGES) - 1)
    for row in rows[_even(len(rows), settings.sample)].tolist():
        clipped = np.clip(corpus.hu(row), HU_EDGES[0], HU_EDGES[-1])
        counts += np.histogram(clipped, HU_EDGES)[0]
    shown = rows[_even(len(rows), settings.tiles)].tolist()
    tiles = tuple(Tile(corpus.key(row), corpus.hu(row), corpus.spacing(row)) for row in shown)
    return counts / counts.sum(), tiles


def _even(total: int, wanted: int) -> NDArray[np.int64]:
    """`wanted` positions, or all, at even distances in the middle of equal parts of range(total)."""
    count = min(total, wanted)
    return ((np.arange(count) + 0.5) * total / count).astype(np.int64)
