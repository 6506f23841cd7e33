"""Our trainer, step by step, against the recorded steps of the official one (tests/golden/make_trajectory.py).

The real parts: settings -> build_method -> the recorded weights -> optimizer, schedules -> `pretrain.loop.train` on the
recorded batches. Losses, gradient norms, rates and, after every step, numbers of every tensor of every network.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from launch.distributed import World, world
from launch.settings import load
from pretrain.checkpoint import Checkpoints
from pretrain.data.batch import Batch
from pretrain.loop import Guard, train
from pretrain.optim import build_optimizer
from pretrain.parallel import fill
from pretrain.settings import Settings
from pretrain.train import build_method, place_method
from tests.gloo import run_ranks
from tests.golden import trajectory
from tests.golden.trajectory import STEPS, VARIANTS, Golden

HERE = World(0, 1, 0, torch.device("cpu"))


class Recorder:
    """In the place of the log and of the checkpoints: what was logged, and how the networks stood after each step."""

    def __init__(self, method: Any, optimizer: torch.optim.Optimizer, folder: Path) -> None:
        self.method, self.optimizer, self.run = method, optimizer, folder
        self.lines: list[dict[str, float]] = []
        self.after: list[dict[str, Any]] = []
        self.checkpoints: Checkpoints | None = None

    def wait(self) -> None:
        """Nothing is in flight."""

    def step(self, step: int, total: int, values: Any, *, terms: Any, more: Any, **_: Any) -> None:
        rates = [group["lr"] / group["lr_multiplier"] for group in self.optimizer.param_groups]
        decays = {group["weight_decay"] / group["wd_multiplier"] for group in self.optimizer.param_groups
                  if group["wd_multiplier"]}  # fmt: skip
        frozen = {rate for rate, group in zip(rates, self.optimizer.param_groups, strict=True)
                  if group["is_last_layer"]}  # fmt: skip
        self.lines.append({**values, **terms, **more, "wd": min(decays), "last_layer_lr": min(frozen)})

    def event(self, text: str) -> None:
        raise AssertionError(text)  # nothing is skipped

    def restore(self) -> int:
        return self.checkpoints.restore() if self.checkpoints else 0

    def maybe_save(self, step: int, *, last: bool) -> None:
        def whole(tensor: Any) -> Tensor:  # a replica's own part is the whole
            return tensor.to_local() if isinstance(tensor, DTensor) else tensor

        self.after.append(
            {
                name: trajectory.picked(name, {key: whole(p) for key, p in network.named_parameters()})
                for name, network in self.method.networks.items()
            }
        )
        if self.checkpoints:
            self.checkpoints.maybe_save(step, last=last)


def settings_of(name: str, folder: Path, **changes: Any) -> Settings:
    """Our settings of a recorded run, with further ones."""
    images = trajectory.IMAGES
    ours = {"steps": STEPS, "folder": folder, "device": "cpu", "precision": "fp32", "log.every": 1} | dict(
        VARIANTS[name].ours
    )
    ours |= {"data.corpus": folder, "data.batch_size": images, **changes}
    return load(Settings, overrides=[f"{key}={_written(value)}" for key, value in ours.items()])


def _written(value: Any) -> str:
    """As a user writes it: key={a: 1}."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_written(each)}" for key, each in value.items()) + "}"
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_written, value)) + "]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def recorded(name: str, golden: Golden, ranks: range) -> Iterator[Batch]:
    """The batches of some of the recorded ranks, joined as one rank would have them."""
    variant = VARIANTS[name]
    each = trajectory.IMAGES // variant.ranks

    def joined(parts: list[Tensor]) -> Tensor:
        return torch.cat([part.unflatten(0, (-1, each)) for part in parts], dim=1).flatten(0, 1)

    for step in range(STEPS):
        parts = [trajectory.crops(variant, step, rank) for rank in ranks]
        crops = {kind: joined([part[kind] for part in parts]) for kind in parts[0]}
        masks = joined([golden.masks(step, rank) for rank in ranks])
        weights = (1 / masks.sum(1).clamp(min=1))[:, None].expand_as(masks)[masks]
        keys = tuple(f"{step}.{rank}.{image}" for rank in ranks for image in range(each))
        yield Batch(
            crops["global"], crops["local"], crops.get("gram"), masks, masks.flatten().nonzero()[:, 0], weights, keys
        )


