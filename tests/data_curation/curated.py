"""How the tests curate: two splits, small shards, one worker; and the bytes that came of it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from data_curation import curate
from data_curation.curate import Settings
from launch.crew import Workers
from launch.run import Outcome


def settings(folder: Path, *roots: Path, name: str = "folder", **more: Any) -> Settings:
    datasets = [{"name": name, "root": root, "id": f"set{i}", "licence": "CC0"} for i, root in enumerate(roots)]
    given = {"shard_slices": 20, "split": {"train": 0.6, "val": 0.4}, "workers": 1, **more}
    return Settings.model_validate({"folder": folder, "datasets": datasets, **given})


def main(settings: Settings) -> Outcome:
    """Curates in this process where one worker is asked for: tests patch what it calls, and start quickly."""
    return curate.main(settings, Workers(0) if settings.workers == 1 else None)


def state(folder: Path) -> dict[str, str]:
    """Hash of every file below the folder but for the note of how long it took."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "throughput.json")
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
