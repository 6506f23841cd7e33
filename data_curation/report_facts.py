"""The facts of a report, counted column by column: an index of millions of rows is never held as Python objects."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_curation.corpus import Corpus
from data_curation.index import EXCLUDED, INDEX, SCHEMA, CorpusError, fingerprint, read_index, read_part
from data_curation.proofs import Proof, proofs
from data_curation.report_volumes import Volumes, read_volumes
from data_curation.spans import spans

__all__ = ["HU_EDGES", "SIZE_EDGES", "DataSetFacts", "Duplicates", "Facts", "SplitFacts", "Tile", "gather"]

HU_EDGES = np.linspace(-1100, 1300, 121)
SIZE_EDGES = np.linspace(0, 400, 81)  # kB of a stored slice
THROUGHPUT = Path("private", "throughput.json")


@dataclass(frozen=True)
class DataSetFacts:
    """One row of the table of data sets; all but what was refused is 0 where nothing was kept."""

    name: str
    catalogue: str  # what the catalogue calls it
    licence: str
    commercial: bool | None
    patients: int
    volumes: int
    slices: int
    duplicates: int  # slices whose content occurs earlier in the corpus
    test_cases: int  # volumes of official test sets that were let in
    size: int  # bytes of the stored slices
    stored: float  # share of the pixels of its frames that is stored
    unstored_body: float  # mean share of a frame that is above -500 HU and not stored
    refused: Mapping[str, int]  # scans by reason
    left_out: Mapping[str, int]  # slices of kept volumes by reason
    excluded: Mapping[str, int]  # slices of finished shards that no longer count, by reason


@dataclass(frozen=True)
class SplitFacts:
    """One row of the table of splits."""

    name: str
    slices: int
    volumes: int
    patients: int
    groups: int


@dataclass(frozen=True)
class Duplicates:
    """Volumes that show the same scan. `shared[i, j]`: volumes of data set i with a twin in data set j."""

    groups: int  # of more than one volume
    volumes: int  # in them
    across: int  # groups over more than one data set
    names: tuple[str, ...]
    shared: NDArray[np.int64]


@dataclass(frozen=True)
class Tile:
    """A slice for the contact sheet; hu is [Y, X], spacing (y, x) in mm."""

    key: str
    hu: NDArray[np.int16]
    spacing: tuple[float, float]


@dataclass(frozen=True)
class Facts:
    """All that the report shows. The mappings are by data set, of those that have slices."""

    fingerprint: str
    recorded: Mapping[str, Any]  # corpus.json
    sets: tuple[DataSetFacts, ...]
    splits: tuple[SplitFacts, ...]
    proofs: tuple[Proof, ...]
    duplicates: Duplicates
    volumes: Volumes
    sizes: Mapping[str, NDArray[np.int64]]  # slices in SIZE_EDGES, the largest in the last bin
    hu: Mapping[str, NDArray[np.float64]]  # share of the sampled pixels in HU_EDGES, tails in the outer bins
    tiles: Mapping[str, tuple[Tile, ...]]
    throughput: Mapping[str, float]  # slices_read, seconds, workers; empty where nobody wrote them down

    @property
    def kept(self) -> tuple[DataSetFacts, ...]:
        """The data sets that have slices."""
        return tuple(one for one in self.sets if one.slices)

    @property
    def wrong(self) -> tuple[str, ...]:
        """What contradicts the corpus's own claims; empty for a sound one."""
        found = [f"{p.shared} {p.what} are both {p.sides[0]} and {p.sides[1]}" for p in self.proofs if p.shared]
        recorded = self.recorded.get("fingerprint", self.fingerprint)
        if recorded != self.fingerprint:
            found.append(f"corpus.json names the fingerprint {recorded}, the index has {self.fingerprint}")
        return tuple(found)


