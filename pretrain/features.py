"""`axial features`: what a recipe's frozen teachers make of every fixed crop of a corpus, kept for any number of runs.

One shard = one task = one proof, as in a corpus: a plain WebDataset tar, written aside, flushed and renamed, then its
rows. A shard is always run through the networks in the same batches, by whichever rank, so its bytes do not depend on
the number of ranks, nor on where a killed run was begun again. What the features are is said in features.json, with
which a run that reads them compares its own settings, files and corpus.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor

import pretrain.methods.multi_teacher
from data_curation.aside import aside, sweep, write_parquet
from data_curation.corpus import Corpus, CorpusError
from data_curation.index import read_part
from data_curation.shards import BLOCK, OWNER
from data_curation.slices import checksum
from launch.distributed import WAIT_S, World, barrier, world
from launch.log import tell
from launch.progress import Progress
from launch.run import Outcome, command, write_text
from pretrain.data.batch import Batch
from pretrain.data.cached import (
    HEADER,
    INDEX,
    SCHEMA,
    FeaturesError,
    is_proven,
    plan_of,
    read_header,
    shard_name,
)
from pretrain.data.stream import batches
from pretrain.loop import Guard
from pretrain.methods import build_method
from pretrain.methods.multi_teacher import MultiTeacher
from pretrain.parallel import fill, place_constant
from pretrain.provenance import differences, header_of
from pretrain.settings import Settings
from pretrain.weights import digest

__all__ = ["dry_run", "main"]


def main(settings: Settings) -> Outcome:
    """Run the recipe's teachers, unmasked, over each crop of each slice, or go on where the folder stands.

    The shards are shared out over the ranks by number. Of the settings only the teachers, `data`, `model.patch_size`,
    `precision`, `device` and `parallel.compile` matter. Raises FeaturesError for a recipe without fixed crops or
    without teachers, and for a folder with features of another recipe; StreamError for a slice that cannot be read.
    """
    recipe = _recipe(settings)
    recipe.check_sources()
    corpora = _corpora(recipe)
    with world(recipe.device, WAIT_S) as here:
        say: Callable[[str], None] = tell if here.rank == 0 else lambda text: None
        torch.set_float32_matmul_precision("high" if recipe.precision == "bf16" else "highest")
        method = build_method(recipe, Guard(here.device))
        assert isinstance(method, MultiTeacher)
        states = method.fixed(say)["teachers"]
        header = header_of(recipe, corpora, {name: digest(state) for name, state in states.items()})
        _claim(recipe.folder, header, here)
        say(_said(header))
        networks = method.networks["teachers"]
        place_constant(networks, here, recipe.parallel, recipe.precision)
        for name, state in states.items():
            fill(networks[name], state)
        _make(recipe, header, method, corpora, here)
        barrier()
        if here.rank == 0:
            _merge(recipe.folder, header)
    fixed = recipe.data.crops.fixed
    given = f"method.cache={settings.folder}", f"data.crops.fixed={fixed}"
    return Outcome(made=(str(settings.folder / INDEX),), next=(command("pretrain", "CONFIG", "folder=RUN", *given),))


def dry_run(settings: Settings) -> str:
    """Say how much would be made. Raises as `main` does, but for a corpus that is not there."""
    recipe = _recipe(settings)
    recipe.check_sources()
    try:
        return _said(header_of(recipe, _corpora(recipe), {}))
    except CorpusError as error:
        return f"warning: {error}"


def _recipe(settings: Settings) -> Settings:
    """The settings without all that is a student's alone."""
    if not isinstance(settings.method, pretrain.methods.multi_teacher.Settings):
        kind = getattr(settings.method, "kind", "")
        raise FeaturesError(f"method.kind: {kind} has no teachers to make features; give a recipe of multi_teacher")
    if settings.data.crops.fixed is None:
        raise FeaturesError(
            "data.crops.fixed: features are kept of fixed crops only; give how many different ones each slice is to "
            "have, such as data.crops.fixed=4"
        )
    method = settings.method.model_copy(update={"cache": None})
    parallel = settings.parallel.model_copy(update={"teachers": "replicate"})  # ranks go through shards on their own
    return settings.model_copy(update={"method": method, "init_from": None, "parallel": parallel})


def _corpora(settings: Settings) -> list[Corpus]:
    return [Corpus(source.path, settings.data.split, mapped=False) for source in settings.data.sources]


def _said(header: Mapping[str, Any]) -> str:
    entries, each = header["entries"], header["entry_bytes"]
    return (
        f"features: {entries:,} crops of {header['corpus']['slices']:,} slices, {each / 2**10:,.0f} KiB each, "
        f"{entries * each / 2**30:,.2f} GiB in {header['shards']:,} shards"
    )


