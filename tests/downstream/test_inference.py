"""Windows over slices: against a plain reference, against MONAI's, and whatever the memory allows."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from downstream.channels import ZSCORE, Channel, image
from downstream.context import Context, neighbours
from downstream.inference import Window, decided, head_scores, predict_volume, probabilities, volume_scores
from downstream.labels import Labels
from downstream.model import Header, ModelError, SegmentationModel
from downstream.prepared import resample
from downstream.sliding import Pace, gaussian, layout, starts
from pretrain.data.window import HuWindow
from tests.downstream.random_models import CT, made

MR = Channel(name="MR", kind="zscore", window=ZSCORE)
TWO_WINDOWS = Channel(window=HuWindow(low=(-160.0, -1000.0), high=(240.0, 0.0), mean=(0.0, -500.0), std=200.0))
REGIONS = {"organs": {"kidney": (1, 2), "tumour": (2,)}, "values": (0, 1, 2), "order": (1, 2)}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "two channels": {"channels": (CT, MR)},
    "two windows": {"channels": (TWO_WINDOWS,)},
    "regions": REGIONS,
    "neighbours": {"context": Context(slices=1)},
    "neighbours by mm": {"context": Context(slices=1, mm=10.0), "channels": (CT, MR)},
}


def some(shape: tuple[int, ...], seed: int = 0) -> NDArray[np.int16]:
    return np.random.default_rng(seed).integers(-300, 300, shape).astype(np.int16)


def scores(model: SegmentationModel, header: Header, stored: NDArray[np.int16], window: Window) -> Tensor:
    return torch.cat([logits for _, logits in head_scores(model, header, stored, 5.0, window)])


@torch.no_grad()
def plainly(
    model: SegmentationModel, header: Header, stored: NDArray[np.int16], z_mm: float, mirror: bool
) -> NDArray[np.float64]:
    """Window by window, pixel by pixel as the method says: logits [Z, heads, Y, X]."""
    patch, (count, height, width) = header.patch, stored.shape[1:]
    around = [max(patch - side, 0) for side in (height, width)]
    pads = [(0, 0), (0, 0), *((more // 2, more - more // 2) for more in around)]
    images = image(torch.from_numpy(np.pad(stored, pads, constant_values=-1000)).transpose(0, 1), header.channels)
    axis = np.exp(-0.5 * ((np.arange(patch) - patch // 2) / (patch / 8)) ** 2)
    weight = axis[:, None] * axis[None, :]
    total = np.zeros((count, len(header.labels.heads), *images.shape[2:]))
    weights = np.zeros(images.shape[2:])
    for top, left in itertools.product(*(starts(side, patch, 0.5) for side in images.shape[2:])):
        part = (slice(top, top + patch), slice(left, left + patch))
        weights[part] += weight
        for z in range(count):
            seen = neighbours(np.array([z]), count, z_mm, header.context)[0]
            window = images[(torch.from_numpy(seen), slice(None), *part)]  # [S, c, patch, patch]
            flips = [[], [2], [3], [2, 3]] if mirror else [[]]
            told = []
            for axes in flips:
                turned = window.flip(axes)
                given = turned[None] if header.context.slices else turned
                told.append(model(given).flip(axes)[0].double().numpy())
            total[(z, slice(None), *part)] += weight * np.mean(told, 0)
    found = total / weights
    (top, _), (left, _) = pads[2:]
    return found[..., top : top + height, left : left + width]


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("shape", [(3, 32, 32), (3, 70, 45), (2, 20, 50)], ids=str)
@pytest.mark.parametrize("kind", list(KINDS))
def test_windows_are_those_of_a_plain_loop(kind: str, shape: tuple[int, int, int], mirror: bool) -> None:
    model, header = made(**KINDS[kind])
    stored = some((len(header.channels), *shape))
    wanted = plainly(model, header, stored, 5.0, mirror)
    got = scores(model, header, stored, Window(mirror=mirror, batch_size=4))
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), wanted, atol=1e-4)


def test_monai_says_the_same_under_the_same_weights() -> None:
    from monai.inferers import sliding_window_inference

    model, header = made()
    stored = some((1, 4, 96, 64))  # where MONAI's windows stand as nnU-Net's do
    weights = torch.outer(gaussian(32), gaussian(32)).float()
    with torch.no_grad():
        wanted = sliding_window_inference(
            image(torch.from_numpy(stored).transpose(0, 1), header.channels),
            (32, 32),
            4,
            model,
            0.5,
            roi_weight_map=weights,
        )
    got = scores(model, header, stored, Window())
    assert isinstance(wanted, Tensor)
    assert torch.allclose(got, wanted, atol=1e-4)
    labels = predict_volume([model], header, stored, (5.0, 1.0, 1.0))
    assert np.array_equal(labels, np.array(header.values, np.uint8)[wanted.argmax(1).numpy()])


def test_windows_stand_where_nnunet_puts_them() -> None:
    assert starts(110, 64, 0.5) == [0, 23, 46]
    assert starts(64, 64, 0.5) == [0]
    assert starts(65, 64, 0.5) == [0, 1]


@settings(deadline=None)
@given(
    size=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    patch=st.integers(2, 40),
    overlap=st.sampled_from([0.0, 0.25, 0.5, 0.9]),
)
def test_weights_add_up_to_one_everywhere(size: tuple[int, int], patch: int, overlap: float) -> None:
    where = layout(size, patch, overlap, torch.device("cpu"))
    assert (where.height, where.width) == tuple(max(side, patch) for side in size)
    total = torch.zeros(where.height, where.width)
    for i, place in enumerate(where.places):
        total[place] += where.weights[i] if where.weights else 1
    assert torch.allclose(total, torch.ones_like(total), atol=1e-5)


@pytest.mark.parametrize("kind", ["plain", "neighbours"])
def test_less_memory_means_more_pieces_and_the_same_result(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, header = made(**KINDS[kind], spacing=0.8)
    stored = some((1, 7, 60, 50))
    pieces = list(volume_scores([model], header, stored, (5.0, 1.0, 1.0)))
    assert [part for part, _ in pieces] == [slice(0, 7)]
    monkeypatch.setattr("downstream.inference.PIECE", 1)
    less = list(volume_scores([model], header, stored, (5.0, 1.0, 1.0), Window(memory_gib=1e-9)))
    assert [part for part, _ in less] == [slice(z, z + 1) for z in range(7)]
    assert torch.allclose(torch.cat([logits for _, logits in less]), pieces[0][1], atol=1e-4)


def test_slices_are_brought_to_the_training_grid_as_in_training() -> None:
    """The logits of a volume are those of the slices that training would store, enlarged."""
    model, header = made(spacing=1.3)
    stored = some((1, 3, 60, 50))
    (_, got), *_ = volume_scores([model], header, stored, (5.0, 1.0, 1.0))
    on_grid = resample(stored[0], (46, 38))[None]
    small = scores(model, header, on_grid, Window())
    wanted = torch.nn.functional.interpolate(small, size=(60, 50), mode="bilinear", align_corners=False)
    assert torch.allclose(got, wanted, atol=1e-4)


class Counted(torch.nn.Module):
    """Counts the images that go through a model's parts."""

    def __init__(self, model: SegmentationModel, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.images = 0
        encode = model.encode

        def counting(images: Tensor) -> list[Tensor]:
            self.images += len(images)
            return encode(images)

        monkeypatch.setattr(model, "encode", counting)


def test_windows_of_nothing_share_one_result(monkeypatch: pytest.MonkeyPatch) -> None:
    model, header = made()
    stored = some((1, 5, 70, 70))
    stored[:, :, :34, :34] = -900  # below the HU window: one window of each slice, and slice 4, are empty
    stored[:, 4] = -1000
    counted = Counted(model, monkeypatch)
    every = scores(model, header, stored, Window(skip_empty=False))
    assert counted.images == 5 * 16
    counted.images = 0
    got = scores(model, header, stored, Window())
    assert counted.images == 4 * (16 - 1) + 1
    assert torch.allclose(got, every, atol=1e-5)


def test_with_neighbours_each_slice_is_encoded_once_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    model, header = made(context=Context(slices=2))
    counted = Counted(model, monkeypatch)
    scores(model, header, some((1, 9, 48, 32)), Window(batch_size=4))
    assert counted.images == 9 * 2


@pytest.mark.parametrize("kind", ["plain", "regions"])
def test_several_models_decide_by_their_mean_probability(kind: str) -> None:
    (one, header), (two, _) = made(1, **KINDS[kind]), made(2, **KINDS[kind])
    stored, spacing = some((1, 2, 50, 40)), (5.0, 1.0, 1.0)

    def told(*models: SegmentationModel) -> Tensor:
        parts = [logits for _, logits in volume_scores(models, header, stored, spacing)]
        return probabilities(torch.cat(parts), header.labels)

    assert torch.allclose(told(one, two), (told(one) + told(two)) / 2, atol=1e-5)
    assert torch.allclose(told(one, one), told(one), atol=1e-5)
    twice = predict_volume([one, one], [header, header], stored, spacing)
    assert (twice == predict_volume([one], header, stored, spacing)).mean() > 0.999


def test_labels_of_classes_and_of_regions() -> None:
    classes = Labels({"a": (3,), "b": (9,)}, (0, 3, 9))
    logits = torch.tensor([[[1.0, 0.0, -1.0]], [[0.0, 2.0, -2.0]], [[0.5, 1.0, 3.0]]])[None]
    assert decided(logits, classes).tolist() == [[[0, 3, 9]]]
    regions = Labels({"kidney": (1, 2), "tumour": (2,)}, (0, 1, 2), order=(1, 2))
    two = torch.tensor([[-1.0, 2.0, 2.0, -1.0], [-1.0, -1.0, 0.1, 0.1]]).view(1, 2, 1, 4)
    assert decided(two, regions).tolist() == [[[0, 1, 2, 2]]], "a later region over an earlier one"
    turned = Labels(regions.organs, regions.values, order=(2, 1))
    assert decided(two, turned).tolist() == [[[0, 2, 1, 1]]]
    assert decided(two, regions).dtype == torch.uint8


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_the_networks_alone(precision: Any) -> None:
    model, header = made()
    stored = some((1, 2, 70, 70))
    whole, half = (scores(model, header, stored, Window(precision=kind)) for kind in ("fp32", precision))
    assert half.dtype == torch.float32
    assert 0 < (whole - half).abs().max() < 0.2
    assert (whole.argmax(1) == half.argmax(1)).float().mean() > 0.95


def test_an_answer_that_is_no_number_is_told() -> None:
    model, header = made()
    with torch.no_grad():
        next(model.decoder.parameters()).fill_(float("inf"))
    with pytest.raises(ModelError, match=r"not finite; use window\.precision=fp32"):
        predict_volume([model], header, some((1, 2, 40, 40)), (5.0, 1.0, 1.0))


def test_the_first_window_tells_how_many_fit() -> None:
    sizes: list[int] = []

    def work(part: slice) -> Tensor:
        count = part.stop - part.start
        sizes.append(count)
        first = torch.zeros(count, 250)  # 1000 bytes a window ...
        second = first + 1  # ... and 1000 more beside it
        del first
        return second[:, :10] * 2  # and 40

    pace = Pace(wanted=8, room=3 * 2000.0)
    parts = [part for part, _ in pace.each(work, 9)]
    assert sizes == [1, 3, 3, 2]
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(9))
    assert Pace(8, 1.0).each(work, 1) is not None
    roomy = Pace(wanted=4, room=1e9)
    sizes.clear()
    list(roomy.each(work, 6))
    list(roomy.each(work, 2))
    assert sizes == [1, 4, 1, 2], "measured once"
