"""Parameter groups, the optimizer and clipping, whole and sharded over two ranks."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from launch.distributed import world
from pretrain.models.heads import DinoHead
from pretrain.models.rope import Table, rotate
from pretrain.models.vit import VitSettings, build
from pretrain.optim import OptimSettings, build_optimizer, clip_gradients, multipliers, param_groups
from tests.gloo import run_ranks

GOLDEN = json.loads((Path(__file__).resolve().parent.parent / "golden" / "param_groups.json").read_text())
TINY: dict[str, Any] = {"size": "custom", "width": 64, "depth": 4, "heads": 4}


def _part(name: str) -> nn.Module:
    model = VitSettings(**TINY, untie_global_and_local_cls_norm=True)
    return build(model) if "backbone" in name else DinoHead(64, 48, 32, 96)


def _settings(official: dict[str, float], **more: Any) -> OptimSettings:
    return OptimSettings(layer_decay=official["lr_decay_rate"], patch_embed_lr=official["patch_embed_lr_mult"], **more)


@pytest.mark.parametrize("name", GOLDEN)
def test_multipliers_are_official(name: str) -> None:
    official, part = GOLDEN[name], _part(name)
    settings = _settings(official["settings"])
    ours = multipliers(part, settings)
    assert ours.keys() == official["groups"].keys() == dict(part.named_parameters()).keys()
    for parameter, (lr, wd, last) in official["groups"].items():
        assert ours[parameter] == (pytest.approx(lr, rel=1e-12), wd, last), parameter
    assert len(param_groups(nn.ModuleDict({"part": part}), settings)) == official["n_fused_groups"]


def test_multipliers_of_the_large_model_are_official(reference: Path) -> None:
    official = json.loads((reference / "param_groups.json").read_text())["vit_large_im1k_decay0.9_patch0.2"]
    with torch.device("meta"):
        model = build(VitSettings(size="l", registers=0, mask_k_bias=False))
    settings = _settings(official["settings"])
    ours = multipliers(model, settings)
    assert ours.keys() == official["groups"].keys()
    for name, group in official["groups"].items():
        assert ours[name] == (pytest.approx(group["lr_multiplier"]), group["wd_multiplier"], group["is_last_layer"])
    assert len(param_groups(nn.ModuleDict({"part": model}), settings)) == official["n_fused_groups"]


def test_tokens_can_be_spared_weight_decay() -> None:
    tokens = {"cls_token", "storage_tokens", "mask_token"}
    plain, spared = (multipliers(_part("backbone"), OptimSettings(exclude_tokens=option)) for option in (False, True))
    assert {name for name in plain if plain[name] != spared[name]} == tokens
    assert all(plain[name].wd == 1 and spared[name].wd == 0 and plain[name].lr == spared[name].lr for name in tokens)


def _student() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"backbone": _part("backbone"), "dino_head": _part("head")})


def test_every_trainable_parameter_is_in_one_group() -> None:
    student = _student()
    student["backbone"].mask_token.requires_grad_(False)
    grouped = [
        parameter for group in build_optimizer(student, OptimSettings()).param_groups for parameter in group["params"]
    ]
    expected = {id(parameter) for parameter in student.parameters() if parameter.requires_grad}
    assert len(grouped) == len(expected) == len({id(parameter) for parameter in grouped})
    assert {id(parameter) for parameter in grouped} == expected
    with torch.device("meta"):
        assert not build_optimizer(nn.ModuleDict({"head": DinoHead(8, 8, 8, 8)}), OptimSettings()).defaults["fused"]


def test_each_part_is_clipped_by_its_own_norm() -> None:
    student = _student()
    for scale, part in zip((1.0, 1e-3), student.values(), strict=True):
        for parameter in part.parameters():
            parameter.grad = scale * torch.ones_like(parameter)
    before = {name: sum(p.numel() for p in part.parameters()) ** 0.5 for name, part in student.items()}
    norms = clip_gradients(student, 3.0)
    assert norms["backbone"].item() == pytest.approx(before["backbone"])
    assert norms["dino_head"].item() == pytest.approx(1e-3 * before["dino_head"])
    assert clip_gradients(student, None)["backbone"].item() == pytest.approx(3.0, rel=1e-4)
    assert clip_gradients(student, None)["dino_head"].item() == norms["dino_head"].item() < 3
    student.zero_grad()
    assert all(norm == 0 for norm in clip_gradients(student, 3.0).values())


def _steps(student: nn.ModuleDict, crops: list[Tensor]) -> dict[str, Tensor]:
    """Two steps on the mean over ``crops`` of a loss that reaches every part of both submodules."""
    settings = OptimSettings(lr={"peak": 1e-2}, lr_rule="none")
    optimizer, schedules = build_optimizer(student, settings), settings.schedules(2, 1)
    found = {}
    for step in range(2):
        schedules.apply(optimizer, step)
        optimizer.zero_grad()
        both = student["backbone"]([crops[0], crops[1]], [torch.arange(4).expand(len(crops[0]), 4) == 1, None])
        logits = student["dino_head"](torch.cat([features.cls for features in both]))
        patches = torch.cat([features.patches.square().mean((1, 2)) for features in both])
        (logits.square().sum(1) * 100 + patches).mean().backward()  # type: ignore[no-untyped-call]
        found |= {f"{name}.norm{step}": norm for name, norm in clip_gradients(student, 0.5).items()}
        optimizer.step()
    state = student.state_dict()
    return found | {name: v.full_tensor() if isinstance(v, DTensor) else v for name, v in state.items()}


def _crops() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, 32, 32, generator=generator), torch.randn(4, 3, 16, 16, generator=generator)]


def _positions_stay_fine(mesh: DeviceMesh) -> bool:
    """Whether a backbone sharded in bf16 still turns its bf16 queries by float32 angles."""
    model = build(VitSettings(**TINY))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for part in (*model.blocks, model):
        fully_shard(part, mesh=mesh, mp_policy=policy)
    seen = set()

    def spy(x: Tensor, table: Table) -> Tensor:
        seen.add((x.dtype, *(part.dtype for part in table)))
        return rotate(x, table)

    with mock.patch("pretrain.models.layers.rotate", spy):
        model(_crops())
    return seen == {(torch.bfloat16, torch.float32, torch.float32)}


def sharded(rank: int, size: int, mesh: tuple[int, ...]) -> dict[str, Tensor]:
    """The steps on this rank's half of the crops, with parameters sharded over ``mesh``."""
    student = _student()
    with world("cpu"):
        names = ("replicate", "shard")[-len(mesh) :]
        device_mesh = init_device_mesh("cpu", mesh, mesh_dim_names=names)
        for block in student["backbone"].blocks:
            fully_shard(block, mesh=device_mesh)
        for part in student.values():
            fully_shard(part, mesh=device_mesh)
        warnings.filterwarnings("error", message="FSDP2-wrapped module")
        found = {"positions": torch.tensor(_positions_stay_fine(device_mesh))}
        return found | _steps(student, [crop[rank * 2 : rank * 2 + 2] for crop in _crops()])