def follow(name: str, folder: Path, here: World = HERE, stop: int = 0, **changes: Any) -> Recorder:
    """Our trainer on one recorded run, or on one rank's part of it; with `stop` in two goes, from a checkpoint."""
    settings, golden, variant = settings_of(name, folder, **changes), Golden(name), VARIANTS[name]
    guard = Guard(here.device)
    method = build_method(settings, guard)
    place_method(method, settings, here)
    for network, parts in build_method(settings, guard, "cpu").networks.items():  # with its own buffers
        shapes = {key: parameter.shape for key, parameter in parts.named_parameters()}
        parts.load_state_dict(trajectory.weights(network, shapes), strict=False)
        for part, module in parts.items():
            fill(method.networks[network][part], module.state_dict())
    optimizer = build_optimizer(method.student, settings.optim)
    schedules = settings.optim.schedules(settings.steps, settings.data.batch_size)
    recorder: Any = Recorder(method, optimizer, folder)
    ranks = range(variant.ranks) if here.size == 1 else range(here.rank, here.rank + 1)
    for end in [stop, STEPS] if stop else [STEPS]:
        loop = settings.loop.model_copy(update={"steps": end})
        if stop:
            recorder.checkpoints = Checkpoints(folder, method, optimizer, here, settings.checkpoint)
            if end == STEPS:
                _forget(method, optimizer)
        stream = (batch.to(here.device) for batch in islice(recorded(name, golden, ranks), recorder.restore(), None))
        with mock.patch("pretrain.loop.step_seed", lambda seed, step, rank, part=0: trajectory.step_of(step)):
            ended = train(method, stream, optimizer, schedules, recorder, recorder, here, loop, guard=guard)
        assert (ended.step, ended.skipped) == (end, 0)
    found: Recorder = recorder
    return found


@torch.no_grad()
def _forget(method: Any, optimizer: torch.optim.Optimizer) -> None:
    """Lose what a new process would not have."""
    optimizer.state.clear()
    for network in method.networks.values():
        for tensor in network.state_dict().values():
            tensor.fill_(float("nan"))


def unweighted(name: str, settings: Any, golden: Golden) -> dict[str, Any]:
    """What our terms must be, from the numbers that the official code logs without their weights."""
    terms, theirs = settings.method.terms, dict(zip(golden.names["losses"], golden["losses"].T, strict=True))
    weights = {term: np.array([terms[term].weight.over(STEPS)(step) for step in range(STEPS)]) for term in terms}
    local = np.array([terms["dino"].local_weight.over(STEPS)(step) for step in range(STEPS)])
    pairs, local_pairs = 2 if terms["dino"].ignore_diagonal else 4, 2 * trajectory.LOCALS
    dino = pairs * theirs["dino_global_crops_loss"] + local_pairs * local * theirs["dino_local_crops_loss"]
    found = {
        "loss": theirs["total_loss"],
        "dino": weights["dino"] * dino / (pairs + local_pairs),
        "koleo": weights["koleo"] * 2 * theirs["koleo_loss"],  # ours is the sum over two crops, theirs the mean
        "ibot": weights["ibot"] * theirs["ibot_loss"],
    }
    return found | ({"gram": weights["gram"] * theirs["gram_loss"]} if "gram" in terms else {})


