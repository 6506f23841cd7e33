"""Exports, and every kind of file that weights may come from: the same function, or a refusal that helps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from launch.distributed import World
from launch.settings import SettingsError, load
from pretrain.checkpoint import Checkpoints, CheckpointSettings
from pretrain.data.window import HuWindow
from pretrain.export import Settings, main
from pretrain.models.heads import DinoHead
from pretrain.models.vit import VisionTransformer, VitSettings, build
from pretrain.released import ReleasedError, fit, load_backbone, read

HERE = World(0, 1, 0, torch.device("cpu"))
VIT = VitSettings(size="custom", width=128, depth=2, heads=2, in_channels=3)
WINDOW = HuWindow(low=-200, high=300, mean=50, std=100)


def lively(settings: VitSettings, seed: int = 0) -> VisionTransformer:
    """A model in which no parameter is zero, so that one that went missing would show."""
    model = build(settings).eval()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.2)
    return model


class Networks:
    def __init__(self, settings: VitSettings = VIT) -> None:
        self.student = nn.ModuleDict(
            {"backbone": lively(settings, 1), "dino_head": DinoHead(settings.shape[0], 16, 8, 12)}
        )
        self.teacher = nn.ModuleDict(
            {"backbone": lively(settings, 2), "dino_head": DinoHead(settings.shape[0], 16, 8, 12)}
        )

    def state(self) -> dict[str, Any]:
        return {"student": self.student.state_dict(), "teacher": self.teacher.state_dict()}


def run_folder(tmp_path: Path, networks: Networks, step: int = 7, settings: VitSettings = VIT) -> Path:
    optimizer = torch.optim.AdamW(networks.student.parameters())
    about = {"model": settings.model_dump(mode="json"), "window": WINDOW.model_dump(mode="json"), "corpus": "c0ffee"}
    Checkpoints(tmp_path, networks, optimizer, HERE, CheckpointSettings(), about=about).save(step)
    return tmp_path


def outputs(model: VisionTransformer, channels: int | None = None) -> Tensor:
    grey = torch.randn(2, 1, 32, 48, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        features = model(grey.repeat(1, channels or model.in_channels, 1, 1))
    return torch.cat([features.cls[:, None], features.registers, features.patches], dim=1)


def test_an_export_is_read_back_as_the_same_model(tmp_path: Path) -> None:
    networks = Networks()
    folder = run_folder(tmp_path, networks)
    outcome = main(Settings(folder=folder))
    (path,) = outcome.made
    model, window = load_backbone(Path(path))
    assert torch.equal(outputs(model), outputs(networks.teacher["backbone"]))  # type: ignore[arg-type]
    assert window == WINDOW
    assert model.settings == VIT
    assert not model.training
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["axial"])
        assert set(file.keys()) == set(networks.teacher["backbone"].state_dict())
    assert (header["step"], header["corpus"], header["which"]) == (7, "c0ffee", "teacher")
    assert not [path for path in folder.glob(".*") if path.is_file()]


def test_the_student_and_the_heads_can_be_had(tmp_path: Path) -> None:
    networks = Networks()
    main(
        Settings(folder=run_folder(tmp_path, networks), which="student", heads=True, output=tmp_path / "x.safetensors")
    )
    found = read(tmp_path / "x.safetensors")
    assert torch.equal(found.backbone["cls_token"], networks.student["backbone"].cls_token)  # type: ignore[arg-type]
    assert torch.equal(found.heads["dino_head"]["last_layer.weight"], networks.student["dino_head"].last_layer.weight)  # type: ignore[union-attr,arg-type]  # fmt: skip


def test_a_run_and_a_checkpoint_folder_are_read_without_an_export(tmp_path: Path) -> None:
    networks = Networks()
    folder = run_folder(tmp_path, networks)
    want = outputs(networks.teacher["backbone"])  # type: ignore[arg-type]
    for path in (folder, folder / "checkpoints" / "step_00000007"):
        assert torch.equal(outputs(load_backbone(path)[0]), want)
    assert torch.equal(outputs(load_backbone(folder, which="student")[0]), outputs(networks.student["backbone"]))  # type: ignore[arg-type]


def hub(model: VisionTransformer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("form", ["pth", "safetensors", "teacher", "wrapped"])
def test_published_forms_give_the_same_function(tmp_path: Path, form: str) -> None:
    model = lively(VIT)
    state = hub(model)
    path = tmp_path / f"published.{'safetensors' if form == 'safetensors' else 'pth'}"
    if form == "safetensors":
        save_file(state, path)
    elif form == "pth":
        torch.save(state, path)
    elif form == "teacher":
        heads = {"dino_head.last_layer.weight": torch.ones(3, 2)}
        torch.save({"teacher": {**{f"backbone.{k}": v for k, v in state.items()}, **heads}, "iteration": 1}, path)
    else:
        torch.save({"teacher": {f"module.backbone._checkpoint_wrapped_module.{k}": v for k, v in state.items()}}, path)
    said: list[str] = []
    loaded, window = load_backbone(path, say=said.append)
    assert torch.equal(outputs(loaded), outputs(model))
    assert window == HuWindow()
    (report,) = said
    assert "38 of the model's 38 tensors come from the file" in report
    assert "178.0 one, assumed: the file does not say" in report
    assert "renamed none" in report
    assert ("prefix 'module.backbone._checkpoint_wrapped_module.'" in report) == (form == "wrapped")
    assert ("heads   dino_head" in report) == (form == "teacher")


def test_biases_hidden_by_a_mask_of_zeros_stay_without_effect_but_can_train(tmp_path: Path) -> None:
    model = lively(VIT)
    state = hub(model)
    for name in state:
        if name.endswith("bias_mask"):
            state[name] = torch.zeros_like(state[name])
    model.load_state_dict(state)
    torch.save(state, tmp_path / "hub.pth")
    said: list[str] = []
    loaded, _ = load_backbone(tmp_path / "hub.pth", say=said.append)
    assert torch.equal(outputs(loaded), outputs(model))
    mask = loaded.state_dict()["blocks.0.attn.qkv.bias_mask"].chunk(3)
    assert [part.unique().tolist() for part in mask] == [[1.0], [0.0], [1.0]]
    assert "warning: 2 of 2 bias masks" in said[0]


def test_meddinov3_has_no_bias_and_its_own_epsilon(tmp_path: Path) -> None:
    settings = VIT.model_copy(update={"qkv_bias": False, "norm_eps": 1e-6})
    model = lively(settings)
    torch.save({"teacher": {f"backbone.{k}": v for k, v in hub(model).items()}}, tmp_path / "model.pth")
    loaded, _ = load_backbone(tmp_path / "model.pth")
    assert loaded.settings.norm_eps == 1e-6
    assert torch.equal(outputs(loaded), outputs(model))
    # A model that has biases computes the same with biases of zero.
    state = fit(read(tmp_path / "model.pth"), VIT.model_copy(update={"norm_eps": 1e-6}))
    biased = build(VIT.model_copy(update={"norm_eps": 1e-6})).eval()
    biased.load_state_dict(state)
    assert torch.equal(outputs(biased), outputs(model))


def test_a_stem_of_three_channels_becomes_one_by_a_sum(tmp_path: Path) -> None:
    model = lively(VIT)
    torch.save(hub(model), tmp_path / "hub.pth")
    one, _ = load_backbone(tmp_path / "hub.pth", in_channels=1)
    assert one.in_channels == 1
    torch.testing.assert_close(outputs(one), outputs(model), atol=1e-5, rtol=1e-5)
    save_file(hub(one), tmp_path / "one.safetensors")
    three, _ = load_backbone(tmp_path / "one.safetensors", in_channels=3)
    torch.testing.assert_close(outputs(three), outputs(model), atol=1e-5, rtol=1e-5)


def test_positions_stored_in_bfloat16_are_computed_anew(tmp_path: Path) -> None:
    model = lively(VIT)
    state = hub(model) | {"rope_embed.periods": model.rope_embed.periods.bfloat16()}
    torch.save(state, tmp_path / "hub.pth")
    loaded, _ = load_backbone(tmp_path / "hub.pth")
    assert torch.equal(loaded.rope_embed.periods, model.rope_embed.periods)


@pytest.mark.parametrize(
    "change",
    [
        {"ffn": "swiglu64", "ffn_ratio": 3.0},
        {"registers": 0},
        {"layerscale": None},
        {"patch_size": 8},
        {"untie_cls_and_patch_norms": True, "untie_global_and_local_cls_norm": True},
        {"mask_k_bias": False},
    ],
    ids=str,
)
def test_the_shape_of_a_model_is_read_off_its_tensors(tmp_path: Path, change: Mapping[str, Any]) -> None:
    model = lively(VitSettings.model_validate(VIT.model_dump() | dict(change)))
    torch.save(hub(model), tmp_path / "hub.pth")
    loaded, _ = load_backbone(tmp_path / "hub.pth")
    assert torch.equal(outputs(loaded), outputs(model))


def test_the_published_reference_model_is_read(reference: Path, tmp_path: Path) -> None:
    arrays = np.load(reference / "vit_A_released_state.npz")
    torch.save({name: torch.from_numpy(arrays[name]) for name in arrays.files}, tmp_path / "hub.pth")
    model, _ = load_backbone(tmp_path / "hub.pth")
    image = torch.from_numpy(np.load(reference / "vit_inputs.npz")["x96x160"])
    want = np.load(reference / "vit_A_released_out_fp32.npz")["eval_96x160.x_norm_patchtokens"]
    with torch.no_grad():
        got = model(image).patches.numpy()
    assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()


def write(path: Path, content: Any) -> Path:
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    return path


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer.*git lfs pull"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"", "no file of weights"),
        (b"PK\x03\x04half a zip", "no file of weights"),
        (b"weights: a table of numbers\n", "no file of weights, or not whole; fetch it again"),
        ({"network_weights": {"a": torch.ones(1)}, "trainer_name": "x"}, "nnU-Net"),
        ({"embeddings.cls_token": torch.ones(1, 1, 4)}, "no vision transformer known here"),
        ({"weight": torch.ones(2)}, r"no vision transformer known here.*first keys are weight"),
        (
            dict.fromkeys(
                ("cls_token", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "rope_embed.periods"),
                torch.ones(1, 3, 4, 4),
            ),
            "no whole vision transformer",
        ),
        ([1, 2], "holds a list"),
        ({"teacher": HuWindow()}, "would run code"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_files_are_named_with_a_remedy(tmp_path: Path, content: Any, says: str) -> None:
    path = write(tmp_path / "wrong.pth", content)
    with pytest.raises(ReleasedError, match=says) as error:
        load_backbone(path)
    assert str(path) in str(error.value)


def test_what_lacks_the_network_or_its_settings_is_named(tmp_path: Path) -> None:
    networks = Networks()
    optimizer = torch.optim.AdamW(networks.student.parameters())
    for name, about in (("bare", {}), ("windowless", {"model": VIT.model_dump(mode="json")})):
        Checkpoints(tmp_path / name, networks, optimizer, HERE, CheckpointSettings(), about=about).save(1)
    with pytest.raises(ReleasedError, match=r"step_00000001 .* does not state its model and window"):
        read(tmp_path / "bare")
    with pytest.raises(ReleasedError, match="does not state its window"):
        read(tmp_path / "windowless")
    save_file(hub(lively(VIT)), tmp_path / "old.safetensors", {"axial": json.dumps({"axial": "0.0"})})
    with pytest.raises(ReleasedError, match=r"old\.safetensors .* does not state its model and window"):
        load_backbone(tmp_path / "old.safetensors")
    folder = run_folder(tmp_path / "run", networks)
    with pytest.raises(ReleasedError, match=r"step_00000007 holds no gram_teacher"):
        read(folder, which="gram_teacher")
    networks.state = lambda: {"other": networks.student.state_dict()}  # type: ignore[method-assign]
    with pytest.raises(ReleasedError, match=r"step_00000008 holds no teacher"):
        read(run_folder(tmp_path / "run", networks, step=8))


def test_a_run_without_a_teacher_gives_its_student(tmp_path: Path) -> None:
    networks = Networks()
    networks.state = lambda: {"student": networks.student.state_dict()}  # type: ignore[method-assign]
    found = read(run_folder(tmp_path / "run", networks))
    assert found.about["which"] == "student"
    assert torch.equal(found.backbone["cls_token"], networks.student.state_dict()["backbone.cls_token"])


def test_another_epsilon_is_warned_of(tmp_path: Path) -> None:
    torch.save(hub(lively(VIT)), tmp_path / "hub.pth")
    released, said = read(tmp_path / "hub.pth"), list[str]()
    fit(released, VIT, said.append)
    assert "epsilon of the norms 1e-05: the file does not say" in said[0]
    assert "warning" not in said[0]
    fit(released, VIT.model_copy(update={"norm_eps": 1e-6}), said.append)
    assert "warning: model.norm_eps is 1e-06, that of the file 1e-05" in said[1]


def test_an_export_must_have_the_ending_by_which_it_is_read(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"output: must end in \.safetensors.*got '.*x\.pth'"):
        load(Settings, overrides=[f"folder={tmp_path}", f"output={tmp_path / 'x.pth'}"])


def test_a_cut_safetensors_file_is_named(tmp_path: Path) -> None:
    save_file(hub(lively(VIT)), tmp_path / "whole.safetensors")
    cut = write(tmp_path / "cut.safetensors", (tmp_path / "whole.safetensors").read_bytes()[:-1000])
    with pytest.raises(ReleasedError, match=r"cut\.safetensors is not a whole safetensors file"):
        load_backbone(cut)


def test_folders_that_are_no_runs_are_named(tmp_path: Path) -> None:
    with pytest.raises(ReleasedError, match="does not exist"):
        load_backbone(tmp_path / "nowhere")
    with pytest.raises(ReleasedError, match="neither a run folder"):
        load_backbone(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ReleasedError, match="no complete checkpoint"):
        main(Settings(folder=tmp_path))


def test_what_would_be_ignored_is_refused(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", Networks())
    (export,) = main(Settings(folder=folder)).made
    torch.save(hub(lively(VIT)), tmp_path / "hub.pth")
    with pytest.raises(ReleasedError, match=r"heads=true: .* has none"):
        main(Settings(folder=Path(export), heads=True, output=tmp_path / "x.safetensors"))
    for path in (Path(export), tmp_path / "hub.pth"):
        with pytest.raises(ReleasedError, match="has no student; choose it in a run folder"):
            main(Settings(folder=path, which="student", output=tmp_path / "x.safetensors"))
        assert read(path, which="student").backbone, "a run starts its student from any file"
    with pytest.raises(ReleasedError, match="is the checkpoint of step 7, not of 1"):
        read(folder / "checkpoints/step_00000007", step=1)
    assert read(folder / "checkpoints/step_00000007", step=7).about["step"] == 7


def test_a_pth_that_a_killed_process_left_aside_is_swept(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, Networks())
    (folder / ".export.pth.12345.part").write_bytes(b"half")
    main(Settings(folder=folder, format="pth"))
    assert not [path for path in folder.glob(".*") if path.is_file()]


def test_a_torn_set_of_keys_is_refused_key_by_key(tmp_path: Path) -> None:
    state = hub(lively(VIT))
    for change, says in (
        ({"blocks.1.norm2.weight": None}, r"blocks\.1\.norm2\.weight is missing"),
        ({"blocks.1.norm3.weight": torch.ones(3)}, r"blocks\.1\.norm3\.weight has no place"),
        ({"norm.bias": torch.ones(3)}, r"norm\.bias is \(3,\), the model has \(128,\)"),
    ):
        torch.save({k: v for k, v in (state | change).items() if v is not None}, tmp_path / "hub.pth")
        with pytest.raises(ReleasedError, match=says):
            load_backbone(tmp_path / "hub.pth")
