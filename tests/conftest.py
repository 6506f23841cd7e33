"""What every test may ask for: the folders of real CT scans and of reference numbers, where the machine has them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings

# A busy machine is no failure: how long a draw takes is not what is tested.
hypothesis_settings.register_profile("axial", deadline=None, suppress_health_check=[HealthCheck.too_slow])
hypothesis_settings.load_profile("axial")

# Two test processes on two cores: more threads than that only fight. Set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

REPOSITORY = Path(__file__).resolve().parent.parent


def _shared(part: str) -> Path:
    root = Path(os.environ.get("AXIAL_SHARED", REPOSITORY.parent / "shared"))
    folder = root / part
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here; set AXIAL_SHARED to the folder that holds {part}")
    return folder


@pytest.fixture(scope="session")
def real_ct() -> Path:
    """Folder of real CT scans with MANIFEST.tsv."""
    return _shared("data/ct")


@pytest.fixture(scope="session")
def reference() -> Path:
    """Folder of the numbers that the official DINOv3 code produced."""
    return _shared("reference")
