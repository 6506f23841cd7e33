"""Teachers from files laid out as they are published: the features of transformers' own models, or a clear refusal."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from launch.settings import plugins
from pretrain.parallel import place
from pretrain.released import ReleasedError
from pretrain.teachers import Teacher
from pretrain.teachers import build as build_any
from tests.pretrain.test_released import MODELS, VIT, at, chunked, lively, mae, official, published_keys, theirs
from tests.pretrain.test_teachers import filled, tokens

hf = pytest.importorskip("transformers")

# The width, the heads and the table of positions of the published ViT-B/16, in two blocks.
BASE = {"hidden_size": 768, "num_hidden_layers": 2, "num_attention_heads": 12, "intermediate_size": 3072,
        "image_size": 224, "patch_size": 16, "layer_norm_eps": 1e-6}  # fmt: skip


def base(seed: int = 0, kind: str = "vit") -> nn.Module:
    """A ViT-B/16 of transformers with numbers of the size that training leaves, and no class position."""
    config, model = {"vit": (hf.ViTConfig, hf.ViTModel), "mae": (hf.ViTMAEConfig, hf.ViTMAEModel)}[kind]
    made: nn.Module = model(config(**BASE, **({"mask_ratio": 0.0} if kind == "mae" else {})))
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.03)
        made.embeddings.position_embeddings[:, 0] = 0  # type: ignore[index,union-attr,operator]
    return made.eval()


def same(teacher: Teacher, model: nn.Module, sides: tuple[int, ...]) -> None:
    for side in sides:
        x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(side))
        want = theirs(model, x)
        with torch.no_grad():
            worst = (tokens(teacher.network(x)) - want).abs().max() / want.abs().max()
        assert worst <= 1e-5, f"{side}: {worst:.1e}"


def moco(base_state: dict[str, Tensor], momentum: dict[str, Tensor]) -> Any:
    head = {f"head.{i}.weight": torch.ones(4, 4) for i in (0, 3, 6)} | {"head.1.running_mean": torch.ones(4)}
    state = {f"module.{which}_encoder.{name}": tensor
             for which, own in (("base", base_state), ("momentum", momentum))
             for name, tensor in (own | head).items()}  # fmt: skip
    state["module.predictor.0.weight"] = torch.ones(4, 4)
    return {"epoch": 300, "arch": "vit_base", "state_dict": state, "optimizer": {"state": {}}, "scaler": {}}


def ibot(teacher: dict[str, Tensor]) -> Any:
    heads = {"head.mlp.0.weight": torch.ones(4, 4), "head.last_layer.weight_v": torch.ones(4, 4)}
    student = {f"module.backbone.{name}": tensor * 0 for name, tensor in teacher.items()}
    student["module.backbone.masked_embed"] = torch.ones(1, 768)
    return {
        "student": student, "teacher": {f"backbone.{name}": t for name, t in teacher.items()} | heads,
        "optimizer": {}, "epoch": 80, "args": argparse.Namespace(arch="vit_base"), "ibot_loss": {}, "fp16_scaler": None,
    }  # fmt: skip


def said_of(teacher: Teacher) -> str:
    lines: list[str] = []
    teacher.weights(lines.append)
    return "\n".join(lines)


def test_mae_as_it_is_published(tmp_path: Path) -> None:
    model = base(kind="mae")
    state = official(published_keys(model, tmp_path))
    assert state["pos_embed"].shape == (1, 197, 768)
    torch.save({"model": state}, tmp_path / "mae_pretrain_vit_base.pth")
    torch.save(mae(state), tmp_path / "checkpoint-799.pth")
    save_file(state, tmp_path / "timm.safetensors")
    for name in ("mae_pretrain_vit_base.pth", "checkpoint-799.pth", "timm.safetensors"):
        teacher = filled("mae", tmp_path / name)
        same(teacher, model, (224, 96) if name.startswith("mae") else (96,))
        said = said_of(teacher)
        assert "assumed nothing" in said
        assert ("decoder_embed.weight" in said) == (name == "checkpoint-799.pth")
        assert teacher.network.settings.shape == (768, 2, 12)
    same(filled("mae", tmp_path), model, (96,))  # a folder of Hugging Face
    assert not teacher.network.mask_token.any()


def test_moco_v3_as_it_is_published(tmp_path: Path) -> None:
    model, average = base(1, "mae"), base(2, "mae")
    states = [official(published_keys(m, tmp_path / str(i))) for i, m in enumerate((model, average))]
    torch.save(moco(*states), tmp_path / "vit-b-300ep.pth.tar")
    torch.save({"model": states[0]}, tmp_path / "converted.pth")
    same(filled("moco_v3", tmp_path / "vit-b-300ep.pth.tar"), model, (224,))
    teacher = filled("moco_v3", tmp_path / "vit-b-300ep.pth.tar", encoder="momentum")
    same(teacher, average, (96,))
    assert "module.momentum_encoder." in teacher.said
    assert "module.base_encoder.cls_token" in said_of(teacher)
    same(filled("moco_v3", tmp_path / "converted.pth"), model, (96,))
    with pytest.raises(ReleasedError, match=r"converted\.pth has no momentum encoder; give MoCo v3's full file"):
        filled("moco_v3", tmp_path / "converted.pth", encoder="momentum")


def test_ibot_as_it_is_published(tmp_path: Path) -> None:
    model = base(3)
    with torch.no_grad():
        model.embeddings.position_embeddings[:, 0] = 0.1  # type: ignore[index,union-attr,operator]
    state = official(published_keys(model, tmp_path))
    files = {
        "checkpoint_teacher.pth": {"state_dict": state},
        "checkpoint.pth": ibot(state),
        "extracted.pth": state,  # extract_backbone_weights.py
        "checkpoint_student.pth": {"state_dict": state | {"masked_embed": torch.full((1, 768), 0.5)}},
    }
    for name, content in files.items():
        torch.save(content, tmp_path / name)
        teacher = filled("ibot", tmp_path / name)
        same(teacher, model, (224,) if name == "checkpoint_teacher.pth" else ())
        scale = 6.1 / 14  # what iBOT's own interpolation gives for a grid of 6
        assert "assumed nothing" in said_of(teacher)
        own = dict(model.state_dict())
        table = own["embeddings.position_embeddings"]
        square = F.interpolate(table[:, 1:].unflatten(1, (14, 14)).permute(0, 3, 1, 2), scale_factor=(scale, scale),
                               mode="bicubic")  # fmt: skip
        own["embeddings.position_embeddings"] = torch.cat([table[:, :1], square.flatten(2).mT], dim=1)
        other = hf.ViTModel(hf.ViTConfig(**BASE | {"image_size": 96})).eval()
        other.load_state_dict(own)
        same(teacher, other, (96,))
        assert teacher.network.mask_token.any() == (name == "checkpoint_student.pth")


@pytest.mark.parametrize("name", ["dinov2", "dinov2 gated", "dinov2 registers", "dinov3", "dinov3 gated"])
def test_dino_through_both_kinds(tmp_path: Path, name: str) -> None:
    model = lively(MODELS[name]())
    state = published_keys(model, tmp_path / "folder")
    patch = model.config.patch_size  # type: ignore[union-attr]
    kind = name.split()[0]
    for each in (kind, "hugging_face"):
        teacher = filled(each, tmp_path / "folder")
        same(teacher, model, (4 * patch, 6 * patch))  # type: ignore[operator]
        assert (teacher.patch_size, teacher.dim, teacher.has_cls) == (patch, 128, True)
    if kind == "dinov2":
        for layout in (lambda s: s, chunked):
            torch.save(layout(official(state)), tmp_path / "file.pth")
            how = {"antialias": True} if "registers" in name else {"offset": 0.1}
            teacher = filled(kind, tmp_path / "file.pth")
            for grid in (4, 6):
                same(teacher, at(model, grid, how), (grid * patch,))  # type: ignore[operator]


def test_moco_v3_of_small_width_has_its_own_heads(tmp_path: Path) -> None:
    model = lively(hf.ViTMAEModel(hf.ViTMAEConfig(**{**VIT, "hidden_size": 384, "num_attention_heads": 12})))
    torch.save({"model": official(published_keys(model, tmp_path))}, tmp_path / "converted.pth")
    found = {kind: filled(kind, tmp_path / "converted.pth") for kind in ("moco_v3", "mae")}
    assert {kind: teacher.network.settings.shape[2] for kind, teacher in found.items()} == {"moco_v3": 12, "mae": 6}
    assert "assumed heads 6" in said_of(found["mae"])


def _linear(state: dict[str, Tensor]) -> Any:
    head = {"module.head.weight": torch.ones(1000, 768), "module.head.bias": torch.ones(1000)}
    return {"epoch": 90, "arch": "vit_base", "state_dict": {f"module.{name}": t for name, t in state.items()} | head}


def _fine_tuned(state: dict[str, Tensor]) -> Any:
    kept = {name: tensor for name, tensor in state.items() if not name.startswith("norm.")}
    return {"model": kept | {"fc_norm.weight": torch.ones(128), "head.weight": torch.ones(10, 128)}}


REFUSED: dict[str, tuple[str, Callable[[dict[str, Tensor]], Any], str]] = {
    "linear probe": ("moco_v3", _linear, r"linear probe; give the file from before that training"),
    "fine-tuned": ("mae", _fine_tuned, "fine-tuned to classify.*give the file from before that training"),
    "decoder": ("mae", lambda s: {"model": {"decoder_embed.weight": torch.ones(2, 2)}}, "decoder only; give the file"),
    "moco as ibot": ("ibot", lambda s: moco(s, s), r"no file for a teacher of kind ibot: it is of MoCo v3, under "
                     r"'state_dict', prefix 'module\.base_encoder\.'; kind: moco_v3 takes it"),
    "mae as dinov3": ("dinov3", lambda s: {"model": s}, r"it is of MAE \(encoder\).*kind: mae or moco_v3 takes it"),
    "timm as meddinov3": ("meddinov3", lambda s: s, r"of ViT \(timm, DINO, iBOT\); kind: ibot or mae or moco_v3 takes"),
    "mae as axial": ("axial", mae, r"kind axial: it is of MAE \(with its decoder\).*; kind: mae takes it"),
    "not finite": ("mae", lambda s: {"model": s | {"norm.bias": torch.full((128,), torch.nan)}}, "not finite in norm"),
    "a lack": ("mae", lambda s: {"model": {k: v for k, v in s.items() if "1.norm1.bias" not in k}}, "1.norm1.bias is"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_another_file_is_refused_by_name(tmp_path: Path, name: str) -> None:
    kind, file, says = REFUSED[name]
    state = official(published_keys(lively(MODELS["vit"]()), tmp_path))
    torch.save(file(state), tmp_path / "file.pth")
    with pytest.raises(ReleasedError, match=says) as error:
        filled(kind, tmp_path / "file.pth")
    assert "file.pth" in str(error.value)


HF: dict[str, tuple[Callable[[], nn.Module], int, tuple[bool, int]]] = {  # patch; class token, registers
    "deit": (lambda: hf.DeiTModel(hf.DeiTConfig(**VIT)), 16, (True, 1)),
    "beit": (lambda: hf.BeitModel(hf.BeitConfig(**VIT)), 16, (True, 0)),
    "clip": (lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**VIT)), 16, (True, 0)),
    "siglip": (lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**VIT)), 16, (False, 0)),
    "swin": (
        lambda: hf.SwinModel(
            hf.SwinConfig(image_size=64, patch_size=4, embed_dim=24, depths=[1, 1], num_heads=[2, 2], window_size=4)
        ), 8, (False, 0),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HF)
def test_any_transformer_of_transformers(tmp_path: Path, name: str) -> None:
    make, patch, (has_cls, registers) = HF[name]
    model = make().eval()
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    mean, std = [0.5, 0.4, 0.3], [0.5, 0.25, 0.2]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": mean, "image_std": std}))
    teacher = filled("hugging_face", tmp_path, hu=(-100, 100))
    assert (teacher.patch_size, teacher.has_cls, teacher.drops, teacher.sizes) == (patch, has_cls, False, None)
    assert torch.tensor(teacher.window.mean).tolist() == pytest.approx([0, -20, -40])
    assert torch.tensor(teacher.window.std).tolist() == pytest.approx([100, 50, 40])
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        want, found = model(pixel_values=x).last_hidden_state, teacher.network(x)
    torch.testing.assert_close(found.patches, want[:, has_cls + registers :], rtol=1e-5, atol=1e-5)
    assert found.registers.shape[1] == registers
    torch.testing.assert_close(found.cls, want[:, 0] if has_cls else found.patches.mean(1), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert teacher.network(x.repeat(1, 1, 2, 2)).patches.shape[1] == 4 * found.patches.shape[1]


def test_numbers_that_are_in_no_file_travel_too(tmp_path: Path) -> None:
    """Positions of some models are computed when they are made, and would be NaN in a network filled from its file."""
    model = lively(MODELS["dinov3"]())
    assert [name for name, _ in model.named_buffers() if name not in model.state_dict()]
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    with torch.device("meta"):
        teacher = build_any(plugins("pretrain.teachers")["hugging_face"].Settings(weights=tmp_path))
    place(teacher.network, torch.device("cpu"))
    state = teacher.network.state_dict()
    left = [name for name, _ in teacher.network.named_buffers() if name not in state]
    assert not left
    found = teacher.weights(lambda _: None)
    assert {name: tensor.shape for name, tensor in found.items()} == {name: t.shape for name, t in state.items()}
    assert any("inv_freq" in name for name in found)


def test_what_transformers_cannot_give_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(folder: Path, says: str, **more: Any) -> None:
        with pytest.raises(ReleasedError, match=says) as error:
            filled("hugging_face", folder, **more)
        assert str(folder) in str(error.value) or "pip install" in says

    hf.ViTMAEModel(hf.ViTMAEConfig(**VIT)).save_pretrained(tmp_path / "mae")
    wrong(tmp_path / "mae", "another part of an image each time.*use kind: mae")
    vit = hf.ViTModel(hf.ViTConfig(**VIT))
    vit.save_pretrained(tmp_path / "vit")
    wrong(tmp_path / "vit", "no whole number of patches of 16", size=100)
    weights = tmp_path / "vit" / "model.safetensors"
    state = {name: t for name, t in published_keys(vit, tmp_path / "vit").items() if "pooler" not in name}
    save_file(state, weights, {"format": "pt"})
    filled("hugging_face", tmp_path / "vit")  # the pooler is no part of any feature
    del state["encoder.layer.1.layernorm_before.weight"]
    save_file(state, weights, {"format": "pt"})
    wrong(tmp_path / "vit", "lacks 1 tensors of the model, .*1.*layernorm_before.weight first")
    (tmp_path / "code").mkdir()
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "run.Mine", "AutoModel": "run.Model"}}
    (tmp_path / "code" / "config.json").write_text(json.dumps(config))
    (tmp_path / "code" / "run.py").write_text("raise SystemExit('code has run')\n")
    wrong(tmp_path / "code", "cannot be loaded as a model of transformers")
    monkeypatch.setitem(sys.modules, "transformers", None)
    wrong(tmp_path / "vit", r"run `pip install transformers`")


def test_a_name_on_the_hub_is_no_missing_file() -> None:
    settings = plugins("pretrain.teachers")["hugging_face"].Settings
    assert settings(weights="facebook/dinov2-base").source is None
    assert str(settings(weights="facebook/dinov2-base").weights) == "facebook/dinov2-base"
    assert settings(weights="/there/is/none").source is not None
