"""The index of a corpus of the size of CT-3M: `python -m tests.benchmarks.bench_index [SLICES]`.

Makes an index of 4 million slices (17,500 volumes of 16 data sets) without shards, and times what opening a corpus and
choosing data sets cost, as wall time and as ratios to reading the same bytes from the page cache; and what memory the
whole of it takes.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_curation.corpus import Corpus
from data_curation.index import INDEX, SCHEMA, fingerprint, read_index

PIECE = 64_000  # slices of a row group: what `merge` writes for 32 shards of 2,000
VOLUME = 228


def piece(start: int, draw: np.random.Generator) -> pa.Table:
    """Rows of made-up slices, with the texts as different from each other as real ones are."""
    number = np.arange(start, start + PIECE)
    volume, z = number // VOLUME, number % VOLUME
    names = np.char.mod("%016x", volume.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    digests = draw.bytes(PIECE * 32).hex()
    columns: dict[str, object] = {
        "key": np.char.add(np.char.add(names, "_"), np.char.mod("%05d", z)),
        "volume": names, "patient": names, "study": names, "duplicate_group": names,
        "dataset": np.char.mod("set%02d", volume % 16),
        "sha256": [digests[64 * i : 64 * i + 64] for i in range(PIECE)],
        "content": [digests[64 * i : 64 * i + 32] for i in range(PIECE)],
        "split": np.where(volume % 20 == 0, "val", "train"), "duplicate": volume % 4 == 0,
        "shard": np.char.mod("train-%06d.tar", number // 2000), "codec": np.full(PIECE, "j2c"),
        "offset": number % 2000 * 150_000, "size": draw.integers(90_000, 220_000, PIECE), "z": z,
        "crc32": draw.integers(0, 2**32, PIECE),
    }  # fmt: skip
    for field in SCHEMA:
        if field.name not in columns:
            columns[field.name] = [""] * PIECE if pa.types.is_string(field.type) else draw.integers(0, 500, PIECE)
    return pa.table({field.name: pa.array(columns[field.name]).cast(field.type) for field in SCHEMA}, SCHEMA)


def seconds(work: Callable[[], object], rounds: int = 3) -> float:
    """The least wall time of a few calls."""
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return min(taken)


def main(slices: int) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        draw = np.random.default_rng(0)
        with pq.ParquetWriter(folder / INDEX, SCHEMA, compression="zstd") as writer:
            for start in range(0, slices, PIECE):
                writer.write_table(piece(start, draw))
        size = (folder / INDEX).stat().st_size
        plain = seconds(lambda: (folder / INDEX).read_bytes())
        opened = seconds(lambda: Corpus(folder))
        chosen = seconds(lambda: Corpus(folder, datasets=["set03", "set07"]))
        rows = read_index(folder, ["dataset"])
        filtered = seconds(lambda: rows.filter(pc.equal(rows["dataset"], "set03")))
        queried = seconds(lambda: pq.read_table(folder / INDEX, columns=["key"], filters=[("dataset", "=", "set03")]))
        counted = pq.read_metadata(folder / INDEX).num_rows
        print(f"index of {counted:,} slices: {size / 1e6:,.0f} MB; reading its bytes {plain:.2f} s")
        print(f"open a corpus: {opened:.2f} s ({opened / plain:.1f} times the bytes); two data sets {chosen:.2f} s")
        print(f"filter by data set: {filtered:.3f} s in memory, {queried:.2f} s from the file")
        start = time.perf_counter()
        fingerprint(batch for batch in (pa.Table.from_batches([b]) for b in pq.ParquetFile(folder / INDEX).iter_batches(
            columns=["key", "sha256"])))  # fmt: skip
        print(f"fingerprint: {time.perf_counter() - start:.1f} s; peak memory {_peak():,.0f} MB")


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 4_000_000)
