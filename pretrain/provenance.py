"""What features are of and by whom: all that decides their bytes, for the folder that holds them and its readers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

import pretrain.methods.multi_teacher
from data_curation.corpus import Corpus
from data_curation.index import fingerprint, read_index
from pretrain.data.cached import FeaturesError, Kept
from pretrain.methods._teachers import built, view_of
from pretrain.settings import Settings
from pretrain.teachers import Teacher, TeacherSettings
from pretrain.weights import digest

__all__ = ["check_cache", "differences", "header_of"]

SLICES = 32  # run through the networks at once
ENTRIES, BYTES = 1024, 2**30  # of a shard, at most
# What decides which part of a slice a crop shows; all else of the crops is the student's alone.
BOXES = ("n_global", "fixed", "global_scale", "ratio", "unit", "global_mm", "flip")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def check_cache(settings: Settings, corpora: Sequence[Corpus]) -> None:
    """Compare what a run's features are of with its own settings, its corpora and the files of its teachers.

    Of a teacher whose file is not there only the settings are compared. Does nothing for a run that reads no features.
    Raises FeaturesError that names every difference, and for features that are not all there.
    """
    cache: Path | None = getattr(settings.method, "cache", None)
    if cache is None:
        return
    kept = Kept(cache, tuple(_teachers(settings)))
    digests = {
        name: digest(_built(name, teacher).weights(lambda text: None))
        for name, teacher in _teachers(settings).items()
        if teacher.source is not None and teacher.source.path.exists()
    }
    lines = differences(kept.header, _compared(settings, corpora, list(digests), digests))
    if lines:
        raise FeaturesError(
            "\n  ".join([f"method.cache: {cache} holds features of another recipe:", *lines])
            + "\nPut back what differs, or make other features: axial features CONFIG folder=OTHER"
        )
    kept.load()


def _teachers(settings: Settings) -> dict[str, TeacherSettings]:
    return cast(pretrain.methods.multi_teacher.Settings, settings.method).active


def _built(name: str, teacher: TeacherSettings) -> Teacher:
    with torch.device("meta"):
        return built(name, teacher)


def _compared(
    settings: Settings, corpora: Sequence[Corpus], known: Sequence[str], digests: Mapping[str, Tensor]
) -> dict[str, Any]:
    """What features are of and by whom, as far as it can be told; of `known` teachers all of it."""
    crops, keys = settings.data.crops, hashlib.sha256()
    for corpus in corpora:
        for i in range(len(corpus)):
            keys.update(f"{corpus.key(i)}\n".encode())
    grid = crops.shapes[0].global_size // settings.model.patch_size
    found = {
        "corpus": {
            "slices": sum(map(len, corpora)),
            "fingerprint": fingerprint(read_index(corpus.folder, ["key", "sha256"]) for corpus in corpora),
            "order": keys.hexdigest(),  # also of the split, and of what is left out as a duplicate
        },
        "data": {
            "seed": settings.data.seed,
            "split": settings.data.split,
            "crops": {name: value for name, value in crops.model_dump(mode="json").items() if name in BOXES},
        },
        "precision": settings.precision,
        "teachers": {
            name: _facts(teacher, _built(name, teacher) if name in known else None, grid, digests.get(name))
            for name, teacher in _teachers(settings).items()
        },
    }
    return cast(dict[str, Any], json.loads(json.dumps(found)))


def _facts(teacher: TeacherSettings, network: Teacher | None, grid: int, mark: Tensor | None) -> dict[str, Any]:
    facts: dict[str, Any] = {"kind": getattr(teacher, "kind", ""), "block": teacher.block, "norm": teacher.norm}
    if mark is not None:
        facts["digest"] = mark.numpy().tobytes().hex()
    if network is not None:
        view = view_of(network, teacher.size, grid)
        window = view.window.model_dump(mode="json")
        return facts | {
            "window": window, "size": view.size, "grid": view.grid, "width": network.dim, "drops": network.drops,
        }  # fmt: skip
    given = {"window": teacher.window and teacher.window.model_dump(mode="json"), "size": teacher.size}
    return facts | {name: value for name, value in given.items() if value is not None}


def header_of(settings: Settings, corpora: Sequence[Corpus], digests: Mapping[str, Tensor]) -> dict[str, Any]:
    """All that the bytes of the shards depend on."""
    header, crops = _compared(settings, corpora, list(_teachers(settings)), digests), settings.data.crops
    assert crops.fixed is not None
    size = DTYPES[settings.precision].itemsize
    each = sum((1 + facts["grid"] ** 2) * facts["width"] * size for facts in header["teachers"].values())
    entries = header["corpus"]["slices"] * crops.fixed * crops.n_global
    most = min(ENTRIES, BYTES // each) // (SLICES * crops.n_global)
    of_shard = max(1, most) * SLICES * crops.n_global
    return {
        "format": 1, **header,
        "batch": SLICES, "entries": entries, "entry_bytes": each, "shard_entries": of_shard,
        "shards": -(-entries // of_shard),
    }  # fmt: skip


def _flat(tree: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= _flat(value, f"{above}{name}.") if isinstance(value, Mapping) else {f"{above}{name}": value}
    return found


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """A line for each value of our header that is another one in theirs."""
    there, here = _flat(theirs), _flat(ours)

    def short(value: Any) -> str:
        return value[:12] if isinstance(value, str) and len(value) == 64 else json.dumps(value)

    def said(key: str) -> str:
        return f"{key}: {short(there[key])} there, {short(here[key])} here" if key in there else f"{key}: not there"

    return [said(key) for key, value in here.items() if key not in there or there[key] != value]
