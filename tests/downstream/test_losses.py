"""The loss against MONAI's, against loops written out, with voxels to ignore, and on two ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.losses import DiceLoss
from torch import Tensor

from downstream.cases import IGNORE, Labels
from downstream.losses import SegmentationLoss
from launch.distributed import world
from tests.gloo import run_ranks

CLASSES = Labels({"liver": (1,), "tumour": (4,)}, (0, 1, 4))
REGIONS = Labels({"kidney": (1, 2, 3), "masses": (2, 3), "tumour": (2,)}, (0, 1, 2, 3), order=(1, 3, 2))
IGNORING = Labels({"liver": (1,), "tumour": (4,)}, (0, 1, 4), ignore=5)


def drawn(labels: Labels, seed: int = 0, batch: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, len(labels.heads), 9, 7, generator=generator)
    return logits, torch.randint(len(labels.values), (batch, 9, 7), generator=generator)


def test_classes_are_monais_dice_and_torchs_cross_entropy() -> None:
    logits, classes = drawn(CLASSES)
    found = SegmentationLoss(CLASSES)(logits, classes)
    dice = DiceLoss(
        include_background=False, softmax=True, to_onehot_y=True, batch=True, smooth_nr=1e-5, smooth_dr=1e-5
    )
    torch.testing.assert_close(found["dice"], dice(logits, classes[:, None]))
    torch.testing.assert_close(found["ce"], torch.nn.functional.cross_entropy(logits, classes))


def test_regions_are_monais_dice_and_torchs_binary_cross_entropy() -> None:
    logits, classes = drawn(REGIONS)
    found = SegmentationLoss(REGIONS)(logits, classes)
    masks = [[torch.isin(plane, torch.tensor(region)) for region in ((1, 2, 3), (2, 3), (2,))] for plane in classes]
    truth = torch.stack([torch.stack(planes) for planes in masks]).float()
    dice = DiceLoss(sigmoid=True, batch=True, smooth_nr=1e-5, smooth_dr=1e-5)
    torch.testing.assert_close(found["dice"], dice(logits, truth))
    torch.testing.assert_close(found["bce"], torch.nn.functional.binary_cross_entropy_with_logits(logits, truth))


def test_dice_of_a_large_batch_is_that_of_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    classes = (torch.rand(4, 512, 512, generator=generator) < 0.6).long()
    logits = torch.randn(4, 3, 512, 512, generator=generator)
    logits[:, 1] += torch.where(classes == 1, 6.0, -6.0)
    probability = logits.double().softmax(1)[:, 1:]
    truth = torch.stack([classes == 1, classes == 2], 1)
    both, sizes = (probability * truth).sum((0, 2, 3)), probability.sum((0, 2, 3)) + truth.sum((0, 2, 3))
    found = SegmentationLoss(CLASSES)(logits, classes)["dice"]
    exact = 1 - ((2 * both + 1e-5) / (sizes + 1e-5)).mean()
    torch.testing.assert_close(found.double(), exact, atol=1e-6, rtol=0)


@pytest.mark.parametrize("labels", [IGNORING, Labels(REGIONS.organs, REGIONS.values, 4, REGIONS.order)])
def test_ignored_voxels_change_nothing_and_get_no_gradient(labels: Labels) -> None:
    logits, classes = drawn(labels)
    classes[:, 4:] = IGNORE
    other = logits.clone()
    other[:, :, 4:] += 3
    loss, logits = SegmentationLoss(labels), logits.requires_grad_()
    found = loss(logits, classes)
    for name, value in loss(other, classes).items():
        torch.testing.assert_close(value, found[name])
    for name, value in loss(logits[:, :, :4], classes[:, :4]).items():
        torch.testing.assert_close(value, found[name], msg=f"{name}: as if those rows were not there")
    sum(found.values()).backward()
    assert logits.grad is not None
    assert not logits.grad[:, :, 4:].any()
    assert logits.grad[:, :, :4].any()


def test_a_batch_of_ignored_voxels_alone_is_finite() -> None:
    logits, classes = drawn(IGNORING)
    found = SegmentationLoss(IGNORING)(logits, torch.full_like(classes, IGNORE))
    assert all(torch.isfinite(value) for value in found.values())


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), shift=st.floats(-5, 5))
def test_the_perfect_answer_is_the_best(seed: int, shift: float) -> None:
    logits, classes = drawn(CLASSES, seed)
    sure = torch.nn.functional.one_hot(classes, 3).movedim(-1, 1) * 40.0 + shift
    loss = SegmentationLoss(CLASSES)
    best, some = loss(sure, classes), loss(logits, classes)
    assert all(best[name] < some[name] for name in best)
    assert float(best["dice"]) == pytest.approx(0, abs=1e-4)


def on_ranks(rank: int, size: int, ignore: bool) -> list[Tensor]:
    labels = IGNORING if ignore else REGIONS
    with world("cpu"):
        logits, classes = drawn(labels, batch=4)
        if ignore:
            classes[:3, 2:] = IGNORE
        each = slice(rank * 4 // size, (rank + 1) * 4 // size)
        mine = logits[each].clone().requires_grad_()
        terms = SegmentationLoss(labels)(mine, classes[each])
        sum(terms.values()).backward()
        assert mine.grad is not None
        return [torch.stack(list(terms.values())).detach(), mine.grad / size]


@pytest.mark.parametrize("ignore", [False, True])
def test_two_ranks_learn_what_one_does(tmp_path: Path, ignore: bool) -> None:
    """The loop takes the mean over ranks of losses and of gradients."""
    (whole, gradient), *_ = [on_ranks(0, 1, ignore)]
    parts = run_ranks(f"{__file__}:on_ranks", 2, tmp_path, ignore=ignore)
    torch.testing.assert_close((parts[0][0] + parts[1][0]) / 2, whole)
    torch.testing.assert_close(torch.cat([parts[0][1], parts[1][1]]), gradient)
