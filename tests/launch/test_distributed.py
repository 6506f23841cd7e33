"""Which process this is: alone, of two over gloo, and what is said when the device is not there."""

from __future__ import annotations

import importlib.util
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed as dist

from launch.distributed import DeviceError, agree, barrier, from_first, largest, rank_zero, world


def _gloo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gloo", Path(__file__).parent.parent / "gloo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def two(rank: int, size: int) -> list[object]:
    assert rank_zero() == (rank == 0)
    with world("cpu") as here:
        assert (here.rank, here.size, here.local_rank, here.device.type) == (rank, size, rank, "cpu")
        barrier()
        said = [agree(False), agree(rank == 1), agree(True), rank_zero(), largest(12 * rank)]
        sums = torch.tensor([rank + 1.0])
        dist.all_reduce(sums)
    left = [dist.is_initialized()]
    with suppress(ValueError), world("cpu"):
        raise ValueError("inside")
    return [*said, sums.item(), *left, dist.is_initialized()]


def told(rank: int, size: int) -> list[object]:
    def fails() -> int:
        raise DeviceError("there is no GPU")

    with world("cpu"):
        found: list[object] = [from_first(lambda: {"of": rank})]
        try:
            from_first(fails)
        except DeviceError as fault:
            found.append(str(fault))
    return found


def test_what_the_first_process_makes_all_have_and_its_error_too(tmp_path: Path) -> None:
    assert _gloo().run_ranks(f"{__file__}:told", 2, tmp_path) == [[{"of": 0}, "there is no GPU"]] * 2
    assert from_first(lambda: 5) == 5


def test_one_process_makes_no_group() -> None:
    with world("cpu") as here:
        assert (here.rank, here.size, here.local_rank, here.device) == (0, 1, 0, torch.device("cpu"))
        assert not dist.is_initialized()
        assert rank_zero()
        assert agree(True)
        assert not agree(False)
        assert largest(-3) == -3
        barrier()


def test_two_processes_agree_and_leave_also_after_an_error(tmp_path: Path) -> None:
    zero, one = _gloo().run_ranks(f"{__file__}:two", 2, tmp_path)
    assert zero == [False, True, True, True, 12, 3.0, False, False]
    assert one == [False, True, True, False, 12, 3.0, False, False]


def test_a_device_that_is_not_there() -> None:
    with pytest.raises(DeviceError, match="no such device 'gpu'; use auto, cpu, cuda"), world("gpu"):
        pass
    count = torch.cuda.device_count()
    with pytest.raises(DeviceError, match=f"means GPU {count}, torch sees {count}"), world(f"cuda:{count}"):
        pass


def test_auto_takes_this_ranks_gpu_where_there_is_one() -> None:
    with world() as here:
        assert here.device == torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
