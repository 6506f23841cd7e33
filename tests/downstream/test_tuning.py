"""Ways to tune a backbone: they start as the unchanged function, train what they say, and end in a plain model file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from downstream import tuning
from downstream.decoders import linear
from downstream.model import Header, SegmentationModel, load_model, save_model
from downstream.tuning import adapter, frozen, full, lora
from launch.settings import Settings, SettingsError, load, plugins
from pretrain.models.lean import Side
from pretrain.models.vit import VitSettings
from pretrain.parallel import recompute_blocks
from tests.downstream.small_models import TUNINGS, VIT, header, images, made, trained

KINDS = sorted(TUNINGS)
VITS = {
    "plain": VIT,
    "gated": VIT.model_copy(update={"ffn": "swiglu"}),
    "bare": VIT.model_copy(update={"qkv_bias": False, "layerscale": None, "registers": 0, "in_channels": 1}),
}
MORE: dict[str, Settings] = TUNINGS | {
    "adapter after": adapter.Settings(width=5, place="after", scale=0.7),
    "adapter of two": adapter.Settings(width=5, last=2, also=("norms",)),
    "lora of two": lora.Settings(rank=2, alpha=8, last=2, also=("norms", "biases")),
    "lora of qkv": lora.Settings(rank=2, targets=("qkv",)),
    "bitfit": frozen.Settings(also=("biases",)),
    "full of two": full.Settings(last=2, layer_decay=0.5),
}


def names(model: SegmentationModel) -> set[str]:
    return {name for name, parameter in model.backbone.named_parameters() if parameter.requires_grad}


def test_the_kinds_are_found() -> None:
    assert set(plugins("downstream.tuning")) == {"adapter", "frozen", "full", "lora"}


@pytest.mark.parametrize("kind", MORE)
def test_a_part_of_a_backbone_learns_without_skipped_blocks(kind: str) -> None:
    model = made(header(vit=VIT.model_copy(update={"drop_path": 0.3})), MORE[kind])
    assert {block.drop_path for block in model.backbone.blocks} == {0.3 if kind.startswith("full") else 0.0}


@pytest.mark.parametrize("vit", VITS)
@pytest.mark.parametrize("kind", MORE)
def test_a_freshly_tuned_model_is_the_model(kind: str, vit: str) -> None:
    said = header(vit=VITS[vit])
    plain, tuned = made(said).eval(), made(said, MORE[kind]).eval()
    with torch.no_grad():
        assert torch.equal(tuned(images(said)), plain(images(said)))
    state = tuned.state_dict()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(state[name], tensor), f"{name} is called so without tuning too"
    trained(tuned, said)
    with torch.no_grad():
        assert not torch.equal(tuned(images(said)), plain(images(said)))


@pytest.mark.parametrize("vit", VITS)
@pytest.mark.parametrize("kind", MORE)
def test_what_was_trained_is_what_the_file_holds(tmp_path: Path, kind: str, vit: str) -> None:
    """Also after a second way through the file, byte for byte."""
    chosen = MORE[kind]
    said = header(vit=VITS[vit], adapters=tuning.kept(chosen))
    model = trained(made(said, chosen), said)
    save_model(tmp_path / "model.safetensors", model, said)
    loaded, read = load_model(tmp_path / "model.safetensors")
    assert read == said
    assert not any(isinstance(module, Side) for module in loaded.modules())
    with torch.no_grad():
        want, found = model(images(said)), loaded(images(said))
    if isinstance(chosen, lora.Settings):  # one product rounded once in place of two
        assert (found - want).abs().max() <= 2e-6 * want.abs().max()
    else:
        assert torch.equal(found, want)
    save_model(tmp_path / "again.safetensors", loaded, read)
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_is_trained_moves_and_all_of_it_does(kind: str) -> None:
    said = header()
    model = made(said, TUNINGS[kind])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    wanted = {f"backbone.{name}" for name in names(model)}
    wanted |= {name for name in before if not name.startswith("backbone.")}
    unused = {"backbone.mask_token"}  # nothing is masked here
    trained(model, said, lr=0.5)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == wanted - unused


def test_what_each_way_trains() -> None:
    def of(settings: Settings) -> set[str]:
        return names(made(header(), settings))

    everything = names(made(header()))
    assert of(full.Settings()) == everything
    assert of(frozen.Settings()) == set()
    assert of(frozen.Settings(also=("biases",))) == {
        name for name in everything if name.endswith("bias") and not name.startswith("patch_embed")
    }
    assert of(frozen.Settings(also=("norms",))) == {name for name in everything if "norm" in name}
    last = of(full.Settings(last=1))
    assert last == {name for name in everything if name.startswith(("blocks.3.", "norm."))}
    ends = {name.split(".", 2)[2] for name in of(lora.Settings(rank=2))}
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert ends == {f"{layer}.side.{part}" for layer in layers for part in ("up", "down")}
    assert {name.split(".")[1] for name in of(lora.Settings(rank=2, last=2))} == {"2", "3"}
    gated = names(made(header(vit=VITS["gated"]), lora.Settings(rank=2, targets=("fc1", "fc2"))))
    assert {name.split(".")[3] for name in gated} == {"w1", "w2", "w3"}
    ends = {name.split(".", 2)[2] for name in of(adapter.Settings(width=2))}
    assert ends == {f"adapter.{layer}.{kind}" for layer in ("down", "up") for kind in ("weight", "bias")}


def test_rates_fall_from_block_to_block() -> None:
    model = made(header(), full.Settings(layer_decay=0.5))
    rates = {
        id(p): share
        for parameters, share in tuning.groups(full.Settings(layer_decay=0.5), model.backbone)
        for p in parameters
    }
    found = {name: rates[id(p)] for name, p in model.backbone.named_parameters()}
    assert found["norm.weight"] == 1
    for i in range(4):
        assert {found[name] for name in found if name.startswith(f"blocks.{i}.")} == {0.5 ** (4 - i)}
    assert found["patch_embed.proj.weight"] == found["cls_token"] == 0.5**5


@pytest.mark.parametrize("kind", MORE)
def test_groups_hold_each_trained_parameter_once(kind: str) -> None:
    chosen = MORE[kind]
    model = made(header(), chosen)
    found = [id(p) for parameters, _ in tuning.groups(chosen, model.backbone) for p in parameters]
    assert len(found) == len(set(found))
    assert set(found) == {id(p) for p in model.backbone.parameters() if p.requires_grad}
    assert {id(p) for p in model.added} == {
        id(p) for name, p in model.named_parameters() if not name.startswith("backbone.")
    }
    shares = [share for _, share in tuning.groups(chosen, model.backbone)]
    assert shares == {"lora of two": [10.0, 1.0], "adapter of two": [10.0, 1.0], "bitfit": [1.0], "lora": [10.0]}.get(
        kind, shares
    )


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dropped", [0.0, 0.3])
def test_the_lean_branch_has_the_gradients_of_the_plain_one(autocast: bool, dropped: float) -> None:
    """The same model through the modules themselves, as a compiler sees it."""
    said = header(decoder=linear.Settings())
    chosen = lora.Settings(rank=3, alpha=6, dropout=dropped, also=("norms", "biases"))

    def gradients(steps: bool) -> dict[str, Tensor]:
        model = made(said, chosen).train()
        for module in model.modules():
            if isinstance(module, Side):
                nn.init.normal_(module.up, std=0.3, generator=torch.Generator().manual_seed(1))
        torch.manual_seed(2)
        with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            if steps:
                patch.setattr("torch.compiler.is_compiling", lambda: True)
            logits = model(images(said))
        logits.float().square().mean().backward()
        return {name: p.grad for name, p in model.backbone.named_parameters() if p.grad is not None}

    one, other = gradients(False), gradients(True)
    assert one.keys() == other.keys()
    for name, gradient in one.items():
        limit = 0.05 if autocast else 1e-4
        assert (gradient - other[name]).norm() <= limit * other[name].norm() + 1e-9, name


@contextmanager
def counted(model: nn.Module) -> Iterator[list[int]]:
    """Bytes that are kept for the backward pass, beside parameters."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    found: dict[int, Tensor] = {}
    total = [0]

    def pack(tensor: Tensor) -> Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in own and pointer not in found:
            found[pointer] = tensor
            total[0] += tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield total


