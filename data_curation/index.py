"""The Parquet index: its schema, links between volumes that share pixels or a patient, splits, the fingerprint.

Two volumes that share a slice (the same pixels up to clipping), or that likeness.py finds to be one scan, are one
duplicate group: a data set repackaged by another, the DICOM and the NIfTI of one scan, a part of a scan, a mirrored or
resliced copy. Volumes of one patient and of one duplicate group always fall into the same split.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_curation.aside import aside
from data_curation.likeness_match import Alike

__all__ = [
    "EXCLUDED",
    "INDEX",
    "SCHEMA",
    "CorpusError",
    "Links",
    "fingerprint",
    "link",
    "merge",
    "read_index",
    "read_part",
    "split_of",
    "unreadable",
]

INDEX = "index.parquet"
EXCLUDED = "excluded"  # the split of slices in finished shards that must no longer be used
MERGED = 32  # shards that make one row group


class CorpusError(ValueError):
    """A corpus folder that cannot be read as it is: what is wrong, in which shard and sample, and what to do."""


def _field(name: str, kind: pa.DataType, meaning: str) -> pa.Field:
    return pa.field(name, kind, nullable=False, metadata={"description": meaning})


SCHEMA = pa.schema(
    [
        _field("key", pa.string(), "name of the sample in its shard: <volume>_<z>"),
        _field("dataset", pa.string(), "data set, as named in the settings"),
        _field("volume", pa.string(), "salted hash of data set, patient, study and series"),
        _field("patient", pa.string(), "salted hash of data set and patient"),
        _field("study", pa.string(), "salted hash of data set, patient and study"),
        _field("z", pa.int32(), "slice number in the volume, 0 nearest the feet"),
        _field("position_mm", pa.float64(), "distance from the lowest slice of the volume, mm"),
        _field("n_slices", pa.int32(), "slices of the volume, left-out ones included"),
        _field("height", pa.int32(), "stored rows, front to back"),
        _field("width", pa.int32(), "stored columns, patient right to left"),
        _field("frame_height", pa.int32(), "rows of the scan; those that are not stored are air, couch or padding"),
        _field("frame_width", pa.int32(), "columns of the scan"),
        _field("box_y", pa.int32(), "first stored row in the frame"),
        _field("box_x", pa.int32(), "first stored column in the frame"),
        _field("box", pa.string(), "the rule by which the stored part was chosen"),
        _field("outside_max", pa.int16(), "highest HU of the frame that is not stored; -32768 if all is"),
        _field("outside_body", pa.float32(), "share of the frame that is above -500 HU and not stored"),
        _field("spacing_z", pa.float64(), "distance between slices, mm"),
        _field("spacing_y", pa.float64(), "distance between rows, mm"),
        _field("spacing_x", pa.float64(), "distance between columns, mm"),
        _field("hu_min", pa.int16(), "lowest stored HU"),
        _field("hu_max", pa.int16(), "highest stored HU"),
        _field("hu_mean", pa.float32(), "mean of the stored HU"),
        _field("hu_std", pa.float32(), "standard deviation of the stored HU"),
        _field("body_fraction", pa.float32(), "share of the frame above -500 HU"),
        _field("rounding", pa.float32(), "largest part of an HU lost by rounding the volume's float values; mostly 0"),
        _field("notes", pa.string(), "what was repaired in the volume, '; ' between"),
        _field("sha256", pa.string(), "SHA-256 of the stored pixels as little-endian int16, row by row"),
        _field(
            "content",
            pa.string(),
            "128 bits of SHA-256 of shape and every fourth row, clipped; '' if uniform",
        ),
        _field("licence", pa.string(), "licence of the data set"),
        _field("commercial", pa.bool_(), "the licence allows commercial use, by its strictest reading"),
        _field("held_out", pa.string(), "why the case is held out by default; '' for all others"),
        _field(
            "split", pa.string(), "train, val or excluded; one for all volumes of a patient and of a duplicate group"
        ),
        _field(
            "duplicate_group", pa.string(), "first volume that shares slices with this one; itself if there is none"
        ),
        _field("duplicate", pa.bool_(), "the same content occurs in an earlier slice of the corpus"),
        _field("excluded", pa.string(), "why a slice of a finished shard does not count any more; '' for all others"),
        _field("codec", pa.string(), "file ending of the stored slice; names the codec"),
        _field("shard", pa.string(), "file in shards/"),
        _field("offset", pa.int64(), "first byte of the stored slice in the shard"),
        _field("size", pa.int32(), "bytes of the stored slice"),
        _field("crc32", pa.uint32(), "CRC-32 of the stored slice, to be compared before it is decoded"),
    ],
    metadata={"description": "One row per slice of an Axial corpus, in the order of the shards."},
)


def read_index(folder: Path, columns: Sequence[str] | None = None, coded: Sequence[str] = ()) -> pa.Table:
    """The index of a corpus folder, or some columns of it; `coded` ones as dictionary arrays (numbers and their texts).

    Raises CorpusError where there is no index.
    """
    path = folder / INDEX
    try:
        wanted = None if columns is None else list(columns)
        return pq.read_table(path, columns=wanted, memory_map=True, read_dictionary=list(coded))
    except FileNotFoundError:
        raise CorpusError(f"{folder} holds no corpus ({INDEX} is missing): make one with `axial curate`") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise CorpusError(f"{path} cannot be read ({error}): run `axial curate` again") from None


def read_part(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """A Parquet file that a step of curation left. Raises CorpusError that names the file and says what to do."""
    try:
        return pq.read_table(path, columns=None if columns is None else list(columns))
    except (pa.ArrowInvalid, OSError) as error:
        raise unreadable(path, error) from None


def unreadable(path: Path, error: Exception) -> CorpusError:
    """A step's file that is damaged or gone, as the error to raise."""
    text = " ".join(str(error).split())
    return CorpusError(f"{path} cannot be read ({text}): delete it and run the same command again")


