"""Checkpoints: whole or absent, kept by rule, the same file for one rank and for several."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from launch.distributed import World, world
from pretrain.checkpoint import Checkpoints, CheckpointSettings, checkpoint_bytes
from pretrain.checkpoint_files import CheckpointError, Progress, complete, newest, read_tensors
from pretrain.parallel import ParallelSettings, fill, place, shard
from tests.gloo import run_ranks

HERE = World(0, 1, 0, torch.device("cpu"))


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(5, 5) for _ in range(2))
        self.out = nn.Linear(5, 3)
        self.register_buffer("table", torch.arange(3.0))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.out(x) * self.table  # type: ignore[no-any-return]


class Two:
    """A student of two parts and a copy of it, on any number of ranks."""

    def __init__(self, here: World = HERE, sharding: Any = "replicate") -> None:
        torch.manual_seed(0)
        whole = nn.ModuleDict({"part": Part(), "head": nn.Linear(3, 2)})
        with torch.device("meta"):
            self.student = nn.ModuleDict({"part": Part(), "head": nn.Linear(3, 2)})
        shard(self.student, here, ParallelSettings(sharding=sharding))
        for name, part in self.student.items():
            place(part, here.device)
            fill(part, whole[name].state_dict())
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=0.05, fused=True)
        self.counter = torch.zeros((), dtype=torch.long)
        self.here = here

    def state(self) -> dict[str, Any]:
        return {"student": self.student.state_dict(), "counter": self.counter}

    def step(self, step: int) -> None:
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step)).chunk(self.here.size)[self.here.rank]
        self.student["head"](self.student["part"](x)).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.counter += 1

    def weights(self) -> list[float]:
        full = [getattr(p, "full_tensor", lambda p=p: p)() for p in self.student.parameters()]
        return torch.cat([p.detach().flatten() for p in full]).tolist()


def keep(folder: Path, two: Two, **settings: Any) -> Checkpoints:
    return Checkpoints(folder, two, two.optimizer, two.here, CheckpointSettings(**settings), samples_per_step=4)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_what_is_restored_is_what_was_saved_bit_for_bit(tmp_path: Path) -> None:
    one = Two()
    for step in range(3):
        one.step(step)
    keep(tmp_path, one).save(3)
    other = Two()
    assert keep(tmp_path, other).restore() == 3
    for step in (3, 4):
        one.step(step)
        other.step(step)
    assert one.weights() == other.weights()
    assert other.counter == 5
    first = next(iter(other.student.parameters()))
    assert set(other.optimizer.state[first]) == {"step", "exp_avg", "exp_avg_sq"}
    progress = Progress.read(tmp_path / "checkpoints" / "step_00000003")
    assert (progress.step, progress.samples, progress.ranks) == (3, 12, 1)


def test_nothing_to_restore_is_step_zero(tmp_path: Path) -> None:
    assert keep(tmp_path, Two()).restore() == 0


def test_newest_are_kept_and_multiples_for_good(tmp_path: Path) -> None:
    two = Two()
    checkpoints = keep(tmp_path, two, every=2, keep=2, keep_every=6)
    saved = [step for step in range(1, 16) if checkpoints.maybe_save(step, last=step == 15)]
    assert saved == [2, 4, 6, 8, 10, 12, 14, 15]
    assert names(tmp_path) == ["step_00000006", "step_00000012", "step_00000014", "step_00000015"]
    assert not checkpoints.maybe_save(15, last=True), "saved a second time"


def test_a_later_damaged_checkpoint_does_not_count_among_those_kept(tmp_path: Path) -> None:
    two = Two()
    for step in (2, 4):
        keep(tmp_path, two, keep=2).save(step)
    (tmp_path / "checkpoints" / "step_00000004" / "progress.json").unlink()
    again = Two()
    checkpoints = keep(tmp_path, again, every=1, keep=1)
    assert checkpoints.restore() == 2
    assert checkpoints.maybe_save(3)
    checkpoints.wait()
    assert newest(tmp_path, say=lambda text: None) == tmp_path / "checkpoints" / "step_00000003"
    assert names(tmp_path) == ["step_00000003", "step_00000004"]
    assert checkpoints.maybe_save(4)
    checkpoints.wait()
    assert names(tmp_path) == ["step_00000004"], "the damaged one is replaced in its turn"
    assert not complete(tmp_path / "checkpoints" / "step_00000004")


@pytest.mark.parametrize("damage", ["progress", "metadata", "torn metadata", "short", "missing"])
def test_a_damaged_checkpoint_is_passed_over_with_a_message(tmp_path: Path, damage: str) -> None:
    two, said = Two(), []
    two.step(0)
    first, second = keep(tmp_path, two).save(1), keep(tmp_path, two).save(2)
    (data,) = second.glob("*.distcp")
    if damage == "progress":
        (second / "progress.json").unlink()
    elif damage == "metadata":
        (second / ".metadata").unlink()
    elif damage == "torn metadata":
        (second / ".metadata").write_bytes((second / ".metadata").read_bytes()[:200])
    elif damage == "short":
        data.write_bytes(data.read_bytes()[:-100])
    else:
        data.unlink()
    assert complete(second)
    assert newest(tmp_path, say=said.append) == first
    assert len(said) == 1
    assert "step_00000002" in said[0]
    with pytest.raises(CheckpointError, match="is incomplete"):
        newest(tmp_path, 2, said.append)
    assert keep(tmp_path, Two()).restore() == 1


def test_what_was_being_written_is_ignored_and_cleared_away(tmp_path: Path) -> None:
    left = tmp_path / "checkpoints" / ".writing_step_00000009"
    left.mkdir(parents=True)
    (left / "__0_0.distcp").write_bytes(b"half")
    two = Two()
    assert keep(tmp_path, two).restore() == 0
    keep(tmp_path, two).save(1)
    assert names(tmp_path) == ["step_00000001"]


def test_a_missing_step_is_named_with_those_there_are(tmp_path: Path) -> None:
    keep(tmp_path, Two()).save(4)
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 5; it holds \[4\]"):
        newest(tmp_path, 5)


def test_other_settings_are_refused(tmp_path: Path) -> None:
    two = Two()
    Checkpoints(tmp_path, two, two.optimizer, HERE, CheckpointSettings(), fingerprint="a").save(1)
    with pytest.raises(CheckpointError, match="other settings"):
        Checkpoints(tmp_path, two, two.optimizer, HERE, CheckpointSettings(), fingerprint="b").restore()


def test_another_model_is_refused_not_half_loaded(tmp_path: Path) -> None:
    two = Two()
    two.step(0)
    keep(tmp_path, two).save(1)
    other = Two()
    other.student["extra"] = nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match="extra"):
        keep(tmp_path, other).restore()
    fewer = Two()
    del fewer.student["head"]
    with pytest.raises(CheckpointError, match=r"head\.weight"):
        keep(tmp_path, fewer).restore()


def test_a_disk_that_refuses_leaves_the_old_checkpoint_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = Two()
    checkpoints = keep(tmp_path, two)
    checkpoints.save(1)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.distributed.checkpoint.filesystem._write_item", full)
    with pytest.raises(CheckpointError, match=r"step_00000002.*No space left on device"):
        checkpoints.save(2)
    assert newest(tmp_path) == tmp_path / "checkpoints" / "step_00000001"


def test_single_tensors_can_be_read_without_the_model(tmp_path: Path) -> None:
    two = Two()
    keep(tmp_path, two).save(1)
    tensors = read_tensors(tmp_path / "checkpoints" / "step_00000001", "method.student.part.")
    assert tensors.keys() == two.student["part"].state_dict().keys()
    assert torch.equal(tensors["out.weight"], two.student["part"].out.weight)  # type: ignore[arg-type]


def ranks(rank: int, size: int, folder: Path, sharding: str, start: int, stop: int) -> list[float]:
    with world("cpu") as here:
        two = Two(here, sharding)
        checkpoints = keep(folder, two)
        assert checkpoints.restore() == start
        for step in range(start, stop):
            two.step(step)
        checkpoints.save(stop)
        return two.weights()


@pytest.mark.parametrize("sharding", ["replicate", "full"])
def test_a_run_goes_on_with_one_rank_then_two_then_one(tmp_path: Path, sharding: str) -> None:
    alone = Two()
    for step in range(2):
        alone.step(step)
    keep(tmp_path, alone).save(2)
    run_ranks(f"{__file__}:ranks", 2, tmp_path, folder=tmp_path, sharding=sharding, start=2, stop=4)
    assert json.loads((tmp_path / "checkpoints/step_00000004/progress.json").read_text())["ranks"] == 2
    again = Two()
    assert keep(tmp_path, again).restore() == 4
    again.step(4)
    for step in range(2, 5):
        alone.step(step)
    assert torch.allclose(torch.tensor(again.weights()), torch.tensor(alone.weights()), atol=1e-6)
    assert again.counter == 5


@pytest.mark.parametrize("background", [True, False])
def test_the_copy_is_as_large_as_it_is_said_to_be(tmp_path: Path, background: bool) -> None:
    two = Two()
    two.step(0)
    settings = CheckpointSettings(every=1, background=background)
    checkpoints = Checkpoints(tmp_path, two, two.optimizer, HERE, settings)
    checkpoints.maybe_save(1)
    checkpoints.wait()
    taken = sum(tensor.nbytes for tensor in checkpoints._copy._buffers.values())
    steps = 4 * len(list(two.student.parameters()))  # AdamW counts for each parameter
    assert taken == (checkpoint_bytes(two) + steps if background else 0)
