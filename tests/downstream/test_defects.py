"""What the official MedDINOv3 fine-tuning code gets wrong (facts of its review, a to e) cannot happen here."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import tomllib
from collections.abc import Mapping
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from downstream.decoders import linear, pyramid
from downstream.model import build, load_model, save_model
from launch.settings import plugins
from launch.verbs import VERBS
from pretrain.models.rope import RopeSettings
from pretrain.models.vit import VitSettings
from pretrain.models.vit import build as build_vit
from pretrain.released import ReleasedError, load_backbone
from tests.downstream.small_models import TUNINGS, VIT, backbone, header, images, made, saved, trained

REPOSITORY = Path(__file__).resolve().parents[2]
BLOCKS = (2, 5, 8, 11)


# ------------------------------------------------------------- a: prediction builds the network that training built


@pytest.mark.parametrize("kind", plugins("downstream.decoders"))
def test_a_the_file_alone_builds_what_was_trained_for_images_of_any_size(tmp_path: Path, kind: str) -> None:
    said = header(decoder=plugins("downstream.decoders")[kind].Settings())
    model = trained(made(said, TUNINGS["full"]), said)
    save_model(tmp_path / "model.safetensors", model, said)
    loaded, _ = load_model(tmp_path / "model.safetensors")
    assert str(loaded) == str(model)
    for size in ((32, 40), (64, 8), (21, 33)):
        with torch.no_grad():
            assert torch.equal(loaded(images(said, 1, size)), model(images(said, 1, size)))


# --------------------------------------------------------------------------------- b: no path of a machine is kept


def test_b_a_model_file_names_no_path_and_needs_no_other_file(tmp_path: Path) -> None:
    start = tmp_path / "checkpoint" / "teacher.pth"
    start.parent.mkdir()
    torch.save({"teacher": {f"backbone.{n}": t for n, t in backbone().state_dict().items()}}, start)
    loaded, _ = load_backbone(start, say=lambda _: None)
    said = header(vit=loaded.settings)
    model = trained(build(loaded, said.decoder, 3), said)
    path = tmp_path / "model.safetensors"
    save_model(path, model, said)
    start.unlink()
    data = path.read_bytes()
    for place in (str(tmp_path), str(start), str(REPOSITORY), str(Path.home()) + "/"):
        assert place.encode() not in data
    with safe_open(path, "pt") as file:
        assert "/" not in json.dumps(file.metadata())
    again, _ = load_model(path)
    with torch.no_grad():
        assert torch.equal(again(images(said)), model(images(said)))


# ---------------------------------------------------------- c: every tensor and setting of a released file is honoured


def randomly(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Numbers of the size that trained ones have."""
    draw = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in shapes.items():
        spread, centre = (0.02, 0.0) if len(shape) > 1 else (0.1, 1.0 if "norm" in name and "weight" in name else 0.0)
        centre = 0.3 if name.endswith("gamma") else centre
        found[name] = torch.empty(shape).normal_(centre, spread, generator=draw)
    return found