def gather(folder: Path, tiles: int, sample: int) -> Facts:
    """Reads the corpus. Raises CorpusError, naming file and command, where it is missing, empty, partial or damaged.

    `tiles` and `sample` are how many slices of each data set are shown, and read for the HU histogram.
    """
    _check_shards(folder)
    recorded = _recorded(folder)
    refused = _reasons(folder / "refused.parquet")
    volumes = read_volumes(folder)
    if not volumes.slices.sum():
        reasons = ", ".join(f"{n} {reason}" for one in refused.values() for reason, n in one.items()) or "nothing found"
        text = f"{folder / INDEX} lists no slice ({reasons}): see private/refused.csv, then run `axial curate` again"
        raise CorpusError(text)
    sets = _sets(recorded, refused, _reasons(folder / "left_out.parquet"), volumes)
    hu, shown, sizes = {}, {}, {}
    corpus = Corpus(folder, split=None, duplicates=True, frame=False)
    rows = read_index(folder, ["dataset", "split", "size"], coded=("dataset", "split"))
    used, kilobytes = pc.not_equal(rows["split"], EXCLUDED).to_numpy(), rows["size"].to_numpy() / 1000
    for name in (one.name for one in sets if one.slices):
        own = pc.equal(rows["dataset"], name).to_numpy()
        sizes[name] = np.histogram(np.clip(kilobytes[own], 0, SIZE_EDGES[-1]), SIZE_EDGES)[0]
        hu[name], shown[name] = _look(corpus, np.flatnonzero(own & used), tiles, sample)
    with pq.ParquetFile(folder / INDEX, memory_map=True) as file:
        batches = file.iter_batches(columns=["key", "sha256"])
        whole = fingerprint(pa.Table.from_batches([batch]) for batch in batches)
    return Facts(
        fingerprint=whole,
        recorded=recorded,
        sets=sets,
        splits=_splits(volumes),
        proofs=proofs(folder, recorded.get("rules", {})),
        duplicates=_duplicates(volumes, [one.name for one in sets if one.slices]),
        volumes=volumes,
        sizes=sizes,
        hu=hu,
        tiles=shown,
        throughput=_throughput(folder),
    )


def _check_shards(folder: Path) -> None:
    """The index, its columns and shards checked: a corpus half copied must not look like a small one."""
    parts = spans(folder)
    missing = [name for name in SCHEMA.names if name not in pq.read_schema(folder / INDEX).names]
    if missing:
        raise CorpusError(f"{folder / INDEX} has no column {', '.join(missing)}: run `axial curate` again")
    places = read_index(folder, ["offset", "size"])
    ends = places["offset"].to_numpy() + places["size"].to_numpy()
    for part in parts:
        shard = folder / "shards" / part.shard
        size = shard.stat().st_size if shard.is_file() else -1
        if size < ends[part.first : part.first + part.count].max():
            what = "is missing" if size < 0 else f"is cut short ({size:,} bytes)"
            raise CorpusError(f"{shard} {what}: run the same `axial curate` again or copy the shard again")


