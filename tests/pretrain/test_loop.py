"""The loop on a method of a few numbers: order, guards, signals, what is read and when."""

from __future__ import annotations

import gc
import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from launch.distributed import World, world
from launch.log import Log
from pretrain.checkpoint import Checkpoints, CheckpointSettings
from pretrain.loop import Ended, Guard, LoopSettings, step_seed, train
from pretrain.meter import LoopError
from pretrain.schedule import Schedule, Schedules
from pretrain.settings import Settings as RunSettings
from pretrain.signals import Stop
from tests.gloo import run_ranks

HERE = World(0, 1, 0, torch.device("cpu"))
DATA = {"corpus": "corpus", "batch_size": 2}


@dataclass(frozen=True)
class Numbers:
    x: Tensor
    keys: tuple[str, ...]
    replaced: tuple[str, ...] = ()


class Line:
    """y = w x towards 1, with a moving average and noise; a batch may be spoilt."""

    def __init__(self, guard: Guard) -> None:
        self.student = nn.ModuleDict({"line": nn.Linear(2, 1, bias=False)})
        nn.init.ones_(self.student["line"].weight)
        self.mean = self.student["line"].weight.detach().clone()
        self.guard = guard
        self.ended = Ended(0)
        self.draws: list[Tensor] = []

    def parts(self, batch: Numbers, step: int, count: int, seed: Callable[[int], None]) -> Sequence[Numbers]:
        each = len(batch.keys) // count
        return [Numbers(batch.x[i : i + each], batch.keys[i : i + each]) for i in range(0, len(batch.keys), each)]

    def loss(self, batch: Numbers, step: int) -> dict[str, Tensor]:
        self.draws.append(torch.rand(()))
        y = self.student["line"](batch.x)
        return {"fit": (y - 1).square().mean(), "size": 0.1 * y.square().mean()}

    def after_step(self, step: int) -> None:
        self.mean.lerp_(self.student["line"].weight.detach(), 0.5 * self.guard.keep)

    def numbers(self) -> dict[str, Tensor]:
        return {"mean": self.mean.abs().mean()}

    def remark(self, values: Mapping[str, float]) -> str:
        return "mean is above 2" if values["mean"] > 2 else ""

    def exported(self) -> nn.Module:
        return self.student["line"]

    def state(self) -> dict[str, Any]:
        return {"student": self.student.state_dict(), "mean": self.mean}


def numbers(start: int, spoilt: frozenset[int] = frozenset(), rank: int = 0) -> Iterator[Numbers]:
    step = start
    while True:
        x = torch.randn(4, 2, generator=torch.Generator().manual_seed(100 * step + rank))
        if step in spoilt and rank == 0:
            x[2, 1] = float("nan")
        keys = tuple(f"slice{step}.{rank}.{i}" for i in range(4))
        yield Numbers(x, keys, ("shard 0, sample 7: torn",) * (step == 3 and rank == 1))
        step += 1


def run(
    folder: Path,
    here: World = HERE,
    spoilt: frozenset[int] = frozenset(),
    every: int = 100,
    fused: bool = True,
    **loop: Any,
) -> Line:
    guard = Guard(here.device)
    method = Line(guard)
    group = {
        "params": list(method.student.parameters()),
        "lr_multiplier": 1.0,
        "wd_multiplier": 1.0,
        "is_last_layer": False,
    }
    optimizer = torch.optim.AdamW([group], lr=0.0, fused=fused)
    checkpoints = Checkpoints(folder, method, optimizer, here, CheckpointSettings(every=every))
    start = checkpoints.restore()
    settings = LoopSettings(**({"steps": 8, "log_every": 4} | loop))
    log = Log(folder, settings.log_every, False, here.rank == 0, start)
    schedules = Schedules(Schedule(peak=0.1), Schedule(peak=0.0))
    try:
        stream = numbers(start, spoilt, here.rank)
        method.ended = train(method, stream, optimizer, schedules, checkpoints, log, here, settings, guard=guard)
    finally:
        log.close()
    return method


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(tmp_path: Path) -> None:
    clean, spoilt = tmp_path / "clean", tmp_path / "spoilt"
    clean.mkdir(), spoilt.mkdir()
    before = run(clean, steps=4)
    after = run(spoilt, steps=5, spoilt=frozenset({4}))
    assert torch.equal(before.student["line"].weight, after.student["line"].weight)
    assert torch.equal(before.mean, after.mean)
    assert not torch.equal(before.mean, torch.ones(1, 2))
    last = metrics(spoilt)[-1]
    assert last["skipped"] == 1
    text = (spoilt / "log.txt").read_text()
    assert "step 4, rank 0: fit, size, grad/line not finite" in text
    assert "slice4.0.2" in text


def test_no_clipping_has_one_word(tmp_path: Path) -> None:
    for model, needed in ((LoopSettings, {"steps": 1}), (RunSettings, {"steps": 1, "folder": tmp_path, "data": DATA})):
        with pytest.raises(ValidationError, match="greater than 0"):
            model(**needed, clip=0)
        assert model(**needed, clip=None).clip is None
    sizes = []
    for clip in (None, 1e-6):
        (folder := tmp_path / str(clip)).mkdir()
        weight = run(folder, steps=1, fused=False, clip=clip).student["line"].weight
        sizes.append(weight.grad.norm().item())
    assert sizes[1] == pytest.approx(1e-6)
    assert sizes[0] > 1e-3


