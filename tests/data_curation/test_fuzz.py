"""Damaged and hostile files: each is read, or refused with a reason and a sentence, within memory and time."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.data_curation.fuzzing import bases

KINDS = sorted(bases())
REASONS = {
    "empty", "unreadable", "truncated", "4d", "vector", "single_slice", "too_large", "no_orientation", "no_spacing",
    "label", "spacing", "not_finite", "not_ct",
}  # fmt: skip


def outcomes(folder: Path, kind: str, count: int) -> Counter[str]:
    """How often each reason came up; fails on anything but a volume or a refusal in words."""
    fits = REASONS.__contains__ if kind in KINDS else re.compile(r"\w+").fullmatch
    code = "from tests.data_curation.fuzzing import main; main()"
    command = [sys.executable, "-c", code, str(folder / "in"), kind, "0", str(count)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"what"')]
    seen: Counter[str] = Counter()
    for line in lines:
        for reason, text in line.get("outcomes", ()):
            seen[reason] += 1
            assert reason == "" or (fits(reason) and text.count(" ") > 3), (line["what"], reason, text)
    assert done.returncode == 0, (done.returncode, lines[-1:], done.stderr[-2000:])
    assert len(lines) == 2 * count
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_some_damage(tmp_path: Path, kind: str) -> None:
    seen = outcomes(tmp_path, kind, 40)
    assert seen[""] > 0  # damage that hit nothing but voxels
    assert sum(seen.values()) - seen[""] > 10


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_much_damage(tmp_path: Path, kind: str) -> None:
    outcomes(tmp_path, kind, 1000)


def test_some_damage_to_dicom(tmp_path: Path) -> None:
    assert sum(outcomes(tmp_path, "dicom", 30).values()) >= 30