def _claim(folder: Path, header: Mapping[str, Any], here: World) -> None:
    """Make the folder that of these features. Raises FeaturesError where it is that of others."""
    for part in ("shards", "rows"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    if (folder / HEADER).exists():
        if lines := differences(read_header(folder), header):
            raise FeaturesError(
                "\n  ".join([f"{folder} holds features of another recipe:", *lines])
                + "\nPut back what differs, or choose another folder="
            )
    elif here.rank == 0:
        write_text(folder / HEADER, json.dumps(header, indent=1) + "\n")


@dataclass(frozen=True)
class _Each:
    """Samples: each crop of each slice once, of these shards, one after the other; then the same again."""

    shards: Sequence[int]
    of_shard: int  # samples
    slices: int
    fixed: int

    def numbers(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Samples as they are numbered in the whole folder; the last shard is filled up with the first ones."""
        turn, within = np.divmod(samples, self.of_shard)
        numbers: NDArray[np.int64] = np.array(self.shards)[turn % len(self.shards)] * self.of_shard + within
        return numbers % (self.slices * self.fixed)

    def at(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        return self.numbers(samples) // self.fixed

    def visits(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        return self.numbers(samples) % self.fixed

    def following(self, sample: int, count: int) -> list[int]:
        """None: a slice that cannot be read has no features."""
        return []


def _make(
    settings: Settings, header: Mapping[str, Any], method: MultiTeacher, corpora: Sequence[Corpus], here: World
) -> None:
    """Make this rank's share of the shards that are not proven."""
    folder, plan, crops = settings.folder, plan_of(header), settings.data.crops
    todo = [number for number in range(header["shards"]) if not is_proven(folder, number, plan)]
    mine = [number for number in todo if number % here.size == here.rank]
    if not mine:
        return
    (folder / INDEX).unlink(missing_ok=True)
    assert crops.fixed is not None
    samples = _Each(mine, header["shard_entries"] // crops.n_global, header["corpus"]["slices"], crops.fixed)
    own = {"batch_size": header["batch"], "max_unreadable": 0}
    stream = batches(
        settings.data.model_copy(update=own),
        world=replace(here, rank=0, size=1),
        patch_size=settings.model.patch_size,
        in_channels=settings.model.in_channels,
        start=0,
        corpus=corpora,
        views=method.views(crops.shapes[0].global_size, whole=True),
        samples=samples,
    )
    try:
        with Progress(len(mine), "features", "shards", active=here.rank == 0) as bar:
            for number in mine:
                _write_shard(folder, number, header, (_looked(method, batch) for batch in stream))
                bar.advance()
    finally:
        stream.close()


_Made = tuple[tuple[str, ...], dict[str, Tensor]]
"""Keys of slices, and of each teacher NAME.patches [G*B, N, D] and NAME.cls [G*B, D] of their crops, on the CPU."""


def _looked(method: MultiTeacher, batch: Batch) -> _Made:
    found: dict[str, Tensor] = {}
    for name, looked in zip(method.networks["teachers"], method.look(batch), strict=True):
        found |= {f"{name}.patches": looked.patches.cpu(), f"{name}.cls": looked.cls.cpu()}
    return batch.keys, found


def _write_shard(folder: Path, number: int, header: Mapping[str, Any], made: Iterator[_Made]) -> None:
    """Write one shard from as many batches as it takes, then its rows; a batch is written while the next is made."""
    from webdataset import TarWriter  # takes a second

    name, (first, end) = shard_name(number), _entries(header, number)
    proof, crops = folder / "rows" / f"{name}.parquet", header["data"]["crops"]
    proof.unlink(missing_ok=True)  # of an earlier shard; it must not vouch for the new one
    for part in ("shards", "rows"):
        sweep(folder / part, f"{name}.")
    rows: list[dict[str, Any]] = []

    def append(at: int, keys: tuple[str, ...], features: Mapping[str, Tensor]) -> None:
        for entry in range(at, min(end, at + len(keys) * crops["n_global"])):
            image, crop = divmod(entry - at, crops["n_global"])
            row = crop * len(keys) + image
            data = save({name: tensor[row].contiguous() for name, tensor in features.items()})
            key = f"{keys[image]}_{entry % (crops['fixed'] * crops['n_global'])}"
            place = {"offset": tar.tarstream.offset + BLOCK, "size": len(data), "crc32": checksum(data)}
            tar.write({"__key__": key, "safetensors": data})
            rows.append({"entry": entry, "key": key, "shard": f"{name}.tar", **place})

    owned = {"user": OWNER, "group": OWNER, "mode": 0o644, "mtime": 0}
    with aside(folder / "shards" / f"{name}.tar") as file:
        with TarWriter(file, **owned, compress=False, encoder=False) as tar, ThreadPoolExecutor(1) as pool:
            written: Future[None] | None = None
            for at in range(first, end, header["batch"] * crops["n_global"]):
                features = next(made)
                if written is not None:
                    written.result()
                written = pool.submit(append, at, *features)
            if written is not None:
                written.result()
        size = file.tell()
    vouched = {"plan": plan_of(header), "tar_bytes": str(size)}
    write_parquet(proof, pa.Table.from_pylist(rows, SCHEMA).replace_schema_metadata(vouched))


def _entries(header: Mapping[str, Any], number: int) -> tuple[int, int]:
    """The first entry of a shard, and the one after its last."""
    first: int = number * header["shard_entries"]
    return first, min(first + header["shard_entries"], header["entries"])


def _merge(folder: Path, header: Mapping[str, Any]) -> None:
    """Write the index, which says that all is there."""
    plan, shards = plan_of(header), range(header["shards"])
    if lacking := [shard_name(number) for number in shards if not is_proven(folder, number, plan)]:
        raise FeaturesError(f"{folder}: {lacking[0]} is gone again; run the same command again")
    tables = [read_part(folder / "rows" / f"{shard_name(number)}.parquet") for number in shards]
    whole = pa.concat_tables([table.replace_schema_metadata(None) for table in tables])
    write_parquet(folder / INDEX, whole.replace_schema_metadata({"plan": plan}))
