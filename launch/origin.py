"""Where the code that runs comes from: its commit, and the versions beneath it."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = ["origin"]

PACKAGES = (
    "axial-ct", "torch", "numpy", "xformers", "webdataset", "SimpleITK", "pyarrow", "imagecodecs", "submitit",
    "pydantic", "monai", "safetensors",
)  # fmt: skip


def origin() -> dict[str, Any]:
    """``git``: commit and changes of the code's checkout (null outside one); ``versions``: of what is beneath it."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    # `ls-files` tells the code's own checkout from one that merely has the virtual environment inside it.
    tracked = _git("ls-files", "--error-unmatch", "launch/run.py") is not None
    sha = _git("rev-parse", "HEAD") if tracked else None
    state = _git("status", "--porcelain", "--untracked-files=no") if sha else None
    return {"git": {"sha": sha, "dirty": None if state is None else bool(state)}, "versions": versions}


def _git(*arguments: str) -> str | None:
    root = Path(__file__).resolve().parent.parent
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
