"""Weights as bytes: one safetensors file, written whole or not at all and the same for the same weights; and a mark."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from data_curation.aside import aside, sweep

__all__ = ["digest", "write_weights"]

_LENGTH = 8  # bytes before the header, which hold its length


def write_weights(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes aside, flushes, renames. `tensors` are on the CPU; `metadata` are texts for the header.

    The library writes metadata in an order that changes from process to process; here they are sorted, so that two runs
    with equal weights have equal files and a checksum tells whether a run was repeated.
    """
    data = save({name: tensor.contiguous() for name, tensor in tensors.items()}, dict(metadata))
    end = _LENGTH + int.from_bytes(data[:_LENGTH], "little")
    header = json.loads(data[_LENGTH:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the numbers to 8 bytes
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent, f"{path.name}.")
    with aside(path) as file:
        file.write(len(text).to_bytes(_LENGTH, "little"))
        file.write(text)
        file.write(memoryview(data)[end:])


def digest(tensors: Mapping[str, Tensor]) -> Tensor:
    """A mark of tensors on the CPU, int64 [4]: SHA-256 over names, kinds, shapes and bytes."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data)
    return torch.frombuffer(bytearray(found.digest()), dtype=torch.int64)
