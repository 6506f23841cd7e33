"""What every decoder must do: logits of the image's size for any grid, and a gradient that reaches the backbone."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from downstream.decoders import ChannelNorm, Taps
from downstream.model import SegmentationModel, build
from launch.settings import plugins
from pretrain.models.vit import VitSettings
from pretrain.models.vit import build as build_vit

DECODERS = plugins("downstream.decoders")


def model(family: ModuleType, classes: int = 5, patch_size: int = 8, in_channels: int = 1) -> SegmentationModel:
    torch.manual_seed(0)
    vit = VitSettings(size="custom", width=24, depth=4, heads=2, patch_size=patch_size, in_channels=in_channels)  # type: ignore[arg-type]
    return build(build_vit(vit), family.Settings(), classes)


def test_the_decoders_are_found() -> None:
    assert set(DECODERS) >= {"linear", "primus", "pyramid", "upernet"}


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("size", [(32, 32), (37, 50), (8, 90), (1, 1)])
@pytest.mark.parametrize("patch_size", [8, 14])
def test_logits_have_the_images_size(kind: str, size: tuple[int, int], patch_size: int) -> None:
    logits = model(DECODERS[kind], patch_size=patch_size)(torch.randn(2, 1, *size))
    assert logits.shape == (2, 5, *size)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("in_channels", [1, 3])
def test_the_gradient_reaches_every_part(kind: str, in_channels: int) -> None:
    made = model(DECODERS[kind], in_channels=in_channels)
    made(torch.randn(2, 1, 32, 32)).square().mean().backward()
    assert all(parameter.grad is not None for parameter in made.decoder.parameters())
    first = made.backbone.patch_embed.proj.weight.grad
    assert first is not None
    assert first.abs().max() > 0


@pytest.mark.parametrize("kind", DECODERS)
def test_a_frozen_backbone_gets_no_gradient(kind: str) -> None:
    made = model(DECODERS[kind])
    made.backbone.requires_grad_(False)
    made(torch.randn(2, 1, 32, 32)).square().mean().backward()
    assert all(parameter.grad is None for parameter in made.backbone.parameters())
    assert all(parameter.grad is not None for parameter in made.decoder.parameters())


@pytest.mark.parametrize("kind", DECODERS)
def test_the_seed_decides_the_weights(kind: str) -> None:
    one, other = model(DECODERS[kind]).decoder, model(DECODERS[kind]).decoder
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("kind", DECODERS)
def test_an_image_alone_and_in_a_batch_is_the_same(kind: str) -> None:
    made = model(DECODERS[kind]).eval()
    images = torch.randn(3, 1, 37, 50)
    with torch.no_grad():
        together, alone = made(images), torch.cat([made(image[None]) for image in images])
    assert torch.allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize("kind", DECODERS)
def test_the_weights_may_be_anywhere(kind: str) -> None:
    """On the meta device for a count, in bf16 under autocast, and without a gradient that is not finite."""
    with torch.device("meta"):
        assert sum(p.numel() for p in model(DECODERS[kind]).parameters()) > 0
    made = model(DECODERS[kind])
    with torch.autocast("cpu", torch.bfloat16):
        logits = made(torch.randn(2, 1, 24, 40))
    assert logits.shape == (2, 5, 24, 40)
    logits.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in made.parameters() if p.grad is not None)


@pytest.mark.parametrize("kind", sorted(DECODERS.keys() - {"upernet"}))  # which sees the map as a whole
def test_a_shift_of_one_patch_shifts_the_logits(kind: str) -> None:
    one = model(DECODERS[kind]).decoder
    taps = DECODERS[kind].Settings().taps
    maps = [torch.randn(1, 24, 6, 6) for _ in range(taps)]
    logits, rolled = one(maps), one([m.roll(1, dims=3) for m in maps])
    assert torch.allclose(logits[..., 8:24], rolled[..., 16:32], atol=1e-5)


def test_the_pyramid_is_meddinov3s() -> None:
    """3072 -> 1536 -> 768 -> 384 -> 192 -> classes; 25.08 M parameters before the last convolution."""
    with torch.device("meta"):
        decoder = DECODERS["pyramid"].build(DECODERS["pyramid"].Settings(), 768, 16, 4, 16)
    convolutions = [m for m in decoder.modules() if isinstance(m, torch.nn.ConvTranspose2d)]
    assert [(c.in_channels, c.out_channels) for c in convolutions] == [
        (3072, 1536),
        (1536, 768),
        (768, 384),
        (384, 192),
    ]
    assert all(c.kernel_size == c.stride == (2, 2) for c in convolutions)
    before = sum(p.numel() for name, p in decoder.named_parameters() if not name.startswith("project"))
    assert before == pytest.approx(25.08e6, rel=1e-3)


def test_primus_is_meddinov3s_single_scale_baseline() -> None:
    """768 -> 384 -> 192 -> 96 -> 48 of the last block."""
    family = DECODERS["primus"]
    with torch.device("meta"):
        decoder = family.build(family.Settings(), 768, 16, 1, 16)
    convolutions = [m for m in decoder.modules() if isinstance(m, torch.nn.ConvTranspose2d)]
    assert [(c.in_channels, c.out_channels) for c in convolutions] == [(768, 384), (384, 192), (192, 96), (96, 48)]
    assert family.Settings().chosen(12) == (11,)


def test_upernets_levels_have_strides_of_4_to_32() -> None:
    family = DECODERS["upernet"]
    with torch.device("meta"):
        decoder = family.build(family.Settings(), 768, 16, 4, 16)
        sides = [resize(torch.empty(1, 768, 14, 14)).shape[-1] for resize in decoder.resize]
    assert [14 * 16 / side for side in sides] == [4, 8, 16, 32]
    with pytest.raises(ValueError, match="upernet reads 4 blocks, 2 are given"):
        family.Settings(blocks=(2, 11)).chosen(12)


def test_upernet_pools_to_grids_of_a_cell_at_least() -> None:
    with pytest.raises(ValueError, match=r"pools\.0\n.*greater than or equal to 1"):
        DECODERS["upernet"].Settings(pools=(0,))


def test_upernet_sees_the_map_as_a_whole() -> None:
    """A change in one corner reaches the other one, which no transposed convolution does."""
    maps = [torch.randn(1, 24, 8, 8) for _ in range(4)]
    changed = [m.clone() for m in maps]
    changed[-1][..., 0, 0] += 5
    for kind, far in (("upernet", True), ("pyramid", False)):
        decoder = model(DECODERS[kind]).decoder.eval()
        with torch.no_grad():
            moved = (decoder(maps) - decoder(changed)).abs()[..., -8:, -8:].max()
        assert (moved > 0) == far, kind


@pytest.mark.parametrize(
    ("depth", "taps", "blocks"),
    [(12, 4, (2, 5, 8, 11)), (24, 4, (5, 11, 17, 23)), (4, 4, (0, 1, 2, 3)), (2, 1, (1,)), (10, 4, (1, 4, 7, 9))],
)
def test_blocks_are_evenly_spaced_and_end_with_the_last(depth: int, taps: int, blocks: tuple[int, ...]) -> None:
    assert Taps(taps=taps).chosen(depth) == blocks


def test_blocks_that_are_not_there_are_refused() -> None:
    with pytest.raises(ValueError, match="reads 4 blocks, the backbone has 2"):
        Taps().chosen(2)
    with pytest.raises(ValueError, match="from 0 to 11"):
        Taps(blocks=(2, 12)).chosen(12)
    with pytest.raises(ValueError, match="different"):
        Taps(blocks=(2, 2)).chosen(12)


def test_channel_norm_is_layer_norm_of_each_position() -> None:
    norm, maps = ChannelNorm(6), torch.randn(2, 6, 3, 5)
    found = norm(maps)
    assert torch.allclose(found.mean(1), torch.zeros(2, 3, 5), atol=1e-6)
    expected = torch.nn.functional.layer_norm(maps[:, :, 1, 2], (6,), eps=1e-6)
    assert torch.allclose(found[:, :, 1, 2], expected, atol=1e-6)
