"""The index summed up by volume: what a report needs of millions of slices, as one row a volume."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_curation.index import read_index

__all__ = ["Volumes", "read_volumes"]


@dataclass(frozen=True)
class Volumes:
    """Columns with one entry a volume, in the order of the index."""

    name: list[str]
    dataset: list[str]
    patient: list[str]
    group: list[str]
    split: list[str]
    licence: list[str]
    held_out: list[str]
    excluded: list[str]
    commercial: NDArray[np.bool_]
    between: NDArray[np.float32]  # mm between slices
    within: NDArray[np.float32]  # mm between columns
    slices: NDArray[np.int64]
    duplicates: NDArray[np.int64]  # of the slices
    size: NDArray[np.int64]  # bytes
    stored: NDArray[np.int64]  # pixels
    frame: NDArray[np.int64]  # pixels
    unstored_body: NDArray[np.float64]  # sum over the slices of the share of the frame

    def __len__(self) -> int:
        return len(self.name)

    def of(self, dataset: str) -> Self:
        """Those of one data set."""
        rows = [i for i, name in enumerate(self.dataset) if name == dataset]
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        picked: dict[str, Any] = {
            name: column[rows] if isinstance(column, np.ndarray) else [column[i] for i in rows]
            for name, column in columns.items()
        }
        return type(self)(**picked)


def read_volumes(folder: Path) -> Volumes:
    """Sums up the index of a corpus folder; a few columns of it are in memory at a time."""
    names, code = _codes(read_index(folder, ["volume"], coded=["volume"])["volume"])
    count = len(names)
    first = np.zeros(count, np.int64)
    first[code[::-1]] = np.arange(len(code) - 1, -1, -1)
    order = np.argsort(first, kind="stable")
    at = pa.array(first[order])

    def summed(*columns: str) -> NDArray[np.float64]:
        """The product of the columns, summed over each volume; sums of whole numbers are exact below 2**53."""
        table = read_index(folder, columns)
        product = np.ones(len(code))
        for column in columns:
            product = product * table[column].to_numpy()
        return np.bincount(code, product, count)[order].astype(np.float64, copy=False)

    def once(column: str) -> pa.ChunkedArray:
        """What is the same for all slices of a volume."""
        return read_index(folder, [column])[column].take(at)

    return Volumes(
        name=[names[i] for i in order],
        dataset=once("dataset").to_pylist(),
        patient=once("patient").to_pylist(),
        group=once("duplicate_group").to_pylist(),
        split=once("split").to_pylist(),
        licence=once("licence").to_pylist(),
        held_out=once("held_out").to_pylist(),
        excluded=once("excluded").to_pylist(),
        commercial=once("commercial").to_numpy().astype(bool),
        between=once("spacing_z").to_numpy(),
        within=once("spacing_x").to_numpy(),
        slices=np.bincount(code, minlength=count)[order],
        duplicates=summed("duplicate").astype(np.int64),
        size=summed("size").astype(np.int64),
        stored=summed("height", "width").astype(np.int64),
        frame=summed("frame_height", "frame_width").astype(np.int64),
        unstored_body=summed("outside_body"),
    )


def _codes(column: pa.ChunkedArray) -> tuple[list[str], NDArray[np.int64]]:
    """The different texts of a column that was read coded, and for each row which of them it has."""
    whole = column.unify_dictionaries().combine_chunks()
    if isinstance(whole, pa.ChunkedArray):  # of no rows
        return [], np.empty(0, np.int64)
    return whole.dictionary.to_pylist(), whole.indices.to_numpy()