@dataclass(frozen=True)
class Links:
    """What `link` found, by the positions of the volumes it was given."""

    related: NDArray[np.int64]  # [V] first volume that this one is tied to by names, slices or likeness, by any path
    group: NDArray[np.int64]  # [V] first volume that this one is tied to by slices or likeness alone
    duplicate: tuple[NDArray[np.bool_], ...]  # per volume [its slices]: an earlier slice shows the same


def link(names: Sequence[Sequence[str]], contents: Sequence[NDArray[np.uint64]], alike: Sequence[Alike] = ()) -> Links:
    """Ties volumes together: by names that they share, by equal slices, by likeness.

    `contents` are the first 64 bits of each slice's content, 0 for a uniform slice.
    """
    sizes = [len(values) for values in contents]
    owner = np.repeat(np.arange(len(sizes)), sizes)
    values = np.concatenate([*contents, np.empty(0, np.uint64)])
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    first = first[inverse]
    first[values == 0] = np.flatnonzero(values == 0)
    pairs = np.array([(pair.first, pair.second) for pair in alike], np.int64).reshape(-1, 2).T
    shared = np.concatenate([np.stack([owner, owner[first]]), pairs], 1)
    repeated = first != np.arange(len(values))
    starts = np.cumsum([0, *sizes])
    for pair in alike:
        repeated[starts[pair.second] : starts[pair.second + 1]] |= pair.same
    earliest: dict[str, int] = {}
    same = [(i, earliest.setdefault(name, i)) for i, known in enumerate(names) for name in known]
    named = np.array(same, np.int64).reshape(-1, 2).T
    return Links(
        _components(np.concatenate([shared, named], 1), len(sizes)),
        _components(shared, len(sizes)),
        tuple(np.split(repeated, starts[1:-1])) if sizes else (),
    )


def _components(edges: NDArray[np.int64], nodes: int) -> NDArray[np.int64]:
    """The smallest member of each node's component."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    graph = coo_array((np.ones(edges.shape[1], np.int8), (edges[0], edges[1])), shape=(nodes, nodes))
    _, labels = connected_components(graph, directed=False)
    smallest = np.full(nodes, nodes, np.int64)
    np.minimum.at(smallest, labels, np.arange(nodes))
    chosen: NDArray[np.int64] = smallest[labels]
    return chosen


def split_of(patient: str, seed: int, fractions: Mapping[str, float]) -> str:
    """The split of a set of related volumes, named by the smallest of their patients.

    A hash and not a draw: more data never move a patient to another split, unless they tie it to one with a smaller
    name.
    """
    share = int.from_bytes(hashlib.sha256(f"{seed} split {patient}".encode()).digest()[:8], "big") / 2**64
    names = list(fractions)
    for name, edge in zip(names, np.cumsum(list(fractions.values())), strict=True):
        if share < edge:
            return name
    return names[-1]


def fingerprint(tables: Iterable[pa.Table]) -> str:
    """256 bits over all (key, sha256), whatever their order: equal slices under equal names, however sharded.

    The sum of the SHA-256 of every pair, so that a corpus of any size needs no sorting. It tells two corpora apart; it
    is no defence against someone who forges slices, which the hashes of the slices themselves are.
    """
    total = 0
    for table in tables:
        for batch in table.select(["key", "sha256"]).to_batches(max_chunksize=65536):
            for key, pixels in zip(batch["key"].to_pylist(), batch["sha256"].to_pylist(), strict=True):
                total += int.from_bytes(hashlib.sha256(f"{key} {pixels}\n".encode()).digest(), "big")
    return f"{total % 2**256:064x}"


def merge(folder: Path, shards: Sequence[str], withdrawn: Mapping[str, str]) -> Iterator[pa.Table]:
    """Writes the index from the rows of the shards, in their order, and yields it in pieces, for a summary.

    Volumes that are `withdrawn` get the split "excluded" and the reason. The index is in place when all is consumed.
    """
    gone, why = pa.array(list(withdrawn), pa.string()), pa.array(list(withdrawn.values()), pa.string())
    with aside(folder / INDEX) as file, pq.ParquetWriter(file, SCHEMA, compression="zstd") as writer:
        for start in range(0, len(shards), MERGED):
            tables = [read_part(folder / "rows" / f"{name}.parquet") for name in shards[start : start + MERGED]]
            table = pa.concat_tables([table.replace_schema_metadata(None).cast(SCHEMA) for table in tables])
            if withdrawn:
                found = pc.index_in(table["volume"], gone)
                split = pc.if_else(pc.is_null(found), table["split"], EXCLUDED)
                reason = pc.fill_null(pc.take(why, found), "")
                for name, values in (("split", split), ("excluded", reason)):
                    table = table.set_column(SCHEMA.get_field_index(name), SCHEMA.field(name), values)
            writer.write_table(table.combine_chunks())
            yield table
