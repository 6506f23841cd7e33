"""Channels, neighbours and the one file: what the network sees, and what of a damaged file is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from downstream import tuning
from downstream.channels import Channel
from downstream.context import Context
from downstream.decoders import linear, pyramid, upernet
from downstream.model import Header, ModelError, SegmentationModel, build, load_model, save_model
from launch.distributed import world
from pretrain.parallel import ParallelSettings, shard
from pretrain.weights import write_weights
from tests.downstream.small_models import CT, MR, TUNINGS, VIT, WIDE, backbone, header, images, made, saved, trained
from tests.gloo import run_ranks

Change = dict[str, Any]


def logits(model: SegmentationModel, image: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(image)
    return found


@pytest.mark.parametrize("kept", [1, 3])
def test_one_channel_is_repeated_and_three_are_as_they_are(kept: int) -> None:
    said = header(channels=(CT,) * kept)
    model = made(said)
    assert model.stem is None
    image = images(said)
    seen: list[Tensor] = []
    model.backbone.patch_embed.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    logits(model, image)
    assert torch.equal(seen[0], image.expand(-1, 3, -1, -1))


@pytest.mark.parametrize(
    ("channels", "rows"), [((CT, MR), [0, 1, 0]), ((WIDE, CT, MR), [0, 1, 2]), ((CT,) * 5, [0, 1, 2])]
)
def test_other_numbers_of_channels_go_through_a_stem_that_starts_as_a_choice(
    channels: tuple[Channel, ...], rows: list[int]
) -> None:
    said = header(channels=channels)
    model = made(said)
    image = images(said)
    assert model.stem is not None
    assert torch.equal(model.stem(image), image[:, rows])


def test_a_backbone_of_one_channel_starts_with_their_mean() -> None:
    said = header(vit=VIT.model_copy(update={"in_channels": 1}), channels=(CT, MR))
    model = made(said)
    image = images(said)
    assert model.stem is not None
    torch.testing.assert_close(model.stem(image), image.mean(1, keepdim=True))


def test_a_stem_is_trained_through_a_frozen_backbone() -> None:
    said = header(channels=(CT, MR))
    model = made(said, TUNINGS["frozen"])
    assert model.stem is not None
    before = model.stem.weight.detach().clone()
    trained(model, said)
    assert not torch.equal(model.stem.weight, before)


def test_an_image_of_another_number_of_channels_is_our_mistake() -> None:
    with pytest.raises(AssertionError, match="2 channels"):
        made(header(channels=(CT, MR)))(torch.zeros(1, 3, 16, 16))


@pytest.mark.parametrize("slices", [1, 2])
@pytest.mark.parametrize(
    "decoder", [linear.Settings(), pyramid.Settings(), upernet.Settings(channels=8)], ids=lambda d: d.kind
)
def test_a_slice_in_its_context_starts_as_the_slice_alone(slices: int, decoder: Any) -> None:
    alone, context = header(decoder=decoder), header(decoder=decoder, context=Context(slices=slices))
    image = images(context)
    one, several = made(alone), made(context)
    several.decoder.load_state_dict(one.decoder.state_dict())  # the seed was used for the fusion before
    torch.testing.assert_close(logits(several, image), logits(one, image[:, slices]), rtol=1e-5, atol=1e-6)


def test_neighbours_are_seen_once_it_has_learnt_and_each_slice_is_encoded_by_itself() -> None:
    said = header(context=Context(slices=1))
    model = trained(made(said), said)
    image = images(said)
    want = logits(model, image)
    for neighbour in (0, 2):
        changed = image.clone()
        changed[:, neighbour] += 1
        assert not torch.allclose(logits(model, changed), want)
    with torch.no_grad():
        stack = torch.cat([image[0], image[1, 2:]])  # slices a, b, c, d, each encoded once
        maps = [each[torch.tensor([[0, 1, 2], [1, 2, 3]])] for each in model.encode(stack)]
        found = model.decode(maps, (image.shape[-2], image.shape[-1]))
        image[1, :2] = image[0, 1:]
    torch.testing.assert_close(found, logits(model, image), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"context": Context(slices=2, mm=3.0)},
        {"channels": (CT, MR)},
        {"channels": (WIDE, CT), "context": Context(slices=1), "adapters": TUNINGS["adapter"]},
        {"organs": {"background": (0,), "kidney": (1, 2), "tumour": (2,)}, "values": (0, 1, 2), "order": (1, 2)},
        {"ignore": 9, "spacing": None, "step": 7},
        {"decoder": upernet.Settings(channels=8, pools=(1, 2))},
    ],
    ids=lambda change: ", ".join(change) or "plain",
)  # fmt: skip
def test_one_file_holds_all_that_was_trained(tmp_path: Path, change: Change) -> None:
    said = header(**change)
    model = trained(made(said, said.adapters), said)
    save_model(tmp_path / "model.safetensors", model, said)
    loaded, read = load_model(tmp_path / "model.safetensors")
    assert read == said
    assert not loaded.training
    assert torch.equal(logits(loaded, images(said)), logits(model, images(said)))
    assert not [path for path in tmp_path.iterdir() if path.name != "model.safetensors"]


def test_a_header_of_another_network_is_never_written(tmp_path: Path) -> None:
    said = header()
    for wrong in (header(context=Context(slices=1)), header(channels=(CT, MR)), header(adapters=TUNINGS["adapter"])):
        with pytest.raises(AssertionError, match="another network"):
            save_model(tmp_path / "model.safetensors", made(said), wrong)
    assert not list(tmp_path.iterdir())


def rewritten(path: Path, change: Any) -> Path:
    """A model file with another header, or other weights."""
    with safe_open(path, "pt") as file:
        facts, weights = dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    said = json.loads(facts["header"])
    change(facts, said, weights)
    facts["header"] = json.dumps(said) if facts.get("header") != "broken" else "{"
    write_weights(path, weights, facts)
    return path


DAMAGE: dict[str, tuple[Any, str]] = {
    "another format": (lambda f, s, w: f.update(format="pt"), "no segmentation model"),
    "a backbone": (lambda f, s, w: f.update(format="pt", axial="{}"), "a backbone without a decoder"),
    "an old format": (lambda f, s, w: f.update(format="axial segmentation 1"), "no segmentation model"),
    "a header that is cut": (lambda f, s, w: f.update(header="broken"), "does not fit this version"),
    "an unknown decoder": (lambda f, s, w: s["decoder"].update(kind="unet"), "no such kind 'unet'"),
    "an unknown tuning": (lambda f, s, w: s.update(adapters={"kind": "prefix"}), "no such kind 'prefix'"),
    "blocks that are not there": (lambda f, s, w: s["decoder"].update(blocks=[1, 90]), "describes no network"),
    "an adapter too wide": (lambda f, s, w: s.update(adapters={"kind": "adapter"}), "describes no network"),
    "no adapter": (lambda f, s, w: s.update(adapters={"kind": "adapter", "width": 5}), "do not agree on"),
    "a layer less": (lambda f, s, w: w.pop("decoder.project.bias"), r"do not agree on \['decoder\.project\.bias'\]"),
    "a layer more": (lambda f, s, w: w.update(x=torch.zeros(1)), r"do not agree on \['x'\]"),
    "another shape": (lambda f, s, w: w.update({"backbone.cls_token": torch.zeros(1, 1, 9)}), "backbone.cls_token"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_what_is_wrong_with_a_file_is_told(tmp_path: Path, name: str) -> None:
    change, says = DAMAGE[name]
    path = rewritten(saved(tmp_path / "model.safetensors"), change)
    with pytest.raises(ModelError, match=says) as told:
        load_model(path)
    assert str(path) in str(told.value)


def test_a_cut_file_a_folder_and_no_file_are_told(tmp_path: Path) -> None:
    path = saved(tmp_path / "model.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        load_model(path)
    for nothing in (tmp_path, tmp_path / "none.safetensors"):
        with pytest.raises(ModelError, match="no such file"):
            load_model(nothing)


def test_a_decoder_that_reads_blocks_that_are_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="from 0 to 3"):
        build(backbone(), pyramid.Settings(blocks=(0, 4)), 3)


def test_two_ranks_train_what_one_does_and_write_one_whole_file(tmp_path: Path) -> None:
    one, other = run_ranks(f"{__file__}:two_ranks", 2, tmp_path, folder=tmp_path)
    for kind in TUNINGS:
        assert torch.equal(one[kind], other[kind])
        said = header(context=Context(slices=1), adapters=tuning.kept(TUNINGS[kind]))
        alone = trained(made(said, TUNINGS[kind]), said)
        torch.testing.assert_close(one[kind], logits(alone, images(said)), rtol=1e-3, atol=1e-4)
        loaded, _ = load_model(tmp_path / f"{kind}.safetensors")
        torch.testing.assert_close(logits(loaded, images(said)), one[kind], rtol=1e-5, atol=1e-5)


def two_ranks(rank: int, size: int, folder: Path) -> dict[str, Tensor]:
    """Each sees the same images, so their mean gradient is that of one."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    found = {}
    with world("cpu") as here:
        for kind, chosen in TUNINGS.items():
            said = header(context=Context(slices=1), adapters=tuning.kept(chosen))
            model = made(said, chosen)
            shard(nn.ModuleDict({"model": model}), here, ParallelSettings())
            for name in ("encode", "decode"):  # which are called by themselves when a stack is gone through
                register_fsdp_forward_method(model, name)
            trained(model, said)
            image = images(said)
            with torch.no_grad():
                maps = [torch.unflatten(each, 0, image.shape[:2]) for each in model.encode(image.flatten(0, 1))]
                found[kind] = model.decode(maps, (image.shape[-2], image.shape[-1])).clone()
                assert torch.equal(found[kind], model(image))
            save_model(folder / f"{kind}.safetensors", model, said, write=rank == 0)
    return found


def test_the_parameters_beside_the_backbone_are_all_found() -> None:
    said = header(context=Context(slices=1), channels=(CT, MR))
    model = made(said, TUNINGS["adapter"])
    table = tuning.parameter_table(model)
    assert all(name in table for name in ("stem", "fusion", "decoder", "added to blocks"))
    assert {id(p) for p in model.added} | {id(p) for p in model.backbone.parameters()} == {
        id(p) for p in model.parameters()
    }
    assert isinstance(Header.model_validate_json(said.model_dump_json()).decoder, pyramid.Settings)
