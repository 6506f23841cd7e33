"""A corpus, teachers and what they make of it, made up on the spot, for tests of kept features."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from data_curation import curate, phantom
from launch.crew import Workers
from launch.settings import load
from pretrain import features, provenance, train
from pretrain.models.vit import VitSettings
from pretrain.settings import Settings
from tests.pretrain.teacher_files import write_export

__all__ = [
    "FIXED", "NAMES", "REPOSITORY", "SHARDS", "SLICES", "bytes_of", "copied", "make", "run", "settings", "small",
    "vit", "write_all", "write_corpus",
]  # fmt: skip

REPOSITORY = Path(__file__).resolve().parents[2]
STEPS, SLICES, FIXED = 6, 15, 2
SHARDS = 8  # of 4 entries: 30 crops
NAMES = ("one", "two", "three")


def write_corpus(folder: Path, cases: range) -> None:
    phantom.write("folder", folder / "scans", cases, shape=(5, 64, 64), spacing=(5.0, 2.0, 2.0))
    given = {
        "folder": folder / "corpus",
        "datasets": [{"name": "folder", "root": folder / "scans"}],
        "split": {"train": 1, "val": 0},
    }
    curate.main(curate.Settings.model_validate(given), Workers(0))


def write_all(folder: Path) -> Path:
    """A corpus of 15 slices, three teachers of which one has another grid, and what they make of it."""
    write_corpus(folder, range(3))
    for seed, (name, width, patch) in enumerate(zip(NAMES, (32, 48, 32), (16, 16, 8), strict=True)):
        write_export(folder / f"{name}.safetensors", vit(width, patch), seed)
    make(folder, folder / "cache")
    return folder


def vit(width: int, patch: int = 16) -> VitSettings:
    return VitSettings(size="custom", width=width, depth=2, heads=2, in_channels=1, layerscale=None, patch_size=patch)


def settings(root: Path, folder: Path, *more: str) -> Settings:
    teachers = [f"method.teachers.{n}={{kind: axial, weights: {root / n}.safetensors, mask: 0}}" for n in NAMES]
    teachers.append("method.teachers.three.size=64")
    return load(
        Settings,
        None,
        [
            f"folder={folder}", f"steps={STEPS}", "precision=fp32", "device=cpu", "log.every=1",
            f"data.corpus={root / 'corpus'}", "data.batch_size=4", "data.workers=0",
            "watch.every=0", "log.tensorboard=false",
            "watch.images_every=0", "model={size: custom, width: 32, depth: 2, heads: 2, in_channels: 1}",
            f"data.crops={{global_size: 64, n_global: 1, n_local: 0, fixed: {FIXED}}}", "method.kind=multi_teacher",
            *teachers, "method.adapter.slices=64", "optim.lr={peak: 2e-3, warmup: 0.1}", "optim.lr_rule=none", *more,
        ],
    )  # fmt: skip


def small(put: Callable[..., None] = setattr) -> None:
    """Shards of four entries, made in batches of two slices."""
    put(provenance, "SLICES", 2)
    put(provenance, "ENTRIES", 4)


def make(root: Path, folder: Path, *more: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        small(patch.setattr)
        features.main(settings(root, folder, *more))
    return folder


def bytes_of(folder: Path) -> dict[str, str]:
    files = [*folder.glob("shards/*"), *folder.glob("rows/*"), folder / "features.json", folder / "index.parquet"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}


def run(root: Path, folder: Path, *more: str) -> list[dict[str, float]]:
    """Train, and give what was logged of each step."""
    folder.mkdir(parents=True, exist_ok=True)
    train.main(settings(root, folder, *more))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    names = [name for name in rows[0] if name.startswith(("loss", "term/", "gate/"))]
    return [{name: row[name] for name in names} for row in rows]


def copied(root: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(root / "cache", tmp_path / "copy"))
