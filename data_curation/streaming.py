"""A corpus as a stream of whole shards, by webdataset: for object stores, and for loaders that others wrote.

webdataset's own `.decode()` unpickles members called .pkl, .pyd or .pth, and its `pipe:` URLs run a shell. Here only
the endings of `slices.CODECS` and JSON are decoded, each from raw bytes; a sample with any other member is refused, and
so is an address that is neither a file nor one of `REMOTE`. For training from a file system `Corpus` is faster and
resumes exactly.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from data_curation.grid import AIR
from data_curation.index import CorpusError, read_index
from data_curation.slices import CODECS, SliceError, checksum, decode, sha256
from data_curation.spans import Span, rows_of, spans

__all__ = ["REMOTE", "Sample", "stream"]

REMOTE = ("http", "https", "gs", "hf", "ais")  # what webdataset can open without a shell
_COPY = "copy the shard again"
_DAMAGED = f"the stored bytes are damaged (checksum differs); {_COPY}"
_ENDINGS = (*CODECS, "json")


@dataclass(frozen=True)
class Sample:
    """One slice: its name in every copy of the corpus, int16 HU [Y, X], and its JSON."""

    key: str
    hu: NDArray[np.int16]
    facts: Mapping[str, Any]


def stream(
    source: Path | str | Sequence[str],
    split: str | None = "train",
    *,
    corpus: Path | str | None = None,
    duplicates: bool = False,
    frame: bool = False,
    shuffle: int = 0,
    seed: int = 0,
    epoch: int = 0,
) -> Iterable[Sample]:
    """The slices of a corpus folder, or of shards given as files and URLs ("a-{000000..000003}.tar" is understood).

    With a corpus folder, as `source` or, for shards elsewhere, as `corpus` (its index.parquet is enough), the index
    rules: `split` and `duplicates` mean what they do for `Corpus`, excluded slices are left out, the checksum of the
    stored bytes is compared before they are decoded, and a shard that delivers fewer or other samples than the index
    has is an error. Without one, `split` is compared with the sample's JSON, the decoded pixels with its SHA-256, and
    a shard that lost samples cannot be told from a small one.

    `shuffle` > 0 draws the order of the shards, and of the samples in a buffer of so many, from `seed` and `epoch`.
    `frame` puts a slice into the frame of its scan, with air around it. What comes back is an IterableDataset for
    torch's DataLoader (`batch_size=None`): ranks and workers share the shards, each is read by one of them.
    Iterating raises CorpusErrors that name shard, sample and member.
    """
    from webdataset import DataPipeline, SimpleShardList, split_by_node, split_by_worker

    folder = Path(source) if isinstance(source, str | Path) and Path(source).is_dir() else None
    home = folder or (Path(corpus) if corpus is not None else None)
    known = {part.shard: part for part in spans(home)} if home is not None else None
    if folder is not None:
        urls = [str(folder / "shards" / name) for name in _wanted(folder, split, duplicates)]
    else:
        urls = _addresses([str(source)] if isinstance(source, str | Path) else source)
    if not urls:
        raise CorpusError(f"{source} has no slice of the split {split!r}")
    if shuffle:
        random.Random(f"{seed} {epoch}").shuffle(urls)  # before ranks share them: all must draw the same
    reader = _Reader(home, known, split, duplicates, frame, shuffle, f"{seed} {epoch}")
    pipeline: Iterable[Sample] = DataPipeline(SimpleShardList(urls), split_by_node, split_by_worker, reader)
    return pipeline


def _addresses(given: Sequence[str]) -> list[str]:
    """Braces filled in, and everything refused that is no file and no URL that is safe to open."""
    from braceexpand import braceexpand

    urls = []
    for url in (url for text in given for url in braceexpand(str(text))):
        scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):", url)
        if url == "-" or (scheme and scheme[1].lower() not in (*REMOTE, "file")):
            what = "runs a shell command" if scheme and scheme[1].lower() == "pipe" else "is no shard"
            raise CorpusError(f"{url!r} {what} and is refused: give files, or URLs of {', '.join(REMOTE)}")
        urls.append(url)
    return urls


def _wanted(folder: Path, split: str | None, duplicates: bool) -> list[str]:
    """Shards that hold at least one slice that is asked for."""
    index = read_index(folder, ["shard", "split", "duplicate"])
    if split is not None:
        index = index.filter(pc.equal(index["split"], split))
    if not duplicates:
        index = index.filter(pc.invert(index["duplicate"]))
    names: list[str] = pc.unique(index["shard"]).to_pylist()
    return names


def _opened(url: str) -> IO[bytes]:
    """The bytes of a shard. No environment variable may turn its address into another one, as gopen lets them."""
    from webdataset.gopen import gopen_schemes

    scheme, colon, rest = url.partition(":")
    if colon and scheme.lower() in REMOTE:
        remote: IO[bytes] = gopen_schemes[scheme.lower()](url, "rb", 8192)
        return remote
    return open(re.sub(r"^//", "", rest) if scheme == "file" else url, "rb")


@dataclass(frozen=True)
class _Reader:
    """The last stage of the pipeline: shards' addresses in, samples out. Pickled into each worker."""

    home: Path | None
    known: Mapping[str, Span] | None
    split: str | None
    duplicates: bool
    frame: bool
    shuffle: int
    draw: str

    def __call__(self, shards: Iterable[Mapping[str, str]]) -> Iterator[Sample]:
        raw = (one for shard in shards for one in self._raw(shard["url"]))
        for url, key, ending, data, facts in self._mixed(raw):
            yield Sample(key, self._hu(f"{url}, sample {key}", data, ending, facts), facts)

    def _mixed(self, raw: Iterator[Any]) -> Iterator[Any]:
        """In the order drawn; what waits is encoded still, hence small."""
        if not self.shuffle:
            return raw
        from webdataset import shuffle

        mixed: Iterator[Any] = shuffle(self.shuffle, initial=self.shuffle, rng=random.Random(self.draw))(raw)
        return mixed

    def _raw(self, url: str) -> Iterator[tuple[str, str, str, bytes, dict[str, Any]]]:
        """(shard, key, ending, encoded slice, JSON) of the samples of one shard that are asked for."""
        rows = self._rows(url)
        missing = dict.fromkeys(rows) if rows is not None else None
        for sample in _samples(url):
            key, ending, data, facts = _taken_apart(url, sample)
            if rows is None or missing is None:
                if facts.get("crc32", checksum(data)) != checksum(data):
                    raise CorpusError(f"{url}, sample {key}: {_DAMAGED}")
                if self.split is None or facts.get("split") == self.split:
                    yield url, key, ending, data, facts
                continue
            if key not in missing:
                what = "is there twice" if key in rows else "is not known to the index"
                raise CorpusError(f"{url}, sample {key}: {what}; {_COPY}")
            del missing[key]
            split, duplicate, crc = rows[key]
            if checksum(data) != crc:
                raise CorpusError(f"{url}, sample {key}: {_DAMAGED}")
            if (self.split is None or split == self.split) and (self.duplicates or not duplicate):
                yield url, key, ending, data, facts
        if missing and rows is not None:
            came = f"{len(rows) - len(missing)} of {len(rows)} samples came"
            first = next(iter(missing))
            raise CorpusError(f"{url}: {came}, the first that did not is {first}; {_COPY}, or see `axial verify`")

    def _rows(self, url: str) -> dict[str, tuple[str, bool, int]] | None:
        """What the index says of a shard: (split, duplicate, checksum) by key; None where there is no index."""
        if self.home is None or self.known is None:
            return None
        name = url.partition("?")[0].rpartition("/")[2]
        if name not in self.known:
            raise CorpusError(f"{url}: the index of {self.home} has no shard {name}")
        columns = ["key", "split", "duplicate", "crc32"]
        table = rows_of(self.home, self.known[name], columns)
        keys, *values = (table[column].to_pylist() for column in columns)
        return dict(zip(keys, zip(*values, strict=True), strict=True))

    def _hu(self, place: str, data: bytes, ending: str, facts: Mapping[str, Any]) -> NDArray[np.int16]:
        try:
            hu = decode(data, ending)
            if self.known is None and sha256(hu) != facts["sha256"]:
                raise CorpusError(f"{place}: the decoded pixels are not those that were curated; {_COPY}")
            if not self.frame or list(hu.shape) == facts["frame_yx"]:
                return hu
            whole = np.full(facts["frame_yx"], AIR, np.int16)
            top, left = facts["box_yx"]
            whole[top : top + hu.shape[0], left : left + hu.shape[1]] = hu
            return whole
        except SliceError as error:
            raise CorpusError(f"{place}: {error}; {_COPY}") from None
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, CorpusError):
                raise
            raise CorpusError(f"{place}: its JSON does not fit ({type(error).__name__}: {error}); {_COPY}") from None


