"""The backbone: official numbers, packing, drop path, initialisation, and what a user gets wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pretrain.models.vit import Features, VisionTransformer, VitSettings, build

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
TINY: dict[str, Any] = {"size": "custom", "width": 64, "depth": 4, "heads": 4}
OFFICIAL = {"cls": "x_norm_clstoken", "registers": "x_storage_tokens", "patches": "x_norm_patchtokens"}
VARIANTS = {
    "released": TINY,
    "7b": TINY | {"ffn": "swiglu64", "ffn_ratio": 3, "qkv_bias": False, "untie_global_and_local_cls_norm": True},
    "im1k": TINY | {"registers": 0, "mask_k_bias": False, "norm_eps": 1e-6, "rope": {"dtype": "bf16"}},
    "untied": TINY | {"registers": 2, "untie_cls_and_patch_norms": True, "rope": {"normalize": "max"}},
}


def _load(path: Path) -> dict[str, Tensor]:
    with np.load(path) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def _close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    """The largest difference, in units of the largest number of the array."""
    worst = (ours.detach() - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30)
    assert ours.shape == theirs.shape
    assert worst <= tolerance, f"{worst:.2e} > {tolerance}"


def _scrambled(settings: dict[str, Any], seed: int = 0) -> VisionTransformer:
    """A model none of whose numbers is 0 or 1, as after training."""
    model = build(VitSettings(**settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@contextmanager
def _streams(model: VisionTransformer) -> Iterator[list[Tensor]]:
    """What the last block returns of each pass, before the final norm: [T, D]."""
    seen: list[Tensor] = []
    hook = model.blocks[-1].register_forward_hook(lambda module, given, stream: seen.append(stream))
    try:
        yield seen
    finally:
        hook.remove()


def _crops(*shapes: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(b, 3, h, w, generator=generator, dtype=dtype) for b, h, w in shapes]


def test_first_block_gives_the_official_numbers() -> None:
    golden = _load(GOLDEN / "vit_block.npz")
    model = build(VitSettings(**TINY | {"depth": 1}))
    state = {name.removeprefix("state."): value for name, value in golden.items() if name.startswith("state.")}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert sorted(missing) == ["norm.bias", "norm.weight"]
    assert not unexpected
    (features,) = model.eval().intermediate_features(golden["image"], [0], norm=False)
    for name in ("cls", "registers", "patches"):
        _close(getattr(features, name), golden[name], 1e-5)


@pytest.mark.parametrize(("name", "dtype", "tolerance"), [("fp32", torch.float32, 1e-5), ("fp64", torch.float64, 1e-6)])
def test_whole_model_gives_the_official_numbers(
    reference: Path, name: str, dtype: torch.dtype, tolerance: float
) -> None:
    expected = _load(reference / f"vit_A_released_out_{name}.npz")
    weights = _load(reference / "vit_A_released_out_fp32.npz")
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in _load(reference / "vit_inputs.npz").items()}
    model = build(VitSettings(**TINY))
    model.load_state_dict(_load(reference / "vit_A_released_state.npz"))
    model.to(dtype).eval()
    for key in ("eval_224", "eval_96x160", "eval_224_mask", "eval_96x160_mask"):
        size = key.split("_")[1]
        with _streams(model) as streams:
            features = model(inputs[f"x{size}"], inputs[f"mask{size}"] if key.endswith("mask") else None)
        for ours, theirs in OFFICIAL.items():
            _close(getattr(features, ours), expected[f"{key}.{theirs}"], tolerance)
        _close(streams[0], expected[f"{key}.x_prenorm"].flatten(0, 1), tolerance)
    raw = model.intermediate_features(inputs["x96x160"], range(4), norm=False)
    for i, features in enumerate(raw):
        for ours, theirs in (("patches", "patch"), ("cls", "cls"), ("registers", "extra")):
            _close(getattr(features, ours), expected[f"inter_n4_nonorm.{i}.{theirs}"], tolerance)
    for i, patches in enumerate(model.intermediate(inputs["x96x160"], [1, 3], reshape=False)):
        _close(patches, expected[f"inter_1_3_norm.{i}.patch"], tolerance)
    _close(model.intermediate(inputs["x96x160"], [-1])[0], expected["inter_last_reshape"], tolerance)

    with _streams(model) as streams:
        both = model.train()([inputs["x96x160"], inputs["xlocal96"]], [inputs["mask96x160"], None])
    prenorm = [expected[f"train_list_{group}.x_prenorm"].flatten(0, 1) for group in ("global", "local")]
    _close(streams[0], torch.cat(prenorm), tolerance)
    probe = torch.zeros((), dtype=dtype)
    for group, features in zip(("global", "local"), both, strict=True):
        for ours, theirs in OFFICIAL.items():
            _close(getattr(features, ours), expected[f"train_list_{group}.{theirs}"], tolerance)
            probe = probe + (getattr(features, ours) * weights[f"grad_probe.w_{group}.{theirs}"]).sum()
    probe.backward()  # type: ignore[no-untyped-call]
    for parameter, tensor in model.named_parameters():
        assert tensor.grad is not None
        _close(tensor.grad, expected[f"grad.{parameter}"], tolerance)


def test_state_has_the_official_keys_and_initial_distribution(reference: Path) -> None:
    keys = json.loads((reference / "vit_A_released_state_keys.json").read_text())
    model = build(VitSettings(**TINY))
    assert {name: list(value.shape) for name, value in model.state_dict().items()} == {n: k[0] for n, k in keys.items()}
    assert {name for name, _ in model.named_parameters()} == {name for name, key in keys.items() if key[2]}

    torch.manual_seed(0)
    state = build(VitSettings(size="s", untie_global_and_local_cls_norm=True)).state_dict()
    stats = json.loads((reference / "init_stats.json").read_text())
    stats = {name.removeprefix("vit_small."): value for name, value in stats.items() if name.startswith("vit_small.")}
    assert stats.keys() == state.keys()
    for name, value in stats.items():
        ours = state[name].float()
        spread = 6 * value["std"] / ours.numel() ** 0.5
        assert abs(ours.mean().item() - value["mean"]) <= 2**0.5 * spread + (
            1e-2 if name.endswith("periods") else 1e-8
        ), name
        if not name.endswith("periods"):  # the official run rounded them to bfloat16
            assert ours.std().item() == pytest.approx(value["std"], rel=6 / ours.numel() ** 0.5, abs=1e-8), name


def test_transformers_agrees() -> None:
    """Another implementation of the released models, for the two forms of feed-forward."""
    hf = pytest.importorskip("transformers")
    for name in ("released", "7b"):
        ours = _scrambled(VARIANTS[name]).eval()
        gated = ours.settings.ffn != "mlp"
        sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_register_tokens": 4}
        biases = {"query_bias": not gated, "key_bias": False, "value_bias": not gated}
        feed = {
            "use_gated_mlp": gated,
            "hidden_act": "silu" if gated else "gelu",
            "intermediate_size": 128 if gated else 256,
        }
        others = {"patch_size": 16, "image_size": 224, "layer_norm_eps": 1e-5, "layerscale_value": 1.0}
        theirs = hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**sizes, **biases, **feed, **others)).eval()
        theirs.load_state_dict(_for_transformers(ours.state_dict()))
        (image,) = _crops((2, 96, 160))
        mask = torch.rand(2, 60, generator=torch.Generator().manual_seed(3)) < 0.3
        with torch.no_grad():
            mine, other = ours(image, mask), theirs(image, bool_masked_pos=mask).last_hidden_state
        _close(torch.cat([mine.cls[:, None], mine.registers, mine.patches], dim=1), other, 1e-5)


def _for_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {
        "cls_token": "embeddings.cls_token",
        "storage_tokens": "embeddings.register_tokens",
        "blocks.": "model.layer.",
    }
    renamed |= {"patch_embed.proj": "embeddings.patch_embeddings", "attn.proj": "attention.o_proj"}
    renamed |= {f"ls{i}.gamma": f"layer_scale{i}.lambda1" for i in (1, 2)}
    renamed |= {"fc1": "up_proj", "fc2": "down_proj", "w1": "gate_proj", "w2": "up_proj", "w3": "down_proj"}
    found = {}
    for key, value in state.items():
        if "periods" in key or "bias_mask" in key or key.startswith("local_cls_norm"):
            continue
        if key == "mask_token":
            found["embeddings.mask_token"] = value[None]
            continue
        if ".qkv." in key:
            for part, third in zip("qkv", value.chunk(3), strict=True):
                name = key.replace("blocks.", "model.layer.").replace("attn.qkv", f"attention.{part}_proj")
                if not (part == "k" and key.endswith("bias")):
                    found[name] = third
            continue
        for ours, theirs in renamed.items():
            key = key.replace(ours, theirs)
        found[key] = value
    return found


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_packed_crops_equal_each_crop_alone(settings: dict[str, Any]) -> None:
    model = _scrambled(settings).double().eval()
    crops = _crops((2, 96, 160), (3, 64, 64), (1, 32, 48), dtype=torch.float64)
    masks = [torch.rand(2, 60, generator=torch.Generator().manual_seed(1)) < 0.4, None, None]
    with _streams(model) as streams:
        packed = model(crops, masks)
        alone = [
            [model(crop[None], None if mask is None else mask[n : n + 1]) for n, crop in enumerate(images)]
            for images, mask in zip(crops, masks, strict=True)
        ]
    torch.testing.assert_close(streams[0], torch.cat(streams[1:]), rtol=0, atol=1e-10)
    for features, each in zip(packed, alone, strict=True):
        for name in OFFICIAL:
            one_by_one = torch.cat([getattr(one, name) for one in each])
            torch.testing.assert_close(getattr(features, name), one_by_one, rtol=0, atol=1e-10)
    assert isinstance(packed, list)
    assert isinstance(model(crops[0]), Features)


def test_untied_norms_are_used_where_they_should_be() -> None:
    crops = _crops((2, 64, 64), (2, 32, 32))
    for flag in ("cls_norm", "local_cls_norm"):
        option = "untie_cls_and_patch_norms" if flag == "cls_norm" else "untie_global_and_local_cls_norm"
        model = _scrambled(TINY | {option: True})
        assert f"{flag}.weight" in model.state_dict()
        for training in (False, True):
            before = model.train(training)(crops)
            with torch.no_grad():
                getattr(model, flag).bias += 1
            after = model(crops)
            for entry in (0, 1):
                moves = (after[entry].cls - before[entry].cls).abs().max() > 0.5
                assert moves == (flag == "cls_norm" or (training and entry == 1)), (flag, training, entry)
                assert torch.equal(after[entry].patches, before[entry].patches)


def test_k_bias_has_no_effect_and_no_gradient() -> None:
    model = _scrambled(TINY)
    (image,) = _crops((2, 32, 32))
    before = model(image).cls
    before.sum().backward()
    gradient = model.blocks[0].attn.qkv.bias.grad
    assert gradient is not None
    query, key, value = gradient.chunk(3)
    assert not key.any()
    assert query.any()
    assert value.any()
    with torch.no_grad():
        model.blocks[0].attn.qkv.bias[64:128] += 100
    assert torch.equal(model(image).cls, before)
    assert not any("bias_mask" in name for name in build(VitSettings(**VARIANTS["7b"])).state_dict())


def test_drop_path_repeats_with_its_permutations() -> None:
    """Against a plain rendering of stochastic depth, one group after the other, with the same draws."""
    model = _scrambled(TINY | {"drop_path": 0.4}).double().train()
    crops = _crops((5, 32, 32), (3, 48, 32), dtype=torch.float64)
    torch.manual_seed(5)
    with _streams(model) as last:
        model(crops)
    torch.manual_seed(5)
    x, groups, grids = model._tokens(crops, [None, None], [None, None])
    streams = [
        part.unflatten(0, group) for part, group in zip(x.split([g[0] * g[1] for g in groups]), groups, strict=True)
    ]
    for block in model.blocks:
        for branch in ("attn", "mlp"):
            for i, kept in enumerate([torch.randperm(len(s))[: max(int(len(s) * 0.6), 1)] for s in streams]):
                part = model._packing((type(groups[0])(len(kept), groups[i].length),), [grids[i]], [None])
                tokens = streams[i][kept].flatten(0, 1)
                change = (
                    block.ls1(block.attn(block.norm1(tokens), part))
                    if branch == "attn"
                    else block.ls2(block.mlp(block.norm2(tokens)))
                )
                streams[i] = streams[i].clone()
                streams[i][kept] += change.view(len(kept), groups[i].length, -1) * len(streams[i]) / len(kept)
    torch.testing.assert_close(last[0], torch.cat([stream.flatten(0, 1) for stream in streams]), rtol=0, atol=1e-10)


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_meta_then_empty_then_init_leaves_nothing_unfilled(settings: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = build(VitSettings(**settings))
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        model(torch.empty(1, 3, 224, 224))
    assert counter.get_total_flops() > 0
    model.to_empty(device="cpu")
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data.fill_(float("nan"))
    model.init_weights(torch.Generator().manual_seed(0))
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    again = build(VitSettings(**settings))
    again.init_weights(torch.Generator().manual_seed(0))
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_flops_and_parameters_of_the_known_sizes() -> None:
    with torch.device("meta"):
        sizes = {name: sum(p.numel() for p in build(VitSettings(size=name)).parameters()) for name in ("s", "b", "l")}
    assert {name: round(count / 1e6, 2) for name, count in sizes.items()} == {"s": 21.60, "b": 85.67, "l": 303.15}


def test_one_channel_and_small_stem() -> None:
    model = build(VitSettings(size="ti", in_channels=1, patch_size=8))
    assert model(torch.zeros(2, 1, 16, 24)).patches.shape == (2, 6, 192)
    assert model.intermediate(torch.zeros(2, 1, 16, 24), [-1, 0])[0].shape == (2, 192, 2, 3)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ((1, 3, 100, 96), "100 x 96 pixels is no whole number of patches of 16 x 16"),
        ((1, 1, 32, 32), "1 channel.*takes 3"),
    ],
)
def test_wrong_images_are_refused(image: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(VitSettings(**TINY))(torch.zeros(image))


def test_wrong_block_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no such blocks \[4\].*0 to 3"):
        build(VitSettings(**TINY)).intermediate(torch.zeros(1, 3, 32, 32), [0, 4])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": "s", "width": 100}, "use size: custom"),
        ({"size": "custom", "width": 100}, "needs width, depth and heads"),
        ({"size": "custom", "width": 66, "depth": 1, "heads": 3}, "multiple of 4 x 3 heads"),
        ({"rope": {"base": 100, "min_period": 1}}, "give either base"),
        ({"rope": {"base": None}}, "give either base"),
        ({"drop_path": 1}, "less than 1"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        VitSettings(**settings)
