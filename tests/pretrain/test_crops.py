"""Multi-crop: the draws, the two executors against each other and against torch, window, distortions, sizes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from launch.settings import SettingsError, load
from pretrain.data.crops import CropDraws, Crops, CropSettings, CropShape, HuWindow, crop_batch, crop_slice, draw_crops
from pretrain.data.window import Distortions

WINDOW = HuWindow()
ALL_ON = Distortions(blur=(0.5, 0.9, 0.5), noise=0.5, contrast=0.5, brightness=0.5)


def _slices(seed: int, *shapes: tuple[int, int]) -> list[NDArray[np.int16]]:
    rng = np.random.default_rng(seed)
    slices = [rng.normal(0, 700, shape).clip(-1024, 3071).astype(np.int16) for shape in shapes]
    for hu in slices:
        hu[: len(hu) // 5] = -3024  # padding of a scanner
    return slices


def _batched(slices: list[NDArray[np.int16]], draws: list[CropDraws], settings: CropSettings) -> Crops:
    padded = torch.full((len(slices), max(s.shape[0] for s in slices), max(s.shape[1] for s in slices)), 32767).short()
    for out, hu in zip(padded, slices, strict=True):
        out[: hu.shape[0], : hu.shape[1]] = torch.from_numpy(hu)
    return crop_batch(padded, CropDraws.stack(draws), settings, settings.shapes[0], WINDOW)


SHAPES = ((170, 150), (64, 200), (40, 33))


@pytest.mark.parametrize(
    "settings",
    [
        CropSettings(global_size=96, local_size=32),
        CropSettings(global_size=32, local_size=16, n_local=3, flip=1),
        CropSettings(global_size=256, local_size=160, n_local=2, flip=0),  # only upsampling
        CropSettings(global_size=16, local_size=16, global_scale=(0.9, 1), n_local=1),  # strong downsampling
        CropSettings(global_size=64, local_size=32, gram_size=128, distortions=ALL_ON),
        CropSettings(global_size=64, local_size=32, gram_size=128, distortions=ALL_ON, gram_no_distortions=False),
        CropSettings(global_size=64, local_size=32, gram_size=48, n_local=0),
        CropSettings(global_size=64, local_size=32, distortions=ALL_ON),
    ],
    ids=lambda s: f"{s.global_size}-{s.local_size}-{s.gram_size}-{'distorted' if s.distortions.on else 'plain'}",
)
def test_both_executors_agree(settings: CropSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.data.crops.CHUNK_BYTES", 2**20)  # a chunk is less than the batch
    slices = _slices(0, *SHAPES)
    draws = [draw_crops(settings, *hu.shape, seed=5, sample=i) for i, hu in enumerate(slices)]
    one_by_one = [crop_slice(hu, d, settings, settings.shapes[0], WINDOW) for hu, d in zip(slices, draws, strict=True)]
    batch = _batched(slices, draws, settings)
    for name, side in (
        ("globals_", settings.global_size),
        ("locals_", settings.local_size),
        ("gram", settings.gram_size),
    ):
        if side is None:
            assert batch.gram is None
            continue
        expected = torch.stack([getattr(crops, name) for crops in one_by_one], 1).flatten(0, 1)
        got = getattr(batch, name)
        assert got.shape == expected.shape == ((settings.n_local if name == "locals_" else 2) * 3, 1, side, side)
        assert got.dtype == torch.float32
        assert not len(got) or (got - expected).abs().max() < 1e-4, name


def test_a_crop_is_torchs_resize_of_the_windowed_box() -> None:
    settings = CropSettings(global_size=48, local_size=16, flip=0.5)
    hu = _slices(1, (90, 120))[0]
    draws = draw_crops(settings, 90, 120, seed=0, sample=3)
    assert 0 < draws.flips.sum() < len(draws.flips)
    crops = crop_slice(hu, draws, settings, settings.shapes[0], WINDOW)
    image = (torch.from_numpy(hu).double().clamp(-1000, 1000) - WINDOW.mean) / WINDOW.std
    for k, (box, flip) in enumerate(zip(draws.boxes.tolist(), draws.flips.tolist(), strict=True)):
        top, left, height, width = box
        size = (48, 48) if k < 2 else (16, 16)
        part = image[None, None, top : top + height, left : left + width]
        expected = F.interpolate(part, size=size, mode="bicubic", antialias=True)[0, 0]
        got = crops.globals_[k, 0] if k < 2 else crops.locals_[k - 2, 0]
        assert (got - (expected.flip(-1) if flip else expected)).abs().max() < 1e-4


def test_padding_cannot_ring() -> None:
    """Air beside -3024 padding comes out as exactly the window's low end in both executors."""
    settings = CropSettings(global_size=32, local_size=16)
    hu = np.full((50, 60), -1000, np.int16)
    hu[:, :20] = -3024
    draws = draw_crops(settings, 50, 60, seed=0, sample=0)
    for crops in (crop_slice(hu, draws, settings, settings.shapes[0], WINDOW), _batched([hu], [draws], settings)):
        assert (crops.globals_ - WINDOW.normalised[0]).abs().max() < 1e-4


