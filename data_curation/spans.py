"""Which rows of the index belong to which shard, and those rows alone, however long the index is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_curation.index import INDEX, CorpusError, read_index

__all__ = ["Span", "rows_of", "spans"]


@dataclass(frozen=True)
class Span:
    """Rows `first` to `first + count` of the index: all slices of one shard, a file name in shards/."""

    shard: str
    first: int
    count: int


def spans(folder: Path) -> tuple[Span, ...]:
    """Every shard of the index, in its order. Raises CorpusError where the rows of one are not together."""
    found: dict[str, Span] = {}
    last, row = "", 0
    for chunk in read_index(folder, ["shard"])["shard"].chunks:
        runs = pc.run_end_encode(chunk)
        start = 0
        for name, end in zip(runs.values.to_pylist(), runs.run_ends.to_pylist(), strict=True):
            known = found.get(name)
            if known is None:
                found[name] = Span(name, row + start, end - start)
            elif name == last:
                found[name] = Span(name, known.first, known.count + end - start)
            else:
                raise CorpusError(f"{folder / INDEX}: the rows of {name} are apart; run the same `axial curate` again")
            last, start = name, end
        row += len(chunk)
    return tuple(found.values())


def rows_of(folder: Path, span: Span, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of one shard in the order of the index. Reads the row groups that hold them and no others."""
    path = folder / INDEX
    try:
        with pq.ParquetFile(path, memory_map=True) as file:
            end, start, wanted, skipped = span.first + span.count, 0, [], 0
            for group in range(file.metadata.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if start < end and start + rows > span.first:
                    wanted.append(group)
                elif not wanted:
                    skipped += rows
                start += rows
            table = file.read_row_groups(wanted, columns=None if columns is None else list(columns))
    except (pa.ArrowInvalid, OSError) as error:
        raise CorpusError(f"{path} cannot be read ({error}): run the same `axial curate` again") from None
    return table.slice(span.first - skipped, span.count)
