"""Published backbones of every family: the features of transformers, from files laid out as they are published."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from pretrain.models.vit import VisionTransformer
from pretrain.released import load_backbone

hf = pytest.importorskip("transformers")

SHAPE = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
V2 = {**SHAPE, "image_size": 56, "patch_size": 14, "mlp_ratio": 4}
VIT = {**SHAPE, "image_size": 64, "patch_size": 16, "intermediate_size": 512, "layer_norm_eps": 1e-6}
V3 = {**SHAPE, "patch_size": 16, "num_register_tokens": 4, "layer_norm_eps": 1e-5}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "dinov2": lambda: hf.Dinov2Model(hf.Dinov2Config(**V2)),
    "dinov2 gated": lambda: hf.Dinov2Model(hf.Dinov2Config(**V2, use_swiglu_ffn=True)),
    "dinov2 registers": lambda: hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**V2, num_register_tokens=4)),
    "dinov3": lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**V3, intermediate_size=512)),
    "dinov3 gated": lambda: hf.DINOv3ViTModel(
        hf.DINOv3ViTConfig(**V3, intermediate_size=256, use_gated_mlp=True, hidden_act="silu")
    ),
    "vit": lambda: hf.ViTModel(hf.ViTConfig(**VIT), add_pooling_layer=True),
    "mae": lambda: hf.ViTMAEModel(hf.ViTMAEConfig(**VIT, mask_ratio=0.0)),
}
# Rows and columns of patches: the table's own grid (4 x 4), finer, coarser, not square, not square but as many patches.
GRIDS = [(4, 4), (7, 7), (3, 3), (5, 8), (2, 8)]


def lively(model: nn.Module, seed: int = 0) -> nn.Module:
    """Numbers as after training: none is 0 or 1, so that one that went missing would show."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.1)
    return model.eval()


