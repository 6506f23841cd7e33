"""Small scans written by SimpleITK, and a corpus made of some."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray
from scipy import ndimage

from data_curation.curate import Settings, Source
from tests.data_curation.curated import main

WriteScan = Callable[..., NDArray[np.int16]]


def _scan(seed: int, depth: int = 12, side: int = 40) -> NDArray[np.int16]:
    """Air with noise round an ellipse of soft tissue that holds lung and bone, int16 HU [Z, Y, X].

    Another seed is another patient: tissue, lung and bone vary smoothly from place to place as the seed draws them.
    """
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : (side + 8) * 1j]
    coarse = draw.normal(size=(5, 8, 8))
    organs = ndimage.zoom(coarse, (depth / 5, side / 8, (side + 8) / 8), order=3, grid_mode=True, mode="nearest")
    tissue = 40 + 90 * organs
    high, left = draw.uniform(-0.3, 0.3, 2)
    tissue = np.where(np.hypot(y - high, x - left) < 0.35 + 0.1 * organs, -850, tissue)
    tissue = np.where(np.hypot(y - 0.6, x) < 0.12, 700, tissue)
    body = np.hypot(y, x * 1.2) < 0.8
    return (np.where(body, tissue, -1000) + draw.integers(-25, 26, tissue.shape)).astype(np.int16)


@pytest.fixture(scope="session")
def write_scan() -> WriteScan:
    """write_scan(path, seed, depth=12, hu=None, dtype=int16) writes a file and returns its HU, [Z, Y, X]."""

    def write(
        path: Path, seed: int = 0, depth: int = 12, hu: NDArray[np.int16] | None = None, dtype: type = np.int16
    ) -> NDArray[np.int16]:
        hu = _scan(seed, depth) if hu is None else hu
        image = sitk.GetImageFromArray(hu.astype(dtype))
        image.SetSpacing((0.75, 0.8, 2.5))
        path.parent.mkdir(parents=True, exist_ok=True)
        sitk.WriteImage(image, str(path), useCompression=True)
        return hu

    return write


@pytest.fixture(scope="session")
def scans(tmp_path_factory: pytest.TempPathFactory, write_scan: WriteScan) -> Path:
    """Ten patients, one of them as two files with the same pixels, one file cut short, one that is no scan."""
    root = tmp_path_factory.mktemp("scans")
    for seed in range(10):
        write_scan(root / f"Jane_Doe_{seed}" / "ct.nii.gz", seed, depth=8 + seed % 3)
    write_scan(root / "Twin_of_3" / "ct.nrrd", 3, depth=8, dtype=np.float32)
    whole = (root / "Jane_Doe_0" / "ct.nii.gz").read_bytes()
    (root / "Broken" / "ct.nii.gz").parent.mkdir()
    (root / "Broken" / "ct.nii.gz").write_bytes(whole[: len(whole) // 2])
    (root / "Empty" / "ct.nii.gz").parent.mkdir()
    (root / "Empty" / "ct.nii.gz").write_bytes(b"")
    return root


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory, scans: Path) -> Path:
    """The corpus of `scans`, 20 slices a shard. Not to be written to."""
    folder = tmp_path_factory.mktemp("corpus") / "made"
    settings = Settings(
        folder=folder,
        datasets=(Source(name="folder", root=scans, licence="CC0"),),
        shard_slices=20,
        split={"train": 0.6, "val": 0.4},
        workers=1,
    )
    assert main(settings).ok
    return folder
