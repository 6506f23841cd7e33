"""Linear layers that keep less: the numbers and gradients of the plain modules, and what a block keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.layers import LayerScale
from pretrain.models.lean import Side, add_rows, linear
from pretrain.models.vit import VitSettings, build

CASES: list[dict[str, Any]] = [
    {"norm": True}, {"gelu": True}, {"scale": True}, {"norm": True, "scale": True}, {"gelu": True, "scale": True},
    {"scale": True, "bias": False}, {},
]  # fmt: skip


def parts(case: dict[str, Any], dtype: torch.dtype) -> tuple[nn.Linear, nn.LayerNorm | None, LayerScale | None]:
    layer = nn.Linear(6, 5, bias=case.get("bias", True), dtype=dtype)
    norm = nn.LayerNorm(6, 1e-5, dtype=dtype) if case.get("norm") else None
    scale = LayerScale(5, 1.0).to(dtype) if case.get("scale") else None
    with torch.no_grad():
        for module in (layer, norm, scale):
            for parameter in module.parameters() if module is not None else ():
                parameter.normal_()
    return layer, norm, scale


def plain(x: Tensor, layer: nn.Linear, norm: nn.LayerNorm | None, gelu: bool, scale: LayerScale | None) -> Tensor:
    made: Tensor = layer(norm(x) if norm is not None else F.gelu(x) if gelu else x)
    return made if scale is None else scale(made)


@pytest.mark.parametrize("frozen", ["", "weight", "layer", "norm"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_numbers_and_gradients_are_those_of_the_modules(case: dict[str, Any], frozen: str) -> None:
    torch.manual_seed(0)
    layer, norm, scale = parts(case, torch.float64)
    for module in {"layer": (layer,), "norm": (norm,)}.get(frozen, ()):
        if module is not None:
            module.requires_grad_(False)
    layer.weight.requires_grad_(frozen not in ("weight", "layer"))
    x = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    gelu = case.get("gelu", False)
    wanted = [x, *(p for m in (layer, norm, scale) if m is not None for p in m.parameters() if p.requires_grad)]
    expected = plain(x, layer, norm, gelu, scale)
    ours = linear(x, layer, layer.bias, norm=norm, gelu=gelu, scale=scale)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    weights = torch.randn_like(expected)
    for got, want in zip(
        torch.autograd.grad((ours * weights).sum(), wanted), torch.autograd.grad((expected * weights).sum(), wanted),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_side_branch_is_what_it_says(case: dict[str, Any], frozen: bool) -> None:
    """scale((W + factor up down) given + b), with the gradients of that."""
    torch.manual_seed(0)
    layer, norm, scale = parts(case, torch.float64)
    side = Side(layer, 2, 6.0)
    nn.init.normal_(side.up)
    layer.side = side
    for module in (layer.weight, layer.bias, *(m for m in (norm, scale) if frozen and m is not None)):
        if module is not None:
            module.requires_grad_(not frozen)
    side.requires_grad_(True)
    x = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    gelu = case.get("gelu", False)
    given = norm(x) if norm is not None else F.gelu(x) if gelu else x
    expected = F.linear(given, layer.weight + 3.0 * side.up @ side.down, layer.bias)
    expected = expected if scale is None else scale(expected)
    ours = linear(x, layer, layer.bias, norm=norm, gelu=gelu, scale=scale)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    modules = (layer, norm, scale)
    wanted = [x, *(p for m in modules if m is not None for p in m.parameters() if p.requires_grad)]
    assert frozen == (len(wanted) == 3)
    weights = torch.randn_like(expected)
    for got, want in zip(
        torch.autograd.grad((ours * weights).sum(), wanted), torch.autograd.grad((expected * weights).sum(), wanted),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(linear(x, layer, layer.bias, norm=norm, gelu=gelu, scale=scale), expected)


@pytest.mark.parametrize(
    ("case", "keeps"), [({}, False), ({"scale": True}, False), ({"gelu": True}, True), ({"norm": True}, True)]
)
def test_a_frozen_layer_keeps_its_input_only_for_what_stands_before_it(case: dict[str, Any], keeps: bool) -> None:
    layer, norm, scale = parts(case, torch.float32)
    for module in (layer, norm, scale):
        if module is not None:
            module.requires_grad_(False)
    x = torch.randn(7, 6, requires_grad=True) * 2
    found = []

    def pack(tensor: Tensor) -> Tensor:
        found.append(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        linear(x, layer, layer.bias, norm=norm, gelu=case.get("gelu", False), scale=scale)
    assert (x.untyped_storage().data_ptr() in found) == keeps


@pytest.mark.parametrize("case", CASES, ids=str)
def test_autocast_multiplies_in_bf16_and_leaves_gradients_in_float32(case: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer, norm, scale = parts(case, torch.float32)
    x, gelu = torch.randn(7, 6, requires_grad=True), case.get("gelu", False)
    given = x.bfloat16() if gelu else x  # what stands before a GELU is a linear layer
    with torch.autocast("cpu", torch.bfloat16):
        ours = linear(given, layer, layer.bias, norm=norm, gelu=gelu, scale=scale)
        expected = plain(given, layer, norm, gelu, scale)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.float(), expected.float(), rtol=0.03, atol=0.05)
    ours.float().square().sum().backward()
    assert {p.grad.dtype for m in (layer, norm, scale) if m for p in m.parameters() if p.grad is not None} == {x.dtype}


def test_added_rows_pass_their_gradient_on() -> None:
    x, change = (torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (6, 3))
    rows = torch.tensor([4, 0, 5])
    factors = [(2, 1.5), (1, 4.0)]
    added = add_rows(x, rows, change, factors)
    expected = x.detach().clone()
    expected[[4, 0, 5]] += change.detach() * torch.tensor([1.5, 1.5, 4.0])[:, None]
    torch.testing.assert_close(added.detach(), expected)
    assert torch.autograd.gradcheck(lambda x, change: add_rows(x, rows, change, factors), (x, change))


def test_without_gradients_the_modules_themselves_are_called() -> None:
    """So that hooks on them see a teacher, and its numbers are to the bit those of the plain layers."""
    layer, norm, scale = parts({"norm": True, "scale": True}, torch.float32)
    seen = []
    layer.register_forward_hook(lambda *_: seen.append(1))
    x = torch.randn(7, 6)
    with torch.no_grad():
        ours = linear(x, layer, layer.bias, norm=norm, scale=scale)
        assert torch.equal(ours, plain(x, layer, norm, False, scale))
    assert len(seen) == 2


def kept(drop_path: float) -> float:
    """What the second of two blocks keeps for the backward pass, in tensors [T, D] of all its tokens."""
    width, images = 64, 2
    model = build(VitSettings(size="custom", width=width, depth=2, heads=2, in_channels=1, drop_path=drop_path))
    crops = [torch.randn(2 * images, 1, 224, 224), torch.randn(8 * images, 1, 96, 96)]
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if inside and storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    inside, alive = False, []

    def enter(*_: object) -> None:
        nonlocal inside
        inside = True

    def leave(*_: object) -> None:
        nonlocal inside
        inside = False

    model.train().blocks[1].register_forward_pre_hook(enter)
    model.blocks[1].register_forward_hook(leave)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(crops)
    tokens = images * (2 * (14 * 14 + 5) + 8 * (6 * 6 + 5))
    return sum(found.values()) / (tokens * width * 4)


@pytest.mark.parametrize(("drop_path", "most"), [(0.0, 11.5), (0.5, 6.0)])
def test_a_block_keeps_half_of_what_autograd_would(drop_path: float, most: float) -> None:
    """Input and hidden layer (1, 1, 4), q, k, v (3), attention (1, and 1 where crops are joined): plainly it is 21."""
    assert kept(drop_path) < most
