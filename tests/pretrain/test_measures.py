"""The numbers and pictures of a watched run, against values made by hand and against numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.watch import pictures
from pretrain.watch.measures import divergence, patch_cosine, rankme, spread, target_use
from pretrain.watch.patches import body_mask, on_body, patch_classes, resize_labels

K = 32


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("targets", "entropy", "of_mean", "used"),
    [
        (torch.full((8, K), 1 / K), math.log(K), math.log(K), 1),  # says nothing
        (F.one_hot(torch.full((8,), 3), K).float(), 0.0, 0.0, 1),  # collapsed onto one prototype
        (F.one_hot(torch.arange(8), K).float(), 0.0, math.log(8), 8),  # sure, and of many
        (F.one_hot(torch.arange(8) // 4, K).float() * 0.5 + 0.5 / K, None, None, 2),
    ],
)
def test_entropy_and_prototype_use(targets: Tensor, entropy: float | None, of_mean: float | None, used: int) -> None:
    found = target_use(targets)
    assert found["used"] == used
    if entropy is not None:
        assert found["entropy"] == pytest.approx(entropy, abs=1e-5)
        assert found["entropy_of_mean"] == pytest.approx(of_mean, abs=1e-5)
    else:
        p, rest = 0.5 + 0.5 / K, 0.5 / K
        assert found["entropy"] == pytest.approx(-p * math.log(p) - (K - 1) * rest * math.log(rest), abs=1e-5)
        assert found["entropy_of_mean"] > found["entropy"]


def test_divergence_is_zero_for_the_targets_themselves_and_the_loss_less_its_floor() -> None:
    targets = (draw(8, K) / 0.3).softmax(1)
    assert divergence(targets, 0.1 * targets.log(), 0.1) == pytest.approx(0, abs=1e-6)
    guess = draw(8, K, seed=1)
    cross = -(targets * (guess / 0.1).log_softmax(1)).sum(1).mean()
    assert divergence(targets, guess, 0.1) == pytest.approx(float(cross) - target_use(targets)["entropy"], rel=1e-4)


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (16, 16)])
def test_rankme_against_numpy(shape: tuple[int, int]) -> None:
    x = draw(*shape) @ torch.diag(torch.logspace(0, -3, shape[1]))
    values = np.linalg.svd(x.double().numpy(), compute_uv=False)
    share = values / values.sum() + 1e-7
    assert rankme(x) == pytest.approx(math.exp(-(share * np.log(share)).sum()), rel=1e-6)
    assert rankme(torch.eye(shape[1])) == pytest.approx(shape[1], rel=1e-4)
    assert math.isnan(rankme(x * torch.inf))
    assert rankme(torch.ones(shape)) == pytest.approx(1, abs=1e-3)


def test_patches_that_grow_alike_have_a_higher_cosine_and_a_lower_spread() -> None:
    patches, body = draw(2, 9, 16), torch.ones(2, 9, dtype=torch.bool)
    unit = F.normalize(patches, dim=-1)
    off = ~torch.eye(9, dtype=torch.bool)
    expected = torch.stack([(x @ x.T)[off].mean() for x in unit]).mean()
    assert patch_cosine(patches, body) == pytest.approx(float(expected), abs=1e-5)
    alike = patches + 5 * draw(16, seed=2)
    assert patch_cosine(alike, body) > 0.9 > 0.2 > patch_cosine(patches, body)
    assert spread(draw(4000, 16)) == pytest.approx(1, abs=0.02)
    assert spread(alike.flatten(0, 1)) < 0.5 * spread(patches.flatten(0, 1))
    assert spread(torch.ones(5, 4)) == 0
    assert math.isnan(spread(torch.ones(1, 4)))


def test_air_does_not_count() -> None:
    patches, body = draw(1, 9, 16), torch.zeros(1, 9, dtype=torch.bool)
    assert math.isnan(patch_cosine(patches, body))
    body[0, :5] = True
    changed = patches.clone()
    changed[0, 5:] = 1.0
    assert patch_cosine(patches, body) == patch_cosine(changed, body)


def test_a_body_is_its_largest_part_with_its_lungs_and_without_the_couch() -> None:
    hu = torch.full((40, 40), -1000.0)
    hu[4:28, 4:36] = 40.0
    hu[10:20, 8:16] = -850.0  # lung
    hu[34:36, 2:38] = 100.0  # couch
    body = np.zeros((40, 40), bool)
    body[4:28, 4:36] = True
    assert np.array_equal(body_mask(hu.numpy()), body)
    assert not body_mask(np.full((8, 8), -1000, np.float32)).any()
    blocks = on_body(hu[None, None], 8)
    # The body covers rows 4 to 28 and columns 4 to 36: half of the patches at its sides, a quarter of those at corners.
    corners = {(0, 0), (0, 4), (3, 0), (3, 4)}
    expected = [[row < 4 and (row, column) not in corners for column in range(5)] for row in range(5)]
    assert blocks.view(5, 5).tolist() == expected


def test_a_patch_has_the_class_of_most_of_its_pixels() -> None:
    labels = np.zeros((1, 4, 4), np.int64)
    labels[0, :2, :2] = [[7, 7], [7, 2]]
    labels[0, 2:, 2:] = [[5, 5], [0, 0]]  # as many: the smaller label
    assert patch_classes(labels, 2).tolist() == [[7, 0, 0, 0]]
    assert resize_labels(labels, (8, 8))[0, :4, :4].tolist() == [[7] * 4, [7] * 4, [7, 7, 2, 2], [7, 7, 2, 2]]
    assert resize_labels(labels, (2, 2)).tolist() == [[[2, 0], [0, 0]]]


def test_colours_are_determined_with_their_sign() -> None:
    patches, body = draw(2, 16, 6) * torch.tensor([5.0, 3, 2, 1, 1, 1]), torch.ones(2, 16, dtype=torch.bool)
    scores = pictures.colour_scores(patches, body)
    assert torch.equal(scores, pictures.colour_scores(patches.clone(), body))
    flat = scores.flatten(0, 1)
    assert torch.allclose(flat.std(0), torch.ones(3, dtype=torch.float64))
    # The sign follows from the features: each direction's largest entry points the way of its channel.
    x = patches.double().flatten(0, 1)
    for component in range(3):
        direction = (x - x.mean(0)).T @ flat[:, component]
        assert direction[direction.abs().argmax()] > 0
    assert torch.allclose(pictures.colour_scores(-patches, body), -scores)


def test_a_tissue_keeps_its_colour_while_the_network_turns_its_features() -> None:
    patches, body = draw(2, 16, 6) * torch.tensor([5.0, 4.9, 4.8, 1, 1, 1]), torch.ones(2, 16, dtype=torch.bool)
    before = pictures.colour_scores(patches, body)
    turn, _ = torch.linalg.qr(draw(6, 6, seed=3))
    after = pictures.colour_scores(patches @ turn, body)
    again = pictures.aligned(after, before, body)
    assert (after - before).abs().max() > 0.5
    assert (again - before).abs().max() < 1e-4
    assert np.abs(pictures.colours(again, body) - pictures.colours(before, body)).max() < 1e-4
    body[:, 3] = False
    assert not pictures.colours(before, body)[:, 3].any()


def test_queries_lie_on_the_body_apart_from_each_other() -> None:
    body = torch.zeros(3, 36, dtype=torch.bool)
    body[:2, 7:29] = True
    found = pictures.queries(body, 6, 0)
    assert np.array_equal(found, pictures.queries(body, 6, 0))
    for picked, inside in zip(found[:2], body[:2], strict=True):
        assert inside[picked].all()
        assert len(set(picked.tolist())) == 3
