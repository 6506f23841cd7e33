"""What a stored slice costs: `python -m tests.benchmarks.bench_corpus [FOLDER OF SCANS]`.

The table that the codecs were chosen by (bytes, encoding, decoding; of whole frames and of the boxes around the body),
and random reads by index against webdataset's stream. Without a folder, phantoms of 512 x 512 pixels are curated. CPU
time of one thread, median of rounds; the ratios count, the milliseconds are those of the machine.
"""

from __future__ import annotations

import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import webdataset
from numpy.typing import NDArray
from PIL import Image

from data_curation import phantom
from data_curation.corpus import Corpus
from data_curation.curate import Settings, Source, main
from data_curation.slices import CODECS, SliceRule, decode, encode

ROUNDS = 5
Pack = Callable[[NDArray[np.int16]], bytes]
Unpack = Callable[[bytes], NDArray[Any]]


def cpu(work: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Median CPU seconds of a call."""
    taken = []
    for _ in range(rounds):
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return statistics.median(taken)


def png(hu: NDArray[np.int16]) -> bytes:
    """What people store: a 16-bit PNG by PIL at its default level, 6."""
    file = io.BytesIO()
    Image.fromarray((hu.astype(np.int32) + 32768).astype(np.uint16)).save(file, "PNG", compress_level=6)
    return file.getvalue()


def unpng(data: bytes) -> NDArray[np.uint16]:
    return np.asarray(Image.open(io.BytesIO(data)))


def bench_codecs(whole: Corpus, corpus: Corpus) -> None:
    """One line a codec, first of whole slices, then of the boxes that are stored."""
    chosen = range(0, len(corpus), max(len(corpus) // 60, 1))
    frames, boxes = [whole.hu(i) for i in chosen], [corpus.hu(i) for i in chosen]
    raw = sum(hu.nbytes for hu in frames)
    print(f"{'':14}{'of raw':>8}{'encode ms':>11}{'decode ms':>11}{'of PNG':>8}   ({len(frames)} slices)")
    codecs: dict[str, tuple[Pack, Unpack]] = {"PNG (PIL)": (png, unpng)}
    codecs |= {name: (partial(encode, codec=name), partial(decode, codec=name)) for name in CODECS}
    for what, slices in (("frame", frames), ("box", boxes)):
        first = 0.0
        for name, (pack, unpack) in codecs.items():
            stored = list(map(pack, slices))
            written = cpu(lambda pack=pack, slices=slices: list(map(pack, slices)), 1)  # type: ignore[misc]
            read = cpu(lambda unpack=unpack, stored=stored: list(map(unpack, stored)))  # type: ignore[misc]
            first = first or read
            write_ms, read_ms = (seconds / len(slices) * 1e3 for seconds in (written, read))
            size = sum(map(len, stored)) / raw
            print(f"{what:6}{name:10}{size:6.3f}{write_ms:11.2f}{read_ms:11.2f}{read / first:8.2f}")


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
        sources = (Source(name="folder", root=scans),)
        frames, made = Path(temporary, "frames"), Path(temporary, "made")
        main(Settings(folder=frames, datasets=sources, slices=SliceRule(box="none")))
        main(Settings(folder=made, datasets=sources))
        bench_codecs(Corpus(frames, None), Corpus(made, None, frame=False))
        bench_reading(Corpus(made, None, frame=False))
