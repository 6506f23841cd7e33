"""Self-distillation: who sees what, what moves, what a later run starts from, and one rank = two ranks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydantic
import pytest
import torch
from torch import Tensor, nn

from launch.distributed import World, world
from launch.log import Log
from pretrain.checkpoint import Checkpoints, CheckpointSettings
from pretrain.data.batch import Batch
from pretrain.data.masks import MaskSettings, draw_masks
from pretrain.export import Settings as ExportSettings
from pretrain.export import main as write_file
from pretrain.loop import Guard, LoopSettings, train
from pretrain.methods import Source, self_distillation
from pretrain.methods.self_distillation import SelfDistillation, Settings, build
from pretrain.models.vit import VitSettings
from pretrain.optim import OptimSettings, build_optimizer
from pretrain.parallel import ParallelSettings, compile_blocks, fill, make_mesh, place, recompute_blocks, shard
from pretrain.released import ReleasedError, read
from pretrain.schedule import Schedule
from tests.gloo import run_ranks

HERE = World(0, 1, 0, torch.device("cpu"))
VIT = VitSettings(size="custom", width=32, depth=2, heads=2, in_channels=1, layerscale=0.5, norm_eps=1e-5)
HEAD = {"prototypes": 24, "hidden": 32, "bottleneck": 16}
TERMS: dict[str, Any] = {"dino": {"head": HEAD}, "ibot": {"head": HEAD}, "koleo": {"group": 4}}
B, CROP, LOCAL, GRAM = 4, 64, 32, 96


def batch(step: int, rank: int = 0, size: int = 1) -> Batch:
    """The images [rank * B / size ...] of the global batch of 4: the same pixels and masks for any number of ranks."""
    draw = torch.Generator().manual_seed(step)
    whole = {
        n: torch.randn(k, B, 1, s, s, generator=draw) for n, k, s in (("g", 2, CROP), ("l", 3, LOCAL), ("t", 2, GRAM))
    }
    each = B // size
    mine = {n: x[:, rank * each : (rank + 1) * each].flatten(0, 1) for n, x in whole.items()}
    masks = draw_masks(MaskSettings(group=2), (4, 4), each, seed=0, step=step, rank=rank)
    keys = tuple(f"{step}.{rank * each + i}" for i in range(each))
    return Batch(mine["g"], mine["l"], mine["t"], masks.masks, masks.indices, masks.weights, keys)


def make(
    terms: dict[str, Any] = TERMS,
    here: World = HERE,
    source: Source | None = None,
    seed: int = 0,
    sharding: Any = "replicate",
    guard: Guard | None = None,
    **settings: Any,
) -> SelfDistillation:
    with torch.device("meta"):
        method = build(Settings(terms=terms, **settings), model=VIT, steps=10, guard=guard or Guard(here.device))
    parallel = ParallelSettings(sharding=sharding)
    mesh = make_mesh(here, parallel)
    for name, network in method.networks.items():
        shard(network, here, parallel, frozen=name != "student", mesh=mesh)
        for part in network.values():
            place(part, here.device)
    method.placed()
    for name, parts in method.initial(seed, source, lambda text: None).items():
        for part, state in parts.items():
            fill(method.networks[name][part], state)
    return method


def keep(folder: Path, method: SelfDistillation, step: int = 3) -> Path:
    """A checkpoint as a run would leave it."""
    optimizer = build_optimizer(method.student, OptimSettings())
    about = {"model": VIT.model_dump(mode="json"), "window": {}, "corpus": "c"}
    return Checkpoints(folder, method, optimizer, HERE, CheckpointSettings(), about=about).save(step)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_teacher_sees_whole_global_crops_and_student_masked_ones_in_one_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = make({**TERMS, "gram": {}}, gram_teacher={"path": keep(tmp_path, make())})
    calls: list[tuple[str, Any, Any]] = []
    for name, network in method.networks.items():
        backbone = network["backbone"]

        def seen(crops: Any, masks: Any = None, name: str = name, forward: Any = backbone.forward) -> Any:
            calls.append((name, crops, masks))
            return forward(crops, masks)

        monkeypatch.setattr(backbone, "forward", seen)
    one = batch(0)
    terms = method.loss(one, 0)
    assert set(terms) == {"dino", "ibot", "koleo", "gram"}
    assert all(term.dtype == torch.float32 and term.shape == () and term > 0 for term in terms.values())
    (first, crops, masks), (second, both, hidden), (third, large, none) = calls
    assert (first, second, third) == ("teacher", "student", "gram_teacher")
    assert crops is one.global_crops
    assert masks is None
    assert both[0] is one.global_crops
    assert both[1] is one.local_crops
    assert hidden[0] is one.masks
    assert hidden[1] is None
    assert large is one.gram_crops
    assert none is None


def test_only_the_student_learns_and_frozen_networks_stay_in_eval_mode() -> None:
    method = make()
    sum(method.loss(batch(0), 0).values()).backward()  # type: ignore[union-attr]
    assert all(p.grad is not None for p in method.student.parameters())
    assert all(p.grad is None and not p.requires_grad for p in method.teacher.parameters())
    assert method.student.training
    assert not any(module.training for module in method.teacher.modules())


def test_average_moves_parameters_not_buffers_by_the_schedule() -> None:
    method = make(momentum={"peak": 0.9, "end": 1.0})
    before = [p.clone() for p in method.teacher.parameters()]
    with torch.no_grad():
        for p in method.student.parameters():
            p.add_(1.0)
        method.student["backbone"].rope_embed.periods.add_(1.0)  # type: ignore[union-attr,operator]
    buffers = [b.clone() for b in method.teacher.buffers()]
    momentum = Schedule(peak=0.9, end=1.0).over(10)(4)
    assert 0.9 < momentum < 1.0
    method.after_step(4)
    for old, new, student in zip(before, method.teacher.parameters(), method.student.parameters(), strict=True):
        torch.testing.assert_close(new, momentum * old + (1 - momentum) * student)
    assert all(torch.equal(a, b) for a, b in zip(buffers, method.teacher.buffers(), strict=True))


def test_average_stands_still_when_the_step_was_skipped() -> None:
    guard = Guard(HERE.device)
    method = make(guard=guard)
    with torch.no_grad():
        for p in method.student.parameters():
            p.add_(1.0)
    before = [p.clone() for p in method.teacher.parameters()]
    guard.judge(torch.tensor([1.0, float("nan")]))
    method.after_step(0)
    assert all(torch.equal(a, b) for a, b in zip(before, method.teacher.parameters(), strict=True))


def test_state_has_the_names_of_the_published_code(tmp_path: Path) -> None:
    method = make({**TERMS, "gram": {}}, gram_teacher={"path": keep(tmp_path, make())})
    keys = {f"{top}.{key}" for top, state in method.state().items() for key in state}
    assert {
        "student.backbone.cls_token",
        "student.dino_head.last_layer.weight",
        "teacher.ibot_head.mlp.4.bias",
        "teacher.backbone.blocks.1.attn.qkv.bias_mask",
        "gram_teacher.backbone.norm.weight",
    } <= keys
    assert not [key for key in keys if key.startswith("gram_teacher.") and "head" in key]


def test_a_gram_term_without_its_teacher_is_refused_and_the_reverse(tmp_path: Path) -> None:
    with pytest.raises(pydantic.ValidationError, match=r"terms\.gram needs a Gram teacher: set gram_teacher\.path"):
        Settings(terms={**TERMS, "gram": {}})
    with pytest.raises(pydantic.ValidationError, match="no gram term"):
        Settings(terms=TERMS, gram_teacher={"path": tmp_path})
    with pytest.raises(pydantic.ValidationError, match="at least one"):
        Settings(terms={"dino": None, "ibot": None, "koleo": None})


def test_names_are_kinds_and_null_takes_a_term_away() -> None:
    settings = Settings(terms={"near": {"kind": "koleo", "weight": 0.3}, "ibot": None, "koleo": None})
    assert {name: getattr(term, "kind", "") for name, term in settings.active.items()} == {
        "dino": "dino",
        "near": "koleo",
    }
    assert list(Settings().active) == ["dino", "ibot", "koleo"]
    again = Settings.model_validate(settings.model_dump(mode="json"))
    assert again == settings
    assert list(again.active) == ["dino", "near"]


@pytest.mark.parametrize(
    ("gram", "expected"), [({"max_updates": 2}, [1, 3]), ({}, [1, 3, 5, 7]), ({"update_every": 0}, [])]
)
def test_gram_teacher_is_renewed_when_due_and_at_most_so_often(
    tmp_path: Path, gram: dict[str, int], expected: list[int]
) -> None:
    gram = {"path": keep(tmp_path, make(seed=5)), "update_every": 2, **gram}  # type: ignore[dict-item]
    method = make({**TERMS, "gram": {}}, gram_teacher=gram)
    frozen, teacher = method.networks["gram_teacher"]["backbone"], method.teacher["backbone"]
    assert not same(frozen, teacher)
    renewed = []
    for step in range(8):
        with torch.no_grad():
            for p in method.student.parameters():
                p.add_(0.1)
        method.after_step(step)
        if same(frozen, teacher):
            renewed.append(step)
    assert renewed == expected


def test_a_term_of_weight_zero_costs_no_gram_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = make(
        {**TERMS, "gram": {"weight": {"peak": 2.0, "freeze": 5}}}, gram_teacher={"path": keep(tmp_path, make())}
    )
    passes = []
    frozen = method.networks["gram_teacher"]["backbone"]
    frozen.register_forward_hook(lambda *_: passes.append(1))
    assert method.loss(batch(0), 0)["gram"] == 0
    assert not passes
    assert method.loss(batch(0), 5)["gram"] > 0
    assert passes == [1]


def test_gram_teacher_without_own_crops_sees_the_global_ones(tmp_path: Path) -> None:
    from dataclasses import replace

    method = make(dict.fromkeys(TERMS) | {"gram": {}}, gram_teacher={"path": keep(tmp_path, make())})
    one = replace(batch(0), gram_crops=None, masks=torch.zeros_like(batch(0).masks))
    # The student is the Gram teacher, unmasked: no difference.
    assert method.loss(one, 0)["gram"].item() == pytest.approx(0.0, abs=1e-6)


def test_a_run_starts_from_student_and_teacher_of_another(tmp_path: Path) -> None:
    first = make(seed=1)
    with torch.no_grad():
        for p in first.teacher.parameters():
            p.add_(0.25)
    folder = keep(tmp_path, first).parent.parent
    second = make(seed=2, source=Source(path=folder))
    assert same(second.student, first.student)
    assert same(second.teacher, first.teacher)
    headless = make(seed=2, source=Source(path=folder, heads=False))
    assert same(headless.student["backbone"], first.student["backbone"])
    assert not same(headless.student["dino_head"], first.student["dino_head"])
    assert same(headless.student["dino_head"], headless.teacher["dino_head"])


def test_a_file_is_read_once_for_student_and_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make(seed=1)
    write_file(ExportSettings(folder=keep(tmp_path, first).parent.parent, heads=True))
    reads: list[Path] = []
    monkeypatch.setattr(self_distillation, "read", lambda path, *more: reads.append(path) or read(path, *more))
    second, said = make(seed=2), list[str]()
    states = second.initial(2, Source(path=tmp_path / "export.safetensors", heads=False), said.append)
    assert reads == [tmp_path / "export.safetensors"]
    assert states["student"] == states["teacher"]
    assert torch.equal(states["teacher"]["backbone"]["cls_token"], first.teacher["backbone"].cls_token)  # type: ignore[arg-type]
    assert said[0] == "student and teacher:"
    assert [line.split(":")[0].strip() for line in said if "starts fresh" in line] == ["dino_head", "ibot_head"]
    reads.clear()
    second.initial(2, Source(path=tmp_path), said.append)
    assert reads == [tmp_path, tmp_path]


def test_heads_of_another_size_are_refused_with_the_setting_to_change(tmp_path: Path) -> None:
    folder = keep(tmp_path, make()).parent.parent
    other = {**TERMS, "dino": {"head": {**HEAD, "prototypes": 48}}}
    with pytest.raises(ReleasedError, match=r"dino_head has other sizes.*method\.terms\.dino\.head.*heads=false"):
        make(other, source=Source(path=folder))
    make(other, source=Source(path=folder, heads=False))


def test_weights_come_from_the_seed_alone() -> None:
    torch.manual_seed(99)
    first = make(seed=3)
    torch.rand(7)
    assert same(first.student, make(seed=3).student)
    assert not same(first.student, make(seed=4).student)
    assert same(first.student, first.teacher)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler looks at every tensor it meets
@pytest.mark.parametrize("wrap", [recompute_blocks, compile_blocks])
def test_recomputation_and_compilation_change_names_and_numbers_of_nothing(
    wrap: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    inductor = torch.compile
    monkeypatch.setattr(torch, "compile", lambda method: inductor(method, backend="eager"))
    plain, wrapped = make(), make()
    names = list(wrapped.student.state_dict())
    wrap(wrapped.student["backbone"])
    assert list(wrapped.student.state_dict()) == names
    for method in (plain, wrapped):
        sum(method.loss(batch(0), 0).values()).backward()  # type: ignore[union-attr]
    for (name, a), b in zip(plain.student.named_parameters(), wrapped.student.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=1e-5, msg=name)


def several_steps(rank: int, size: int, folder: Path, source: Path, sharding: str = "replicate") -> dict[str, Tensor]:
    """Four optimizer steps on the same global batches; the whole weights of both networks."""

    def stream(here: World) -> Iterator[Batch]:
        for step in range(100):
            yield batch(step, here.rank, here.size)

    def steps(here: World) -> dict[str, Tensor]:
        guard = Guard(here.device)
        gram = {"path": source, "update_every": 2, "max_updates": 1}
        terms = {**TERMS, "gram": {"weight": 2.0}}
        method = make(terms, here, sharding=sharding, guard=guard, momentum=0.8, gram_teacher=gram)
        optim = OptimSettings(lr=Schedule(peak=2e-3), lr_rule="none")
        optimizer = build_optimizer(method.student, optim)
        checkpoints = Checkpoints(folder, method, optimizer, here, CheckpointSettings())
        log = Log(folder, 1, False, here.rank == 0)
        loop = LoopSettings(steps=4, log_every=1)
        train(method, stream(here), optimizer, optim.schedules(4, B), checkpoints, log, here, loop, guard=guard)
        log.close()
        return {
            f"{top}.{name}": getattr(tensor, "full_tensor", lambda tensor=tensor: tensor)().clone()
            for top, state in method.state().items()
            for name, tensor in state.items()
        }

    if size == 1:
        return steps(HERE)
    with world("cpu") as here:
        return steps(here)


@pytest.mark.parametrize("sharding", ["replicate", "full"])
def test_one_rank_is_two_ranks(tmp_path: Path, sharding: str) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    source = keep(tmp_path / "earlier", make(seed=5))
    alone = several_steps(0, 1, one, source)
    pair = run_ranks(f"{__file__}:several_steps", 2, tmp_path, folder=two, source=source, sharding=sharding)
    start = make().student.state_dict()
    moved = max((alone[f"student.{name}"] - tensor).abs().max().item() for name, tensor in start.items())
    assert moved > 1e-3
    for both in pair:
        assert both.keys() == alone.keys()
        worst = max((both[name] - alone[name]).abs().max().item() for name in alone)
        assert worst < 1e-5, worst
