"""The first lines of a job: on what it runs, by which code, and with which settings."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
from pathlib import Path

from launch.origin import origin
from launch.run import now

__all__ = ["head"]

ASK_S = 30.0  # a machine with many GPUs may take long to count them


def head(folder: Path) -> str:
    """What a job of the run in ``folder`` prints first. What is not known is left out; it never raises."""
    found = origin()
    sha, dirty = found["git"]["sha"], found["git"]["dirty"]
    versions = (f"{name} {version}" for name, version in found["versions"].items() if version)
    rows = {
        "run": str(folder),
        "at": now(),
        "machine": f"{socket.gethostname()}, {platform.platform()}",
        "cores": f"{_cores()} of {os.cpu_count()}",
        "GPUs": _gpus(),
        "job": _job(),
        "ranks": os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or "1",
        "code": f"{sha}{' with changes that are not committed' if dirty else ''}" if sha else "not a git checkout",
        "versions": ", ".join(versions),
    }
    lines = [f"{name:<9}{text}" for name, text in rows.items() if text]
    return "\n".join([*lines, "settings", *(f"  {line}" for line in _settings(folder))])


def _cores() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _gpus() -> str:
    """Asked of the driver's own program: torch would open a context on each."""
    try:
        asked = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=ASK_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return "none"
    names = [line.strip().partition(" (UUID")[0] for line in asked.stdout.splitlines() if line.startswith("GPU ")]
    return "; ".join(names) or "none"


def _job() -> str:
    """The job's number, how often it was started before, and its machines; empty outside one."""
    number = os.environ.get("SLURM_JOB_ID", "")
    if not number:
        return ""
    array, element = os.environ.get("SLURM_ARRAY_JOB_ID", ""), os.environ.get("SLURM_ARRAY_TASK_ID", "")
    name = f"{array}_{element}" if array and element else number
    nodes = os.environ.get("SLURM_JOB_NODELIST", "")
    restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
    again = f", started again {restarts} time{'s' * (restarts != '1')}" if restarts != "0" else ""
    return f"{name}{f' on {nodes}' if nodes else ''}{again}"


def _settings(folder: Path) -> list[str]:
    try:
        return (folder / "settings.yaml").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        return [f"cannot be read: {error}"]
