"""The shards of a finished corpus, as they were planned: what `--extend` must not touch.

One row a part in private/finished.parquet, so that a shard that is lost later is made again with the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa

from data_curation.aside import write_parquet
from data_curation.index import read_part
from data_curation.shards import Part, Shard

__all__ = ["FINISHED", "changed", "read_finished", "write_finished"]

FINISHED = Path("private", "finished.parquet")
_SCHEMA = pa.schema(
    [
        ("shard", pa.string()), ("seed", pa.int64()), ("volume", pa.string()), ("stamp", pa.string()),
        ("rows", pa.list_(pa.int32())), ("split", pa.string()), ("duplicate_group", pa.string()),
        ("duplicate", pa.bool_()),
    ]
)  # fmt: skip


def write_finished(folder: Path, shards: Sequence[Shard], extended: bool) -> None:
    """Notes that the corpus is finished with these shards. Once extended it can only be extended further."""
    rows = [
        {"shard": shard.name, "seed": shard.seed, **{name: getattr(part, name) for name in _SCHEMA.names[2:]}}
        for shard in shards
        for part in shard.parts
    ]
    table = pa.Table.from_pylist(rows, _SCHEMA)
    write_parquet(folder / FINISHED, table.replace_schema_metadata({"extended": "yes" if extended else "no"}))


def read_finished(folder: Path) -> tuple[tuple[Shard, ...], bool]:
    """The shards, and whether the corpus was extended; nothing where no curation has ended here yet."""
    if not (folder / FINISHED).exists():
        return (), False
    table = read_part(folder / FINISHED)
    parts: dict[tuple[str, int], list[Part]] = {}
    for row in table.to_pylist():
        name, seed = row.pop("shard"), row.pop("seed")
        parts.setdefault((name, seed), []).append(Part(**{**row, "rows": tuple(row["rows"])}))
    extended = bool(table.schema.metadata and table.schema.metadata.get(b"extended") == b"yes")
    return tuple(Shard(name, tuple(members), seed) for (name, seed), members in parts.items()), extended


def changed(shards: Sequence[Shard], stamps: Mapping[str, str]) -> list[str]:
    """Volumes of the shards that are gone, or whose files or rules are other ones now."""
    parts = [part for shard in shards for part in shard.parts]
    return sorted({part.volume for part in parts if stamps.get(part.volume) != part.stamp})