def shapes_of_vit_b(qkv_bias: bool) -> dict[str, tuple[int, ...]]:
    """The keys of the published ViT-B/16, as the facts on MedDINOv3 list them."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, 768),
        "storage_tokens": (1, 4, 768),
        "mask_token": (1, 768),
        "patch_embed.proj.weight": (768, 3, 16, 16),
        "patch_embed.proj.bias": (768,),
    }
    for i in range(12):
        own: dict[str, tuple[int, ...]] = {
            f"{norm}.{kind}": (768,) for norm in ("norm1", "norm2") for kind in ("weight", "bias")
        }
        own |= {"attn.qkv.weight": (2304, 768), "attn.proj.weight": (768, 768), "attn.proj.bias": (768,)}
        own |= {"mlp.fc1.weight": (3072, 768), "mlp.fc1.bias": (3072,), "mlp.fc2.weight": (768, 3072)}
        own |= {"mlp.fc2.bias": (768,), "ls1.gamma": (768,), "ls2.gamma": (768,)}
        own |= {"attn.qkv.bias": (2304,)} if qkv_bias else {}
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in own.items()}
    return shapes | {"norm.weight": (768,), "norm.bias": (768,)}


def in_transformers(state: Mapping[str, Tensor], eps: float) -> nn.Module:
    """DINOv3ViTModel with these numbers, put there by name and by nothing of ours."""
    hf = pytest.importorskip("transformers")
    biased = "blocks.0.attn.qkv.bias" in state
    config = hf.DINOv3ViTConfig(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072, num_register_tokens=4,
        layer_norm_eps=eps, query_bias=biased, key_bias=False, value_bias=biased,
    )  # fmt: skip
    with torch.device("meta"):
        model = hf.DINOv3ViTModel(config)
    own: dict[str, Tensor] = {}
    for name, tensor in state.items():
        new = name.replace("storage_tokens", "register_tokens").replace("patch_embed.proj", "patch_embeddings")
        if re.match(r"(cls|register|mask)_token|patch_emb", new):
            own[f"embeddings.{new}"] = tensor[None] if name == "mask_token" else tensor
        elif name.startswith("norm."):
            own[name] = tensor
        elif "attn.qkv" in name:
            block, kind = name.split(".")[1], name.split(".")[-1]
            for part, third in zip("qkv", tensor.chunk(3), strict=True):
                if kind == "weight" or part != "k":
                    own[f"model.layer.{block}.attention.{part}_proj.{kind}"] = third
        else:
            for old, there in (
                ("blocks.", "model.layer."), ("attn.proj", "attention.o_proj"), ("mlp.fc1", "mlp.up_proj"),
                ("mlp.fc2", "mlp.down_proj"), ("ls1.gamma", "layer_scale1.lambda1"),
                ("ls2.gamma", "layer_scale2.lambda1"),
            ):  # fmt: skip
                new = new.replace(old, there)
            own[new] = tensor
    found = model.load_state_dict(own, strict=False, assign=True)
    assert not found.missing_keys and not found.unexpected_keys, found
    rope = type(model.rope_embeddings)(config)  # its frequencies are no part of a file
    model.rope_embeddings = rope
    return model.eval()  # type: ignore[no-any-return]


def same_maps(path: Path, other: nn.Module, said: list[str]) -> None:
    """What the decoder is given, and what transformers has after those blocks and the final norm."""
    loaded, _ = load_backbone(path, say=said.append)
    model = build(loaded, pyramid.Settings(), 3).eval()
    assert model.blocks == BLOCKS
    image = torch.randn(1, 1, 64, 96, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        maps = model.encode(image)
        states = other(image.expand(-1, 3, -1, -1), output_hidden_states=True).hidden_states
        for block, found in zip(BLOCKS, maps, strict=True):
            want = other.norm(states[block + 1])[:, 5:].mT.unflatten(-1, (4, 6))
            assert found.shape == want.shape
            assert (found - want).abs().max() <= 1e-5 * want.abs().max(), block


def test_c_meddinov3s_published_layout_gives_the_features_of_transformers(tmp_path: Path) -> None:
    """All 164 tensors, and the heads in the file, which are named."""
    state = randomly(shapes_of_vit_b(qkv_bias=False))
    periods = 100 ** (2 * torch.arange(16) / 32)
    heads = randomly({
        "dino_head.mlp.0.weight": (2048, 768), "dino_head.mlp.0.bias": (2048,),
        "dino_head.last_layer.weight": (512, 256),
        "ibot_head.mlp.0.weight": (2048, 768), "ibot_head.last_layer.weight": (512, 256),
    })  # fmt: skip
    teacher = {f"backbone.{name}": tensor for name, tensor in {**state, "rope_embed.periods": periods}.items()} | heads
    assert len(teacher) == 164 + len(heads)
    torch.save({"teacher": teacher, "iteration": 4999}, tmp_path / "model.pth")
    said: list[str] = []
    same_maps(tmp_path / "model.pth", in_transformers(state, eps=1e-6), said)
    assert "used    164 of the model's 164 tensors come from the file" in said[0]
    assert "heads   dino_head, ibot_head" in said[0]
    assert "left aside in the file: iteration" in said[0]
    loaded, _ = load_backbone(tmp_path / "model.pth", say=said.append)
    assert loaded.settings.registers == 4
    assert loaded.settings.norm_eps == 1e-6
    assert loaded.settings.rope.dtype == "fp32"


@pytest.mark.parametrize("form", ["hub", "hugging_face"])
def test_c_the_original_dinov3_keeps_its_registers_biases_and_masks(tmp_path: Path, form: str) -> None:
    """The baselines of the official code lose them: `strict=False` on a network without registers and k mask."""
    state = randomly(shapes_of_vit_b(qkv_bias=True))
    other = in_transformers(state, eps=1e-5)
    path = tmp_path / "folder"
    if form == "hub":
        path = tmp_path / "dinov3_vitb16.pth"
        mask = torch.cat([torch.ones(768), torch.zeros(768), torch.ones(768)])
        masks = {f"blocks.{i}.attn.qkv.bias_mask": mask for i in range(12)}
        torch.save({**state, **masks, "rope_embed.periods": 100 ** (2 * torch.arange(16) / 32)}, path)
    else:
        other.save_pretrained(path)  # type: ignore[operator]
    same_maps(path, other, said := [])
    loaded, _ = load_backbone(path, say=said.append)
    assert (loaded.settings.registers, loaded.settings.mask_k_bias, loaded.settings.norm_eps) == (4, True, 1e-5)
    assert torch.equal(loaded.storage_tokens, state["storage_tokens"])


def test_c_a_file_with_more_or_less_than_the_network_is_refused(tmp_path: Path) -> None:
    state = dict(backbone().state_dict())
    for change, says in (
        ({"blocks.1.norm2.weight": None}, r"blocks\.1\.norm2\.weight is missing"),
        ({"storage_tokens_2": torch.ones(1, 4, 24)}, r"storage_tokens_2 has no place"),
    ):
        found = {f"backbone.{k}": v for k, v in (state | change).items() if v is not None}
        torch.save({"teacher": found}, tmp_path / "model.pth")
        with pytest.raises(ReleasedError, match=says):
            load_backbone(tmp_path / "model.pth", say=lambda _: None)


CHANGES: tuple[dict[str, Any], ...] = (
    {"norm_eps": 1e-6}, {"registers": 2}, {"registers": 0}, {"mask_k_bias": False}, {"qkv_bias": False},
    {"rope": RopeSettings(dtype="bf16")}, {"rope": RopeSettings(dtype="fp64", base=50.0)}, {"layerscale": None},
    {"untie_cls_and_patch_norms": True},
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_c_what_a_backbone_is_stays_in_the_model_file(tmp_path: Path, change: dict[str, Any]) -> None:
    path = saved(tmp_path / "model.safetensors", vit=VIT.model_copy(update=change))
    loaded, said = load_model(path)
    for name, value in change.items():
        assert getattr(loaded.backbone.settings, name) == value
    want = made(said)
    with torch.no_grad():
        assert torch.equal(loaded(images(said)), want.eval()(images(said)))
    for name, tensor in want.state_dict().items():
        assert loaded.state_dict()[name].dtype == tensor.dtype, name


# ------------------------------------------------------------------------------ d: installs from what it declares


_BELONGS = {"pydantic-core": "pydantic", "braceexpand": "webdataset"}  # parts of them that they install


def declared() -> tuple[dict[str, Any], set[str]]:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = [name for group in project.get("optional-dependencies", {}).values() for name in group]
    every = [*project["dependencies"], *extras]
    return project, {re.split(r"[\s<>=!~;\[]", name)[0].lower().replace("_", "-") for name in every}


def test_d_dependencies_are_names_and_versions_from_an_index() -> None:
    project, names = declared()
    extras = [name for group in project["optional-dependencies"].values() for name in group]
    for text in [*project["dependencies"], *extras]:
        assert not re.search(r"git\+|ssh://|https?://|file:| @ |^\.", text), text
    assert project["name"] not in names


def test_d_every_import_is_declared() -> None:
    _, names = declared()
    providers = packages_distributions()
    own = {"launch", "data_curation", "pretrain", "downstream"}
    missing = set()
    for path in (path for package in own for path in (REPOSITORY / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            found = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for module in {name.split(".")[0] for name in found} - own:
                given = {name.lower().replace("_", "-") for name in providers.get(module, [])}
                given |= {_BELONGS[name] for name in given & _BELONGS.keys()}
                if given and not given & names:
                    missing.add(f"{path.relative_to(REPOSITORY)}: {module} of {', '.join(given)}")
    assert not missing


def test_d_no_file_is_there_by_a_slip_of_the_shell() -> None:
    """`pip install x >=0.3` unquoted leaves a file called `=0.3`."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    names = [name for name in listed.stdout.split("\0") if name]
    assert not [name for name in names if not re.fullmatch(r"[\w./-]+", name)]
    assert not [name for name in names if Path(name).suffix in {".pyc", ".ckpt", ".pth", ".log", ".swp", ".orig"}]


# --------------------------------------------------------- e: an example that runs, and a model file that goes round


def test_e_the_example_is_a_verb_and_what_it_trains_is_a_model_file_that_goes_round(tmp_path: Path) -> None:
    """The demo itself runs in test_demo.py."""
    assert VERBS["demo"].main == "downstream.demo:main"
    for chosen in TUNINGS.values():
        said = header(decoder=linear.Settings(), adapters=chosen if chosen.kind == "adapter" else None)  # type: ignore[attr-defined]
        save_model(tmp_path / "a.safetensors", trained(made(said, chosen), said), said)
        save_model(tmp_path / "b.safetensors", *load_model(tmp_path / "a.safetensors"))
        assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_e_a_small_vit_is_as_its_settings_say() -> None:
    """So that the network of a header on the meta device is the one that was trained."""
    vit = VitSettings(size="custom", width=24, depth=2, heads=2)
    with torch.device("meta"):
        empty = build(build_vit(vit), linear.Settings(), 3)
    full = build(build_vit(vit), linear.Settings(), 3)
    assert {n: t.shape for n, t in empty.state_dict().items()} == {n: t.shape for n, t in full.state_dict().items()}
