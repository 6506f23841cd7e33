"""Speed of the corpus as ratios inside one run: `python tests/benchmarks/bench_corpus.py [FOLDER OF SCANS]`.

Without a folder, phantoms of 512 x 512 pixels are curated. CPU time of one thread, median of rounds, curation and
reading in one round each; the ratios count, the milliseconds are those of the machine.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import webdataset

from data_curation import phantom
from data_curation.corpus import Corpus
from data_curation.curate import Settings, Source, main
from data_curation.slices import decode, encode
from data_curation.volumes import find

ROUNDS = 5


def cpu(work: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Median CPU seconds of a call."""
    taken = []
    for _ in range(rounds):
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return statistics.median(taken)


def bench_curation(scans: Path, root: Path) -> None:
    """Curation end to end against reading the same files with SimpleITK and keeping nothing."""

    def read() -> None:
        for found in find(scans):
            if found.kind == "dicom":
                sitk.GetArrayFromImage(sitk.ReadImage([str(path) for path in found.files]))
            else:
                sitk.GetArrayFromImage(sitk.ReadImage(str(found.path)))

    def settings(name: str) -> Settings:
        return Settings(folder=root / name, datasets=(Source(name="folder", root=scans),), workers=1)

    main(settings("warm-up"))  # imports take longer than a small folder
    curated = cpu(lambda: main(settings("made")), rounds=1)
    folder = root / "made"
    n, alone = len(Corpus(folder, None, duplicates=True)), cpu(read, rounds=1)
    print(
        f"curate: {n / curated:.0f} slices/s/core; SimpleITK reading alone {n / alone:.0f}; "
        f"curate = {curated / alone:.2f} readings"
    )


def bench_codecs(corpus: Corpus) -> None:
    """Decoding against a copy of the raw pixels and against 16-bit PNG."""
    slices = [corpus.hu(i) for i in range(0, len(corpus), max(len(corpus) // 60, 1))]
    raw = [hu.tobytes() for hu in slices]
    floor = cpu(lambda: sum(np.frombuffer(data, np.int16).copy().size for data in raw))
    times = {}
    for codec in ("j2c", "png"):
        stored = [encode(hu, codec) for hu in slices]
        times[codec] = cpu(lambda stored=stored, codec=codec: sum(decode(data, codec).size for data in stored))
        size, ms = sum(map(len, stored)), times[codec] / len(slices) * 1e3
        written = cpu(lambda codec=codec: [encode(hu, codec) for hu in slices], 3) / len(slices) * 1e3
        print(f"{codec}: {ms:.2f} ms to decode = {times[codec] / floor:.1f} copies, {written:.2f} to encode, "
              f"{sum(map(len, raw)) / size:.2f} times smaller than raw")  # fmt: skip
    print(f"png / j2c: {times['png'] / times['j2c']:.2f} times the decoding time")


def bench_reading(corpus: Corpus) -> None:
    """Random access by index against webdataset's stream, both to checked or raw bytes, nothing decoded."""
    order = np.random.default_rng(0).permutation(len(corpus)).tolist()
    urls = [str(path) for path in sorted((corpus.folder / "shards").glob("*.tar"))]
    corpus.encoded(0)
    by_index = cpu(lambda: sum(len(corpus.encoded(i)) for i in order)) / len(order)
    stream = webdataset.WebDataset(urls, shardshuffle=False).to_tuple("j2c", "json")
    streamed = cpu(lambda: sum(1 for _ in stream), 3) / len(Corpus(corpus.folder, None, duplicates=True))
    decoded = cpu(lambda: sum(corpus.hu(i).size for i in order), 3) / len(order)
    print(f"random read: {1 / by_index:,.0f} slices/s/core, CRC compared; stream {1 / streamed:,.0f}; "
          f"{streamed / by_index:.1f} times the stream; with decoding {1 / decoded:,.0f}")  # fmt: skip


if __name__ == "__main__":
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    with tempfile.TemporaryDirectory() as temporary:
        scans = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(temporary, "scans")
        if len(sys.argv) < 2:
            phantom.write("folder", scans, range(3), shape=(40, 512, 512), spacing=(3.0, 0.75, 0.75))
        bench_curation(scans, Path(temporary))
        made = Corpus(Path(temporary, "made"), None)
        bench_codecs(made)
        bench_reading(made)
