"""The cache of prepared cases: never half written, never damaged in silence, the same bytes every time."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from downstream.cases import CaseError, open_dataset
from downstream.prepared import Prepared
from downstream.reading import read_case
from tests.downstream.test_channels import arrays, describe, folder, prepared, write

__all__ = ["folder"]

HOST = socket.gethostname().partition(".")[0]


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_flipped_bit_of_the_cache_is_never_silent(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    root = tmp_path_factory.mktemp("cache")
    hu, pet, label = (array[:3] for array in arrays(0))
    write(root / "imagesTr/case_0000.nii.gz", hu)
    write(root / "imagesTr/case_0001.nii.gz", pet)
    write(root / "labelsTr/case.nii.gz", label)
    describe(root)
    dataset = open_dataset(root)
    case = prepared(dataset, root / "cache")[0]
    expected = case.volume()
    raw = bytearray(case.path.read_bytes())
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    case.path.write_bytes(raw)
    again = prepared(dataset, root / "cache")[0]
    found = again.volume() if _readable(again) else expected
    assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))
    assert np.array_equal(again.counts, case.counts)
    assert again.histograms == case.histograms


def _readable(case: Prepared) -> bool:
    """False where the case says that a slice is damaged."""
    with contextlib.suppress(CaseError):
        case.volume()
        return True
    return False


_CHILD = """
import sys
from pathlib import Path
from downstream.cases import open_dataset
from downstream.prepared import prepare
given = open_dataset(Path(sys.argv[1]))
print("ready", flush=True)
prepare(given.cases, given.labels, 0.9, Path(sys.argv[2]), active=False, channels=given.channels)
"""


def test_killed_at_any_time_it_goes_on_to_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    dataset = open_dataset(folder)
    whole = {case.path.name: case.path.read_bytes() for case in prepared(dataset, tmp_path / "whole", 0.9)}
    cache = tmp_path / "killed"
    for delay in (0.03,):
        command = [sys.executable, "-c", _CHILD, str(folder), str(cache)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as child:
            assert child.stdout is not None
            child.stdout.readline()
            time.sleep(delay)
            child.kill()
    cache.mkdir(exist_ok=True)
    left = cache / f".{next(name for name in whole if name.startswith('case_1'))}.{HOST}.4194999.part"
    left.write_bytes(b"half")
    for path in cache.glob("case_1.*"):
        path.unlink()
    prepared(dataset, cache, 0.9)
    assert {path.name: path.read_bytes() for path in cache.iterdir()} == whole


def part(path: Path, host: str, pid: int, age: float = 0.0) -> Path:
    """What a process would write aside for `path`."""
    made = path.with_name(f".{path.name}.{host}.{pid}.part")
    made.write_bytes(b"half")
    os.utime(made, (time.time() - age,) * 2)
    return made


def test_runs_with_other_settings_leave_each_others_cases_alone(folder: Path, tmp_path: Path) -> None:
    dataset = open_dataset(folder)
    fine = prepared(dataset, tmp_path / "cache", 1.25)
    volumes = [case.volume() for case in fine]
    coarse = prepared(dataset, tmp_path / "cache", 2.5)
    assert [case.shape for case in coarse] != [case.shape for case in fine]
    for case, (stored, classes) in zip(fine, volumes, strict=True):
        again = case.volume()
        assert np.array_equal(again[0], stored)
        assert np.array_equal(again[1], classes)


def test_two_data_sets_are_told_apart_where_names_sizes_and_times_are_the_same(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    write(folder / "imagesTr/case_0_0000.nii", arrays(0)[0])
    write(other / "imagesTr/case_0_0000.nii", arrays(1)[0])
    keys = []
    for root in (folder, other):
        (root / "imagesTr/case_0_0000.nii.gz").unlink()
        (root / "imagesTr/case_0_0000.nii").rename(root / "imagesTr/case_0_0000.nii.gz")
        for path in (root / "imagesTr/case_0_0000.nii.gz", root / "imagesTr/case_0_0001.nii.gz"):
            os.utime(path, (1e9, 1e9))
        os.utime(root / "labelsTr/case_0.nii.gz", (1e9, 1e9))
        keys.append(prepared(open_dataset(root), tmp_path / "cache")[0].volume()[0])
    assert np.array_equal(keys[0][0], arrays(0)[0])
    assert np.array_equal(keys[1][0], arrays(1)[0])


def test_what_other_processes_write_stays_and_is_not_done_twice(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, cache = open_dataset(folder), tmp_path / "cache"
    paths = [case.path for case in prepared(dataset, cache)]
    for path in paths[:2]:
        path.unlink()
    living = part(paths[0], HOST, os.getppid()), part(paths[0], "elsewhere", 4194999)
    left = part(paths[1], HOST, 4194999), part(paths[1], "elsewhere", 1, age=1e5), part(paths[2], HOST, 4194999)
    order = []
    monkeypatch.setattr(
        "downstream.prepared.read_case", lambda case, channels: order.append(case.name) or read_case(case, channels)
    )
    prepared(dataset, cache)
    assert order == ["case_1", "case_0"], "what another process is at comes last"
    assert all(one.exists() for one in living)
    assert not any(one.exists() for one in left)


def test_a_case_that_another_process_ends_meanwhile_is_taken_from_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, cache = open_dataset(folder), tmp_path / "cache"
    first = prepared(dataset, cache)[0].path
    whole = first.read_bytes()
    for path in cache.iterdir():
        path.unlink()
    living, order = part(first, "elsewhere", 7), []

    def read(case: Any, channels: Any) -> Any:
        order.append(case.name)
        if case.name == "case_2":
            living.unlink()
            first.write_bytes(whole)
        return read_case(case, channels)

    monkeypatch.setattr("downstream.prepared.read_case", read)
    assert len(prepared(dataset, cache)) == 3
    assert order == ["case_1", "case_2"]


def test_a_full_disk_is_not_taken_for_the_fault_of_each_case(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = open_dataset(folder)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("data_curation.aside.os.fsync", full)
    with pytest.raises(OSError, match=r"No space left.*make room"):
        prepared(dataset, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
