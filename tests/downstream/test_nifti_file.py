"""Label maps and volumes on the disk: where they lie without a header to take over, and what a full disk leaves."""

from __future__ import annotations

import errno
import gzip
import itertools
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from scipy.spatial.transform import Rotation

from data_curation import nifti
from downstream.geometry import place_of, write_labelmap
from downstream.nifti_file import write_nifti
from tests.downstream.test_geometry import ORDERS, image, place


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii"])
@pytest.mark.parametrize("degrees", [(0, 0, 0), (3, -2, 1), (170, 40, 95)])
def test_a_nifti_without_a_model_lies_where_it_should(
    tmp_path: Path, suffix: str, degrees: tuple[int, int, int]
) -> None:
    """By its rows, by its turn, and for ITK; mirrored grids too."""
    turn = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix()
    path = tmp_path / f"a{suffix}"
    for number, order in enumerate(ORDERS[::5]):
        own = place(turn @ order)
        hu = np.random.default_rng(number).integers(-1024, 3000, (6, 5, 4)).astype(np.int16)
        write_nifti(path, hu[::-1][::-1], own.affine)
        written = sitk.ReadImage(str(path))
        assert np.array_equal(sitk.GetArrayFromImage(written), hu)
        for at in itertools.product((0, 3), (0, 4), (0, 5)):
            assert np.allclose(written.TransformIndexToPhysicalPoint(at), own.position(np.array(at)), atol=1e-3)
        raw = bytearray(gzip.decompress(path.read_bytes()) if suffix == ".nii.gz" else path.read_bytes())
        # A turn is three single numbers, of which the fourth is made: near half a turn that is exact to 1e-3 only.
        for qform, sform, off in ((0, 1, 1e-4), (1, 0, 2e-2)):
            struct.pack_into("<2h", raw, 252, qform, sform)
            (tmp_path / "one.nii").write_bytes(raw)
            grid = nifti.load(tmp_path / "one.nii")
            assert np.abs(place_of(grid).corners - own.corners).max() < off
            assert grid.voxels.dtype == np.int16
            assert not grid.notes


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nii", "a.mha"])
@pytest.mark.parametrize("copied", [True, False])
def test_a_full_disk_leaves_no_label_map(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, copied: bool
) -> None:
    source = tmp_path / f"source_{name}"
    sitk.WriteImage(image(np.eye(3), np.zeros((6, 5, 4), np.int16)), str(source))

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def itk(_: Any, path: str, **__: Any) -> None:
        Path(path).write_bytes(b"half")
        raise RuntimeError("Exception thrown in SimpleITK WriteImage: could not write")

    monkeypatch.setattr("data_curation.aside.os.fsync", full)
    monkeypatch.setattr(sitk, "WriteImage", itk)
    (tmp_path / "out").mkdir()
    with pytest.raises(OSError, match="make room") as caught:
        write_labelmap(
            tmp_path / "out" / name, np.ones((6, 5, 4), np.uint8), place(np.eye(3)), source if copied else None
        )
    assert caught.value.filename == str(tmp_path / "out" / name)
    assert not list((tmp_path / "out").iterdir())
