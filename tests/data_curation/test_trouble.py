"""A full disk, a read-only folder, a file that vanishes, a gzip cut short: one clear line, and a state that goes on."""

from __future__ import annotations

import builtins
import errno
import os
from pathlib import Path
from typing import Any

import pytest

import data_curation.aside
from data_curation import curate
from launch.cli import main
from tests.data_curation.curated import settings, state
from tests.data_curation.test_curate import refusals

WriteScan = Any  # the fixture of conftest.py
RUN = ("settings.yaml", "run.json", "outcome.json")


@pytest.fixture
def command(tmp_path: Path, write_scan: WriteScan, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Curation of three scans, in this process; the same into the folder `expected` has ended undisturbed."""
    for seed in range(3):
        write_scan(tmp_path / "in" / f"p{seed}" / "ct.nii.gz", seed)
    monkeypatch.setattr(curate, "workers_for", lambda wanted: 0)
    (tmp_path / "corpus.yaml").write_text(settings(tmp_path / "corpus", tmp_path / "in").model_dump_json())
    assert main(["curate", str(tmp_path / "corpus.yaml"), f"folder={tmp_path / 'expected'}"]) == 0
    return ["curate", str(tmp_path / "corpus.yaml")]


def whole(folder: Path) -> dict[str, str]:
    return {name: digest for name, digest in state(folder).items() if name not in RUN}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
@pytest.mark.parametrize("files", [0, 4, 9])
def test_what_cannot_be_written(
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    code: int,
    files: int,
) -> None:
    left = files

    def full(name: Any, mode: str = "r", *more: Any) -> Any:
        nonlocal left
        left -= "w" in mode
        if left < 0 and "w" in mode:
            raise OSError(code, os.strerror(code), name)
        return builtins.open(name, mode, *more)

    monkeypatch.setattr(data_curation.aside, "open", full, raising=False)
    capsys.readouterr()
    assert main(command) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith(("scan:", "write:"))]
    (line,) = said
    assert line.startswith(f"axial curate: {os.strerror(code)}; make room or allow writing, then run the same command")
    assert str(tmp_path / "corpus") in line
    monkeypatch.undo()
    assert main(command) == 0
    assert whole(tmp_path / "corpus") == whole(tmp_path / "expected")


def test_a_source_that_vanishes_is_refused_and_looked_for_again(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lost, honest = tmp_path / "in" / "p1" / "ct.nii.gz", curate.gather

    def gather(given: Any) -> Any:
        listed = honest(given)
        lost.rename(tmp_path / "elsewhere")
        return listed

    monkeypatch.setattr(curate, "gather", gather)
    assert main(command) == 0
    (row,) = refusals(tmp_path / "corpus")
    assert (row["source"], row["reason"]) == ("p1/ct.nii.gz", "unreadable")
    assert "No such file" in row["detail"]
    monkeypatch.setattr(curate, "gather", honest)
    (tmp_path / "elsewhere").rename(lost)
    assert main(command) == 0
    assert whole(tmp_path / "corpus") == whole(tmp_path / "expected")


def test_a_gzip_that_is_cut_short_is_refused_and_read_when_whole(command: list[str], tmp_path: Path) -> None:
    scan = tmp_path / "in" / "p1" / "ct.nii.gz"
    data, status = scan.read_bytes(), scan.stat()
    scan.write_bytes(data[: len(data) // 2])
    assert main(command) == 0
    (row,) = refusals(tmp_path / "corpus")
    assert (row["source"], row["reason"]) == ("p1/ct.nii.gz", "truncated")
    assert "download it again" in row["detail"]
    scan.write_bytes(data)
    os.utime(scan, ns=(status.st_atime_ns, status.st_mtime_ns))  # by which a scan is known
    assert main(command) == 0
    assert whole(tmp_path / "corpus") == whole(tmp_path / "expected")
