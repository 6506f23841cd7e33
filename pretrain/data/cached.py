"""Features that teachers once made of fixed crops: the folder that `axial features` wrote, read entry by entry.

    features.json     what they are of, and by whom: the header
    shards/*.tar      plain WebDataset: KEY_CROP.safetensors, with NAME.patches [N, D] and NAME.cls [D] of each teacher
    rows/*.parquet    the entries of one shard; its proof that it is whole
    index.parquet     all rows, once every shard is there

Entry e is crop e % crops of slice e // crops, in the order of the corpus. A reader may be pickled into a worker or live
on through a fork; each process opens shards of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from data_curation.slices import checksum
from launch.run import RunError, read_json
from pretrain.data.settings import StreamError
from pretrain.data.views import TeacherView
from pretrain.data.window import HuWindow

__all__ = ["HEADER", "INDEX", "SCHEMA", "FeaturesError", "Kept", "is_proven", "plan_of", "read_header", "shard_name"]

HEADER, INDEX = "features.json", "index.parquet"
OPEN_SHARDS = 128  # file descriptors kept open by a reader
SCHEMA = pa.schema(
    [
        pa.field(name, kind, nullable=False, metadata={"description": meaning})
        for name, kind, meaning in (
            ("entry", pa.int64(), "number of the crop: slices in the order of the corpus, each with all its crops"),
            ("key", pa.string(), "name of the sample in its shard: that of the slice, and the number of the crop"),
            ("shard", pa.string(), "file in shards/"),
            ("offset", pa.int64(), "first byte of the stored features in the shard"),
            ("size", pa.int32(), "bytes of the stored features"),
            ("crc32", pa.uint32(), "CRC-32 of the stored features, to be compared before they are used"),
        )
    ]
)


class FeaturesError(StreamError):
    """Features that cannot be made, or read as they are: what is wrong, and what to do."""


def read_header(folder: Path) -> dict[str, Any]:
    """What the features in a folder are. Raises FeaturesError where there are none."""
    try:
        header = read_json(folder / HEADER)
    except RunError as error:
        raise FeaturesError(f"method.cache: {error}") from None
    if header is None:
        raise FeaturesError(
            f"method.cache: {folder} holds no features ({HEADER} is missing); make them with `axial features CONFIG "
            f"folder={folder}`"
        )
    return header


def plan_of(header: Mapping[str, Any]) -> str:
    """Names everything that the bytes of the shards depend on."""
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()


def shard_name(number: int) -> str:
    """Of a shard's files, without ending."""
    return f"shard-{number:06d}"


def is_proven(folder: Path, number: int, plan: str) -> bool:
    """Are a shard and its rows there, by this plan and whole?"""
    name = shard_name(number)
    try:
        proof = pq.read_schema(folder / "rows" / f"{name}.parquet").metadata
        size = (folder / "shards" / f"{name}.tar").stat().st_size
    except (OSError, pa.ArrowInvalid):
        return False
    return bool(proof.get(b"plan") == plan.encode() and proof.get(b"tar_bytes") == str(size).encode())