def test_an_optimizer_without_a_device_side_switch_skips_too(tmp_path: Path) -> None:
    method = run(tmp_path, steps=5, spoilt=frozenset({1, 3}), fused=False)
    assert torch.isfinite(method.student["line"].weight).all()
    assert metrics(tmp_path)[-1]["skipped"] == 2


def test_too_many_bad_steps_in_a_row_stop_the_run_and_are_named(tmp_path: Path) -> None:
    with pytest.raises(LoopError, match=r"3 steps in a row.*step 2, rank 0: fit, size, grad/line.*slice2\.0\.0"):
        run(tmp_path, steps=20, spoilt=frozenset({2, 3, 4}), max_bad=3)
    assert gc.isenabled()


def test_bad_steps_with_good_ones_between_do_not_stop_it(tmp_path: Path) -> None:
    method = run(tmp_path, steps=12, spoilt=frozenset({2, 3, 5, 6, 8, 9}), max_bad=3)
    assert method.ended.step == 12
    assert method.ended.skipped == 6


def test_every_step_draws_from_its_own_seed(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    draws = run(whole, steps=6).draws
    first = run(parts, steps=3).draws
    torch.rand(1000)  # whatever happened to the generator in between
    assert draws == first + run(parts, steps=6).draws
    assert len(set(draws)) == 6
    assert len({step_seed(0, step, rank) for step in range(50) for rank in range(8)}) == 400
    assert all(0 <= step_seed(seed, 0, 0) < 2**63 for seed in range(50))


class Reads(TorchDispatchMode):
    """Notes at which step a number is read from a tensor, which on a GPU would stop the host."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int] = []
        self.step = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.rand.default:
            self.step += 1
        if func is torch.ops.aten._local_scalar_dense.default:
            self.steps.append(self.step)
        return func(*args, **(kwargs or {}))


def test_the_device_is_read_at_logged_steps_only(tmp_path: Path) -> None:
    with Reads() as reads:
        run(tmp_path, steps=9, log_every=4)
    assert set(reads.steps) == {4, 8, 9}
    rows = metrics(tmp_path)
    assert [row["step"] for row in rows] == [4, 8, 9]
    assert rows[0]["loss"] == pytest.approx(rows[0]["term/fit"] + rows[0]["term/size"])
    assert rows[0]["grad"] > 0
    assert rows[0]["lr"] == 0.1


def test_validation_is_called_after_its_steps_and_logged(tmp_path: Path) -> None:
    guard = Guard(HERE.device)
    method = Line(guard)
    group = {
        "params": list(method.student.parameters()),
        "lr_multiplier": 1.0,
        "wd_multiplier": 1.0,
        "is_last_layer": False,
    }
    optimizer = torch.optim.AdamW([group], lr=0.0, fused=True)
    checkpoints = Checkpoints(tmp_path, method, optimizer, HERE, CheckpointSettings())
    log = Log(tmp_path, 100, False)
    settings = LoopSettings(steps=7, log_every=100, validate_every=3)
    constant = Schedules(Schedule(peak=0.1), Schedule(peak=0.0))
    train(method, numbers(0), optimizer, constant, checkpoints, log, HERE, settings, lambda step: {"dice": step / 10})
    log.close()
    assert [(row["step"], row.get("dice")) for row in metrics(tmp_path)] == [(3, 0.3), (6, 0.6), (7, None)]


def test_a_signal_stops_at_a_step_boundary_saved_and_the_same_call_goes_on(tmp_path: Path) -> None:
    class Asked(Line):
        def after_step(self, step: int) -> None:
            super().after_step(step)
            if step == 2:
                os.kill(os.getpid(), signal.SIGUSR2)

    asked, whole = tmp_path / "asked", tmp_path / "whole"
    asked.mkdir(), whole.mkdir()
    before = signal.getsignal(signal.SIGUSR2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(run.__globals__, "Line", Asked)
        stopped = run(asked)
    assert (stopped.ended.step, stopped.ended.stopped_by) == (3, "SIGUSR2")
    assert signal.getsignal(signal.SIGUSR2) == before
    assert (asked / "checkpoints" / "step_00000003").is_dir()
    resumed = run(asked)
    assert torch.equal(resumed.mean, run(whole).mean)


def test_a_second_interrupt_does_not_wait() -> None:
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.name == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def two_ranks(rank: int, size: int, folder: Path) -> tuple[list[float], int, str]:
    """Rank 0 alone meets spoilt batches; both must skip the same steps. Rank 1 alone is asked to stop."""

    class Asked(Line):
        def after_step(self, step: int) -> None:
            super().after_step(step)
            if step == 5 and rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    globals()["Line"] = Asked
    with world("cpu") as here:
        method = run(folder, here, frozenset({1, 2}), steps=100, log_every=2)
        return method.mean.flatten().tolist(), method.ended.step, method.ended.stopped_by


def test_ranks_skip_and_stop_together(tmp_path: Path) -> None:
    (mean0, step0, by0), (mean1, step1, by1) = run_ranks(f"{__file__}:two_ranks", 2, tmp_path, folder=tmp_path)
    assert step0 == step1 == 6
    assert (by0, by1) == ("SIGTERM", "SIGTERM")
    # Line is not sharded, so the ranks differ in their gradients, but not in which steps they left out.
    assert mean0 != [1.0, 1.0]
    assert mean1 != [1.0, 1.0]
    text = (tmp_path / "log.txt").read_text()
    assert text.count("skipped: step 1, rank 0") == 1
    assert "slice1.0.0" in text
    assert metrics(tmp_path)[-1]["skipped"] == 2
    assert [row.get("replaced") for row in metrics(tmp_path)] == [None, 1, 1]