def _recorded(folder: Path) -> Mapping[str, Any]:
    path = folder / "corpus.json"
    remedy = "run the same `axial curate` again"
    try:
        recorded = json.loads(path.read_text())
    except FileNotFoundError:
        raise CorpusError(f"{path} is missing, so the corpus is not finished: {remedy}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CorpusError(f"{path} is damaged ({error}): {remedy}") from None
    if not isinstance(recorded, dict):
        raise CorpusError(f"{path} is damaged (not a JSON object): {remedy}")
    return recorded


def _reasons(path: Path) -> dict[str, dict[str, int]]:
    """How often each reason occurs in each data set, the most frequent first."""
    if not path.is_file():
        raise CorpusError(f"{path} is missing, so the corpus is not finished: run the same `axial curate` again")
    counted = read_part(path, ["dataset", "reason"]).group_by(["dataset", "reason"]).aggregate([([], "count_all")])
    found: dict[str, dict[str, int]] = {}
    for row in sorted(counted.to_pylist(), key=lambda row: (-row["count_all"], row["reason"])):
        found.setdefault(str(row["dataset"]), {})[str(row["reason"])] = row["count_all"]
    return found


def _sets(
    recorded: Mapping[str, Any],
    refused: Mapping[str, Mapping[str, int]],
    left_out: Mapping[str, Mapping[str, int]],
    volumes: Volumes,
) -> tuple[DataSetFacts, ...]:
    listed = recorded.get("datasets")
    listed = listed if isinstance(listed, dict) else {}
    found = []
    for name in dict.fromkeys([*listed, *sorted({*volumes.dataset, *refused, *left_out})]):
        mine = volumes.of(name)
        frames = int(mine.frame.sum())
        known = listed.get(name)
        excluded: dict[str, int] = {}
        for reason, slices in zip(mine.excluded, mine.slices.tolist(), strict=True):
            if reason:
                excluded[reason] = excluded.get(reason, 0) + slices
        found.append(
            DataSetFacts(
                name=name,
                catalogue=str(known.get("catalogue", name)) if isinstance(known, dict) else name,
                licence=", ".join(sorted(set(mine.licence))),
                commercial=bool(mine.commercial.all()) if len(mine) else None,
                patients=len(set(mine.patient)),
                volumes=len(mine),
                slices=int(mine.slices.sum()),
                duplicates=int(mine.duplicates.sum()),
                test_cases=sum(map(bool, mine.held_out)),
                size=int(mine.size.sum()),
                stored=int(mine.stored.sum()) / frames if frames else 0.0,
                unstored_body=float(mine.unstored_body.sum() / mine.slices.sum()) if len(mine) else 0.0,
                refused=refused.get(name, {}),
                left_out=left_out.get(name, {}),
                excluded=excluded,
            )
        )
    return tuple(found)


def _splits(volumes: Volumes) -> tuple[SplitFacts, ...]:
    found = []
    for name in sorted(set(volumes.split)):
        here = [i for i, split in enumerate(volumes.split) if split == name]
        counts = (len({column[i] for i in here}) for column in (volumes.name, volumes.patient, volumes.group))
        found.append(SplitFacts(name, int(volumes.slices[here].sum()), *counts))
    return tuple(sorted(found, key=lambda split: -split.slices))


def _duplicates(volumes: Volumes, names: list[str]) -> Duplicates:
    rank = {name: i for i, name in enumerate(names)}
    groups = {group: i for i, group in enumerate(dict.fromkeys(volumes.group))}
    counts = np.zeros((len(groups), len(names)), np.int64)  # volumes of each group in each data set
    np.add.at(counts, ([groups[g] for g in volumes.group], [rank[d] for d in volumes.dataset]), 1)
    present = counts > 0
    shared = counts.T @ present  # volumes of i whose group is also in j
    alone = (counts * (counts == 1)).sum(0)  # the only one of its data set in its group: no twin there
    shared[np.diag_indices(len(names))] -= alone
    several = counts.sum(1) > 1
    across = int((present.sum(1) > 1).sum())
    return Duplicates(int(several.sum()), int(counts[several].sum()), across, tuple(names), shared)


def _throughput(folder: Path) -> dict[str, float]:
    try:
        stored = json.loads((folder / THROUGHPUT).read_text())
        return {name: float(stored[name]) for name in ("slices_read", "seconds", "workers")}
    except (OSError, ValueError, LookupError, TypeError):
        return {}  # nobody measured, or the corpus was given away without private/


def _look(
    corpus: Corpus, rows: NDArray[np.int64], tiles: int, sample: int
) -> tuple[NDArray[np.float64], tuple[Tile, ...]]:
    """Reads slices at even distances through a data set: HU histogram of `sample` of them, `tiles` of them to show."""
    counts = np.zeros(len(HU_EDGES) - 1)
    for row in rows[_even(len(rows), sample)].tolist():
        counts += np.histogram(np.clip(corpus.hu(row), HU_EDGES[0], HU_EDGES[-1]), HU_EDGES)[0]
    shown = rows[_even(len(rows), tiles)].tolist()
    return counts / max(counts.sum(), 1), tuple(Tile(corpus.key(i), corpus.hu(i), corpus.spacing(i)) for i in shown)


def _even(total: int, wanted: int) -> NDArray[np.int64]:
    """`wanted` positions, or all, at even distances in the middle of equal parts of range(total)."""
    count = min(total, wanted)
    return ((np.arange(count) + 0.5) * total / max(count, 1)).astype(np.int64)
