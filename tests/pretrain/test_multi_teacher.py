"""Distillation from several teachers: the equations, what moves and what does not, collapse, one rank = two ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydantic
import pytest
import torch
from torch import Tensor

from launch.distributed import World, world
from launch.log import Log
from pretrain.checkpoint import Checkpoints, CheckpointSettings
from pretrain.data.batch import Batch
from pretrain.loop import LoopSettings, train
from pretrain.methods import Source, SourceError
from pretrain.methods.multi_teacher import Settings
from pretrain.models.vit import VisionTransformer, VitSettings
from pretrain.optim import OptimSettings, build_optimizer
from pretrain.schedule import Schedule
from pretrain.weights import digest
from tests.gloo import run_ranks
from tests.pretrain.distilling import ADAPTER, GRID, HERE, VIT, B, batch, given, make
from tests.pretrain.teacher_files import write_export


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three teachers of different widths; the last has smaller patches, and so another grid."""
    folder = tmp_path_factory.mktemp("teachers")
    made = {}
    for seed, (name, width, patch) in enumerate([("one", 32, 16), ("two", 48, 16), ("three", 32, 8)]):
        size = VitSettings(
            size="custom", width=width, depth=2, heads=2, in_channels=1, layerscale=None, patch_size=patch
        )
        made[name] = write_export(folder / f"{name}.safetensors", size, seed)
    return made


def alone(path: Path) -> VisionTransformer:
    from pretrain.released import load_backbone

    return load_backbone(path, say=lambda text: None)[0].eval()


def test_the_loss_is_that_of_the_equations(files: dict[str, Path]) -> None:
    """Token by token and in float64, from the networks alone; teachers on the student's grid, some patches hidden."""
    method = make(given({n: files[n] for n in ("one", "two")}, gate={"affinity": 0.7, "agreement": 1.3}))
    method.student.double()
    one = batch(method, 0)
    losses = method.loss(Batch(**{**vars(one), "global_crops": one.global_crops.double()}), 0)
    student = method.student["backbone"](one.global_crops.double(), one.masks)
    maps = method.state()["adapters"]
    features = {}
    for index, name in enumerate(("one", "two")):
        made = alone(files[name])(one.views[index], None, one.kept[index])
        features[name] = made
    token, spatial, cls = [], [], []
    for image in range(B):
        at: dict[str, list[float]] = {"visible": [], "all": []}
        for place_ in range(GRID * GRID):
            targets = []
            for index, name in enumerate(("one", "two")):
                kept = one.kept[index]
                assert kept is not None
                if place_ in kept[image].tolist():
                    row = features[name].patches[image, kept[image].tolist().index(place_)]
                    targets.append(_mapped(row, maps["patches"][name]))
            if not targets:
                continue
            divergence = _divergence(student.patches[image, place_], targets, 0.7, 1.3)
            at["all"].append(divergence)
            if not one.masks[image, place_]:
                at["visible"].append(divergence)
        token.append(sum(at["visible"]) / max(len(at["visible"]), 1))
        spatial.append(sum(at["all"]) / max(len(at["all"]), 1))
        targets = [_mapped(features[name].cls[image], maps["cls"][name]) for name in ("one", "two")]
        cls.append(_divergence(student.cls[image], targets, 0.7, 1.3))
    for name, found in (("token", token), ("spatial", spatial), ("cls", cls)):
        assert losses[name].item() == pytest.approx(sum(found) / B, rel=1e-5), name
        assert losses[name].item() > 0.01


