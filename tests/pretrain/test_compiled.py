"""Compilation: few graphs for all blocks and crop sizes, also beside recomputation, and the same gradients."""

from __future__ import annotations

import functools
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pretrain.models import attention
from pretrain.parallel import compile_blocks, is_compiled, recompute_blocks
from pretrain.precision import in_bf16
from tests.pretrain.test_parallel import backbone

SIDES = [(64, 32), (96, 32), (96, 48), (96, 64), (128, 64), (64, 32)]


def learnt(model: nn.Module, sides: tuple[int, int] = (64, 32)) -> list[Tensor]:
    """The gradients alone: under a mode that sees every operator, as `passed` has, nothing is compiled."""
    draw = torch.Generator().manual_seed(1)
    crops = [torch.randn(n, 1, side, side, generator=draw) for n, side in zip((2, 4), sides, strict=True)]
    torch.manual_seed(2)
    model.zero_grad()
    sum(f.cls.float().square().sum() + f.patches.float().square().sum() for f in model(crops)).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def counting(monkeypatch: Any) -> list[int]:
    """Compilation as far as torch's own graphs, without a C++ compiler; the number of graphs so far."""
    from torch._dynamo.backends.debugging import aot_eager

    graphs = [0]

    def backend(graph: Any, inputs: Any) -> Any:
        graphs[0] += 1
        return aot_eager(graph, inputs)

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    return graphs


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler looks at every tensor it meets
@pytest.mark.parametrize(
    ("what", "bf16"),
    [
        ("none", False),
        ("blocks", True),
        ("matmuls", True),
        *(
            pytest.param(what, bf16, marks=pytest.mark.slow)
            for what, bf16 in (("blocks", False), ("matmuls", False), ("none", True))
        ),
    ],
)
def test_all_blocks_and_all_crop_sizes_share_few_graphs(monkeypatch: pytest.MonkeyPatch, what: Any, bf16: bool) -> None:
    torch._dynamo.reset()
    graphs = counting(monkeypatch)
    plain, student, teacher = backbone(drop_path=0.3), backbone(drop_path=0.3), backbone().requires_grad_(False).eval()
    for model in (plain, student, teacher):
        if bf16:
            in_bf16(model)
        if model is not plain:
            recompute_blocks(model, what if model is student else "none")
            compile_blocks(model)
    for sides in SIDES:
        expected, got = learnt(plain, sides), learnt(student, sides)
        for a, b in zip(expected, got, strict=True):
            torch.testing.assert_close(
                a, b, atol=1e-2 * a.abs().max().item() if bf16 else 1e-5, rtol=0.1 if bf16 else 1e-4
            )
        with torch.no_grad():
            teacher(torch.randn(2, 1, sides[0], sides[0]))
    assert graphs[0] <= 6, "a graph for the first sizes and one for all others, with and without gradients"


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler looks at every tensor it meets
@pytest.mark.parametrize("what", ["none", "blocks", "matmuls"])
def test_a_block_is_one_graph_where_there_is_a_kernel_for_all_crops(monkeypatch: pytest.MonkeyPatch, what: Any) -> None:
    """On a GPU the compiler does not look into xformers' kernel; a block must not meet it while it is compiled."""
    torch._dynamo.reset()
    found, plain, calls = backbone(drop_path=0.3), backbone(drop_path=0.3), [0]

    def kernel(q: Tensor, k: Tensor, v: Tensor, groups: tuple[attention.Group, ...]) -> Tensor:
        calls[0] += 1
        sizes = [group.sequences * group.length for group in groups]
        return torch.cat(list(map(attention._attend, *(torch.split(x, sizes) for x in (q, k, v)), groups)))

    monkeypatch.setattr(attention, "_has_kernel", lambda x: True)
    monkeypatch.setattr(attention, "_attend_blocks", torch.compiler.disable(kernel))
    expected = learnt(plain)
    assert calls[0] > 0
    calls[0] = 0
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager", fullgraph=True))
    recompute_blocks(found, what)
    compile_blocks(found)
    assert is_compiled(found.blocks[0])
    assert not is_compiled(plain.blocks[0])
    for a, b in zip(expected, learnt(found), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert calls[0] == 0


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="the compiler's code for a CPU needs g++")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor", "ignore::DeprecationWarning")
def test_compiled_code_computes_the_same() -> None:
    torch._dynamo.reset()
    plain, compiled = backbone(2), backbone(2)
    recompute_blocks(compiled, "matmuls")
    compile_blocks(compiled)
    for sides in SIDES[:3]:
        for a, b in zip(learnt(plain, sides), learnt(compiled, sides), strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
