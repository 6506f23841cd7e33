"""Copies of a held-out scan, disguised and under another data set's name, are caught; other patients are not."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray
from scipy import ndimage

from data_curation.curate import Settings
from data_curation.index import SCHEMA, read_index
from data_curation.phantom import make
from data_curation.proofs import proofs
from tests.data_curation.curated import main

Hu = NDArray[np.int16]
SHAPE, SPACING = (40, 128, 128), (4.0, 2.8, 2.8)
DISGUISES: dict[str, tuple[Callable[[Hu], Hu], tuple[float, float, float]]] = {
    "plain": (lambda hu: hu, SPACING),
    "flipped": (lambda hu: hu[:, :, ::-1], SPACING),
    "turned": (lambda hu: np.rot90(hu, 1, (1, 2)), SPACING),
    "head first": (lambda hu: hu[::-1, ::-1], SPACING),
    "every second slice": (lambda hu: hu[1::2], (8.0, 2.8, 2.8)),
    "thicker slices": (lambda hu: np.rint(hu.reshape(-1, 2, *hu.shape[1:]).mean(1)).astype(np.int16), (8.0, 2.8, 2.8)),
    "clipped": (lambda hu: hu.clip(-1000, 1000), SPACING),
    "clipped, flipped, a part": (lambda hu: hu[10:32, ::-1].clip(-1024, 600), SPACING),
    "resampled": (
        lambda hu: np.rint(ndimage.zoom(hu.astype(np.float32), (1.6, 0.8, 0.8), order=1)).astype(np.int16),
        (2.5, 3.5, 3.5),
    ),
}


def save(path: Path, hu: Hu, spacing: tuple[float, float, float] = SPACING) -> None:
    image = sitk.GetImageFromArray(np.ascontiguousarray(hu))
    image.SetSpacing(spacing[::-1])
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path), useCompression=True)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MSD Spleen with a test case, and a folder with disguised copies of it and with four other patients."""
    root = tmp_path_factory.mktemp("planted")
    spleen = root / "spleen" / "Task09_Spleen"
    save(spleen / "imagesTr" / "spleen_2.nii.gz", make(2, SHAPE, SPACING).hu)
    secret = make(1, SHAPE, SPACING).hu
    save(spleen / "imagesTs" / "spleen_1.nii.gz", secret)
    for name, (disguise, spacing) in DISGUISES.items():
        save(root / "ours" / name / "scan.nii.gz", disguise(secret), spacing)
    for seed in range(10, 14):
        save(root / "ours" / f"patient {seed}" / "scan.nii.gz", make(seed, SHAPE, SPACING).hu)
    return root


def curated(folder: Path, planted: Path, **more: Any) -> dict[str, str]:
    """Why each scan of `ours` was refused."""
    datasets = [{"name": "msd_spleen", "root": planted / "spleen"}, {"name": "folder", "root": planted / "ours"}]
    main(Settings.model_validate({"folder": folder, "datasets": datasets, "workers": 1, **more}))
    with (folder / "private" / "refused.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["dataset"] == "folder"]
    return {row["source"].partition("/")[0]: row["reason"] for row in rows}


def test_every_disguise_is_seen_through(tmp_path: Path, planted: Path) -> None:
    assert curated(tmp_path / "corpus", planted) == dict.fromkeys(DISGUISES, "held_out_related")
    index = read_index(tmp_path / "corpus")
    assert len(set(index["volume"].to_pylist())) == 5
    found = proofs(tmp_path / "corpus", {})
    assert all(proof.shared == 0 for proof in found)
    pixels = next(proof for proof in found if "held out" in proof.sides[0] and "content" in proof.what)
    assert (pixels.left, pixels.right) == (SHAPE[0], 5 * SHAPE[0])


def test_without_likeness_only_equal_slices_are_found(tmp_path: Path, planted: Path) -> None:
    found = curated(tmp_path / "corpus", planted, likeness=False)
    assert set(found) == {"plain", "every second slice", "clipped"}
    index = tmp_path / "corpus" / "index.parquet"
    table = pq.read_table(tmp_path / "corpus" / "held_out.parquet")
    planted_slice = pq.read_table(index).to_pylist()[0] | {"content": table["content"][3].as_py()}
    pq.write_table(pa.Table.from_pylist([planted_slice], SCHEMA), index)
    assert [proof.shared for proof in proofs(index.parent, {}) if "held out" in proof.sides[0]] == [0, 1, 0]


def test_copies_among_the_training_cases_share_split_and_group(tmp_path: Path, planted: Path) -> None:
    """The same disguises of a case that is not held out: one split, one group, and what repeats lies apart."""
    save(tmp_path / "ours" / "a" / "scan.nii.gz", make(1, SHAPE, SPACING).hu)
    for name, (disguise, spacing) in DISGUISES.items():
        save(tmp_path / "ours" / f"b {name}" / "scan.nii.gz", disguise(make(1, SHAPE, SPACING).hu), spacing)
    save(tmp_path / "ours" / "c" / "scan.nii.gz", make(3, SHAPE, SPACING).hu)
    settings = {"folder": tmp_path / "corpus", "datasets": [{"name": "folder", "root": tmp_path / "ours"}]}
    main(Settings.model_validate({**settings, "workers": 1, "split": {"train": 0.5, "val": 0.5}}))
    index = read_index(tmp_path / "corpus").to_pylist()
    assert len({row["duplicate_group"] for row in index}) == 2
    for group in {row["duplicate_group"] for row in index}:
        assert len({row["split"] for row in index if row["duplicate_group"] == group}) == 1
    once = [row for row in index if not row["duplicate"]]
    assert len(once) < 0.35 * len(index)