class Kept:
    """The features of some of the teachers in a folder, by entry. Raises FeaturesError where the folder has none."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder, self.names = folder, tuple(names)
        self.header = read_header(folder)
        there: dict[str, dict[str, Any]] = self.header["teachers"]
        if missing := [name for name in names if name not in there]:
            raise FeaturesError(
                f"method.cache: {folder} has no features of {', '.join(missing)}; it has those of {', '.join(there)}"
            )
        self.teachers = {name: there[name] for name in names}
        self._descriptors: OrderedDict[str, int] = OrderedDict()
        self._rows: tuple[list[str], NDArray[np.int64], NDArray[np.int32], NDArray[np.uint32]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "names": self.names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]  # the index is read again: smaller than what would be sent
        self.load()

    def __del__(self) -> None:
        for descriptor in getattr(self, "_descriptors", {}).values():
            os.close(descriptor)

    @property
    def rules(self) -> dict[str, TeacherView]:
        """How each teacher saw a crop, all of it."""
        return {
            name: TeacherView(HuWindow.model_validate(facts["window"]), facts["size"], facts["grid"], 0.0)
            for name, facts in self.teachers.items()
        }

    @property
    def widths(self) -> dict[str, int]:
        """D_m of each teacher."""
        return {name: facts["width"] for name, facts in self.teachers.items()}

    def load(self) -> None:
        """Read the index. Raises FeaturesError where shards are still missing, with the command that makes them."""
        if self._rows is not None:
            return
        plan = plan_of(self.header)
        try:
            table = pq.read_table(self.folder / INDEX, memory_map=False, read_dictionary=["shard"])
            found = (table.schema.metadata or {}).get(b"plan", b"").decode()
        except (OSError, pa.ArrowInvalid):
            found = ""
        if found != plan:
            shards = self.header["shards"]
            done = sum(is_proven(self.folder, number, plan) for number in range(shards))
            raise FeaturesError(
                f"method.cache: {self.folder} is not finished, {done} of {shards} shards are there; run "
                f"`{self._command()}` to the end"
            )
        shard = table["shard"].unify_dictionaries().combine_chunks()
        assert np.array_equal(table["entry"].to_numpy(), np.arange(self.header["entries"]))
        per = self.header["shard_entries"]
        assert np.array_equal(shard.indices.to_numpy(), np.arange(self.header["entries"]) // per)
        self._rows = shard.dictionary.to_pylist(), *(table[name].to_numpy() for name in ("offset", "size", "crc32"))

    def _command(self) -> str:
        """The command that made the folder."""
        try:
            starts = (read_json(self.folder / "run.json") or {}).get("starts") or [{}]
        except RunError:
            starts = [{}]
        return shlex.join(starts[-1].get("command") or ["axial", "features", "CONFIG", f"folder={self.folder}"])

    def read(self, entries: Sequence[int], kept: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        """Of each teacher the class token and the patches of these entries, [E, 1 + K_m, D_m] as they were stored.

        `kept` int64 [E, K_m] are a teacher's patches; None: all. Raises FeaturesError for an entry that cannot be read.
        """
        made: list[Tensor] = []
        for row, entry in enumerate(entries):
            parts = self._entry(entry)
            for number, name in enumerate(self.names):
                own = kept[number]
                patches, cls = parts[f"{name}.patches"], parts[f"{name}.cls"]
                if not row:
                    count = len(patches) if own is None else own.shape[1]
                    made.append(patches.new_empty(len(entries), 1 + count, patches.shape[1]))
                out = made[number][row]
                out[0] = cls
                if own is None:
                    out[1:] = patches
                else:
                    torch.index_select(patches, 0, own[row], out=out[1:])
        return tuple(made)

    def _entry(self, entry: int) -> dict[str, Tensor]:
        self.load()
        assert self._rows is not None
        shards, offsets, sizes, checksums = self._rows
        shard = shards[entry // self.header["shard_entries"]]
        place = f"{self.folder / 'shards' / shard}, entry {entry}"
        remedy = "delete that shard and run the same `axial features` again"
        try:
            data = os.pread(self._descriptor(shard), int(sizes[entry]), int(offsets[entry]))
        except OSError as error:
            raise FeaturesError(f"{place}: cannot be read ({error.strerror}); {remedy}") from None
        if len(data) != sizes[entry]:
            raise FeaturesError(f"{place}: the shard is cut short; {remedy}")
        if checksum(data) != checksums[entry]:
            raise FeaturesError(f"{place}: the stored bytes are damaged (checksum differs); {remedy}")
        try:
            found: dict[str, Tensor] = load(data)
        except SafetensorError as error:
            raise FeaturesError(f"{place}: is no safetensors file ({error}); {remedy}") from None
        return found

    def _descriptor(self, shard: str) -> int:
        if shard not in self._descriptors:
            self._descriptors[shard] = os.open(self.folder / "shards" / shard, os.O_RDONLY | os.O_CLOEXEC)
            if len(self._descriptors) > OPEN_SHARDS:
                os.close(self._descriptors.popitem(last=False)[1])
        self._descriptors.move_to_end(shard)
        return self._descriptors[shard]