@pytest.mark.parametrize("mesh", [(2,), (2, 1)], ids=["sharded", "replicated"])
def test_two_ranks_step_as_one(tmp_path: Path, mesh: tuple[int, ...]) -> None:
    one = _steps(_student(), _crops())
    for found in run_ranks(f"{__file__}:sharded", 2, tmp_path, mesh=mesh):
        assert found.pop("positions")
        assert found.keys() == one.keys()
        for name, value in one.items():
            torch.testing.assert_close(
                found[name], value, rtol=1e-3, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_a_backbone_stands_still_while_new_heads_learn() -> None:
    """As if it had no gradient: its averages begin with its first step, the heads and their clipping see nothing."""
    settings = OptimSettings(lr={"peak": 1e-2}, lr_rule="none", freeze_backbone=0.5, weight_decay=0.1)
    frozen, fixed = _student(), _student()
    fixed["backbone"].requires_grad_(False)
    start = [p.clone() for p in frozen["backbone"].parameters()]

    def step(student: nn.ModuleDict, optimizer: torch.optim.Optimizer, number: int) -> dict[str, Tensor]:
        settings.schedules(4, 1).apply(optimizer, number)
        optimizer.zero_grad()
        student["dino_head"](student["backbone"](_crops()[0]).cls).square().mean().backward()  # type: ignore[no-untyped-call]
        norms = clip_gradients(student, 1e-3)
        optimizer.step()
        return norms

    optimizer, other = build_optimizer(frozen, settings), build_optimizer(fixed, settings)
    for number in range(2):
        norms = step(frozen, optimizer, number)
        assert norms["backbone"] > 0, "measured all the same, so that a step that is not finite is still found"
        assert norms["dino_head"] == step(fixed, other, number)["dino_head"]
    for a, b in zip(frozen["dino_head"].parameters(), fixed["dino_head"].parameters(), strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(a, b) for a, b in zip(start, frozen["backbone"].parameters(), strict=True))
    assert not [p for p in frozen["backbone"].parameters() if p in optimizer.state]
    step(frozen, optimizer, 2)
    assert not torch.equal(start[0], next(frozen["backbone"].parameters()))
    assert {int(optimizer.state[p]["step"]) for p in frozen["backbone"].parameters() if p in optimizer.state} == {1}
    assert {int(optimizer.state[p]["step"]) for p in frozen["dino_head"].parameters()} == {3}