def _samples(url: str) -> Iterator[dict[str, Any]]:
    """The raw samples of a shard, members by their endings."""
    import tarfile

    from webdataset.tariterators import group_by_keys, tar_file_expander

    try:
        with _opened(url) as file:
            yield from group_by_keys(_permitted(url, tar_file_expander([{"url": url, "stream": file}])))
    except CorpusError:
        raise
    except (OSError, EOFError, ValueError, tarfile.TarError) as error:
        raise CorpusError(f"{url}: cannot be read ({error.args[0] if error.args else error}); {_COPY}") from None


def _permitted(url: str, members: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The members as they come; one that is no part of a slice ends it all. `{}` marks the end of a shard."""
    for member in members:
        name = member.get("fname", "json.json")
        key, _, ending = name.rpartition("/")[2].partition(".")
        if ending not in _ENDINGS:
            known = ", ".join(_ENDINGS)
            raise CorpusError(f"{url}, sample {key}: the member {name} is refused: a shard holds only {known}")
        yield member


def _taken_apart(url: str, sample: Mapping[str, Any]) -> tuple[str, str, bytes, dict[str, Any]]:
    """(key, ending of the slice, its bytes, its JSON)."""
    key = sample["__key__"]
    stored = [ending for ending in CODECS if ending in sample]
    if len(stored) != 1 or "json" not in sample:
        endings = ", ".join(ending for ending in _ENDINGS if ending in sample)
        raise CorpusError(f"{url}, sample {key}: holds {endings}, not one slice and its JSON; {_COPY}")
    try:
        facts = json.loads(sample["json"])
    except ValueError as error:
        raise CorpusError(f"{url}, sample {key}: its JSON cannot be read ({error}); {_COPY}") from None
    if not isinstance(facts, dict):
        raise CorpusError(f"{url}, sample {key}: its JSON is no object; {_COPY}")
    return key, stored[0], sample[stored[0]], facts
