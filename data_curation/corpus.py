"""Random access to a corpus folder: slice i is one positioned read, one checksum, one decode.

No tar is walked and nothing is shared between readers: a `Corpus` may be pickled into a worker or live on through a
fork, and any number of threads may use one.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_curation.grid import AIR
from data_curation.index import CorpusError, read_index
from data_curation.slices import SliceError, checksum, decode, sha256

__all__ = ["Corpus", "CorpusError"]

CODED = ("shard", "codec", "split", "dataset")  # columns of few different texts, held as numbers
OPEN_SHARDS = 128  # file descriptors kept open; a process may have about a thousand


class Corpus:
    """The slices of one split (None: of all, excluded ones too), or of some data sets of it, in the order of the index.

    Slices that an earlier one of the corpus shows already are left out unless `duplicates` is set. With `frame` a slice
    comes as large as the scan had it, with air around the stored part; without, the stored part alone. Every read
    compares the checksum of the stored bytes; `verify` also hashes the decoded pixels (twice the work). `mapped` reads
    through mapped files, without a copy; a storage error then ends the process (SIGBUS) where a plain read raises. All
    errors are CorpusErrors that name shard and sample.
    """

    def __init__(
        self,
        folder: Path | str,
        split: str | None = "train",
        *,
        datasets: Collection[str] | None = None,
        duplicates: bool = False,
        frame: bool = True,
        verify: bool = False,
        mapped: bool = True,
    ) -> None:
        self.folder, self.split, self.duplicates, self.verify = Path(folder), split, duplicates, verify
        self.datasets, self.frame, self.mapped = None if datasets is None else tuple(datasets), frame, mapped
        self._load()

    def _load(self) -> None:
        index = read_index(self.folder, ["shard", "offset", "size", "crc32", "codec", "split", "duplicate"], CODED)
        chosen = np.ones(len(index), bool)
        if self.split is not None:
            chosen &= self._one_of(index["split"], "split", (self.split,), ("train", "val"))
        if self.datasets is not None:
            names = read_index(self.folder, ["dataset"], CODED)["dataset"]
            chosen &= self._one_of(names, "data set", self.datasets)
        if not self.duplicates:
            chosen &= ~index["duplicate"].to_numpy()
        self._rows = np.flatnonzero(chosen)
        self._shards, self._shard = _codes(index["shard"], chosen)
        self._codecs, self._codec = _codes(index["codec"], chosen)
        self._offset, self._size, self._crc = (index[name].to_numpy()[chosen] for name in ("offset", "size", "crc32"))
        self._columns: dict[str, Any] = {}
        self._files: OrderedDict[int, _File] = OrderedDict()
        self._lock = threading.Lock()

    def _one_of(
        self, column: pa.ChunkedArray, what: str, wanted: Sequence[str], always: Sequence[str] = ()
    ) -> NDArray[np.bool_]:
        """Which rows have one of the wanted texts. Raises CorpusError for one that no row has, but for `always`."""
        texts, codes = _codes(column)
        for name in wanted:
            if name not in (*texts, *always):
                raise CorpusError(f"{self.folder} has no {what} {name!r}; it has: {', '.join(sorted(texts))}")
        return np.array([text in wanted for text in texts] or [False])[codes]

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _GIVEN}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._load()

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        return f"Corpus({str(self.folder)!r}, split={self.split!r}): {len(self):,} slices in {len(self._shards)} shards"

    def hu(self, i: int) -> NDArray[np.int16]:
        """The pixels of slice i in HU, int16 [Y, X], a fresh array of `shape(i)`."""
        data = self.encoded(i)
        try:
            hu = decode(data, self._codecs[self._codec[i]])
        except SliceError as error:
            raise CorpusError(f"{self._place(i)}: {error}") from None
        if self.verify and sha256(hu) != self._column("sha256")[i].as_py():
            raise CorpusError(f"{self._place(i)}: the decoded pixels are not those that were curated")
        if not self.frame or hu.shape == self.shape(i):
            return hu
        whole = np.full(self.shape(i), AIR, np.int16)
        top, left = int(self._column("box_y")[i]), int(self._column("box_x")[i])
        whole[top : top + hu.shape[0], left : left + hu.shape[1]] = hu
        return whole

    def encoded(self, i: int) -> bytes | memoryview:
        """The stored bytes of slice i, checksum compared; a view of the mapped shard where the corpus is `mapped`."""
        offset, size = int(self._offset[i]), int(self._size[i])
        try:
            data = self._file(int(self._shard[i])).read(size, offset)
        except OSError as error:
            raise CorpusError(f"{self._place(i)}: cannot be read ({error.strerror}); {_REMEDY}") from None
        if len(data) != size:
            end = offset + len(data)
            raise CorpusError(
                f"{self._place(i)}: the shard is cut short, {offset + size} bytes needed, {end} there; {_REMEDY}"
            )
        if checksum(data) != self._crc[i]:
            raise CorpusError(f"{self._place(i)}: the stored bytes are damaged (checksum differs); {_REMEDY}")
        return data

    def spacing(self, i: int) -> tuple[float, float]:
        """Distance between rows and between columns, mm."""
        return float(self._column("spacing_y")[i]), float(self._column("spacing_x")[i])

    def shape(self, i: int) -> tuple[int, int]:
        """Rows and columns of `hu(i)`, without reading the slice."""
        height, width = ("frame_height", "frame_width") if self.frame else ("height", "width")
        return int(self._column(height)[i]), int(self._column(width)[i])

    def key(self, i: int) -> str:
        """Name of slice i, the same in every copy of the corpus."""
        return str(self._column("key")[i].as_py())

    def dataset(self, i: int) -> str:
        """Data set of slice i, as named in the curation's settings."""
        return str(self._column("dataset")[i].as_py())

    def stretches(self) -> list[tuple[str, int, int]]:
        """Neighbouring slices of one data set, in the corpus's order: its name, the first, and the one after them."""
        names, codes = _codes(read_index(self.folder, ["dataset"], CODED)["dataset"])
        codes = codes[self._rows]
        first = np.flatnonzero(np.diff(codes, prepend=-1)).tolist()
        return [(names[codes[a]], a, b) for a, b in zip(first, [*first[1:], len(codes)], strict=True)]

    def _column(self, name: str) -> Any:
        """One column of the chosen rows, read on first use; text stays in Arrow's compact form."""
        if name not in self._columns:
            values = read_index(self.folder, [name])[name].take(pa.array(self._rows)).combine_chunks()
            self._columns[name] = values if pa.types.is_string(values.type) else values.to_numpy()
        return self._columns[name]

    def _place(self, i: int) -> str:
        return f"{self.folder / 'shards' / self._shards[self._shard[i]]}, sample {self.key(i)}"

    def _file(self, shard: int) -> _File:
        with self._lock:
            file = self._files.get(shard)
            if file is None:
                file = self._files[shard] = _File(self.folder / "shards" / self._shards[shard], self.mapped)
                if len(self._files) > OPEN_SHARDS:
                    self._files.popitem(last=False)
            self._files.move_to_end(shard)
            return file


