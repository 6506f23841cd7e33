"""HU windows: one, several as channels, drawn anew for each slice; and crops whose boxes are in millimetres."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from numpy.typing import NDArray

from launch.settings import SettingsError, dump, load
from pretrain.data.batch import Batch
from pretrain.data.crops import CropDraws, CropSettings, crop_batch, crop_slice, draw_crops
from pretrain.data.stream import DataSettings, StreamError, batches
from pretrain.data.window import Distortions, HuWindow, RandomWindow
from tests.pretrain.made_up import World

LUNG = {"low": -1350.0, "high": 150.0, "mean": -600.0, "std": 400.0}
SOFT = {"low": -160.0, "high": 240.0, "mean": 40.0, "std": 100.0}
BONE = {"low": -500.0, "high": 1300.0, "mean": 400.0, "std": 450.0}
THREE = HuWindow.model_validate([LUNG, SOFT, BONE])
ALL_ON = Distortions(blur=(0.5, 0.9, 0.5), noise=0.5, contrast=0.5, brightness=0.5)
SMALL = {"global_size": 32, "local_size": 16, "n_local": 2}


@dataclass(frozen=True)
class Phantoms:
    mm: tuple[float, float] = (0.8, 0.8)

    def __len__(self) -> int:
        return 20

    def hu(self, i: int, /) -> NDArray[np.int16]:
        return np.random.default_rng(i).integers(-1400, 1600, (60 + i, 80 - i), dtype=np.int16)

    def key(self, i: int, /) -> str:
        return f"slice-{i}"

    def spacing(self, i: int, /) -> tuple[float, float]:
        return self.mm


def data(**changes: object) -> DataSettings:
    return DataSettings.model_validate({"corpus": Path("c"), "batch_size": 4, "workers": 0, "crops": SMALL} | changes)


def first(settings: DataSettings, channels: int = 1, corpus: Phantoms = Phantoms()) -> Batch:
    return next(batches(settings, world=World(), patch_size=16, in_channels=channels, start=0, corpus=corpus))


def both(hu: list[NDArray[np.int16]], settings: CropSettings, window: HuWindow) -> tuple[torch.Tensor, torch.Tensor]:
    """Global crops made one by one, and as a batch."""
    draws = [draw_crops(settings, *one.shape, seed=1, sample=i, spacing=(0.7, 0.9)) for i, one in enumerate(hu)]
    shape = settings.shapes[0]
    single = [crop_slice(one, draw, settings, shape, window).globals_ for one, draw in zip(hu, draws, strict=True)]
    batch = crop_batch(torch.from_numpy(np.stack(hu)), CropDraws.stack(draws), settings, shape, window)
    return torch.stack(single, 1).flatten(0, 1), batch.globals_


def slices() -> list[NDArray[np.int16]]:
    return [np.random.default_rng(i).integers(-1400, 1600, (90, 70), dtype=np.int16) for i in range(3)]


def test_several_windows_are_each_a_channel() -> None:
    hu = torch.from_numpy(slices()[0])
    image = THREE.image(hu)
    assert THREE.channels == 3
    assert image.shape == (3, 90, 70)
    for channel, numbers in zip(image, (LUNG, SOFT, BONE), strict=True):
        assert channel.equal(HuWindow(**numbers).apply(hu))
    assert THREE.image(hu[None]).shape == (1, 3, 90, 70)
    one = HuWindow()
    assert one.image(hu)[0].equal(one.apply(hu))
    assert one.parts == (one,)


@pytest.mark.parametrize("distortions", [Distortions(), ALL_ON], ids=["plain", "distorted"])
@pytest.mark.parametrize("gram", [None, 48])
def test_channels_are_the_crops_of_each_window_alone(distortions: Distortions, gram: int | None) -> None:
    settings = CropSettings.model_validate(SMALL | {"gram_size": gram, "distortions": distortions})
    together, batch = both(slices(), settings, THREE)
    assert together.shape == (6, 3, 32, 32)
    assert (together - batch).abs().max() < 2e-4
    for k, part in enumerate(THREE.parts):
        alone, _ = both(slices(), settings, part)
        assert (together[:, k] - alone[:, 0]).abs().max() < 1e-4


def test_several_windows_through_the_stream() -> None:
    batch = first(data(window=[LUNG, SOFT, BONE]), 3)
    assert batch.global_crops.shape == (8, 3, 32, 32)
    assert batch.local_crops.shape == (8, 3, 16, 16)
    device = first(data(window=[LUNG, SOFT, BONE], crop_on="device"), 3)
    assert (batch.global_crops - device.global_crops).abs().max() < 2e-4
    with pytest.raises(StreamError, match=r"3 windows make 3 channels, and model\.in_channels is 1"):
        first(data(window=[LUNG, SOFT, BONE]), 1)


def test_windows_are_written_and_read_in_every_form() -> None:
    """As a list in a file, as columns in a dump and in a header, and as one window in an old header."""
    settings = load(
        DataSettings, None, ["corpus=c", "batch_size=4", f"window=[{LUNG}, {SOFT}, {BONE}]".replace("'", "")]
    )
    assert settings.window == THREE
    assert HuWindow.model_validate(THREE.model_dump(mode="json")) == THREE
    assert HuWindow.model_validate_json(THREE.model_dump_json()) == THREE
    assert "low: [-1350.0, -160.0, -500.0]" in dump(settings)
    assert HuWindow().model_dump() == {"low": -1000, "high": 1000, "mean": 65.1084213256836, "std": 178.01663208007812}
    assert HuWindow.model_validate([SOFT]) == HuWindow(**SOFT)
    assert load(DataSettings, None, ["corpus=c", "batch_size=4", "window.low=-200"]).window.low == -200
    shared = HuWindow.model_validate({"low": [-1000, -160], "high": [1000, 240], "mean": 0, "std": [400, 100]})
    assert [part.mean for part in shared.parts] == [0, 0]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("window=[]", "a list of such windows is expected"),
        ("window=[3]", "a list of such windows is expected"),
        ("window=[{low: 5, high: 1}, {low: 0}]", "low < high"),
        ("window=[{lower: 5}, {low: 0}]", "no such setting of a window: lower"),
        ("window={low: [1, 2], high: [3, 4, 5]}", "lists of one length"),
        ("window.std=0", "std > 0"),
        ("crops.random_window={level: [5, 1]}", "level needs low <= high"),
        ("crops.random_window={width: [0, 1]}", "width needs 0 < low <= high"),
        ("crops.global_mm=[300, 200]", "global_mm needs 0 < low <= high"),
        ("crops.unit=cm", "crops.unit"),
    ],
)
def test_wrong_settings_are_refused(wrong: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        load(DataSettings, None, ["corpus=c", "batch_size=4", wrong])


def test_random_windows_need_one_fixed_window() -> None:
    with pytest.raises(ValueError, match="needs one fixed window, and window has 3"):
        data(window=[LUNG, SOFT, BONE], crops=SMALL | {"random_window": {}})
    with pytest.raises(ValueError, match="one HU window is needed here, and there are 3: HU -1350 to 150"):
        THREE.apply(torch.zeros(1))


def test_a_random_window_shows_its_ends_as_the_fixed_one_shows_its_own() -> None:
    random = RandomWindow(level=(50, 50), width=(400, 400))
    hu = torch.tensor([[[-3024, -150, 50, 250, 3000]]], dtype=torch.int16)
    ends = torch.tensor([random.draw(np.random.default_rng(0))])
    assert ends.tolist() == [[-150, 250]]
    low, high = HuWindow().normalised
    assert random.image(hu, ends, HuWindow())[0, 0, 0] == pytest.approx([low, low, (low + high) / 2, high, high])
    kept = random.image(hu, torch.zeros(1, 2), HuWindow())[0, 0]
    assert (kept - HuWindow().apply(hu)[0]).abs().max() < 1e-5


def test_random_windows_are_drawn_for_each_slice_from_its_number() -> None:
    random = {"level": (-200, 300), "width": (300, 2000), "probability": 0.7}
    settings = CropSettings.model_validate(SMALL | {"random_window": random})
    plain = CropSettings.model_validate(SMALL)
    drawn = [draw_crops(settings, 90, 70, seed=1, sample=i) for i in range(400)]
    ends = torch.stack([draw.window for draw in drawn]).double()
    fixed = (ends == 0).all(1)
    assert fixed.double().mean().item() == pytest.approx(0.3, abs=0.08)
    level, width = ends[~fixed].mean(1), ends[~fixed].diff(dim=1)
    assert level.min() >= -200
    assert level.max() <= 300
    assert level.mean().item() == pytest.approx(50, abs=30)
    assert width.min() >= 300
    assert width.max() <= 2000
    assert drawn[3].boxes.equal(draw_crops(plain, 90, 70, seed=1, sample=3).boxes)  # no other draw is shifted
    single, batch = both(slices(), settings, HuWindow())
    assert (single - batch).abs().max() < 2e-4
    assert not torch.allclose(single, both(slices(), plain, HuWindow())[0], atol=0.1)


@given(st.integers(0, 10**6), st.floats(0.3, 2), st.integers(64, 512))
@examples(max_examples=30)
def test_the_same_limits_in_mm_and_px_give_the_same_boxes(sample: int, mm: float, side: int) -> None:
    px = CropSettings(global_scale=(0.2, 0.6), local_scale=(0.05, 0.2))
    whole = side * mm
    in_mm = px.model_copy(
        update={
            "unit": "mm",
            "global_mm": (math.sqrt(0.2) * whole, math.sqrt(0.6) * whole),
            "local_mm": (math.sqrt(0.05) * whole, math.sqrt(0.2) * whole),
        }
    )
    expected = draw_crops(px, side, side, seed=0, sample=sample).boxes
    got = draw_crops(in_mm, side, side, seed=0, sample=sample, spacing=(mm, mm)).boxes
    assert (got - expected).abs().max() <= 1  # a half may be rounded either way


@given(st.integers(0, 10**6), st.floats(0.2, 3), st.floats(0.2, 3), st.integers(8, 600), st.integers(8, 600))
@examples(max_examples=60)
def test_boxes_in_mm_lie_inside_and_have_their_size(sample: int, y: float, x: float, height: int, width: int) -> None:
    settings = CropSettings(unit="mm", global_mm=(60, 90), local_mm=(20, 40), n_local=4, ratio=(0.8, 1.25))
    boxes = draw_crops(settings, height, width, seed=2, sample=sample, spacing=(y, x)).boxes
    top, left, h, w = boxes.unbind(-1)
    assert (boxes[:, 2:] > 0).all()
    assert (boxes[:, :2] >= 0).all()
    assert (top + h <= height).all()
    assert (left + w <= width).all()
    for k, (low, high) in enumerate([(60, 90)] * 2 + [(20, 40)] * 4):
        tall, wide = h[k].item(), w[k].item()
        most = high * math.sqrt(1.25)
        assert (tall - 0.5) * y <= most or tall == 1
        assert (wide - 0.5) * x <= most or wide == 1
        if tall < height and wide < width:  # not cut to the slice
            assert (tall + 0.5) * (wide + 0.5) * x * y >= low**2
            assert (tall - 0.5) * (wide - 0.5) * x * y <= high**2 or 1 in (tall, wide)


def test_boxes_in_mm_need_spacings() -> None:
    settings = data(crops=SMALL | {"unit": "mm", "global_mm": [30, 40], "local_mm": [10, 20]})
    assert first(settings).global_crops.shape == (8, 1, 32, 32)
    device = first(settings.model_copy(update={"crop_on": "device"}))
    assert (device.global_crops - first(settings).global_crops).abs().max() < 2e-4
    for wrong in ((0.0, 0.8), (0.8, math.nan), (-1.0, 1.0), (math.inf, 1.0)):
        with pytest.raises(StreamError, match=r"slice slice-\d+ has no spacing that could be true.*unit=px"):
            first(settings, corpus=Phantoms(wrong))
