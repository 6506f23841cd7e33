"""Schedules: the official arrays, the official recipes, and how a user writes one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from launch.settings import Settings, SettingsError, dump, load
from pretrain.losses import dino, ibot
from pretrain.methods import self_distillation
from pretrain.optim import OptimSettings
from pretrain.schedule import Schedule, Schedules, scale_lr, whole

GOLDEN = np.load(Path(__file__).resolve().parent.parent / "golden" / "schedules.npz")
STEPS = 130
ARRAYS = {
    "v1.lr": Schedule(peak=1e-3, end=1e-6, warmup=13, form="v1"),
    "v1.lr_freeze": Schedule(peak=1e-3, end=1e-6, warmup=13, freeze=5, form="v1"),
    "v1.lr_trunc0.25": Schedule(peak=1e-3, end=1e-6, warmup=13, truncate=0.25, form="v1"),
    "v1.wd": Schedule(peak=0.04, end=0.4, form="v1"),
    "v1.momentum": Schedule(peak=0.992, end=1.0, form="v1"),
    "v1.teacher_temp": Schedule(start=0.04, peak=0.07, warmup=0.3, form="v1"),
    "v2.warmup_then_const": Schedule(peak=4e-4, warmup=13),
    "v2.warmup_cosine_const": Schedule(peak=1e-3, end=1e-5, warmup=13, cosine=50),
    "v2.warmup_cosine": Schedule(peak=1e-3, end=1e-5, warmup=0.1),
    "v2.no_cosine_const": Schedule(peak=1.5),
    "v2.gramlike": Schedule(peak=0, end=2, warmup=100, cosine=10),
    "v2.highres_lr": Schedule(peak=0, end=7e-5, cosine=50),
}
WARM = Schedule(start=0.04, peak=0.07, warmup=100_000)
RECIPES: dict[str, dict[str, Any]] = {
    "vitl_im1k_ws32": {
        "run": {"steps": 125_000, "batch": 2048, "freeze": 1250},
        "lr": Schedule(peak=1e-3, end=1e-6, warmup=12_500, form="v1"),
        "wd": Schedule(peak=0.04, end=0.4, form="v1"),
        "momentum": Schedule(peak=0.992, end=1, form="v1"),
        "teacher_temp": Schedule(start=0.04, peak=0.07, warmup=37_500, form="v1"),
    },
    "7b_pretrain_ws256": {
        "run": {"steps": 1_000_000, "batch": 4096, "freeze": 5000},
        "lr": Schedule(peak=5e-5, warmup=100_000),
        "wd": Schedule(peak=0.04),
        "momentum": Schedule(peak=0.994),
        "teacher_temp": WARM,
    },
    "7b_gram_ws256": {
        "run": {"steps": 1_200_000, "batch": 4096, "freeze": 5000},
        "lr": Schedule(peak=3e-5, warmup=100_000),
        "wd": Schedule(peak=0.04),
        "momentum": Schedule(peak=0.999),
        "teacher_temp": WARM,
        "gram_loss_weight": Schedule(peak=0, end=2, warmup=1_000_000, cosine=1000),
        "dino_local_loss_weight": Schedule(start=1, peak=1, end=0.5, warmup=1_000_000, cosine=1000),
    },
    "7b_highres_ws256": {
        "run": {"steps": 30_000, "batch": 2048, "freeze": 0},
        "lr": Schedule(peak=0, end=1.25e-5, cosine=10_000),
        "wd": Schedule(peak=0.04),
        "momentum": Schedule(peak=0.999),
        "teacher_temp": Schedule(peak=0.07),
        "gram_loss_weight": Schedule(peak=1.5),
        "dino_local_loss_weight": Schedule(peak=0.5),
    },
}
RECIPES["vitl_im1k_ws1"] = RECIPES["vitl_im1k_ws32"] | {"run": {"steps": 125_000, "batch": 64, "freeze": 1250}}


@pytest.mark.parametrize("name", ARRAYS)
def test_official_arrays(name: str) -> None:
    schedule = ARRAYS[name].over(STEPS)
    np.testing.assert_allclose([schedule(step) for step in range(STEPS)], GOLDEN[name], rtol=1e-12, atol=1e-18)


def test_every_official_array_is_tested() -> None:
    recipes = {f"yaml_{name}" for name in RECIPES}
    assert {key for key in GOLDEN.files if not key.startswith("yaml")} == set(ARRAYS)
    assert {key.rpartition(".")[0] for key in GOLDEN.files if key.startswith("yaml")} == recipes


@pytest.mark.parametrize("name", RECIPES)
def test_official_recipes(name: str) -> None:
    recipe = dict(RECIPES[name])
    run = recipe.pop("run")
    settings = OptimSettings(lr=recipe.pop("lr"), weight_decay=recipe["wd"], freeze_last_layer=run["freeze"])
    schedules = settings.schedules(run["steps"], run["batch"])
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.AdamW([
        {"params": [parameter], "lr_multiplier": 1.0, "wd_multiplier": 1.0, "is_last_layer": bool(last)}
        for last, parameter in enumerate(parameters)
    ])  # fmt: skip
    seen: dict[str, list[float]] = {key: [] for key in ("lr", "last_layer_lr", *recipe)}
    for step in GOLDEN[f"yaml_{name}.idx"].tolist():
        schedules.apply(optimizer, step)
        free, last = optimizer.param_groups
        assert free["weight_decay"] == last["weight_decay"]
        values = {key: schedule.over(run["steps"])(step) for key, schedule in recipe.items()}
        for key, value in {**values, "lr": free["lr"], "last_layer_lr": last["lr"], "wd": free["weight_decay"]}.items():
            seen[key].append(value)
    assert {f"yaml_{name}.{key}" for key in (*seen, "idx")} == {
        key for key in GOLDEN.files if key.startswith(f"yaml_{name}.")
    }
    for key, values in seen.items():
        np.testing.assert_allclose(values, GOLDEN[f"yaml_{name}.{key}"], rtol=1e-9, atol=1e-18, err_msg=key)


def test_groups_get_their_multiples() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.AdamW([
        {"params": [parameters[0]], "lr_multiplier": 0.2, "wd_multiplier": 0.0, "is_last_layer": False},
        {"params": [parameters[1]], "lr_multiplier": 1.0, "wd_multiplier": 1.0, "is_last_layer": True},
    ])  # fmt: skip
    schedules = Schedules(Schedule(peak=1.0), Schedule(peak=0.5), freeze_last_layer=2)
    expected = {0: [0.2, 0.0], 1: [0.2, 0.0], 2: [0.2, 1.0]}
    for step, rates in expected.items():
        schedules.apply(optimizer, step)
        assert [group["lr"] for group in optimizer.param_groups] == rates
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.5]


def test_learning_rate_rule() -> None:
    assert scale_lr(1e-3, 64, "sqrt_wrt_1024") == pytest.approx(1e-3)
    assert scale_lr(5e-5, 4096, "sqrt_wrt_1024") == pytest.approx(4e-4)
    assert scale_lr(5e-5, 4096, "none") == 5e-5


class _Run(Settings):
    weight: Schedule = Schedule(peak=1.0)


def test_a_number_is_a_constant_and_is_dumped_as_one(tmp_path: Path) -> None:
    assert load(_Run, overrides=["weight=0.25"]) == _Run(weight=Schedule(peak=0.25))
    assert load(_Run, overrides=["weight=1e-4"]).weight(12345) == 1e-4
    for run, text in ((_Run(weight=0.5), "weight: 0.5\n"), (_Run(weight={"peak": 2, "warmup": 0.1, "end": 0}), None)):
        file = tmp_path / "run.yaml"
        file.write_text(dump(run))
        assert load(_Run, file) == run
        assert text is None or dump(run) == text


def test_a_part_of_a_schedule_can_be_changed() -> None:
    assert load(_Run, overrides=["weight.end=0"]).weight == Schedule(peak=1.0, end=0)
    assert load(_Run, overrides=["weight.peak=2", "weight.end=0"]).weight == Schedule(peak=2, end=0)


@pytest.mark.parametrize(
    "schedule", [Schedule(peak=1, end=0), Schedule(peak=1, warmup=0.5), Schedule(peak=1, freeze=0.1)]
)
def test_an_unresolved_schedule_says_so(schedule: Schedule) -> None:
    with pytest.raises(ValueError, match=r"over\(steps\)"):
        schedule(3)
    assert schedule.over(100)(100) == schedule.over(100)(1000)


def test_short_runs_have_a_value_at_every_step() -> None:
    schedule = Schedule(peak=1, end=0, warmup=10)
    for form in ("v1", "v2"):
        for steps in (0, 1, 2, 9, 10, 11, 12):
            resolved = schedule.model_copy(update={"form": form}).over(steps)
            assert all(0 <= resolved(step) <= 1 for step in range(steps + 3))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"warmup": 1.5, "peak": 1}, "whole steps, or a share"),
        ({"warmup": -1, "peak": 1}, "greater than or equal to 0"),
        ({"truncate": 0.5, "peak": 1}, "belongs to form: v1"),
        ({"warmup": 1}, "peak"),
        ("fast", "valid number"),
    ],
)
def test_wrong_schedules_are_refused(values: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Schedule.model_validate(values)


@pytest.mark.parametrize(
    ("model", "words", "message"),
    [
        (dino.Settings, ["teacher_temperature={peak: 0.07, warmup: 10}"], "temperature.start: must be greater than 0"),
        (ibot.Settings, ["teacher_temperature={peak: 0.07, end: 0}"], "temperature.end: must be greater than 0"),
        (dino.Settings, ["teacher_temperature.freeze=0.1"], "temperature.freeze: keeps the value at 0 at first"),
        (ibot.Settings, ["teacher_temperature=nan"], "temperature.peak: must be greater than 0, got nan"),
        (OptimSettings, ["lr=-1e-3"], r"lr.peak: must be 0 or greater, got -0.001  \[override"),
        (OptimSettings, ["lr={start: -1, warmup: 3}"], "lr.start: must be 0 or greater"),
        (OptimSettings, ["weight_decay.end=-0.1"], "weight_decay.end: must be 0 or greater"),
        (OptimSettings, ["freeze_last_layer=1.5"], "freeze_last_layer: give whole steps, or a share"),
        (self_distillation.Settings, ["momentum=1.01"], "momentum.peak: must be between 0 and 1, got 1.01"),
        (self_distillation.Settings, ["momentum={peak: 0.9, end: 2}"], "momentum.end: must be between 0 and 1"),
    ],
)
def test_values_that_no_run_can_use_are_refused_with_their_place(
    model: type[Settings], words: list[str], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        load(model, overrides=words)


def test_only_values_that_are_used_are_looked_at() -> None:
    assert load(dino.Settings, overrides=["teacher_temperature=0.05"]).teacher_temperature.start == 0
    frozen = load(OptimSettings, overrides=["lr={peak: 0, end: 1e-3, freeze: 5}", "weight_decay=0"])
    assert frozen.lr.over(10)(0) == 0
    assert load(self_distillation.Settings, overrides=["momentum={peak: 0, end: 1}"]).momentum.end == 1


def test_lengths_are_steps_or_shares() -> None:
    assert [whole(length, 250) for length in (0, 0.1, 0.999, 1, 7.0)] == [0, 25, 250, 1, 7]
    assert OptimSettings(freeze_last_layer=0.1).schedules(250, 8).freeze_last_layer == 25


def test_a_list_has_the_value_of_each_step() -> None:
    settings = load(OptimSettings, overrides=["lr=[1e-3, 2e-3, 5e-4]", "weight_decay=[0.1, 0.2]"])
    schedules = settings.schedules(5, 64)  # 64 images: the rule's factor is 1
    assert [schedules.lr(step) for step in range(5)] == pytest.approx([1e-3, 2e-3, 5e-4, 5e-4, 5e-4])
    assert [schedules.weight_decay(step) for step in range(3)] == [0.1, 0.2, 0.2]
    assert settings.schedules(5, 256).lr(1) == pytest.approx(4e-3)
    assert OptimSettings.model_validate(settings.model_dump(mode="json")) == settings
    with pytest.raises(SettingsError, match=r"lr.*: must be 0 or greater"):
        load(OptimSettings, overrides=["lr=[1e-3, -1]"])
    with pytest.raises(SettingsError, match=r"lr\.values: Tuple should have at least 1 item"):
        load(OptimSettings, overrides=["lr=[]"])
