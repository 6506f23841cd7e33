"""bfloat16 networks on float32 weights: what is rounded, what is not, and the same on one rank and on several."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from launch.distributed import World, world
from pretrain.data.batch import Batch
from pretrain.models.heads import DinoHead
from pretrain.models.positions import PositionSettings
from pretrain.models.vit import VisionTransformer, VitSettings, build
from pretrain.precision import in_bf16
from tests.gloo import run_ranks
from tests.pretrain.test_parallel import HERE, batch, placed, settings, whole

BF16, FP32 = torch.bfloat16, torch.float32
VIT = VitSettings(size="custom", width=32, depth=2, heads=2, in_channels=1, layerscale=0.5)


def network(residual: Any = "bf16") -> VisionTransformer:
    torch.manual_seed(0)
    model = build(VIT)
    in_bf16(model, residual)
    return model


@pytest.mark.parametrize(("residual", "stream"), [("bf16", BF16), ("fp32", FP32)])
def test_what_is_rounded_and_what_is_not(residual: str, stream: torch.dtype) -> None:
    model, seen = network(residual), dict[str, set[torch.dtype]]()

    def note(name: str, *tensors: Any) -> None:
        seen.setdefault(name, set()).update(t.dtype for t in tensors if isinstance(t, Tensor))

    for block in model.blocks:
        block.register_forward_hook(lambda _, args, out: note("stream", out))
        block.register_forward_hook(
            lambda _, args, out: note("positions", *(t for pair in args[1].tables for t in pair))
        )

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.__name__.split(".")[0] in ("mm", "addmm"):
                note("layers", *args)
            return func(*args, **(kwargs or {}))

    torch.manual_seed(1)
    with Products():
        features = model([torch.randn(2, 1, 64, 64), torch.randn(4, 1, 32, 32)])
        sum(f.cls.float().sum() for f in features).backward()
    assert seen == {"stream": {stream}, "positions": {FP32}, "layers": {BF16}}
    assert {f.cls.dtype for f in features} | {f.patches.dtype for f in features} == {stream}
    assert {p.dtype for p in model.parameters()} == {p.grad.dtype for p in model.parameters() if p.grad is not None}
    assert {x.dtype for x in model.state_dict().values()} == {FP32}
    assert list(model.state_dict()) == list(build(VIT).state_dict())
    assert model.rope_embed.periods.dtype == model.blocks[0].attn.qkv.bias_mask.dtype == FP32


def test_the_class_of_a_layer_is_shared_so_that_blocks_share_a_graph() -> None:
    first, second = (block.attn.proj for block in network().blocks)
    assert type(first) is type(second)
    assert isinstance(first, nn.Linear)


def test_a_teachers_logits_stay_exact_products() -> None:
    torch.manual_seed(0)
    head = DinoHead(32, 48, 16, 64)
    in_bf16(head)
    x = torch.randn(5, 32)
    with torch.no_grad():
        logits = head(x)
        bottleneck = head(x, no_last=True)
        again = head(bottleneck, only_last=True)
    assert logits.dtype == bottleneck.dtype == FP32
    torch.testing.assert_close(logits, bottleneck @ head.last_layer.weight.float().T)
    assert torch.equal(again, logits), "a batch in parts has the targets of the uncut one"
    assert head(x).dtype == BF16, "a student's are rounded, which halves the largest tensor of a step"


def gradients(here: World, one: Batch, *words: str) -> dict[str, Tensor]:
    method = placed(settings(*words), here)
    torch.stack(list(method.loss(one, 0).values())).sum().backward()
    return {name: whole(p.grad) for name, p in method.student.named_parameters()}


def error(found: dict[str, Tensor], true: dict[str, Tensor]) -> float:
    flat = [torch.cat([x[name].flatten() for name in true]) for x in (found, true)]
    return ((flat[0] - flat[1]).norm() / flat[1].norm()).item()


def rounded(rank: int, size: int) -> list[dict[str, Tensor]]:
    """Every rank has the same images: the mean of the ranks' gradients must be that of one."""
    torch.compile = functools.partial(torch.compile, backend="aot_eager")  # type: ignore[misc]
    with world("cpu") as here:
        return [
            gradients(here, batch(0), "precision=bf16", f"residual={residual}", f"parallel.sharding={sharding}", *more)
            for residual, sharding, more in (
                ("bf16", "full", ()),
                ("bf16", "replicate", ("parallel.recompute=blocks",)),
                ("fp32", "full", ("parallel.recompute=matmuls",)),
                ("bf16", "full", ("parallel={recompute: blocks, compile: true}",)),
                ("fp32", "replicate", ("parallel={recompute: matmuls, compile: true}",)),
            )
        ]


def test_one_rank_has_the_arithmetic_of_several(tmp_path: Path) -> None:
    both = run_ranks(f"{__file__}:rounded", 2, tmp_path)
    exact = gradients(HERE, batch(0))
    for number, residual in enumerate(("bf16", "bf16", "fp32", "bf16", "fp32")):
        alone = gradients(HERE, batch(0), "precision=bf16", f"residual={residual}")
        assert error(alone, exact) > 1e-3, "nothing was rounded"
        for found in (ranks[number] for ranks in both):
            if number > 2:  # compiled: sums in another order, rounded elsewhere
                assert error(found, alone) < 0.5 * error(alone, exact), residual
                continue
            inner = {name: g for name, g in alone.items() if ".blocks." in name}
            assert error(found, inner) < 1e-6, residual
            # Sharded weights add up the gradients of their several uses in bfloat16; only these are used several times.
            assert error(found, alone) < 1e-3, residual


def test_a_wider_stream_rounds_less() -> None:
    exact = gradients(HERE, batch(0))
    narrow, wide = (gradients(HERE, batch(0), "precision=bf16", f"residual={r}") for r in ("bf16", "fp32"))
    assert error(wide, exact) < error(narrow, exact) < 0.1


def test_a_fixed_table_of_positions_takes_on_the_precision() -> None:
    for grid in (2, 4):  # of the images, or another
        model = build(VIT.model_copy(update={"positions": PositionSettings(grid=grid, fixed=True)}))
        exact = model(torch.ones(1, 1, 64, 64)).cls
        in_bf16(model)
        found = model(torch.ones(1, 1, 64, 64)).cls
        assert (exact.dtype, found.dtype) == (FP32, BF16)
        torch.testing.assert_close(found.float(), exact, rtol=0.05, atol=0.05)
