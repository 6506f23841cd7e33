"""Patches that are left out of the network: those that stay are what they would be among themselves."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.models.positions import PositionSettings
from pretrain.models.vit import Features, VisionTransformer, VitSettings, build
from pretrain.parallel import compile_blocks, recompute_blocks
from pretrain.precision import in_bf16

TINY: dict[str, Any] = {"size": "custom", "width": 64, "depth": 3, "heads": 4, "in_channels": 1}
TABLE = PositionSettings(grid=3, offset=0.1)
NETWORKS = {
    "rope": TINY,
    "rope of many": TINY | {"registers": 0, "ffn": "swiglu", "qkv_bias": False, "rope": {"normalize": "max"}},
    "table": TINY | {"registers": 0, "positions": TABLE},
    "table without class": TINY | {"positions": TABLE.model_copy(update={"on_cls": False, "fixed": True})},
}
GRID = (4, 6)
N = GRID[0] * GRID[1]


def network(settings: dict[str, Any]) -> VisionTransformer:
    draw = torch.Generator().manual_seed(0)
    model = build(VitSettings(**settings))
    model.init_weights(draw)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=draw))
    return model.double().eval()


def images(count: int = 3) -> Tensor:
    sides = [side * 16 for side in GRID]
    return torch.randn(count, 1, *sides, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def drawn(keep: int, count: int = 3, patches: int = N) -> Tensor:
    """Other patches of each image, in no order."""
    draw = torch.Generator().manual_seed(2)
    return torch.stack([torch.randperm(patches, generator=draw)[:keep] for _ in range(count)])


def all_tokens(features: Features) -> Tensor:
    return torch.cat([features.cls[:, None], features.registers, features.patches], dim=1)


@pytest.mark.parametrize("settings", NETWORKS.values(), ids=NETWORKS)
def test_all_patches_kept_are_the_network_itself(settings: dict[str, Any]) -> None:
    model, x = network(settings), images()
    mask = torch.rand(3, N, generator=torch.Generator().manual_seed(3)) < 0.4
    for masks in (None, mask):
        whole = model(x, masks)
        same = model(x, masks, torch.arange(N).expand(3, -1))
        assert torch.equal(all_tokens(same), all_tokens(whole))
        order = drawn(N)
        turned = model(x, masks, kept=order)
        wanted = whole.patches.gather(1, order[..., None].expand(-1, -1, 64))
        torch.testing.assert_close(turned.patches, wanted, rtol=0, atol=1e-10)
        torch.testing.assert_close(turned.cls, whole.cls, rtol=0, atol=1e-10)


def by_hand(model: VisionTransformer, image: Tensor, rows: Tensor) -> Tensor:
    """One image [1, C, H, W] through plain blocks on tokens picked by their numbers, with their own positions."""
    s, prefix = model.settings, [model.cls_token, *([model.storage_tokens] if model.registers else [])]
    patches = model.patch_embed(image)
    heads, width = s.shape[2], model.dim // s.shape[2]
    sin = cos = None
    if s.positions is None:
        sin, cos = (part[rows][:, None] for part in model.rope_embed(*GRID))
    else:
        from pretrain.models.positions import add_positions

        prefix[0], patches = add_positions(model.pos_embed, s.positions, prefix[0], patches, GRID)
    x = torch.cat([*prefix, patches[:, rows]], dim=1)[0]
    first = 1 + model.registers

    def turned(part: Tensor) -> Tensor:
        if sin is None or cos is None:
            return part
        kept = part[first:]
        half = torch.cat([-kept[..., width // 2 :], kept[..., : width // 2]], dim=-1)
        return torch.cat([part[:first], kept * cos + half * sin])

    for block in model.blocks:
        q, k, v = block.attn.qkv(block.norm1(x)).view(len(x), 3, heads, width).unbind(1)
        q, k = turned(q), turned(k)
        scores = torch.einsum("qhd,khd->hqk", q, k) / width**0.5
        x = x + block.ls1(block.attn.proj(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)))
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return model.norm(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("settings", NETWORKS.values(), ids=NETWORKS)
def test_what_is_left_out_is_seen_by_nothing(settings: dict[str, Any]) -> None:
    model, x, rows = network(settings), images(), drawn(7)
    x.requires_grad_()
    expected = torch.cat([by_hand(model, x[i : i + 1], rows[i])[None] for i in range(3)])
    found = all_tokens(model(x, kept=rows))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    probe = torch.randn(found.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    wanted = dict(model.named_parameters()) | {"image": x}
    for (name, _), a, b in zip(
        wanted.items(),
        *(
            torch.autograd.grad((out * probe).sum(), list(wanted.values()), allow_unused=True)
            for out in (found, expected)
        ),
        strict=True,
    ):
        if b is None:
            assert name == "mask_token" and (a is None or not a.any())
        else:
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_entries_of_a_list_keep_their_own() -> None:
    model, large, small = network(TINY), images(), images(2)[..., :32, :48]
    rows, few = drawn(9), drawn(4, 2, 6)
    both = model([large, small, large], None, [rows, few, None])
    for features, alone in zip(both, (model(large, None, rows), model(small, kept=few), model(large)), strict=True):
        torch.testing.assert_close(all_tokens(features), all_tokens(alone), rtol=0, atol=1e-10)


def test_dropped_paths_turn_each_image_by_its_own_positions() -> None:
    """With every path of an image dropped or taken as a whole, an image comes out as it does alone, or nearly raw."""
    model = network(TINY | {"drop_path": 0.5, "depth": 1}).train()
    x, rows = images(4), drawn(5, 4)
    torch.manual_seed(0)
    found = model(x, kept=rows)
    torch.manual_seed(0)
    attended, fed = (torch.randperm(4)[:2].tolist() for _ in range(2))
    block = model.blocks[0]
    tokens, groups, grids = model._tokens([x], [None], [rows])
    stream = tokens.unflatten(0, groups[0]).clone()
    for branch, chosen in (("attn", attended), ("mlp", fed)):
        before = stream.clone()
        for i in chosen:
            one = model._packing((type(groups[0])(1, groups[0].length),), grids, [rows[i : i + 1]])
            own = before[i]
            out = (
                block.ls1(block.attn(block.norm1(own), one))
                if branch == "attn"
                else block.ls2(block.mlp(block.norm2(own)))
            )
            stream[i] = own + 2 * out
    torch.testing.assert_close(all_tokens(found), model.norm(stream), rtol=0, atol=1e-10)


def test_an_augmented_block_draws_before_it_picks() -> None:
    model = network(TINY | {"rope": {"rescale": 2, "shift": 0.2}}).train()
    x = images()
    torch.manual_seed(1)
    whole = model(x)
    torch.manual_seed(1)
    assert torch.equal(all_tokens(model(x, kept=torch.arange(N).expand(3, -1))), all_tokens(whole))


def learnt(model: VisionTransformer, kept: Tensor) -> list[Tensor]:
    model.zero_grad()
    torch.manual_seed(2)
    features = model(images().float(), None, kept)
    (features.cls.float().square().sum() + features.patches.float().square().sum()).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize(
    ("settings", "what"), [(TINY, "blocks"), (NETWORKS["table"], "matmuls")], ids=["rope", "table"]
)
def test_compiled_recomputed_and_in_bf16(monkeypatch: pytest.MonkeyPatch, what: Any, settings: dict[str, Any]) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager", fullgraph=True))
    settings = settings | {"drop_path": 0.3, "depth": 2}
    for bf16 in (False, True):
        plain, other = network(settings).float().train(), network(settings).float().train()
        for model in (plain, other):
            if bf16:
                in_bf16(model)
        recompute_blocks(other, what)
        compile_blocks(other)
        for keep in (9, 14):
            for a, b in zip(learnt(plain, drawn(keep)), learnt(other, drawn(keep)), strict=True):
                assert (a - b).norm() <= (5e-2 if bf16 else 1e-4) * a.norm() + 1e-4
    assert plain(images().float(), kept=drawn(3)).patches.shape == (3, 3, 64)
    with torch.device("meta"):
        empty = build(VitSettings(**settings))
        rows = torch.empty(2, 5, dtype=torch.int64)
        assert empty(torch.empty(2, 1, 64, 96), kept=rows).patches.shape == (2, 5, 64)
