"""How the tests damage a corpus: bytes of a shard, values of a table."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

TRAIN = "train-000000"


def tar_of(folder: Path, name: str = TRAIN) -> Path:
    return folder / "shards" / f"{name}.tar"


def members(folder: Path, name: str = TRAIN) -> list[tarfile.TarInfo]:
    with tarfile.open(tar_of(folder, name)) as tar:
        return tar.getmembers()


def overwrite(path: Path, at: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)


def flip(path: Path, at: int, bit: int = 0) -> None:
    with open(path, "rb") as file:
        file.seek(at)
        overwrite(path, at, bytes([file.read(1)[0] ^ 1 << bit]))


def put(table: pa.Table, row: int, **values: object) -> pa.Table:
    for name, value in values.items():
        column = table[name].to_pylist()
        column[row] = value
        at = table.schema.get_field_index(name)
        table = table.set_column(at, table.schema.field(name), pa.array(column, table.schema.field(name).type))
    return table


def rewrite(folder: Path, change: Callable[[list[tuple[tarfile.TarInfo, bytes]]], None]) -> None:
    """Unpacks the training shard, changes its members, packs it as a shard is packed."""
    with tarfile.open(tar_of(folder)) as tar:
        held = [(info, tar.extractfile(info).read()) for info in tar.getmembers()]  # type: ignore[union-attr]
    change(held)
    with tarfile.open(tar_of(folder), "w", format=tarfile.USTAR_FORMAT) as tar:
        for info, data in held:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