def held(name: str, settings: Any, recorder: Recorder, tolerance: float | None = None) -> float:
    """Assert that every recorded number of a run is ours; the largest relative difference."""
    golden, variant, worst = Golden(name), VARIANTS[name], [0.0]
    limit = tolerance or variant.tolerance

    def close(what: str, ours: Any, theirs: Any, scale: Any) -> None:
        error = np.abs(np.asarray(ours) - theirs) / np.where(scale == 0, 1, scale)
        worst.append(float(error.max(initial=0)))
        assert worst[-1] <= limit, f"{name}: {what} is off by {worst[-1]:.1e}"

    lines = recorder.lines
    for key, theirs in unweighted(name, settings, golden).items():
        close(key, [line[key] for line in lines], theirs, np.abs(theirs).max())  # KoLeo passes through 0
    for column, theirs in zip(golden.names["norms"], golden["norms"].T, strict=True):
        close(column, [line[f"grad/{column.removesuffix('_grad_norm')}"] for line in lines], theirs, theirs)
    momentum = settings.method.momentum.over(STEPS)
    ours = [{**line, "mom": momentum(step)} for step, line in enumerate(lines)]
    for column, theirs in zip(golden.names["rates"], golden["rates"].T, strict=True):
        np.testing.assert_allclose([line[column] for line in ours], theirs, rtol=1e-6, atol=1e-12, err_msg=column)
    assert recorder.after[0].keys() == golden.names.keys() - {"losses", "norms", "rates"}
    # The official code copies at the start of the step what ours does at the end of the one before.
    copied = (variant.theirs.get("gram", {}).get("it_load_ema_teacher") or 0) - 1
    for network in recorder.after[0]:
        rows = [step for step in range(STEPS) if network != "gram_teacher" or step != copied]
        for index, what in enumerate(("samples", "norms")):
            found = np.stack([recorder.after[step][network][index] for step in rows])
            theirs = golden[f"{network}.{what}"][rows]
            scale = np.abs(theirs).max((0, 2), keepdims=True) if what == "samples" else theirs
            close(f"{network}.{what}", found, theirs, scale)
    return max(worst)


@pytest.mark.parametrize("name", VARIANTS)
def test_nine_steps_are_the_official_ones(name: str, tmp_path: Path) -> None:
    held(name, settings_of(name, tmp_path), follow(name, tmp_path))


@pytest.mark.parametrize(
    "changes",
    [
        {"accumulate": 2, "method.statistics": "batch"},
        {"accumulate": 4, "method.statistics": "batch"},
        {"parallel.recompute": True},
    ],
    ids=["two parts", "four parts", "recomputed"],
)
def test_how_a_step_is_computed_changes_nothing(changes: dict[str, Any], tmp_path: Path) -> None:
    held("plain", settings_of("plain", tmp_path), follow("plain", tmp_path, **changes))


@pytest.mark.parametrize(("name", "stop"), [("plain", 5), ("drawn", 3)])
def test_a_run_in_two_goes_takes_the_official_steps(name: str, stop: int, tmp_path: Path) -> None:
    held(name, settings_of(name, tmp_path), follow(name, tmp_path, stop=stop))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["plain", "giant", "early"])
def test_a_gpu_takes_the_official_steps(name: str, tmp_path: Path) -> None:
    here = World(0, 1, 0, torch.device("cuda"))
    held(name, settings_of(name, tmp_path), follow(name, tmp_path, here), tolerance=1e-4)


def test_the_recorded_runs_show_what_they_are_for() -> None:
    """Otherwise agreement would prove little: clipping bites in some steps, rates change, the Gram teacher moves."""
    plain, drawn = Golden("plain"), Golden("drawn")
    clipped = plain["norms"] > 3.0
    assert clipped.any(0).all()
    assert not clipped.all()
    moves = [np.abs(np.diff(run["gram_teacher.samples"], axis=0)).max((1, 2)) > 0 for run in (plain, drawn)]
    assert [np.flatnonzero(move).tolist() for move in moves] == [[4], [3]]
    for run in (plain, drawn):
        assert (np.abs(np.diff(run["student.samples"], axis=0)).max(2) > 0).any(0).all()
    assert (plain["rates"][:2, plain.names["rates"].index("last_layer_lr")] == 0).all()


def one_of_two(rank: int, size: int, folder: Path) -> float:
    """The recorded run of two processes, on one of ours."""
    with world("cpu") as here:
        recorder = follow("pair", folder, here)
        return held("pair", settings_of("pair", folder), recorder)


def test_two_ranks_are_the_two_official_processes(tmp_path: Path) -> None:
    worst = run_ranks(f"{__file__}:one_of_two", 2, tmp_path, time_limit=400.0, folder=tmp_path)
    assert max(worst) <= VARIANTS["pair"].tolerance