def test_boxes_are_those_of_random_resized_crop() -> None:
    """Area share and log ratio are uniform where every try fits, positions are uniform, boxes lie inside."""
    settings = CropSettings(global_scale=(0.1, 0.3), local_scale=(0.05, 0.1), n_local=8)
    boxes = torch.stack([draw_crops(settings, 300, 300, seed=0, sample=i).boxes for i in range(1000)]).double()
    top, left, height, width = boxes.unbind(-1)
    assert (boxes >= 0).all()
    assert (top + height <= 300).all()
    assert (left + width <= 300).all()
    for group, (low, high) in ((slice(0, 2), (0.1, 0.3)), (slice(2, None), (0.05, 0.1))):
        share = (height * width / 300**2)[:, group].flatten()
        ratio = (width / height).log()[:, group].flatten() / math.log(4 / 3)
        n = len(share)
        assert share.mean().item() == pytest.approx((low + high) / 2, abs=4 * (high - low) / math.sqrt(12 * n))
        assert share.std().item() == pytest.approx((high - low) / math.sqrt(12), rel=0.05)
        assert ratio.mean().item() == pytest.approx(0, abs=4 * 2 / math.sqrt(12 * n))
        assert ratio.abs().max() < 1.1
        place = (left / (300 - width))[:, group].flatten()
        assert place.mean().item() == pytest.approx(0.5, abs=4 / math.sqrt(12 * n))
        assert place.min().item() == 0
        assert place.max().item() == 1


def test_a_box_that_never_fits_becomes_the_central_one() -> None:
    settings = CropSettings(global_scale=(1, 1), n_local=0)
    assert draw_crops(settings, 30, 300, seed=0, sample=0).boxes.tolist() == [[0, 130, 30, 40]] * 2
    assert draw_crops(settings, 300, 30, seed=0, sample=0).boxes.tolist() == [[130, 0, 40, 30]] * 2
    assert draw_crops(settings, 1, 1, seed=0, sample=0).boxes.tolist() == [[0, 0, 1, 1]] * 2


def test_draws_depend_on_seed_and_sample_only() -> None:
    settings = CropSettings()
    first = draw_crops(settings, 200, 200, seed=1, sample=2)
    np.random.seed(0)  # noqa: NPY002  # what others do with the global state does not matter
    torch.manual_seed(0)
    again = draw_crops(settings, 200, 200, seed=1, sample=2)
    assert all(a.equal(b) for a, b in zip(first.tensors(), again.tensors(), strict=True))
    for seed, sample in ((1, 3), (2, 2)):
        assert not first.boxes.equal(draw_crops(settings, 200, 200, seed=seed, sample=sample).boxes)
    distorted = draw_crops(CropSettings(distortions=ALL_ON), 200, 200, seed=1, sample=2)
    assert first.boxes.equal(distorted.boxes)
    assert first.flips.equal(distorted.flips)


def test_the_student_is_resized_from_the_gram_teachers_crop() -> None:
    settings = CropSettings(global_size=32, local_size=16, gram_size=64)
    hu = _slices(2, (100, 90))[0]
    draws = draw_crops(settings, 100, 90, seed=0, sample=0)
    crops = crop_slice(hu, draws, settings, settings.shapes[0], WINDOW)
    assert crops.gram is not None
    smaller = F.interpolate(crops.gram, size=(32, 32), mode="bicubic", antialias=True)
    assert crops.globals_.equal(smaller)


@pytest.mark.parametrize("shared", [False, True])
def test_who_is_distorted_beside_the_gram_teacher(shared: bool) -> None:
    noise = Distortions(noise=1, noise_hu=(100, 100))
    plain = CropSettings(global_size=32, local_size=16, gram_size=64)
    noisy = plain.model_copy(update={"distortions": noise, "gram_no_distortions": not shared})
    hu = _slices(3, (100, 90))[0]
    crops, clean = (
        crop_slice(hu, draw_crops(s, 100, 90, seed=0, sample=0), s, s.shapes[0], WINDOW) for s in (noisy, plain)
    )
    assert crops.gram is not None
    assert clean.gram is not None
    assert crops.gram.equal(clean.gram) is not shared
    assert not crops.globals_.equal(clean.globals_)


