"""What `axial convert` writes: on its own grid, whole or not at all, also on a full disk and after a kill."""

from __future__ import annotations

import builtins
import errno
import io
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from scipy.spatial.transform import Rotation

import data_curation.aside
from data_curation.nifti import load as load_nifti
from data_curation.phantom import make, write
from data_curation.phantom_files import numbered
from downstream.cases import open_dataset
from downstream.convert import main
from downstream.geometry import difference, place_of, read_labelmap
from tests.data_curation.test_catalogue_entries import grow
from tests.downstream.test_convert import files, rows, settings


def test_an_oblique_series_stays_on_its_own_grid(tmp_path: Path) -> None:
    write("chaos", tmp_path / "root", [4], (12, 48, 48), (14.0, 8.0, 8.0))
    turn = Rotation.from_euler("xz", [12, 7], degrees=True).as_matrix()
    for path in (tmp_path / "root").rglob("*.dcm"):
        header = pydicom.dcmread(path)
        header.ImageOrientationPatient = turn.T[:2].ravel().round(9).tolist()
        header.ImagePositionPatient = (turn @ np.array(header.ImagePositionPatient, float)).round(6).tolist()
        header.save_as(path)
    main(settings("chaos", tmp_path / "root", tmp_path / "out"))
    (case,) = open_dataset(tmp_path / "out").cases
    phantom = make(4, (12, 48, 48), (14.0, 8.0, 8.0))
    image, label = load_nifti(case.images[0]), read_labelmap(case.label)
    assert np.array_equal(image.voxels, phantom.hu)
    assert np.array_equal(label.array, numbered(phantom, {1: "liver"}))
    assert np.abs(image.affine[:, :3] / image.spacing - turn).max() < 1e-5
    assert not difference(label.place, place_of(image))
    assert "resampled" not in rows(tmp_path / "out/cases.csv")[0]["notes"]


@pytest.mark.parametrize("name", ["chaos", "totalsegmentator", "btcv"])
@pytest.mark.parametrize(("kind", "left"), [(".nii.gz", 3), (".json", 1)])
def test_a_full_disk_ends_the_command_and_no_case_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str, left: int
) -> None:
    """Series that are written anew, labels that are merged, files that are copied; or the record of any of them."""
    grow(name, tmp_path / "root")
    out = tmp_path / "out"

    class Full(io.FileIO):
        def write(self, data: Any, /) -> int:
            nonlocal left
            left -= 1
            if left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    def opened(path: Any, mode: str = "r", *more: Any) -> Any:
        return Full(path, mode) if f"{kind}." in Path(path).name and "w" in mode else builtins.open(path, mode, *more)

    monkeypatch.setattr(data_curation.aside, "open", opened, raising=False)
    with pytest.raises(OSError, match="make room"):
        main(settings(name, tmp_path / "root", out))
    assert not list(out.rglob("dataset.json"))
    monkeypatch.undo()
    main(settings(name, tmp_path / "root", out))
    main(settings(name, tmp_path / "root", tmp_path / "whole"))
    assert files(out) == files(tmp_path / "whole")


_CHILD = """
import sys
from pathlib import Path
from downstream.convert import Settings, main
given = Settings(name="totalsegmentator", root=Path(sys.argv[1]), folder=Path(sys.argv[2]))
print("ready", flush=True)
main(given)
"""


def test_killed_at_any_time_it_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    grow("totalsegmentator", tmp_path / "root")
    main(settings("totalsegmentator", tmp_path / "root", tmp_path / "whole"))
    out = tmp_path / "killed"
    for delay in (0.0, 0.1):
        command = [sys.executable, "-c", _CHILD, str(tmp_path / "root"), str(out)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, stderr=subprocess.DEVNULL) as child:
            assert child.stdout is not None
            child.stdout.readline()
            time.sleep(delay)
            child.kill()
    (out / "imagesTr").mkdir(parents=True, exist_ok=True)
    (out / "imagesTr/.s0001_0000.nii.gz.12.part").write_bytes(b"half")
    main(settings("totalsegmentator", tmp_path / "root", out, workers=2))
    assert files(out) == files(tmp_path / "whole")
    when = {path: path.stat().st_mtime_ns for path in (out / "labelsTr").iterdir()}
    main(settings("totalsegmentator", tmp_path / "root", out))
    assert {path: path.stat().st_mtime_ns for path in (out / "labelsTr").iterdir()} == when, "nothing is done twice"