def kept_bytes(vit: VitSettings, chosen: Settings) -> int:
    said = header(vit=vit, decoder=linear.Settings())
    model = made(said, chosen).train()
    with counted(model) as total:
        model(images(said, 2, (64, 64)))
    return total[0]


def test_nothing_is_kept_below_the_lowest_trained_weight() -> None:
    """A frozen backbone keeps nothing; with the last block trained, depth does not matter."""
    deep = VIT.model_copy(update={"depth": 6})
    for chosen in (
        frozen.Settings(),
        lora.Settings(rank=2, last=1),
        adapter.Settings(width=4, last=1),
        full.Settings(last=1),
    ):
        assert kept_bytes(deep, chosen) == kept_bytes(VIT, chosen), chosen
    nothing = kept_bytes(VIT, frozen.Settings())
    assert nothing < kept_bytes(VIT, lora.Settings(rank=2, last=1)) < kept_bytes(VIT, lora.Settings(rank=2))
    assert kept_bytes(deep, full.Settings()) > kept_bytes(VIT, full.Settings())


def test_a_thin_branch_keeps_less_than_full_tuning() -> None:
    """Inputs of frozen layers that nothing else needs are let go; a branch keeps its rank a token."""
    wide = VIT.model_copy(update={"width": 96})
    thin, every = kept_bytes(wide, lora.Settings(rank=2)), kept_bytes(wide, full.Settings())
    assert thin < 1.01 * every
    attention_only = kept_bytes(wide, lora.Settings(rank=2, targets=("qkv",)))
    assert attention_only < thin
    assert kept_bytes(wide, adapter.Settings(width=8)) < every


