"""Several corpora as one, which of their slices are seen how often, and what they have in common."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, combinations
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from data_curation.index import read_index
from pretrain.data.order import TABLE, Order, Run, Source
from pretrain.data.settings import DataSettings, StreamError

__all__ = ["Corpora", "Slices", "order_of", "overlaps"]


class Slices(Protocol):
    """What the stream needs of `data_curation.corpus.Corpus`."""

    def __len__(self) -> int: ...
    def hu(self, i: int, /) -> NDArray[np.int16]: ...
    def key(self, i: int, /) -> str: ...
    def spacing(self, i: int, /) -> tuple[float, float]: ...  # asked for only where boxes are in mm
    def stretches(self) -> list[tuple[str, int, int]]: ...  # asked for only where data sets have weights


class Corpora:
    """Corpora laid end to end: slice i is that of the one in which it falls."""

    def __init__(self, parts: Sequence[Slices]) -> None:
        self.parts = tuple(parts)
        self._ends = list(accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def of(self, i: int) -> tuple[Slices, int]:
        """The corpus that holds slice i, and the slice's number there."""
        part = bisect_right(self._ends, i)
        return self.parts[part], i - (self._ends[part - 1] if part else 0)


def order_of(settings: DataSettings, parts: Sequence[Slices]) -> Order:
    """The order of the samples: sources (of a corpus, the data sets with a weight, each, and all others), and shares.

    Without weights all slices are one source, in the order of one corpus. Raises StreamError for a corpus without a
    slice and for weights of data sets that are not there.
    """
    for part, corpus in zip(parts, settings.sources, strict=True):
        if not len(part):
            raise StreamError(f"data: {corpus.path} has no slice in split {settings.split!r}")
    apart = any(corpus.weight is not None for corpus in settings.sources)
    runs = _runs(settings, parts, apart)
    masses = {
        (corpus, name): Fraction(repr(settings.weights.get(name, 1.0))) * sum(last - first for first, last in found)
        for (corpus, name), found in sorted(runs.items())
    }
    masses = {key: mass for key, mass in masses.items() if mass}
    shares: dict[tuple[int, str], Fraction] = masses
    if apart:
        whole = [sum((mass for (of, _), mass in masses.items() if of == k), Fraction(0)) for k in range(len(parts))]
        for corpus, mass in zip(settings.corpora, whole, strict=True):
            if not mass:
                raise StreamError(f"data.weights leave no slice of {corpus.path}; take it out of data.corpora")
        weights = [Fraction(repr(1.0 if corpus.weight is None else corpus.weight)) for corpus in settings.sources]
        shares = {(k, name): weights[k] * mass / whole[k] for (k, name), mass in masses.items()}
    if not shares:
        raise StreamError(f"data.weights leave no slice of {settings.place}")
    try:
        return Order.of([Source(runs[key]) for key in shares], list(shares.values()), settings.seed)
    except ValueError as error:
        corpus_number, name = list(shares)[error.args[0]]
        where = f"data.weights.{name}" if name else f"data.corpora.{corpus_number}.weight"
        raise StreamError(
            f"{where}: its slices would be less than one sample in {2 * TABLE:,}; give them more weight, or 0 (never)"
        ) from None


def _runs(settings: DataSettings, parts: Sequence[Slices], apart: bool) -> dict[tuple[int, str], list[Run]]:
    """Runs of slices by (corpus, data set): corpus 0 where corpora are not kept `apart`, '' for sets without weight."""
    runs: dict[tuple[int, str], list[Run]] = {}
    there: set[str] = set()
    offset = 0
    for number, part in enumerate(parts):
        for name, first, last in part.stretches() if settings.weights else [("", 0, len(part))]:
            there.add(name)
            own = runs.setdefault((number if apart else 0, name if name in settings.weights else ""), [])
            if own and own[-1][1] == first + offset:
                own[-1] = (own[-1][0], last + offset)
            else:
                own.append((first + offset, last + offset))
        offset += len(part)
    if unknown := sorted(settings.weights.keys() - there):
        raise StreamError(
            f"data.weights: {settings.place} has no data set {', '.join(map(repr, unknown))} in split "
            f"{settings.split!r}; there are: {', '.join(sorted(there))}"
        )
    return runs


def overlaps(settings: DataSettings) -> list[str]:
    """What two of the corpora have in common and should not: one line for each, from their indexes."""
    if len(settings.sources) == 1:
        return []
    lines = []
    split = repr(settings.split)
    for a, b in combinations([_Facts.read(corpus.path, settings.split) for corpus in settings.sources], 2):
        both = f"{a.folder} and {b.folder}"
        if shared := len(np.intersect1d(a.slices, b.slices)):
            lines.append(f"{both} share {shared:,} slices of equal pixels, which are seen as often as both say")
        if leaked := len(np.intersect1d(a.slices, b.unseen)) + len(np.intersect1d(b.slices, a.unseen)):
            lines.append(f"{both}: {leaked:,} slices of split {split} in one are in another split of the other")
        if people := len(a.patients & b.strangers) + len(b.patients & a.strangers):
            lines.append(f"{both}: {people:,} patients of split {split} in one are in another split of the other")
    return lines


@dataclass(frozen=True)
class _Facts:
    """What one corpus can share with another."""

    folder: Path
    slices: NDArray[np.uint64]  # 64 bits of the SHA-256 of each slice that is read
    unseen: NDArray[np.uint64]  # and of those of other splits
    patients: set[str]
    strangers: set[str]

    @staticmethod
    def read(folder: Path, split: str | None) -> _Facts:
        index = read_index(folder, ["sha256", "split", "duplicate", "patient"], ["split", "patient"])
        hashes = [
            np.frombuffer(bytes.fromhex("".join(batch.column(0).to_pylist())), np.uint64)[::4]
            for batch in index.select(["sha256"]).to_batches(max_chunksize=65536)
        ]
        sha256 = np.concatenate([*hashes, np.empty(0, np.uint64)])
        own = np.ones(len(index), bool)
        if split is not None:
            own = pc.equal(index["split"].cast(pa.string()), split).to_numpy()
        patients, strangers = (
            set(index["patient"].filter(pa.array(rows)).unique().to_pylist()) for rows in (own, ~own)
        )
        return _Facts(folder, sha256[own & ~index["duplicate"].to_numpy()], sha256[~own], patients, strangers)
