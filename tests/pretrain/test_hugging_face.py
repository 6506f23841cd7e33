"""Exports for other people's code: transformers computes our features from them, and what it cannot is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from launch.settings import SettingsError, load
from pretrain.data.window import HuWindow
from pretrain.export import Settings, main
from pretrain.hugging_face import ExportError, preprocessor
from pretrain.models.positions import PositionSettings
from pretrain.models.rope import RopeSettings
from pretrain.models.vit import VisionTransformer, VitSettings, build
from pretrain.released import ReleasedError, load_backbone, read
from pretrain.weights import write_weights
from tests.pretrain.test_export import Networks, lively, run_folder

hf = pytest.importorskip("transformers")

VIT = VitSettings(size="custom", width=64, depth=3, heads=2)
WINDOW = HuWindow(low=-200, high=300, mean=50, std=100)
FITTING: dict[str, dict[str, Any]] = {
    "as DINOv3": {},
    "as MedDINOv3": {"qkv_bias": False, "norm_eps": 1e-6},
    "a bias of k": {"mask_k_bias": False},
    "no registers": {"registers": 0},
    "no layer scale": {"layerscale": None},
    "gated": {"ffn": "swiglu64"},
    "one channel": {"in_channels": 1},
    "small patches": {"patch_size": 8},
    "another base": {"rope": RopeSettings(base=1000.0)},
    "double angles": {"rope": RopeSettings(dtype="fp64")},
    "a norm for local crops": {"untie_global_and_local_cls_norm": True},
}


def export(folder: Path, model: VisionTransformer, window: HuWindow = WINDOW) -> Path:
    """What `axial export` writes."""
    header = {"axial": "0", "model": model.settings.model_dump(mode="json"), "window": window.model_dump(mode="json")}
    path = folder / "export.safetensors"
    write_weights(path, dict(model.state_dict()), {"format": "pt", "axial": json.dumps(header)})
    return path


def tokens(model: VisionTransformer, image: Tensor) -> Tensor:
    with torch.no_grad():
        found = model(image)
    return torch.cat([found.cls[:, None], found.registers, found.patches], dim=1)


def theirs(folder: Path) -> nn.Module:
    model, report = hf.DINOv3ViTModel.from_pretrained(folder, output_loading_info=True)
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not report[what], f"{what}: {report[what]}"
    return model.eval()  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", FITTING)
def test_transformers_gives_our_features_and_reading_back_our_weights(tmp_path: Path, name: str) -> None:
    ours = lively(VIT.model_copy(update=FITTING[name]))
    folder = tmp_path / "folder"
    main(Settings(folder=export(tmp_path, ours), format="hugging_face", output=folder))
    other, said = theirs(folder), list[str]()
    back, window = load_backbone(folder, say=said.append)
    assert window == WINDOW
    assert "assumed" in said[0] and "window  " in said[0] and "HU -200 to 300" in said[0]
    grey = torch.randn(2, 1, 48, 80, generator=torch.Generator().manual_seed(1))
    want = tokens(ours, grey.expand(-1, ours.in_channels, -1, -1))
    with torch.no_grad():
        for found in (other(grey.expand(-1, 3, -1, -1)).last_hidden_state, tokens(back, grey.expand(-1, 3, -1, -1))):
            assert (found - want).abs().max() <= 1e-5 * want.abs().max()
    state, mine = back.state_dict(), ours.state_dict()
    for key in state.keys() & mine.keys():
        if key not in ("patch_embed.proj.weight", "blocks.0.attn.qkv.bias_mask") and not key.startswith("rope"):
            masked = mine[key] * mine[f"{key}_mask"] if f"{key}_mask" in mine else mine[key]
            assert torch.equal(state[key], masked), key
    assert back.settings.norm_eps == ours.settings.norm_eps


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "two norms": ({"untie_cls_and_patch_norms": True}, "untie_cls_and_patch_norms: it has one final norm"),
    "a table": ({"positions": PositionSettings(grid=4)}, "positions: it turns q and k"),
    "coarse angles": ({"rope": RopeSettings(dtype="bf16")}, "rope.dtype: bf16"),
    "periods": ({"rope": RopeSettings(base=None, min_period=1, max_period=9)}, "rope.min_period"),
    "longer side": ({"rope": RopeSettings(normalize="max")}, "rope.normalize: max"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_cannot_compute_is_refused_before_anything_is_written(tmp_path: Path, name: str) -> None:
    change, says = REFUSED[name]
    path = export(tmp_path, lively(VIT.model_copy(update=change)))
    with pytest.raises(ExportError, match=says) as refused:
        main(Settings(folder=path, format="hugging_face", output=tmp_path / "folder"))
    assert "format=pth" in str(refused.value)
    assert not (tmp_path / "folder").exists()
    main(Settings(folder=path, format="pth", output=tmp_path / "all.pth"))  # the way out


def test_two_windows_as_channels_have_no_place(tmp_path: Path) -> None:
    two = HuWindow(low=(-1000.0, -200.0), high=(1000.0, 300.0))
    with pytest.raises(ExportError, match="2 HU windows"):
        main(Settings(folder=export(tmp_path, lively(VIT), two), format="hugging_face", output=tmp_path / "folder"))


def test_shades_of_the_preprocessor_are_the_window() -> None:
    three = HuWindow(
        low=(-1000.0, -200.0, 0.0), high=(1000.0, 300.0, 80.0), mean=(0.0, 50.0, 40.0), std=(300.0, 90.0, 20.0)
    )
    hu = torch.linspace(-1200, 1200, 97).view(1, 1, 97)
    for window in (WINDOW, three):
        said = preprocessor(window)
        parts = window.parts * (3 if window.channels == 1 else 1)
        for mean, std, part in zip(said["image_mean"], said["image_std"], parts, strict=True):
            low, high = part.low, part.high
            assert isinstance(low, float) and isinstance(high, float)
            shade = (hu.clamp(low, high) - low) / (high - low)
            torch.testing.assert_close((shade - mean) / std, part.apply(hu), rtol=1e-5, atol=1e-5)


def test_a_run_gives_all_three_forms_and_a_broken_window_is_named(tmp_path: Path) -> None:
    networks = Networks()
    run = run_folder(tmp_path, networks)
    teacher = networks.teacher["backbone"]
    assert isinstance(teacher, VisionTransformer)
    image = torch.randn(1, 3, 32, 48)
    for form, name in (("axial", "export.safetensors"), ("pth", "export.pth"), ("hugging_face", "hugging_face")):
        outcome = main(load(Settings, overrides=[f"folder={run}", f"format={form}"]))
        assert (run / name).exists() and str(run / name) in outcome.next[0]
        assert torch.allclose(tokens(load_backbone(run / name)[0], image), tokens(teacher, image), atol=1e-5)
    config = run / "hugging_face" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"hu_window": {"low": 5, "high": 1}}))
    with pytest.raises(ReleasedError, match=r"hu_window in config\.json is no window"):
        load_backbone(run / "hugging_face")


def test_a_pth_is_what_dinov3s_own_code_reads(tmp_path: Path) -> None:
    networks = Networks()
    run = run_folder(tmp_path, networks)
    main(Settings(folder=run, format="pth", heads=True, output=tmp_path / "teacher.pth"))
    found = torch.load(tmp_path / "teacher.pth", weights_only=True)
    assert set(found) == {"teacher"}
    parts = {name.split(".")[0] for name in found["teacher"]}
    assert "backbone" in parts and "dino_head" in parts
    plain = {k.removeprefix("backbone."): v for k, v in found["teacher"].items() if k.startswith("backbone.")}
    model = build(networks.teacher["backbone"].settings)  # type: ignore[arg-type,union-attr]
    model.load_state_dict(plain)  # strict
    assert set(read(tmp_path / "teacher.pth").heads) == {"dino_head"}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["format=pth", "output=x.safetensors"], r"output: must end in \.pth"),
        (["format=hugging_face", "output=x.pth"], "output: must be a folder"),
        (["format=hugging_face", "heads=true"], "DINOv3ViTModel has none"),
        (["format=huggingface"], "hugging_face"),
    ],
)
def test_words_that_do_not_belong_together(words: list[str], says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        load(Settings, overrides=["folder=run", *words])


def test_places_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    path = export(tmp_path, lively(VIT))
    with pytest.raises(ValueError, match="give output=NAME"):
        main(Settings(folder=path, format="pth"))
    (tmp_path / "taken").write_text("")
    (tmp_path / "x.pth").mkdir()
    with pytest.raises(ValueError, match="is a file; give a folder"):
        main(Settings(folder=path, format="hugging_face", output=tmp_path / "taken"))
    with pytest.raises(ValueError, match="is a folder"):
        main(Settings(folder=path, format="pth", output=tmp_path / "x.pth"))