class _File:
    """A descriptor that is closed when its last reader lets go of it: another thread may still be reading."""

    __slots__ = ("descriptor", "view")

    def __init__(self, path: Path, mapped: bool) -> None:
        self.descriptor = -1
        self.view: memoryview | None = None
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        if mapped and os.fstat(self.descriptor).st_size:
            self.view = memoryview(mmap.mmap(self.descriptor, 0, prot=mmap.PROT_READ))

    def read(self, size: int, offset: int) -> bytes | memoryview:
        """`size` bytes, or as many as there are: who touches mapped bytes that were cut off since is killed."""
        if self.view is None:
            return os.pread(self.descriptor, size, offset)
        return self.view[offset : min(offset + size, os.fstat(self.descriptor).st_size)]

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


_GIVEN = ("folder", "split", "datasets", "duplicates", "frame", "verify", "mapped")
_REMEDY = "copy the shard again, or delete it and run the same `axial curate` again"


def _codes(column: pa.ChunkedArray, chosen: NDArray[np.bool_] | None = None) -> tuple[list[str], NDArray[np.int32]]:
    """The distinct texts of a column read as codes, and for each (chosen) row which of them it has."""
    whole = column.unify_dictionaries().combine_chunks()
    if isinstance(whole, pa.ChunkedArray):  # of no rows
        return [], np.empty(0, np.int32)
    codes = whole.indices.to_numpy()
    return whole.dictionary.to_pylist(), codes if chosen is None else codes[chosen]