def test_what_the_distortions_do() -> None:
    flat = torch.zeros(3, 1, 64, 64)
    keys = torch.tensor([1, 2, 1])
    noisy = Distortions(noise=1).apply(flat, torch.tensor([[0, 50.0, 1, 0]] * 3), keys, WINDOW)
    assert noisy[0].equal(noisy[2])
    assert noisy.std().item() == pytest.approx(50 / WINDOW.std, rel=0.03)
    assert noisy.mean().item() == pytest.approx(0, abs=0.01)
    assert np.corrcoef(noisy[0].flatten(), noisy[1].flatten())[0, 1] == pytest.approx(0, abs=0.06)
    assert np.corrcoef(noisy[0, 0, :, 1:].flatten(), noisy[0, 0, :, :-1].flatten())[0, 1] == pytest.approx(0, abs=0.06)
    amounts = torch.tensor([[0, 0, 2.0, 10.0]])  # 100 HU: twice as far from the centre, 0 HU, and 10 more
    bright = Distortions(contrast=1).apply(WINDOW.image(torch.full((1, 8, 8), 100)), amounts, keys[:1], WINDOW)
    assert (bright * WINDOW.std + WINDOW.mean).mean().item() == pytest.approx(210, abs=0.01)
    point = torch.zeros(2, 1, 33, 33)
    point[..., 16, 16] = 1
    blurred = Distortions(blur=(1, 1, 1)).apply(point, torch.tensor([[0, 0, 1, 0], [1.0, 0, 1, 0]]), keys[:2], WINDOW)
    assert (blurred[0] - point[0]).abs().max() < 1e-5
    assert blurred[1].sum().item() == pytest.approx(1, abs=1e-3)
    assert (blurred[1, 0, 16, 17] / blurred[1, 0, 16, 16]).item() == pytest.approx(math.exp(-0.5), abs=1e-3)


def test_distortions_happen_with_their_probability() -> None:
    settings = Distortions(blur=(0, 0.9, 0.5), noise=0.25)
    amounts = np.stack([settings.draw(10, np.random.default_rng(i))[0] for i in range(2000)])
    happened = (amounts != [0, 0, 1, 0]).mean(0)
    assert happened[:, 0] == pytest.approx([0, 0.9] + [0.5] * 8, abs=0.05)
    assert happened[:, 1] == pytest.approx([0.25] * 10, abs=0.05)
    assert not happened[:, 2:].any()
    assert not CropSettings().distortions.on


def test_the_mix_of_sizes_follows_its_probabilities() -> None:
    mix = tuple(CropShape(global_size=g, local_size=64, gram_size=g, probability=p) for g, p in ((64, 0.7), (128, 0.3)))
    settings = CropSettings(mix=mix)
    drawn = [settings.shape_at(0, step) for step in range(2000)]
    assert drawn == [settings.shape_at(0, step) for step in range(2000)]
    assert sum(shape == mix[1] for shape in drawn) / 2000 == pytest.approx(0.3, abs=0.04)
    assert {CropSettings().shape_at(0, step) for step in range(5)} == {CropShape()}


def test_window() -> None:
    hu = torch.tensor([-3024, -1000, 65, 1000, 3071], dtype=torch.int16)
    out = WINDOW.apply(hu)
    assert out.dtype == torch.float32
    assert out[0] == out[1] == pytest.approx(WINDOW.normalised[0], abs=1e-6)
    assert out[3] == out[4] == pytest.approx(WINDOW.normalised[1], abs=1e-6)
    assert out[2].item() == pytest.approx((65 - 65.1084213256836) / 178.01663208007812, abs=1e-6)
    same = torch.zeros(2)
    assert WINDOW.apply(same) is not same
    assert same.equal(torch.zeros(2))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("global_scale=[0.5,0.2]", "global_scale needs 0 < low <= high <= 1"),
        ("local_scale=[0,0.2]", "local_scale"),
        ("ratio=[2,1]", "ratio needs"),
        ("mix=[{probability: 0.5}]", "sum to 1, not 0.5"),
        ("mix=[{probability: 0.5, gram_size: 512}, {probability: 0.5}]", "gram_size to every shape or to none"),
        ("flip=2", "flip"),
        ("distortions.blur=[0,2,0]", "three probabilities"),
        ("distortions.noise_hu=[5,1]", "noise_hu needs"),
    ],
)
def test_wrong_settings_are_refused(wrong: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message.replace("[", r"\[")):
        load(CropSettings, None, [wrong])


def test_wrong_window_is_refused() -> None:
    with pytest.raises(SettingsError, match="low < high"):
        load(HuWindow, None, ["low=10", "high=-10"])


def test_the_trainers_precision_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """The products are exact float32 whatever the trainer chose, and its choice is still there afterwards."""
    seen = []
    product = torch.bmm

    def spy(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        seen.append(torch.get_float32_matmul_precision())
        return product(first, second)

    monkeypatch.setattr(torch, "bmm", spy)
    settings, hu = CropSettings(global_size=32, local_size=16), _slices(4, (40, 40))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        _batched(hu, [draw_crops(settings, 40, 40, seed=0, sample=0)], settings)
        assert set(seen) == {"highest"}
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
