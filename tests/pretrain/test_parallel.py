"""Sharding, recomputation, compilation: where a run is and how it is computed changes none of its numbers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydantic
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from launch.distributed import World, world
from launch.log import Log
from launch.settings import load
from pretrain import parallel
from pretrain.checkpoint import Checkpoints
from pretrain.data.batch import Batch
from pretrain.data.masks import MaskSettings, draw_masks
from pretrain.loop import Guard, train
from pretrain.methods import Trainable
from pretrain.models.vit import VitSettings, build
from pretrain.optim import build_optimizer
from pretrain.parallel import ParallelError, ParallelSettings, fill, make_mesh, recompute_blocks
from pretrain.precision import in_bf16
from pretrain.settings import Settings
from pretrain.train import build_method, place_method
from tests.gloo import run_ranks

HERE = World(0, 1, 0, torch.device("cpu"))
B = 8
HEAD = "{prototypes: 25, hidden: 31, bottleneck: 16}"  # odd, so that no number of ranks shares them out evenly
SMALL = (
    "folder=unused", "steps=6", "precision=fp32", "device=cpu", "data.corpus=unused", f"data.batch_size={B}",
    "model={size: custom, width: 32, depth: 2, heads: 2, in_channels: 1, layerscale: 0.5}", "method.momentum=0.8",
    f"method.terms.dino.head={HEAD}", f"method.terms.ibot.head={HEAD}", "method.terms.koleo.group=8",
    "optim.lr=2e-3", "optim.lr_rule=none", "clip=0.5",
)  # fmt: skip
FULL = "parallel.sharding=full"


def hybrid(ranks: int) -> str:
    return f"parallel={{sharding: hybrid, shard_ranks: {ranks}}}"


def settings(*more: str) -> Settings:
    return load(Settings, None, [*SMALL, *more])


def batch(step: int, rank: int = 0, size: int = 1) -> Batch:
    """This rank's images of a global batch that is the same for any number of ranks."""
    draw = torch.Generator().manual_seed(step)
    each = B // size
    crops = [
        torch.randn(n, B, 1, side, side, generator=draw)[:, rank * each : (rank + 1) * each].flatten(0, 1)
        for n, side in ((2, 64), (3, 32))
    ]
    masks = draw_masks(MaskSettings(group=2), (4, 4), each, seed=0, step=step, rank=rank)
    return Batch(*crops, None, masks.masks, masks.indices, masks.weights, ("",) * each)


def placed(chosen: Settings, here: World = HERE, guard: Guard | None = None) -> Trainable:
    method = build_method(chosen, guard or Guard(here.device))
    place_method(method, chosen, here)
    for name, parts in method.initial(0, None, lambda _: None).items():
        for part, state in parts.items():
            fill(method.networks[name][part], state)
    return method


def whole(tensor: Any) -> Tensor:
    found: Tensor = getattr(tensor, "full_tensor", lambda: tensor)()
    return found.detach().clone()


def trained(folder: Path, stop: int, *words: str, here: World = HERE) -> dict[str, Tensor]:
    """Go on from the folder's newest checkpoint to step ``stop``: the whole weights of student and teacher."""
    chosen, guard = settings(*words), Guard(here.device)
    method = placed(chosen, here, guard)
    optimizer = build_optimizer(method.student, chosen.optim)
    checkpoints = Checkpoints(folder, method, optimizer, here, chosen.checkpoint, say=lambda _: None)
    start = checkpoints.restore()

    def stream() -> Iterator[Batch]:
        for step in range(start, 100):
            yield batch(step, here.rank, here.size)

    log = Log(folder, 100, False, False)
    loop = chosen.loop.model_copy(update={"steps": stop, "log_every": 100})
    train(method, stream(), optimizer, chosen.optim.schedules(6, B), checkpoints, log, here, loop, guard=guard)
    log.close()
    return {f"{top}.{name}": whole(x) for top, state in method.state().items() for name, x in state.items()}


Run = tuple[str, int, tuple[str, ...]]  # its name, the step to stop at, settings

