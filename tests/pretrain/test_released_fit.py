"""Published backbones in a model of one's own: what fits, what is made anew, and what is refused by name."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from launch.settings import load
from pretrain.data.window import HuWindow
from pretrain.loop import Guard
from pretrain.methods import Source, self_distillation
from pretrain.models.positions import PositionSettings
from pretrain.models.vit import VisionTransformer, VitSettings, build
from pretrain.optim import OptimSettings, multipliers
from pretrain.released import ReleasedError, fit, load_backbone, published, read
from pretrain.released_files import Weights
from pretrain.released_keys import name_tensors
from pretrain.released_shapes import settings_of
from pretrain.weights import write_weights

TABLE = PositionSettings(grid=4, offset=0.1)
OLD = VitSettings(size="custom", width=128, depth=2, heads=2, patch_size=14, registers=0, mask_k_bias=False,
                  norm_eps=1e-6, positions=TABLE)  # fmt: skip
NEW = VitSettings(size="custom", width=128, depth=2, heads=2)


def lively(settings: VitSettings) -> VisionTransformer:
    model, draw = build(settings).eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.2)
    return model


@torch.no_grad()
def outputs(model: VisionTransformer, rows: int = 3, columns: int = 5) -> Tensor:
    side = model.patch_size
    grey = torch.randn(2, 1, rows * side, columns * side, generator=torch.Generator().manual_seed(3))
    features = model(grey.repeat(1, model.in_channels, 1, 1))
    return torch.cat([features.cls[:, None], features.registers, features.patches], dim=1)


def timm(model: VisionTransformer) -> dict[str, Tensor]:
    """DINOv3 as timm has it: no mask token, no periods, biases of q and v on their own, other names."""
    out = {}
    gated = model.settings.ffn != "mlp"
    for name, tensor in model.state_dict().items():
        for old, new in (("ls1.gamma", "gamma_1"), ("ls2.gamma", "gamma_2"), ("storage_tokens", "reg_token")):
            name = name.replace(old, new)
        for old, new in (("mlp.w1", "mlp.fc1_g"), ("mlp.w2", "mlp.fc1_x"), ("mlp.w3", "mlp.fc2")) if gated else ():
            name = name.replace(old, new)
        if name.endswith("qkv.bias"):
            query, _, value = tensor.chunk(3)
            out |= {name.replace("qkv.bias", "q_bias"): query, name.replace("qkv.bias", "v_bias"): value}
        elif name not in ("mask_token", "rope_embed.periods") and not name.endswith("bias_mask"):
            out[name] = tensor
    return out


@pytest.mark.parametrize("change", [{}, {"qkv_bias": False}, {"ffn": "swiglu64", "ffn_ratio": 3.0}], ids=str)
def test_dinov3_of_timm_is_read(tmp_path: Path, change: dict[str, Any]) -> None:
    model = lively(NEW.model_copy(update=change))
    save_file(timm(model), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_base_patch16_dinov3"}))
    said: list[str] = []
    loaded, _ = load_backbone(tmp_path, say=said.append)
    assert torch.equal(outputs(loaded), outputs(model))
    for line in ("DINOv3 (timm)", "mask_token (zeros)", "rope_embed.periods (base 100)", "heads 2 and epsilon of the"):
        assert line in said[0]


def test_a_table_of_positions_goes_round(tmp_path: Path) -> None:
    for settings in (OLD, OLD.model_copy(update={"positions": PositionSettings(grid=3, on_cls=False, fixed=True)})):
        model = lively(settings)
        header = {"axial": "0", "model": settings.model_dump(mode="json"), "window": HuWindow().model_dump(mode="json")}
        write_weights(tmp_path / "x.safetensors", model.state_dict(), {"format": "pt", "axial": json.dumps(header)})
        loaded, _ = load_backbone(tmp_path / "x.safetensors", in_channels=1)
        assert loaded.settings == settings.model_copy(update={"in_channels": 1})
        torch.testing.assert_close(outputs(loaded), outputs(model), atol=1e-5, rtol=1e-5)
        maps = loaded.intermediate(torch.zeros(1, 1, 28, 42), [-1])
        assert maps[0].shape == (1, 128, 2, 3)


def test_channels_that_are_windows_are_not_summed(tmp_path: Path) -> None:
    model = lively(OLD)
    window = HuWindow(low=(-1350.0, -160.0, -500.0), high=(150.0, 240.0, 1300.0))
    header = {"axial": "0", "model": OLD.model_dump(mode="json"), "window": window.model_dump(mode="json")}
    write_weights(tmp_path / "x.safetensors", model.state_dict(), {"format": "pt", "axial": json.dumps(header)})
    assert load_backbone(tmp_path / "x.safetensors", in_channels=3)[1].channels == 3
    with pytest.raises(ReleasedError, match=r"3 HU windows as channels .* give model\.in_channels=3"):
        load_backbone(tmp_path / "x.safetensors", in_channels=1)


def test_a_table_of_positions_trains_unless_it_is_fixed() -> None:
    with torch.device("meta"):
        empty = build(OLD)
    assert empty(torch.empty(1, 3, 28, 42, device="meta")).patches.shape == (1, 6, 128)
    for fixed in (False, True):
        model = build(OLD.model_copy(update={"positions": TABLE.model_copy(update={"fixed": fixed})}))
        assert model.state_dict()["pos_embed"].shape == (1, 17, 128)
        assert model.pos_embed.isfinite().all()
        assert len(model.pos_embed[0].unique(dim=0)) == 17
        crops = [torch.randn(2, 3, 56, 56), torch.randn(2, 3, 28, 42)]
        both = model(crops, [torch.rand(2, 16) < 0.5, None])
        alone = model(crops[1])
        torch.testing.assert_close(both[1].patches, alone.patches, atol=1e-5, rtol=1e-5)
        torch.stack([f.patches.square().sum() for f in both]).sum().backward()
        assert model.pos_embed.requires_grad == (not fixed)
        if not fixed:
            assert model.pos_embed.grad is not None and model.pos_embed.grad.abs().sum() > 0
            factors = multipliers(model, OptimSettings())
            assert factors["pos_embed"] == factors["cls_token"]


def test_masked_patches_keep_their_positions() -> None:
    model = lively(OLD)
    x = torch.zeros(1, 3, 56, 56)
    whole = torch.ones(1, 16, dtype=torch.bool)
    patches = model(x, whole).patches
    assert (patches[0, 0] - patches[0, 1]).abs().max() > 1e-3
    assert torch.equal(patches, model(x + 1, whole).patches)


def test_registers_are_the_files_or_explicitly_fresh(tmp_path: Path) -> None:
    torch.save(lively(OLD).state_dict(), tmp_path / "old.pth")
    released = read(tmp_path / "old.pth")
    with_four = released.settings.model_copy(update={"registers": 4})
    with pytest.raises(ReleasedError, match=r"model\.registers is 4, the file's is 0") as error:
        fit(released, with_four)
    to_do = "to fit it, write model.registers=0\nor init_from.registers=fresh, for 4 registers drawn anew"
    assert to_do in str(error.value)
    fresh = {"storage_tokens": torch.full((1, 4, 128), 0.5)}
    said: list[str] = []
    state = fit(released, with_four, said.append, fresh)
    assert torch.equal(state["storage_tokens"], fresh["storage_tokens"])
    assert "4 drawn anew, 0 of the file dropped" in said[0]
    torch.save(lively(NEW).state_dict(), tmp_path / "new.pth")
    released = read(tmp_path / "new.pth")
    bare = NEW.model_copy(update={"registers": 0})
    with pytest.raises(ReleasedError, match=r"model\.registers is 0, the file's is 4"):
        fit(released, bare)
    assert "storage_tokens" not in fit(released, bare, said.append, {})
    assert "0 drawn anew, 4 of the file dropped" in said[1]


def test_a_run_starts_from_a_folder_with_registers_of_its_own(tmp_path: Path) -> None:
    hf = pytest.importorskip("transformers")
    shape = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56}
    hf.Dinov2Model(hf.Dinov2Config(**shape)).save_pretrained(tmp_path)
    words = ["model.size=custom", "model.width=128", "model.depth=2", "model.heads=2", "model.patch_size=14"]
    source = Source.model_validate({"path": tmp_path, "registers": "fresh"})
    overrides = [word.removeprefix("model.") for word in [*words, "model.positions={grid: 4}", "model.norm_eps=1e-6"]]
    model = load(VitSettings, overrides=[*overrides, "in_channels=1"])
    small = {"prototypes": 16, "hidden": 16, "bottleneck": 8}
    terms = {"dino": {"head": small}, "ibot": {"head": small}}
    settings = self_distillation.Settings.model_validate({"terms": terms})
    with torch.device("meta"):
        method = self_distillation.build(settings, model=model, steps=4, guard=Guard(torch.device("cpu")))
    said: list[str] = []
    states = method.initial(0, source, said.append)
    assert said[0] == "student and teacher:"  # read once
    assert "4 drawn anew" in said[1]
    teacher, student = states["teacher"]["backbone"], states["student"]["backbone"]
    assert torch.equal(teacher["storage_tokens"], student["storage_tokens"])
    assert student["storage_tokens"].std() == pytest.approx(0.02, rel=0.3)
    with pytest.raises(ReleasedError, match=r"init_from\.registers=fresh"):
        method.initial(0, Source(path=tmp_path), said.append)


def test_settings_that_differ_are_named_with_what_would_fit(tmp_path: Path) -> None:
    torch.save(lively(OLD).state_dict(), tmp_path / "old.pth")
    released = read(tmp_path / "old.pth")
    with pytest.raises(ReleasedError) as error:
        fit(released, VitSettings(in_channels=1, layerscale=None, ffn_ratio=2.0))
    text = str(error.value)
    for line in (
        "model.width is 384, the file's is 128",
        "model.patch_size is 16, the file's is 14",
        "model.layerscale is null, the file's is 1e-05",
        "model.positions is null, the file's is {grid: 4",
    ):
        assert line in text
    # What it says to write does fit.
    written = next(line for line in text.splitlines() if line.startswith("to fit it, write ")).partition("write ")[2]
    overrides = [word.removeprefix("model.") for word in shlex.split(written)]
    fitting = load(VitSettings, overrides=[*overrides, "in_channels=1"])
    fit(released, fitting, lambda text: None)
    for change, says in (
        ({"positions": TABLE.model_copy(update={"grid": 5})}, r"model\.positions\.grid is 5, the file's is 4"),
        ({"ffn_ratio": 2.0}, r"model\.ffn_ratio is 2, the file's is 4"),
        ({"qkv_bias": False}, r"model\.qkv_bias is false, the file's is true"),
    ):
        with pytest.raises(ReleasedError, match=says):
            fit(released, released.settings.model_copy(update=change))
    said: list[str] = []
    odd = {"norm_eps": 1e-5, "positions": TABLE.model_copy(update={"offset": 0.3}), "heads": 4}
    fit(released, released.settings.model_copy(update=odd), said.append)
    for what in (
        "norm_eps is 1e-05, that of the file 1e-06",
        "positions.offset is 0.3",
        "heads is 4; the file does not say",
    ):
        assert f"warning: model.{what}" in said[0]


def test_rotary_positions_and_biases_of_k_are_not_changed_in_silence(tmp_path: Path) -> None:
    free = NEW.model_copy(update={"mask_k_bias": False})
    torch.save(lively(free).state_dict(), tmp_path / "free.pth")
    released = read(tmp_path / "free.pth")
    with pytest.raises(ReleasedError, match=r"model\.mask_k_bias is true, the file's is false"):
        fit(released, NEW)
    with pytest.raises(ReleasedError, match=r"model\.rope\.base is 50, the file's is 100"):
        fit(released, free.model_copy(update={"rope": free.rope.model_copy(update={"base": 50.0})}))
    # Without rotation the bias of k says nothing: the mask is allowed, and the function the same.
    torch.save(lively(OLD).state_dict(), tmp_path / "old.pth")
    old = read(tmp_path / "old.pth")
    masked = build(old.settings.model_copy(update={"mask_k_bias": True})).eval()
    masked.load_state_dict(fit(old, masked.settings, lambda text: None))
    torch.testing.assert_close(outputs(masked), outputs(lively(OLD)), atol=1e-5, rtol=1e-5)
    # A mask that is taken away leaves what it hid without effect.
    torch.save(lively(NEW).state_dict(), tmp_path / "new.pth")
    bare = build(free).eval()
    bare.load_state_dict(fit(read(tmp_path / "new.pth"), free, lambda text: None))
    assert torch.equal(outputs(bare), outputs(lively(NEW)))


def blocks(depth: int, width: int, **parts: tuple[int, ...]) -> dict[str, Tensor]:
    """The keys of a ViT's blocks with tensors that take no memory."""
    shapes: dict[str, tuple[int, ...]] = {
        f"{norm}.{kind}": (width,) for norm in ("norm1", "norm2") for kind in ("weight", "bias")
    }
    shapes |= {"attn.qkv.weight": (3 * width, width), "attn.proj.weight": (width, width), "attn.proj.bias": (width,)}
    shapes |= {name.replace("__", "."): shape for name, shape in parts.items()}
    shapes |= (
        {"mlp.fc1.weight": (4 * width, width), "mlp.fc1.bias": (4 * width,)} if "mlp__w3__bias" not in parts else {}
    )
    shapes |= {"mlp.fc2.weight": (width, 4 * width), "mlp.fc2.bias": (width,)} if "mlp__w3__bias" not in parts else {}
    return {f"blocks.{i}.{name}": torch.zeros(1).expand(shape) for i in range(depth) for name, shape in shapes.items()}


