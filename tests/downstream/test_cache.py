"""The cache of prepared cases: never half written, never damaged in silence, the same bytes every time."""

from __future__ import annotations

import contextlib
import os
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
from tests.downstream.test_channels import arrays, describe, folder, prepared, write

__all__ = ["folder"]


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
    whole = {case.name: case.path.read_bytes() for case in prepared(dataset, tmp_path / "whole", 0.9)}
    cache = tmp_path / "killed"
    for delay in (0.03,):
        command = [sys.executable, "-c", _CHILD, str(folder), str(cache)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as child:
            assert child.stdout is not None
            child.stdout.readline()
            time.sleep(delay)
            child.kill()
    (cache / ".case_1.safetensors.77.part").parent.mkdir(exist_ok=True)
    (cache / ".case_1.safetensors.77.part").write_bytes(b"half")
    (cache / "case_1.safetensors").unlink(missing_ok=True)
    found = {case.name: case.path.read_bytes() for case in prepared(dataset, cache, 0.9)}
    assert found == whole
    assert sorted(path.name for path in cache.iterdir()) == [f"case_{n}.safetensors" for n in range(3)]