PLAN: list[tuple[int, list[Run]]] = [
    (1, [("start", 0, ()), ("alone", 4, ()), ("whole", 6, ()), ("growing", 2, ())]),
    (
        2,
        [
            ("two copies", 4, ("parallel.sharding=replicate",)),
            ("one over two", 4, (FULL, "parallel.recompute=matmuls")),
            ("two hybrid", 4, (hybrid(1),)),
            ("shrinking", 2, (FULL,)),
            ("growing", 4, (hybrid(2),)),
        ],
    ),
    (
        4,
        [
            ("four copies", 4, ("parallel.sharding=replicate",)),
            ("one over four", 4, (FULL,)),
            ("two over two", 4, (hybrid(2), "parallel.recompute=blocks")),
            ("shrinking", 4, (hybrid(2),)),
            ("growing", 6, (FULL,)),
        ],
    ),
    (1, [("shrinking", 6, ())]),
]


def on_ranks(rank: int, size: int, folder: Path, runs: list[Run]) -> dict[str, dict[str, Tensor]]:
    """The runs, one after the other in one process group."""
    with world("cpu") as here:
        found = {name: trained(folder / name, stop, *words, here=here) for name, stop, words in runs}
        return found | {"grid": grid(here)}


def grid(here: World) -> dict[str, Tensor]:
    """Which ranks share a copy, and how many blocks each module of a student gathers ahead."""
    found = {}
    for name, of in {
        "replicate": ParallelSettings(),
        "full": ParallelSettings(sharding="full"),
        "machine": ParallelSettings(sharding="hybrid"),
        "hybrid": ParallelSettings(sharding="hybrid", shard_ranks=2),
    }.items():
        mesh = make_mesh(here, of)
        assert mesh is not None
        found[name] = torch.as_tensor(mesh.mesh)
    root: Any = placed(settings(hybrid(2)), here).student["backbone"]
    modules = [root, *root.blocks]
    assert all(isinstance(module, FSDPModule) for module in modules)
    ahead = [len(module._get_fsdp_state()._states_to_forward_prefetch) for module in modules]
    return found | {"ahead": torch.tensor(ahead)}


def worst(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Tensor]]]:
    """What each rank got of each run of PLAN, the newest where a run was continued."""
    folder, found = tmp_path_factory.mktemp("runs"), dict[str, list[dict[str, Tensor]]]()
    for size, runs in PLAN:
        if size == 1:
            found |= {name: [trained(folder / name, stop, *words)] for name, stop, words in runs}
            continue
        ranks = run_ranks(f"{__file__}:on_ranks", size, folder, time_limit=400, folder=folder, runs=runs)
        found |= {name: [results[name] for results in ranks] for name in ranks[0]}
    return found


@pytest.mark.parametrize(
    "name", ["two copies", "one over two", "two hybrid", "four copies", "one over four", "two over two"]
)
def test_any_sharding_makes_the_steps_of_one_rank(made: dict[str, list[dict[str, Tensor]]], name: str) -> None:
    (alone,), (start,) = made["alone"], made["start"]
    assert worst(alone, start) > 1e-3
    assert max(worst(found, alone) for found in made[name]) < 1e-5


@pytest.mark.parametrize("name", ["shrinking", "growing"])
def test_a_run_goes_on_at_any_size_and_sharding(made: dict[str, list[dict[str, Tensor]]], name: str) -> None:
    (alone,) = made["whole"]
    assert max(worst(found, alone) for found in made[name]) < 2e-5


def test_which_ranks_share_a_copy(made: dict[str, list[dict[str, Tensor]]]) -> None:
    assert {name: tensor.tolist() for name, tensor in made["grid"][0].items()} == {
        "replicate": [[0], [1], [2], [3]],
        "full": [0, 1, 2, 3],
        "machine": [0, 1, 2, 3],
        "hybrid": [[0, 1], [2, 3]],
        "ahead": [1, 1, 0],
    }


def test_ranks_that_cannot_be_shared_out_are_refused_with_those_that_can() -> None:
    of_eight = World(0, 8, 0, torch.device("cpu"), local_size=3)
    with pytest.raises(ParallelError, match=r"parallel\.shard_ranks: 5 ranks .* the 8 ranks of the run; 1, 2, 4, 8 do"):
        make_mesh(of_eight, ParallelSettings(sharding="hybrid", shard_ranks=5))
    with pytest.raises(ParallelError, match="3 ranks to a copy"):
        make_mesh(of_eight, ParallelSettings(sharding="hybrid"))
    with pytest.raises(pydantic.ValidationError, match="shard_ranks belongs to sharding: hybrid"):
        ParallelSettings(sharding="full", shard_ranks=2)
    assert make_mesh(HERE, ParallelSettings(sharding="hybrid", shard_ranks=5)) is None