def published_keys(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """What transformers itself writes: the keys of the files on its hub."""
    model.save_pretrained(folder)  # type: ignore[operator]
    return load_file(folder / "model.safetensors")


def image(grid: tuple[int, int], patch: int) -> Tensor:
    return torch.randn(2, 3, grid[0] * patch, grid[1] * patch, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def theirs(model: nn.Module, x: Tensor) -> Tensor:
    name, more = type(model).__name__, {}
    if name in ("ViTModel", "ViTMAEModel"):
        more["interpolate_pos_encoding"] = True
    if name == "ViTMAEModel":  # it shuffles the patches by this noise
        more["noise"] = torch.arange(x.shape[-1] * x.shape[-2] // 256).repeat(len(x), 1).float()
    out: Tensor = model(x, **more).last_hidden_state
    return out


@torch.no_grad()
def ours(model: VisionTransformer, x: Tensor) -> Tensor:
    features = model(x)
    return torch.cat([features.cls[:, None], features.registers, features.patches], dim=1)


def same(model: VisionTransformer, other: nn.Module, grids: list[tuple[int, int]]) -> None:
    for grid in grids:
        x = image(grid, model.patch_size)
        want = theirs(other, x)
        worst = (ours(model, x) - want).abs().max() / want.abs().max().clamp(min=1)
        assert worst <= 1e-5, f"{grid}: {worst:.1e}"


@pytest.mark.parametrize("name", MODELS)
def test_a_hugging_face_folder_gives_its_model(tmp_path: Path, name: str) -> None:
    model = lively(MODELS[name]())
    published_keys(model, tmp_path)
    said: list[str] = []
    for path in (tmp_path, tmp_path / "model.safetensors"):
        loaded, _ = load_backbone(path, say=said.append)
        same(loaded, model, GRIDS)
        assert "with its config.json" in said[-1]
        assert "assumed nothing" in said[-1]
    assert ("pooler.dense.weight" in said[0]) == (name == "vit")
    assert loaded.settings.norm_eps == model.config.layer_norm_eps  # type: ignore[union-attr]
    assert loaded.settings.shape == (128, 2, 2)


def test_folders_in_several_files_and_of_torch_are_read(tmp_path: Path) -> None:
    model = lively(MODELS["dinov3"]())
    model.save_pretrained(tmp_path / "shards", max_shard_size="500KB")  # type: ignore[operator]
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    same(load_backbone(tmp_path / "shards")[0], model, [(3, 5)])
    state = published_keys(model, tmp_path / "torch")
    (tmp_path / "torch" / "model.safetensors").unlink()
    torch.save(state, tmp_path / "torch" / "pytorch_model.bin")
    same(load_backbone(tmp_path / "torch")[0], model, [(3, 5)])
    # The names that transformers 5 has in memory will do as well.
    torch.save(model.state_dict(), tmp_path / "torch" / "pytorch_model.bin")
    same(load_backbone(tmp_path / "torch")[0], model, [(3, 5)])


def official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The keys of DINOv2's, MAE's, MoCo v3's and iBOT's own files, of those on Hugging Face's hub."""
    out = {}
    for name, tensor in state.items():
        for old, new in (
            ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
            ("embeddings.patch_embeddings", "patch_embed.proj"),
            ("embeddings.position_embeddings", "pos_embed"),
            ("embeddings.", ""),
            ("encoder.layer.", "blocks."),
            ("attention.output.dense", "attn.proj"),
            ("intermediate.dense", "mlp.fc1"),
            (".output.dense", ".mlp.fc2"),
            ("weights_in", "w12"),
            ("weights_out", "w3"),
            ("layernorm_before", "norm1"),
            ("layernorm_after", "norm2"),
            ("layernorm.", "norm."),
            ("layer_scale1.lambda1", "ls1.gamma"),
            ("layer_scale2.lambda1", "ls2.gamma"),
        ):
            name = name.replace(old, new)
        if found := re.fullmatch(r"(blocks\.\d+\.)attention\.attention\.(query|key|value)\.(\w+)", name):
            block, part, kind = found.groups()
            thirds = out.setdefault(f"{block}attn.qkv.{kind}", torch.empty(3 * len(tensor), *tensor.shape[1:]))
            thirds.chunk(3)[("query", "key", "value").index(part)].copy_(tensor)
        elif not name.startswith("pooler."):
            out[name] = tensor
    return out


def mae(state: dict[str, Tensor]) -> Any:
    decoder = {"decoder_embed.weight": torch.ones(8, 128), "decoder_pos_embed": torch.ones(1, 17, 8)}
    blocks = {"decoder_blocks.0.norm1.weight": torch.ones(8), "decoder_norm.bias": torch.ones(8)}
    args = argparse.Namespace(model="mae_vit", lr=1e-3, resume="")
    return {"model": {**state, "mask_token": torch.ones(1, 1, 8), **decoder, **blocks}, "epoch": 8, "args": args}


def moco(state: dict[str, Tensor]) -> Any:
    base = {f"module.base_encoder.{name}": tensor for name, tensor in state.items()}
    base |= {f"module.momentum_encoder.{name}": tensor * 0 for name, tensor in state.items()}
    heads = {"module.base_encoder.head.0.weight": torch.ones(4, 128), "module.predictor.0.weight": torch.ones(4, 4)}
    return {"epoch": 3, "arch": "vit_base", "state_dict": base | heads, "optimizer": {"state": {}}}


def ibot(state: dict[str, Tensor]) -> Any:
    teacher = {f"backbone.{name}": tensor for name, tensor in state.items()}
    student = {f"module.backbone.{name}": tensor * 0 for name, tensor in state.items()}
    student["module.backbone.masked_embed"] = torch.ones(1, 128)
    head = {"head.mlp.0.weight": torch.ones(4, 128), "head.last_layer.weight_g": torch.ones(4, 1)}
    return {"teacher": teacher | head, "student": student, "epoch": 1, "args": argparse.Namespace(arch="vit_base")}


def chunked(state: dict[str, Tensor]) -> Any:
    """DINOv2's own training keeps its blocks in chunks."""
    new = {re.sub(r"^blocks\.(\d+)\.", r"blocks.0.\1.", name): tensor for name, tensor in state.items()}
    heads = {"dino_head.mlp.0.weight": torch.ones(4, 128), "ibot_head.mlp.0.weight": torch.ones(4, 128)}
    return {"teacher": {f"backbone.{name}": tensor for name, tensor in new.items()} | heads}


def timm_dinov2(state: dict[str, Tensor]) -> Any:
    """timm adds the class token's position to it, and packs the gate in fc1."""
    new = {name.replace("mlp.w12", "mlp.fc1").replace("mlp.w3", "mlp.fc2"): t for name, t in state.items()}
    new.pop("mask_token")
    if "register_tokens" in new:
        new["reg_token"] = new.pop("register_tokens")
        new["cls_token"] = new["cls_token"] + new["pos_embed"][:, :1]
        new["pos_embed"] = new["pos_embed"][:, 1:]
    return new


LAYOUTS: dict[str, tuple[str, Callable[[dict[str, Tensor]], Any], str, dict[str, Any]]] = {
    "DINOv2": ("dinov2", lambda s: s, "DINOv2", {"offset": 0.1}),
    "DINOv2 giant": ("dinov2 gated", lambda s: s, "DINOv2", {"offset": 0.1}),
    "DINOv2 reg": ("dinov2 registers", lambda s: s, "DINOv2 with registers", {"antialias": True}),
    "DINOv2 run": ("dinov2", chunked, "DINOv2, under 'teacher', prefix 'backbone.'", {"offset": 0.1}),
    "DINOv2 timm": ("dinov2", timm_dinov2, "DINOv2 (timm)", {"antialias": True}),
    "DINOv2 timm giant": ("dinov2 gated", timm_dinov2, "DINOv2 (timm)", {"antialias": True}),
    "DINOv2 timm reg": ("dinov2 registers", timm_dinov2, "DINOv2 (timm)", {"antialias": True}),
    "MAE": ("mae", lambda s: {"model": s}, "MAE (encoder), under 'model'", {}),
    "MAE full": ("mae", mae, "MAE (with its decoder), under 'model'", {}),
    "MoCo v3": ("mae", moco, "MoCo v3, under 'state_dict', prefix 'module.base_encoder.'", {}),
    "iBOT": ("vit", ibot, "iBOT or DINO, under 'teacher', prefix 'backbone.'", {"offset": 0.1}),
    "iBOT teacher": ("vit", lambda s: {"state_dict": s}, "iBOT, under 'state_dict'", {"offset": 0.1}),
    "timm": ("vit", lambda s: s, "ViT (timm, DINO, iBOT)", {"antialias": True}),
}


def at(model: nn.Module, side: int, how: Mapping[str, Any]) -> nn.Module:
    """The model with its table of positions brought to another square grid as the family's own code does."""
    if side == 4:
        return model
    config = type(model.config)(**{**model.config.to_dict(), "image_size": side * model.config.patch_size})  # type: ignore[operator,union-attr]
    other = type(model)(config).eval()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    table = state["embeddings.position_embeddings"]
    square = table[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    antialias = how.get("antialias", False)
    if "offset" in how:
        scale = (side + 0.1) / 4
        square = F.interpolate(square, scale_factor=(scale, scale), mode="bicubic", antialias=antialias)
    else:
        square = F.interpolate(square, size=(side, side), mode="bicubic", antialias=antialias)
    state["embeddings.position_embeddings"] = torch.cat([table[:, :1], square.flatten(2).mT], dim=1)
    other.load_state_dict(state)
    return other


@pytest.mark.parametrize("name", LAYOUTS)
def test_an_official_file_gives_the_model(tmp_path: Path, name: str) -> None:
    kind, layout, form, how = LAYOUTS[name]
    model = lively(MODELS[kind]())
    if kind == "mae":  # sines and cosines have none for the class token
        with torch.no_grad():
            model.embeddings.position_embeddings[:, 0] = 0  # type: ignore[index,union-attr,operator]
    torch.save(layout(official(published_keys(model, tmp_path))), tmp_path / "file.pth")
    said: list[str] = []
    loaded, _ = load_backbone(tmp_path / "file.pth", say=said.append)
    assert f"({form})" in said[0]
    # These files leave the epsilon and the heads open, and a bare one whose rule of interpolation it takes.
    assert "assumed heads 2 and epsilon of the norms 1e-06" in said[0]
    assert ("antialiasing of positions" in said[0]) == (name == "timm")
    for side in (4, 7, 3):
        same(loaded, at(model, side, how), [(side, side)])
    positions = loaded.settings.positions
    assert positions is not None
    assert (positions.grid, positions.fixed) == (4, kind == "mae")
    assert "pos_embed" in dict(loaded.named_buffers() if kind == "mae" else loaded.named_parameters())


def test_what_is_no_part_of_a_backbone_is_dropped_by_name(tmp_path: Path) -> None:
    plain = official(published_keys(lively(MODELS["vit"]()), tmp_path))
    for layout, names in (
        (mae, ["mask_token", "decoder_embed.weight", "decoder_pos_embed", "decoder_blocks.*.norm1.weight"]),
        (moco, ["module.momentum_encoder.cls_token", "and 16 more kinds"]),
        (
            ibot,
            ["dropped 2: head.mlp.*.weight, head.last_layer.weight_g", "left aside in the file: student, epoch, args"],
        ),
        (chunked, ["heads   dino_head, ibot_head", "renamed 28: blocks.*.*.attn.qkv.bias -> blocks.*.attn.qkv.bias"]),
    ):
        more = {"ls1.gamma": torch.ones(128), "ls2.gamma": torch.ones(128)} if layout is chunked else {}
        scales = {f"blocks.{i}.{name}": tensor for i in range(2) for name, tensor in more.items()}
        mask = {"mask_token": torch.ones(1, 128)} if more else {}
        torch.save(layout(plain | scales | mask), tmp_path / "file.pth")
        said: list[str] = []
        load_backbone(tmp_path / "file.pth", say=said.append)
        for name in names:
            assert name in said[0]
