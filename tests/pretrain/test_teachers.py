"""What every kind of teacher must be: built without numbers, filled from its file, frozen, in its own window."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from launch.settings import plugins
from pretrain.data.window import HuWindow
from pretrain.methods import SourceError
from pretrain.models.positions import PositionSettings
from pretrain.models.vit import Features, VisionTransformer, VitSettings, build
from pretrain.parallel import fill, place
from pretrain.precision import in_bf16
from pretrain.released import ReleasedError
from pretrain.teachers import Teacher, _vit
from pretrain.teachers import build as build_any
from pretrain.teachers._natural import IMAGENET, natural_window
from pretrain.weights import write_weights
from tests.pretrain.test_export import WINDOW, Networks, run_folder

OLD = VitSettings(size="custom", width=128, depth=2, heads=2, registers=0, mask_k_bias=False, norm_eps=1e-6,
                  layerscale=None, positions=PositionSettings(grid=4, fixed=True))  # fmt: skip
DINO = OLD.model_copy(update={"positions": PositionSettings(grid=4, offset=0.1)})
V2 = DINO.model_copy(update={"patch_size": 14, "layerscale": 1e-5})
V3 = VitSettings(size="custom", width=128, depth=2, heads=2)
MED = V3.model_copy(update={"qkv_bias": False, "norm_eps": 1e-6})
OWN = V3.model_copy(update={"in_channels": 1, "registers": 2, "patch_size": 8})
LUNG = HuWindow(low=-1350, high=150, mean=-600, std=500)


def lively(settings: VitSettings) -> VisionTransformer:
    model, draw = build(settings).eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not name.endswith(("periods", "bias_mask")):
                tensor.copy_(torch.randn(tensor.shape, generator=draw) * 0.2)
        if settings.positions is not None and settings.positions.fixed:
            model.pos_embed[:, 0] = 0
        if settings.positions is not None:  # most of their files have none
            model.mask_token.zero_()
    return model


def plain(model: VisionTransformer) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if name != "mask_token"}


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def export(path: Path, model: VisionTransformer, window: HuWindow = LUNG) -> None:
    said = {"model": model.settings.model_dump(mode="json"), "window": window.model_dump(mode="json")}
    write_weights(path, model.state_dict(), {"format": "pt", "axial": json.dumps({"axial": "0", **said})})


def hugging_face(folder: Path) -> Callable[[Tensor], Tensor]:
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = hf.DINOv3ViTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=64,
        num_register_tokens=2,
    )  # fmt: skip
    model = hf.DINOv3ViTModel(config).eval()
    model.save_pretrained(folder / "weights")
    return lambda x: model(x).last_hidden_state


def of_vit(settings: VitSettings, file: Callable[[VisionTransformer], Any]) -> Any:
    def write(folder: Path) -> Callable[[Tensor], Tensor]:
        model = lively(settings)
        torch.save(file(model), folder / "weights")
        return lambda x: tokens(model(x))

    return write


def own(folder: Path) -> Callable[[Tensor], Tensor]:
    model = lively(OWN)
    export(folder / "weights.safetensors", model)
    return lambda x: tokens(model(x))


def tokens(features: Features) -> Tensor:
    return torch.cat([features.cls[:, None], features.registers, features.patches], dim=1)


Kind = tuple[Callable[[Path], Callable[[Tensor], Tensor]], int, int, int]  # what writes its file; patch, channels, D
KINDS: dict[str, Kind] = {
    "mae": (of_vit(OLD, lambda m: {"model": plain(m)}), 16, 3, 128),
    "moco_v3": (of_vit(OLD, lambda m: {"state_dict": prefixed(plain(m), "module.base_encoder.")}), 16, 3, 128),
    "ibot": (of_vit(DINO, lambda m: {"teacher": prefixed(plain(m), "backbone.")}), 16, 3, 128),
    "dinov2": (of_vit(V2, lambda m: m.state_dict()), 14, 3, 128),
    "dinov3": (of_vit(V3, lambda m: m.state_dict()), 16, 3, 128),
    "meddinov3": (of_vit(MED, lambda m: {"teacher": prefixed(m.state_dict(), "backbone.")}), 16, 3, 128),
    "axial": (own, 8, 1, 128),
    "hugging_face": (hugging_face, 16, 3, 64),
}


def made(kind: str, folder: Path, **more: Any) -> tuple[Teacher, Callable[[Tensor], Tensor]]:
    """A teacher as the trainer makes it, on the meta device and filled, and the network that its file is of."""
    reference = KINDS[kind][0](folder)
    path = folder / ("weights.safetensors" if kind == "axial" else "weights")
    return filled(kind, path, **more), reference


def filled(kind: str, path: Path, **more: Any) -> Teacher:
    with torch.device("meta"):
        teacher = build_any(plugins("pretrain.teachers")[kind].Settings(weights=path, **more))
    assert all(tensor.is_meta for tensor in teacher.network.state_dict().values())
    place(teacher.network, torch.device("cpu"))
    fill(teacher.network, teacher.weights(lambda _: None))
    return teacher


def test_every_kind_is_tested() -> None:
    assert KINDS.keys() == plugins("pretrain.teachers").keys()


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_is_the_network_of_its_file(kind: str, tmp_path: Path) -> None:
    teacher, reference = made(kind, tmp_path)
    before = torch.get_rng_state()
    filled(kind, teacher_path(tmp_path, kind))
    assert torch.equal(torch.get_rng_state(), before), "a run's draws do not depend on its teachers"
    _, patch, channels, dim = KINDS[kind]
    assert (teacher.patch_size, teacher.in_channels, teacher.dim, teacher.has_cls) == (patch, channels, dim, True)
    assert teacher.said.startswith(kind + ": ")
    assert not teacher.network.training
    assert not any(parameter.requires_grad for parameter in teacher.network.parameters())
    with torch.no_grad():
        for grid in (4, 6):  # that of the table of positions, and another
            x = torch.randn(2, channels, grid * patch, grid * patch, generator=torch.Generator().manual_seed(1))
            assert teacher.grid(grid * patch) == grid
            found = teacher.network(x)
            assert found.patches.shape == (2, grid**2, dim)
            assert found.cls.shape == (2, dim)
            torch.testing.assert_close(tokens(found), reference(x), rtol=1e-5, atol=1e-5)
            assert torch.equal(tokens(teacher.network(x)), tokens(found))
            mask = torch.rand(2, grid**2, generator=torch.Generator().manual_seed(2)) < 0.5
            pixels = mask.unflatten(1, (grid, grid)).repeat_interleave(patch, 1).repeat_interleave(patch, 2)
            hidden = x + 10 * pixels[:, None]
            assert torch.equal(tokens(teacher.network(hidden, mask)), tokens(teacher.network(x, mask)))
            assert not torch.equal(tokens(teacher.network(x, mask)), tokens(found))
    with pytest.raises(ReleasedError, match=f"{patch * 4 + 1} pixels is no whole number of patches of {patch}"):
        teacher.grid(patch * 4 + 1)


@pytest.mark.parametrize("kind", KINDS)
def test_left_out_patches_and_bf16(kind: str, tmp_path: Path) -> None:
    teacher, _ = made(kind, tmp_path)
    patch, channels = teacher.patch_size, teacher.in_channels
    x = torch.randn(3, channels, 4 * patch, 4 * patch, generator=torch.Generator().manual_seed(1))
    assert teacher.drops == (kind != "hugging_face")
    with torch.no_grad():
        whole = teacher.network(x)
        if teacher.drops:
            rows = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(i))[:9] for i in range(3)])
            some = teacher.network(x, kept=rows)
            assert some.patches.shape == (3, 9, teacher.dim)
            moved = (some.patches - whole.patches.gather(1, rows[..., None].expand(-1, -1, teacher.dim))).abs()
            assert moved.max() > 0
        in_bf16(teacher.network)
        coarse = teacher.network(x)
    assert coarse.patches.dtype == torch.bfloat16
    error = (coarse.patches.float() - whole.patches).norm() / whole.patches.norm()
    assert 0 < error < 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_images_are_made_from_hu_by_its_own_rule(kind: str, tmp_path: Path) -> None:
    hu = torch.randint(-2000, 2000, (2, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.int16)
    clipped = hu.double()
    if kind == "axial":
        want = ((clipped.clamp(-1350, 150) + 600) / 500)[:, None]
    elif kind == "meddinov3":
        want = ((clipped.clamp(-1000, 1000) - 65.1084213256836) / 178.01663208007812)[:, None]
    else:
        mean, std = (torch.tensor(x, dtype=torch.float64)[:, None, None] for x in IMAGENET)
        want = ((clipped.clamp(-1000, 1000)[:, None] + 1000) / 2000 - mean) / std
    teacher, _ = made(kind, tmp_path)
    torch.testing.assert_close(teacher.window.image(hu).double(), want, rtol=0, atol=1e-5)
    assert filled(kind, teacher_path(tmp_path, kind), window=LUNG).window == LUNG
    if kind not in ("axial", "meddinov3"):
        three = [(-1000.0, 1000.0), (-160.0, 240.0), (-1350.0, 150.0)]
        window = filled(kind, teacher_path(tmp_path, kind), hu=three).window
        scaled = torch.stack([(clipped.clamp(low, high) - low) / (high - low) for low, high in three], 1)
        torch.testing.assert_close(window.image(hu).double(), (scaled - mean) / std, rtol=0, atol=1e-5)
    if teacher.in_channels == 1:
        with pytest.raises(ReleasedError, match=r"1 channel\(s\), and 2 windows .* give `window` with one or 1"):
            filled(kind, teacher_path(tmp_path, kind), window=[{}, {"low": -160, "high": 240}])


def teacher_path(folder: Path, kind: str) -> Path:
    return folder / ("weights.safetensors" if kind == "axial" else "weights")


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_before_the_last_and_no_norm(kind: str, tmp_path: Path) -> None:
    full, _ = made(kind, tmp_path)
    path = teacher_path(tmp_path, kind)
    x = torch.randn(2, full.in_channels, 4 * full.patch_size, 4 * full.patch_size)
    early, raw = filled(kind, path, block=0), filled(kind, path, norm=False)
    assert filled(kind, path, block=-2).network.state_dict().keys() == early.network.state_dict().keys()
    size = [sum(p.numel() for p in teacher.network.parameters()) for teacher in (full, early, raw)]
    assert size[2] == size[0] - 2 * full.dim
    assert size[1] < 0.8 * size[0]
    with torch.no_grad():
        last = full.network(x)
        norm = full.network.model.norm if kind == "hugging_face" else full.network.norm
        torch.testing.assert_close(norm(raw.network(x).patches), last.patches, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(early.network(x).patches, last.patches, atol=1e-3)
        if kind != "hugging_face":
            (inner,) = full.network.intermediate_features(x, [0])
            assert torch.equal(tokens(early.network(x)), tokens(inner))
    with pytest.raises(ReleasedError, match="block 2"):
        filled(kind, path, block=2)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_missing_are_named(kind: str, tmp_path: Path) -> None:
    settings = plugins("pretrain.teachers")[kind].Settings(weights=tmp_path / "none", where="ask Ann")
    assert settings.source is not None
    assert (settings.source.path, settings.source.where) == (tmp_path / "none", "ask Ann")
    with pytest.raises(SourceError, match=r"none (does not exist|is no folder); ask Ann"):
        build_any(settings)
    if kind not in ("axial", "hugging_face"):
        with pytest.raises(SourceError, match=r"does not exist; .*(https://|github\.com)"):
            build_any(settings.model_copy(update={"where": ""}))


class Payload:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return print, ("code has run",)


@pytest.mark.parametrize("kind", KINDS)
def test_no_code_of_a_file_is_run(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = teacher_path(tmp_path, kind)
    if kind == "hugging_face":
        KINDS[kind][0](tmp_path)
        (path / "model.safetensors").unlink()
        torch.save({"x": Payload()}, path / "pytorch_model.bin")
        with pytest.raises(ReleasedError, match="cannot be loaded"):
            filled(kind, path)
    else:
        path = tmp_path / "weights"
        torch.save({"model": Payload()}, path)
        with pytest.raises(ReleasedError, match="would run code"):
            filled(kind, path)
    assert "code has run" not in capsys.readouterr().out


def test_a_file_is_read_again_only_when_it_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    KINDS["dinov3"][0](tmp_path)
    path, reads, read = tmp_path / "weights", [0], _vit.read

    def counted(*given: Any) -> Any:
        reads[0] += 1
        return read(*given)

    monkeypatch.setattr(_vit, "read", counted)
    settings = plugins("pretrain.teachers")["dinov3"].Settings(weights=path)
    teacher = build_any(settings)
    assert build_any(settings).dim == 128
    assert reads == [1]
    kept = _vit._looked_at(path, _vit._stamp(path), None, "teacher", "base")
    assert not kept.backbone
    assert not kept.heads
    torch.save(lively(V3.model_copy(update={"width": 256, "heads": 4})).state_dict(), path)
    assert build_any(settings).dim == 256
    assert reads == [2]
    with pytest.raises(ReleasedError, match="no longer the file that it was"):
        teacher.weights(lambda _: None)


def test_a_conversion_of_meddinov3_is_not_taken_for_a_dinov3(tmp_path: Path) -> None:
    """It would see CT as photographs are seen, and nobody would be told."""
    for settings, kind, other in ((MED, "meddinov3", "dinov3"), (V3, "dinov3", "meddinov3")):
        torch.save(lively(settings).state_dict(), tmp_path / "weights")
        assert filled(kind, tmp_path / "weights").said.startswith(kind)
        with pytest.raises(ReleasedError, match=f"kind {other}: it is of DINOv3; kind: {kind} takes it"):
            filled(other, tmp_path / "weights")


def test_ranges_that_are_none_are_refused() -> None:
    mae = plugins("pretrain.teachers")["mae"].Settings
    with pytest.raises(ValidationError, match=r"hu needs low < high, got \[240, -160\]"):
        mae(weights="x", hu=(240, -160))
    with pytest.raises(ValueError, match="3 ranges of HU are given for images of 1 channel"):
        natural_window(((0.0, 1.0),) * 3, (0.5,), (0.5,))
    assert natural_window((-100.0, 100.0), (0.5,), (0.25,)) == HuWindow(low=-100, high=100, mean=0, std=50)
    for wrong in ({"mask": 1.0}, {"mask": -0.1}, {"size": 0}, {"floor": 1.0}):
        with pytest.raises(ValidationError, match=next(iter(wrong))):
            mae(weights="x", **wrong)


def test_a_run_and_its_student_are_teachers_too(tmp_path: Path) -> None:
    networks = Networks()
    folder = run_folder(tmp_path, networks)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    for which in ("teacher", "student"):
        for path in (folder, folder / "checkpoints" / "step_00000007"):
            teacher = filled("axial", path, which=which)
            assert teacher.window == WINDOW
            with torch.no_grad():
                want = getattr(networks, which)["backbone"](x)
                assert torch.equal(tokens(teacher.network(x)), tokens(want))
    with pytest.raises(ReleasedError, match="a step can only be chosen in a run folder"):
        made("dinov3", tmp_path, step=3)