class Live(TorchDispatchMode):
    """The bytes made under it that somebody still holds, and how often each operator ran."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls[func.__name__.split(".")[0]] = self.calls.get(func.__name__.split(".")[0], 0) + 1
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                ref = StorageWeakRef(tensor.untyped_storage())
                self.made[ref.cdata] = (ref, tensor.untyped_storage().nbytes())
        return out

    def bytes(self) -> int:
        return sum(size for ref, size in self.made.values() if not ref.expired())


def backbone(layers: int = 4, **more: Any) -> nn.Module:
    torch.manual_seed(0)
    given = {"size": "custom", "width": 64, "depth": layers, "heads": 4, "in_channels": 1, "layerscale": 0.5, **more}
    return build(VitSettings.model_validate(given))


def passed(model: nn.Module, sides: tuple[int, int] = (64, 32)) -> tuple[int, int, list[Tensor]]:
    """Bytes held for the backward pass, matrix products in it, the gradients."""
    big, small = sides
    draw = torch.Generator().manual_seed(1)
    crops = [torch.randn(2, 1, big, big, generator=draw), torch.randn(4, 1, small, small, generator=draw)]
    torch.manual_seed(2)
    with Live() as live:
        out = model(crops)
        loss = sum(f.cls.float().square().sum() + f.patches.float().square().sum() for f in out)
        held, before = live.bytes(), live.calls.get("addmm", 0)
        loss.backward()
        again = live.calls.get("addmm", 0) - before
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    return held, again, [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("bf16", [False, True])
def test_recomputation_holds_less_and_changes_no_gradient(bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # As the compiler sees the blocks: uncompiled ones make norms and GELUs again by themselves.
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    found = {}
    for what in ("none", "matmuls", "blocks"):
        model = backbone(drop_path=0.3, rope={"rescale": 2})
        if bf16:
            in_bf16(model)
        recompute_blocks(model, what)  # type: ignore[arg-type]
        found[what] = passed(model)
    for what in ("matmuls", "blocks"):
        assert all(torch.equal(a, b) for a, b in zip(found["none"][2], found[what][2], strict=True)), what
    assert found["blocks"][0] < 0.7 * found["matmuls"][0]
    assert found["matmuls"][0] < 0.8 * found["none"][0]
    # Biased layers dispatch addmm: four a block, none of which `matmuls` computes again.
    assert [found[what][1] for what in ("none", "matmuls", "blocks")] == [0, 0, 16]


def test_matmuls_keeps_what_operators_outside_of_torch_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """As xformers' attention on a GPU, which is no operator of torch and not there before it is first used."""
    assert {"xformers_flash::flash_fwd", "xformers_flash3::flash_fwd"} <= parallel._KEPT
    calls: list[int] = []

    class Attend(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return attend(x).sin()  # type: ignore[no-any-return]

    part = nn.Module()
    part.blocks = nn.ModuleList([Attend()])
    recompute_blocks(part, "matmuls")

    @torch.library.custom_op("axial_test::attend", mutates_args=())
    def attend(x: Tensor) -> Tensor:
        calls.append(1)
        return 2 * x

    attend.register_autograd(lambda ctx, grad: 2 * grad)
    for kept, expected in ((frozenset({"axial_test::attend"}), 1), (frozenset(), 2)):
        monkeypatch.setattr(parallel, "_KEPT", kept)
        calls.clear()
        part.blocks[0](torch.ones(3, requires_grad=True)).sum().backward()
        assert len(calls) == expected


def test_uncompiled_blocks_hold_still_less_when_all_is_recomputed() -> None:
    found = {}
    for what in ("none", "blocks"):
        model = backbone(drop_path=0.3)
        recompute_blocks(model, what)  # type: ignore[arg-type]
        found[what] = passed(model)
    assert all(torch.equal(a, b) for a, b in zip(found["none"][2], found["blocks"][2], strict=True))
    assert found["blocks"][0] < 0.7 * found["none"][0]


def test_yes_and_no_still_say_what_to_recompute() -> None:
    assert [ParallelSettings.model_validate({"recompute": r}).recompute for r in (True, False, "matmuls")] == [
        "blocks",
        "none",
        "matmuls",
    ]
    with pytest.raises(pydantic.ValidationError):
        ParallelSettings.model_validate({"recompute": "some"})