def _mapped(row: Tensor, map_: dict[str, Tensor]) -> Tensor:
    x = map_["weight"].double() @ row.detach().double() + map_["bias"].double()
    return (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt()


def _divergence(student: Tensor, targets: list[Tensor], affinity: float, agreement: float) -> float:
    def cos(a: Tensor, b: Tensor) -> float:
        return float(a @ b / (a.norm() * b.norm()))

    scores = []
    for m, target in enumerate(targets):
        others = [cos(target, other) for k, other in enumerate(targets) if k != m]
        scores.append(affinity * cos(student.detach(), target) + agreement * (sum(others) / max(len(others), 1)))
    powers = [math.exp(score / 0.1) for score in scores]
    fused = sum(p / sum(powers) * t for p, t in zip(powers, targets, strict=True))
    assert isinstance(fused, Tensor)
    p = fused.softmax(0)
    return float((p * (p.log() - student.detach().log_softmax(0))).sum())


def test_only_the_student_learns(files: dict[str, Path]) -> None:
    method = make(given(files))
    before = {name: digest(part.state_dict()) for name, part in method.networks["teachers"].items()}
    maps = method.state()["adapters"]["patches"]["one"]["weight"].clone()
    optimizer = build_optimizer(method.student, OptimSettings())
    for step in range(3):
        sum(method.loss(batch(method, step), step).values()).backward()  # type: ignore[union-attr]
        optimizer.step()
    assert all(p.grad is not None for p in method.student.parameters())
    assert all(not p.requires_grad for p in method.networks["teachers"].parameters())
    assert not any(module.training for module in method.networks["teachers"].modules())
    after = {name: digest(part.state_dict()) for name, part in method.networks["teachers"].items()}
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(maps, method.state()["adapters"]["patches"]["one"]["weight"])
    assert method.exported() is method.student["backbone"]


def test_without_masks_everything_is_the_unmasked_forward(files: dict[str, Path]) -> None:
    settings = given(files, masks={"student": 0.0}, teachers={name: {"mask": 0.0} for name in files})
    method = make(settings)
    one = batch(method, 0)
    assert one.kept == (None, None, None)
    assert not one.masks.any()
    seen = method._see(one)
    for (name, path), each in zip(files.items(), seen, strict=True):
        index = list(files).index(name)
        made = alone(path)(one.views[index])
        assert each.valid.all()
        torch.testing.assert_close(each.cls, made.cls)
        if name != "three":
            torch.testing.assert_close(each.patches, made.patches)
    losses = method.loss(one, 0)
    assert losses["token"].item() == pytest.approx(losses["spatial"].item(), rel=1e-6)


def test_replaced_patches_vote_and_dropped_ones_do_not(files: dict[str, Path]) -> None:
    dropped, replaced = (make(given(files, masks={"replace": word})) for word in (False, True))
    one = batch(dropped, 0)
    for gone, there, kept in zip(dropped._see(one), replaced._see(one), one.kept, strict=True):
        assert kept is not None
        assert not gone.valid.all()
        assert there.valid.all()
        assert not torch.allclose(gone.patches[gone.valid], there.patches[gone.valid])


def test_a_single_teacher_and_two_are_defined(files: dict[str, Path]) -> None:
    alone_ = make(given({"one": files["one"]}))
    losses = alone_.loss(batch(alone_, 0), 0)
    numbers = alone_.numbers()
    assert all(torch.isfinite(value) for value in (*losses.values(), *numbers.values()))
    assert numbers["gate/weight/one"] == 1
    pair = {name: files[name] for name in ("one", "two")}
    found = [make(given(pair, gate={"agreement": weight})) for weight in (0.0, 5.0)]
    first, second = (method.loss(batch(method, 0), 0)["spatial"].item() for method in found)
    assert first == pytest.approx(second, rel=1e-6), "agreement is the same for both of two teachers"


def test_floors_hold_a_teacher_up(files: dict[str, Path]) -> None:
    pair = {name: files[name] for name in ("one", "two")}
    method = make(given(pair, teachers={"one": {"floor": 0.5}, "two": {"floor": 0.3}}, masks={"replace": True}))
    method.loss(batch(method, 0), 0)
    numbers = method.numbers()
    assert numbers["gate/weight/one"] >= 0.5
    assert numbers["gate/weight/two"] >= 0.3
    assert numbers["gate/weight/one"] + numbers["gate/weight/two"] == pytest.approx(1)


@pytest.mark.parametrize("kind", ["gcca", "pca", "recon", "joint"])
def test_trained_adapters_collapse_and_the_monitor_says_so_and_fitted_ones_do_not(
    files: dict[str, Path], kind: str
) -> None:
    method = make(given({n: files[n] for n in ("one", "two")}, adapter={**ADAPTER, "kind": kind}))
    optimizer = torch.optim.AdamW(method.student.parameters(), lr=3e-3)
    said = []
    for step in range(150):
        optimizer.zero_grad()
        sum(method.loss(batch(method, step % 20), 0).values()).backward()  # type: ignore[union-attr]
        optimizer.step()
        values = {name: value.item() for name, value in method.numbers().items()}
        if text := method.remark(values):
            said.append(text)
    if kind == "joint":
        assert values["gate/target_std"] < 0.3
        assert len(said) == 1
        assert "collapsing" in said[0]
        assert "method.adapter.kind=gcca" in said[0]
    else:
        assert values["gate/target_std"] > 0.5
        assert not said


def test_a_teacher_that_changed_since_the_run_began_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    path = write_export(tmp_path / "t.safetensors", VIT, 7)
    method = make(given({"one": path}))
    write_export(path, VIT, 7)
    method.fixed(lambda text: None)
    write_export(path, VIT, 8)
    with pytest.raises(
        SourceError, match=r"method\.teachers\.one: .*t\.safetensors holds other weights than when this"
    ):
        method.fixed(lambda text: None)


def test_a_student_starts_from_given_weights(files: dict[str, Path]) -> None:
    method = make(given({"two": files["two"]}))
    states = method.initial(0, Source(path=files["one"], registers="file"), lambda text: None)
    assert torch.equal(states["student"]["backbone"]["cls_token"], alone(files["one"]).cls_token)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"masks": {"student": 0.2}, "teachers": {"one": {"mask": 0.4}}}, "the student must see no more"),
        ({"teachers": {"one": {"floor": 0.7}, "two": {"floor": 0.7}}}, "their floors add up to 1.4"),
        ({"adapter": {"affine": True}}, "affine belongs to kind: joint"),
        ({"adapter": {"kind": "cca"}}, "'gcca', 'pca', 'recon' or 'joint'"),
        ({"masks": {"student": 1.0}}, "less than 1"),
        ({"gate": {"temperature": 0}}, "greater than 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(files: dict[str, Path], changes: Any, message: str) -> None:
    with pytest.raises(pydantic.ValidationError, match=message):
        given({name: files[name] for name in ("one", "two")}, **changes)


def test_shares_fall_from_a_half_in_even_steps(files: dict[str, Path]) -> None:
    assert given(files).shares == pytest.approx({"one": 0.5, "two": 0.4, "three": 0.3})
    assert given({"one": files["one"]}).shares == {"one": 0.5}
    assert given(files, teachers={"two": {"mask": 0.1}}).shares["two"] == 0.1
    with pytest.raises(pydantic.ValidationError, match="at least one is needed"):
        Settings(teachers={"one": None})


def several_steps(rank: int, size: int, folder: Path, files: dict[str, Path], sharding: str) -> dict[str, Tensor]:
    """Four optimizer steps on the same global batches; the student's whole weights, and the maps."""

    def steps(here: World) -> dict[str, Tensor]:
        method = make(given(files), here, sharding=sharding)

        def stream() -> Iterator[Batch]:
            for step in range(100):
                yield batch(method, step, here.rank, here.size)

        optim = OptimSettings(lr=Schedule(peak=2e-3), lr_rule="none")
        optimizer = build_optimizer(method.student, optim)
        checkpoints = Checkpoints(folder, method, optimizer, here, CheckpointSettings())
        log = Log(folder, 1, False, here.rank == 0)
        loop = LoopSettings(steps=4, log_every=1)
        train(method, stream(), optimizer, optim.schedules(4, B), checkpoints, log, here, loop)
        log.close()
        found = {
            name: getattr(tensor, "full_tensor", lambda tensor=tensor: tensor)().clone()
            for name, tensor in method.student.state_dict().items()
        }
        return found | {f"map.{n}": m["weight"] for n, m in method.state()["adapters"]["patches"].items()}

    if size == 1:
        return steps(HERE)
    with world("cpu") as here:
        return steps(here)


@pytest.mark.parametrize("sharding", ["replicate", "full"])
def test_one_rank_is_two_ranks(tmp_path: Path, files: dict[str, Path], sharding: str) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    single = several_steps(0, 1, one, files, sharding)
    pair = run_ranks(f"{__file__}:several_steps", 2, tmp_path, folder=two, files=files, sharding=sharding)
    start = make(given(files)).student.state_dict()
    assert max((single[name] - tensor).abs().max().item() for name, tensor in start.items()) > 1e-3
    for both in pair:
        assert both.keys() == single.keys()
        worst = max((both[name] - single[name]).abs().max().item() for name in single)
        assert worst < 1e-5, worst


def test_a_batch_in_parts_is_the_batch(files: dict[str, Path]) -> None:
    method = make(given(files))
    one = batch(method, 0)
    whole = method.loss(one, 0)
    parts = [method.loss(part, 0) for part in method.parts(one, 0, 2, lambda part: None)]
    for name, value in whole.items():
        assert sum(part[name].item() for part in parts) / 2 == pytest.approx(value.item(), rel=1e-5)


def test_positions_may_be_the_axis_of_the_softmax(files: dict[str, Path]) -> None:
    method = make(given(files, spatial={"axis": "positions", "temperature": 2.0}, token={"weight": 0.0}))
    losses = method.loss(batch(method, 0), 0)
    assert losses["token"] == 0
    assert losses["spatial"] > 0
    losses["spatial"].backward()
    assert method.student["backbone"].cls_token.grad is not None
