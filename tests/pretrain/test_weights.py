"""Weight files: readable by safetensors, whole or absent, and equal bytes in every process."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from pretrain.weights import write_weights

TENSORS = {
    "b": torch.arange(5.0),
    "a": torch.ones(2, 3, dtype=torch.bfloat16),
    "ü": torch.zeros(0),
    "n": torch.tensor(7),
}
ABOUT = {"format": "pt", "axial": '{"x": "é"}', "more": "1", "yet": "2"}


def test_read_back(tmp_path: Path) -> None:
    write_weights(tmp_path / "new" / "w.safetensors", TENSORS, ABOUT)
    with safe_open(tmp_path / "new" / "w.safetensors", "pt") as file:
        assert file.metadata() == ABOUT
        assert set(file.keys()) == set(TENSORS)
        for name, tensor in TENSORS.items():
            assert torch.equal(file.get_tensor(name), tensor)
            assert file.get_tensor(name).dtype == tensor.dtype
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["w.safetensors"]


def test_bytes_do_not_depend_on_the_process(tmp_path: Path) -> None:
    """The library alone orders the metadata differently in about every second process."""
    code = (
        "import sys, torch; from pathlib import Path; from pretrain.weights import write_weights\n"
        "write_weights(Path(sys.argv[1]), {'a': torch.ones(3)}, {k: k for k in 'pqrstuvw'})"
    )
    digests = set()
    for number in range(3):
        path = tmp_path / f"{number}.safetensors"
        subprocess.run([sys.executable, "-c", code, str(path)], check=True, cwd=Path(__file__).parents[2])
        digests.add(hashlib.sha256(path.read_bytes()).hexdigest())
    assert len(digests) == 1


def test_what_a_killed_process_left_of_this_file_goes(tmp_path: Path) -> None:
    for name in (".w.safetensors.123.part", ".other.safetensors.123.part"):
        (tmp_path / name).write_bytes(b"half")
    write_weights(tmp_path / "w.safetensors", TENSORS, ABOUT)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.safetensors.123.part", "w.safetensors"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w.safetensors"
    write_weights(path, TENSORS, ABOUT)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_weights(path, {"a": torch.zeros(4)}, ABOUT)
    assert path.read_bytes() == before
    assert [found.name for found in tmp_path.iterdir()] == ["w.safetensors"]
