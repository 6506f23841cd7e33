"""Block masks: exact counts and the distributions of the official recipe, independence of ranks, bad settings."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.ndimage import label

from launch.settings import SettingsError, load
from pretrain.data.masks import MaskSettings, block_masks, draw_masks, max_block, target_counts

SETTINGS = MaskSettings()
SHARES = ("0.1", "0.15", "0.2", "0.3", "0.4", "0.5")


def test_counts_are_the_official_ones(reference: Path) -> None:
    golden = json.loads((reference / "collate_counts.json").read_text())
    assert len(golden) > 20
    for name, expected in golden.items():
        side, images = (int(part.lstrip("gridB")) for part in name.split("."))
        assert target_counts(SETTINGS, (side, side), images) == expected["sorted_counts"], name
        masks = draw_masks(SETTINGS, (side, side), images, seed=1, step=2, rank=0)
        assert len(masks.indices) == expected["n_masked"], name
        assert masks.weights.double().sum().item() == pytest.approx(expected["sum_weights"], rel=1e-6), name


def test_counts_use_float32_edges() -> None:
    """100 * 0.3 is 29.99... in float32 and 30 in float64; the official code truncates the former."""
    assert 29 in target_counts(SETTINGS, (10, 10), 6)
    assert 30 not in target_counts(SETTINGS, (10, 10), 6)


def test_largest_block(reference: Path) -> None:
    golden = np.load(reference / "masking.npz")
    sides = [int(name.split(".")[1]) for name in golden.files if name.startswith("max_num_patches")]
    assert len(sides) >= 6
    for side in sides:
        assert max_block((side // 16, side // 16)) == golden[f"max_num_patches.{side}"]


def _statistics(masks: NDArray[np.bool_]) -> dict[str, NDArray[np.int64]]:
    boundary = (masks[:, 1:] != masks[:, :-1]).sum((1, 2)) + (masks[:, :, 1:] != masks[:, :, :-1]).sum((1, 2))
    labels = [label(mask) for mask in masks]
    isolated = [int((np.bincount(parts.ravel())[1:] == 1).sum()) for parts, _ in labels]
    return {"boundary": boundary, "components": np.array([n for _, n in labels]), "isolated": np.array(isolated)}


@pytest.mark.parametrize("side", [14, 16])
@pytest.mark.parametrize("share", SHARES)
def test_shapes_are_distributed_as_in_the_official_code(reference: Path, side: int, share: str) -> None:
    golden, prefix, n = np.load(reference / "masking.npz"), f"grid{side}.frac{share}.", 2000
    count = int(golden[prefix + "target"])
    masks = block_masks(SETTINGS, (side, side), [count] * n, np.random.default_rng(5))
    assert (masks.sum((1, 2)) == count).all()
    for name, values in _statistics(masks).items():
        mean, std = golden[f"{prefix}{name}_mean_std"]
        assert abs(values.mean() - mean) < 4 * std * np.sqrt(2 / n), name
        assert values.std() == pytest.approx(std, rel=0.08), name
    expected = golden[prefix + "position_prob"]
    assert (np.abs(masks.mean(0) - expected) < 5 * np.sqrt(expected * (1 - expected) * 2 / n)).all()


def test_any_grid_and_any_share_is_filled_exactly() -> None:
    for grid in ((1, 1), (2, 2), (3, 17), (24, 8), (48, 48)):
        counts = [round(grid[0] * grid[1] * share) for share in (0, 0.1, 0.5, 0.9, 1)]
        masks = block_masks(SETTINGS, grid, counts, np.random.default_rng(0))
        assert masks.shape == (5, *grid)
        assert masks.sum((1, 2)).tolist() == counts
    assert block_masks(SETTINGS, (4, 4), [], np.random.default_rng(0)).shape == (0, 4, 4)


def test_indices_and_weights_describe_the_masks() -> None:
    drawn = draw_masks(SETTINGS, (8, 12), 5, seed=0, step=0, rank=0)
    assert drawn.masks.shape == (10, 96)
    assert drawn.indices.equal(drawn.masks.flatten().nonzero().flatten())
    counts = drawn.masks.sum(1)
    assert drawn.weights.equal((1 / counts.clamp(min=1)).repeat_interleave(counts).float())
    assert sorted(counts.tolist()) == target_counts(SETTINGS, (8, 12), 5)


def test_masks_depend_on_seed_step_and_rank_only() -> None:
    same = [draw_masks(SETTINGS, (8, 8), 4, seed=3, step=7, rank=1).masks for _ in range(2)]
    assert same[0].equal(same[1])
    for seed, step, rank in ((4, 7, 1), (3, 8, 1), (3, 7, 0)):
        assert not same[0].equal(draw_masks(SETTINGS, (8, 8), 4, seed=seed, step=step, rank=rank).masks)


def test_a_fixed_group_gives_the_same_masks_on_other_ranks() -> None:
    grouped = MaskSettings(group=2)
    whole = draw_masks(grouped, (8, 8), 8, seed=0, step=3, rank=0).masks.view(2, 8, 64)
    parts = [draw_masks(grouped, (8, 8), 4, seed=0, step=3, rank=rank).masks.view(2, 4, 64) for rank in range(2)]
    assert whole[:, :4].equal(parts[0])
    assert whole[:, 4:].equal(parts[1])
    counts = whole.sum(2)
    for image in range(0, 8, 2):
        assert sorted(counts[:, image : image + 2].flatten().tolist()) == target_counts(grouped, (8, 8), 2)


def test_a_group_that_does_not_divide_the_batch_is_named() -> None:
    with pytest.raises(ValueError, match=r"masks\.group: 3 does not divide the 4 images"):
        draw_masks(MaskSettings(group=3), (8, 8), 4, seed=0, step=0, rank=0)


def test_middle_edges_have_a_mean_that_does_not_depend_on_the_group() -> None:
    middle = MaskSettings(edge="middle")
    means = [sum(target_counts(middle, (48, 48), images)) / images / 48**2 for images in (1, 2, 64)]
    assert means == pytest.approx([0.3] * 3, abs=1e-3)
    assert sum(target_counts(SETTINGS, (48, 48), 1)) / 48**2 == 0.5


def test_no_masks_at_all() -> None:
    drawn = draw_masks(MaskSettings(probability=0), (4, 4), 3, seed=0, step=0, rank=0)
    assert not drawn.masks.any()
    assert drawn.indices.shape == drawn.weights.shape == (0,)


@pytest.mark.parametrize("wrong", ["ratio=[0.5,0.1]", "ratio=[0,2]", "probability=1.5", "group=0", "aspect=0"])
def test_wrong_settings_are_refused(wrong: str) -> None:
    with pytest.raises(SettingsError, match=wrong.partition("=")[0]):
        load(MaskSettings, None, [wrong])


def test_masks_of_a_batch_take_milliseconds() -> None:
    best = min(_seconds(step) for step in range(10))
    assert best < 0.02, f"{best * 1e3:.1f} ms for 128 crops of 16x16; 2 ms when it was written"


def _seconds(step: int) -> float:
    start = time.process_time()
    draw_masks(SETTINGS, (16, 16), 64, seed=0, step=step, rank=0)
    return time.process_time() - start