def around(width: int, patch: int, **more: tuple[int, ...]) -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "norm.weight": (width,),
        "norm.bias": (width,),
        **more,
    }
    shapes |= {"patch_embed.proj.weight": (width, 3, patch, patch), "patch_embed.proj.bias": (width,)}
    return {name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}


SCALES: dict[str, tuple[int, ...]] = {"ls1__gamma": (768,), "ls2__gamma": (768,)}
PERIODS = {"rope_embed.periods": 100.0 ** (torch.arange(16) / 16)}
GIANT: dict[str, tuple[int, ...]] = {
    "mlp__w12__weight": (8192, 1536), "mlp__w12__bias": (8192,), "mlp__w3__weight": (1536, 4096),
    "mlp__w3__bias": (1536,), "attn__qkv__bias": (4608,), "ls1__gamma": (1536,), "ls2__gamma": (1536,),
}  # fmt: skip
TOKENS: dict[str, tuple[int, ...]] = {"storage_tokens": (1, 4, 768), "mask_token": (1, 768)}


def test_the_full_key_tables_of_the_published_files_fit() -> None:
    """Counts of tensors and parameters as they are published; nothing of that size is made."""
    hub = around(768, 16, **TOKENS) | PERIODS
    biases: dict[str, tuple[int, ...]] = {"attn__qkv__bias": (2304,), "attn__qkv__bias_mask": (2304,)}
    dinov3 = hub | blocks(12, 768, **SCALES, **biases)
    meddinov3 = {f"backbone.{name}": tensor for name, tensor in (hub | blocks(12, 768, **SCALES)).items()}
    assert len(meddinov3) == 164
    mae = around(768, 16, pos_embed=(1, 197, 768)) | blocks(12, 768, attn__qkv__bias=(2304,))
    assert (len(mae), sum(t.numel() for t in mae.values())) == (150, 85_798_656)
    for tensors, container, change in (
        (dinov3, "", {}),
        (meddinov3, "teacher", {"qkv_bias": False, "norm_eps": 1e-6}),
        (mae, "model", {"registers": 0, "mask_k_bias": False, "layerscale": None, "norm_eps": 1e-6,
                        "positions": PositionSettings(grid=14, fixed=True)}),
    ):  # fmt: skip
        released = published(Weights(Path("file.pth"), tensors, container))
        assert released.settings == VitSettings.model_validate({"size": "b", **change})
        fitted = fit(released, released.settings, lambda text: None)
        with torch.device("meta"):
            model = build(released.settings)
        assert {k: v.shape for k, v in fitted.items()} == {k: v.shape for k, v in model.state_dict().items()}
    giant = around(1536, 14, pos_embed=(1, 1370, 1536), mask_token=(1, 1536), register_tokens=(1, 4, 1536))
    weights = Weights(Path("giant.pth"), giant | blocks(40, 1536, **GIANT))
    named = name_tensors(weights)
    settings, assumed = settings_of(weights, named)
    assert settings.shape == (1536, 40, 24)
    assert assumed == ("heads", "norm_eps")
    with torch.device("meta"):
        model = build(settings)
    assert {k: v.shape for k, v in named.state.items()} == {k: v.shape for k, v in model.state_dict().items()}
    small = around(384, 16, pos_embed=(1, 197, 384)) | blocks(12, 384, attn__qkv__bias=(1152,))
    moco = {f"module.base_encoder.{name}": tensor for name, tensor in small.items()}
    assert published(Weights(Path("moco.pth"), moco, "state_dict")).settings.shape == (384, 12, 12)  # its own 12 heads
    with pytest.raises(ReleasedError, match="does not state its heads, and a width of 200 is not usual"):
        published(Weights(Path("odd.pth"), around(200, 16, pos_embed=(1, 17, 200)) | blocks(1, 200)))


@pytest.mark.parametrize("base", [50.0, 100.0, 1000.0, 10000.0])
def test_another_base_of_the_positions_is_read_back_as_it_was_set(tmp_path: Path, base: float) -> None:
    settings = NEW.model_copy(update={"rope": NEW.rope.model_copy(update={"base": base})})
    torch.save(lively(settings).state_dict(), tmp_path / "published.pth")
    found = read(tmp_path / "published.pth")
    assert found.settings.rope.base == base
    fit(found, settings, say=lambda _: None)