def test_a_frozen_weight_gets_no_gradient_and_none_is_computed() -> None:
    said = header()
    model = made(said, TUNINGS["lora"]).train()
    shapes: list[tuple[int, ...]] = []

    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.mm.default:
                shapes.append(tuple(out.shape))
            return out

    loss = model(images(said)).square().mean()
    with Seen():
        loss.backward()
    weights = {
        tuple(p.shape)
        for name, p in model.backbone.named_parameters()
        if name.endswith(("qkv.weight", "fc1.weight", "fc2.weight"))
    }
    assert shapes
    assert not weights & set(shapes)
    assert all(p.grad is None for name, p in model.backbone.named_parameters() if ".side." not in name)


@pytest.mark.parametrize("what", ["blocks", "matmuls", "compile"])
@pytest.mark.parametrize("kind", ["lora", "adapter"])
def test_recomputed_and_compiled_blocks_train_the_same(kind: str, what: str) -> None:
    said = header(decoder=linear.Settings(), vit=VIT.model_copy(update={"depth": 2}))
    plain, other = made(said, TUNINGS[kind]), made(said, TUNINGS[kind])
    if what == "compile":
        pytest.importorskip("torch._inductor")
        other.backbone.blocks[0].forward = torch.compile(other.backbone.blocks[0].forward, backend="eager")
    else:
        recompute_blocks(other.backbone, what)  # type: ignore[arg-type]
    trained(plain, said)
    trained(other, said)
    with torch.no_grad():
        torch.testing.assert_close(other(images(said)), plain(images(said)), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (lora.Settings(rank=24), r"tuning\.rank 24 must be below 24, the smaller side of attn\.qkv"),
        (lora.Settings(rank=2, last=9), r"tuning\.last is 9, and the backbone has 4 blocks; give 4 at most"),
        (full.Settings(last=5), r"tuning\.last is 5"),
        (adapter.Settings(width=24), r"tuning\.width 24 must be below the backbone's 24"),
    ],
)
def test_what_a_backbone_is_too_small_for_is_named(settings: Settings, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        made(header(), settings)


def test_a_backbone_is_tuned_once() -> None:
    for kind in ("lora", "adapter"):
        model = made(header(), TUNINGS[kind])
        with pytest.raises(ValueError, match=r"tuned by .* already"):
            tuning.install(full.Settings(), model)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["adapters.kind=lorra"], r"no such kind 'lorra'; did you mean 'lora'"),
        (["adapters={kind: lora, rank: 0}"], r"adapters\.rank"),
        (["adapters={kind: lora, targets: [fc3]}"], r"adapters\.targets"),
        (["adapters={kind: lora, alpha: 1, ranks: 4}"], "did you mean 'rank'"),
    ],
)
def test_mistakes_in_settings_are_named(words: list[str], says: str) -> None:
    base = header().model_dump(mode="json", exclude={"adapters"})
    given = [
        f"{key}={value!r}".replace("None", "null").replace("True", "true").replace("False", "false")
        for key, value in base.items()
    ]
    with pytest.raises(SettingsError, match=says):
        load(Header, overrides=[*given, *words])


def test_the_table_counts_every_parameter_once() -> None:
    said = header()
    for chosen in TUNINGS.values():
        model = made(said, chosen)
        rows = [line.rsplit(maxsplit=2) for line in tuning.parameter_table(model).splitlines()[1:]]
        parts = {name.strip(): (int(a.replace(",", "")), int(b.replace(",", ""))) for name, a, b in rows}
        total = parts.pop("all")
        assert total == (
            sum(p.numel() for p in model.parameters() if p.requires_grad),
            sum(p.numel() for p in model.parameters()),
        )
        assert total == tuple(sum(column) for column in zip(*parts.values(), strict=True))
