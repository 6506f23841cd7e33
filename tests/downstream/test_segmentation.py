"""Patches are where they should be, distortions keep their promises, and the loss is nnU-Net's."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from pydantic import BaseModel

from downstream import finetune
from downstream.augment import Augmentation, Placement, cut_image, cut_label, distort, off, place
from downstream.cases import Labels
from downstream.decoders import linear
from downstream.finetune import Settings
from downstream.model import build
from downstream.segmentation import Patches, Segmentation, parameter_groups
from downstream.tuning import frozen, full
from launch.settings import Settings as Base
from launch.settings import SettingsError, find, load
from pretrain.models.vit import VitSettings
from pretrain.models.vit import build as build_vit

HU = np.random.default_rng(0).integers(-900, 900, (40, 60)).astype(np.int16)
LABEL = (HU > 0).astype(np.uint8)


def method(tuned: Base | None = None) -> Segmentation:
    torch.manual_seed(0)
    vit = VitSettings(size="custom", width=24, depth=2, heads=2, patch_size=8, in_channels=1)
    model = build(build_vit(vit), linear.Settings(), 3, tuning=tuned or full.Settings())
    return Segmentation(model, Labels({"a": (1,), "b": (2,)}, (0, 1, 2)))


def cut(image: np.ndarray[Any, Any], label: np.ndarray[Any, Any], size: int, where: Placement) -> tuple[Any, Any]:
    """Image and label of one patch."""
    return cut_image(image, size, where), cut_label(label, size, where)


def test_a_plain_patch_is_a_copy_and_what_lies_outside_is_air() -> None:
    image, label = cut(HU, LABEL, 16, Placement((20, 30)))
    assert np.array_equal(image.numpy(), HU[12:28, 22:38])
    assert np.array_equal(label.numpy(), LABEL[12:28, 22:38])
    image, label = cut(HU, LABEL, 64, Placement((20, 30)))
    assert np.array_equal(image.numpy()[12:52, 2:62], HU)
    assert (image[:12] == -1000).all()
    assert (label[:12] == 0).all()
    flipped, _ = cut(HU, LABEL, 16, Placement((20, 30), mirror=(True, False)))
    assert np.array_equal(flipped.numpy(), HU[12:28, 22:38][::-1])


def test_turning_and_scaling_sample_the_same_places() -> None:
    where = Placement((20.0, 30.0), angle=math.pi / 2)
    image, label = cut(HU, LABEL, 16, where)
    assert np.allclose(image.numpy(), np.rot90(HU[12:28, 22:38], 1), atol=0.1) or np.allclose(
        image.numpy(), np.rot90(HU[12:28, 22:38], -1), atol=0.1
    )
    turned = np.array_equal(label.numpy(), (image.numpy() > 0.5).astype(np.int64))
    assert turned, "image and label turn together"
    smooth = np.add.outer(np.arange(40), 2 * np.arange(60)).astype(np.int16)
    twice, _ = cut(smooth, LABEL, 16, Placement((20, 30), scale=2.0))
    steps = (np.arange(16) - 7.5) / 2
    assert np.allclose(twice.numpy(), np.add.outer(19.5 + steps, 2 * (29.5 + steps)), atol=0.01)
    outside, nothing = cut(HU, LABEL, 64, Placement((20, 30), scale=0.5))
    assert outside[0, 0] == -1000
    assert nothing[0, 0] == 0


@pytest.mark.parametrize("size", [8, 16, 48, 64])
def test_a_placement_stays_inside_and_holds_its_pixel(size: int) -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        y, x = int(rng.integers(40)), int(rng.integers(60))
        where = place(rng, off(), (40, 60), size, (y, x))
        marked = np.zeros((40, 60), np.uint8)
        marked[y, x] = 1
        assert cut(HU, marked, size, where)[1].sum() == 1
        for middle, side in zip(where.centre, (40, 60), strict=True):
            assert (size >= side and middle == side / 2) or size / 2 <= middle <= side - size / 2


@pytest.mark.parametrize("size", [8, 15, 16, 48, 64])
@pytest.mark.parametrize("chances", [{"rotate_p": 1}, {"scale_p": 1}, {"rotate_p": 1, "scale_p": 1, "scale": (0.2, 5)}])
def test_a_turned_and_scaled_patch_holds_its_pixel_too(size: int, chances: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    settings = off().model_copy(update=chances)
    for _ in range(300):
        y, x = int(rng.integers(40)), int(rng.integers(60))
        marked = np.zeros((40, 60), np.uint8)
        marked[y, x] = 1
        where = place(rng, settings, (40, 60), size, (y, x))
        image, label = cut(HU, marked, size, where)
        assert label.any(), f"{where} misses {y, x}"
        at = tuple(label.nonzero()[0].tolist())
        if where.scale < 1:  # the only sample of its pixel, so its very middle
            assert image[at] == pytest.approx(HU[y, x], abs=1)


def test_an_enlarged_pixel_lies_anywhere_in_the_patch() -> None:
    """A patch moved by no more than is needed would have half of such pixels on its border."""
    settings = off().model_copy(update={"rotate_p": 1.0, "scale_p": 1.0, "scale": (2.0, 2.0)})
    marked = np.zeros((200, 200), np.uint8)
    marked[100, 100] = 1
    image = marked.astype(np.int16)
    on_border = 0
    for seed in range(200):
        where = place(np.random.default_rng(seed), settings, (200, 200), 32, (100, 100))
        label = cut(image, marked, 32, where)[1]
        on_border += int(label.sum() > label[2:-2, 2:-2].sum())
    # An even draw has 1 - (28 / 32)^2 = 23 % of its pixels within 2 px of a border, corners turned inside some more.
    assert on_border < 90


@pytest.mark.parametrize("name", ["scale", "blur_sigma", "brightness", "contrast", "coarse", "gamma"])
@pytest.mark.parametrize("limits", ["[1.4, 0.7]", "[0, 1]", "[-1, 1]", "[.nan, 1]", "[1, .inf]"])
def test_a_range_the_wrong_way_round_is_refused_where_it_stands(tmp_path: Path, name: str, limits: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(f"folder: run\ndataset: data\naugmentation:\n  {name}: {limits}\n")
    with pytest.raises(SettingsError, match=rf"augmentation\.{name}: .*needs 0 < low <= high, got .*a\.yaml:4"):
        load(Settings, path)


def test_distortions_follow_the_seed_and_leave_a_finite_patch() -> None:
    patch = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
    chances = {name: 1.0 for name in Augmentation.model_fields if name.endswith("_p")}
    strong = Augmentation(**chances)  # type: ignore[arg-type]
    one, again, other = (distort(patch, np.random.default_rng(seed), strong) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.isfinite(one).all()
    assert torch.equal(distort(patch, np.random.default_rng(1), off()), patch)
    flat = torch.zeros(16, 16)
    assert torch.isfinite(distort(flat, np.random.default_rng(3), strong)).all()


def test_the_loss_is_dice_over_the_batch_plus_cross_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    made = method()
    labels = torch.zeros(2, 8, 8, dtype=torch.int64)
    labels[0, :4], labels[1, 2:3] = 1, 2
    logits = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(made.exported(), "forward", lambda image: logits)
    found = made.loss(Patches(torch.zeros(2, 1, 8, 8), labels, ("a", "b")), 0)
    share = logits.softmax(1)
    dices = []
    for c in (1, 2):  # background does not count
        truth = (labels == c).float()
        dices.append((2 * (share[:, c] * truth).sum() + 1e-5) / (share[:, c].sum() + truth.sum() + 1e-5))
    assert float(found["dice"]) == pytest.approx(1 - float(sum(dices)) / 2, abs=1e-5)
    picked = share.gather(1, labels[:, None]).log()
    assert float(found["ce"]) == pytest.approx(-float(picked.mean()), abs=1e-5)


def test_two_rates_and_no_group_for_what_is_frozen() -> None:
    groups = parameter_groups(method().exported(), 3e-4, 3e-5, full.Settings())
    assert [group["lr_multiplier"] for group in groups] == [1.0, pytest.approx(0.1)]
    made = method(frozen.Settings())
    groups = parameter_groups(made.exported(), 3e-4, 3e-5, frozen.Settings())
    assert len(groups) == 1
    counted = sum(p.numel() for p in groups[0]["params"])
    assert counted == sum(p.numel() for p in made.exported().decoder.parameters())


def test_slices_seen_together_share_all_but_the_noise() -> None:
    patch = torch.randn(24, 24, generator=torch.Generator().manual_seed(0))
    quiet = Augmentation(noise_p=0, blur_p=1, brightness_p=1, contrast_p=1, gamma_p=1)
    first, second = (distort(patch, np.random.default_rng(1), quiet, plane) for plane in (0, 1))
    assert torch.equal(first, second)
    noisy = off().model_copy(update={"noise_p": 1.0, "noise_variance": 1.0})
    first, second = (distort(patch, np.random.default_rng(1), noisy, plane) - patch for plane in (0, 1))
    assert not torch.equal(first, second)
    assert float(first.std()) == pytest.approx(float(second.std()), rel=0.2), "one variance"


def test_a_blur_darkens_no_border() -> None:
    blurred = distort(torch.full((16, 16), 3.0), np.random.default_rng(0), off().model_copy(update={"blur_p": 1.0}))
    assert torch.allclose(blurred, torch.full((16, 16), 3.0), atol=1e-5)


CONFIGS = sorted(path.stem for path in (Path(finetune.__file__).parent / "configs").glob("*.yaml"))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_packaged_config_says_only_what_differs_in_lines_that_can_be_read(name: str) -> None:
    text = find(f"{name}.yaml").read_text()
    assert max(map(len, text.splitlines())) <= 120
    assert not repeated(yaml.safe_load(text), Settings)


def repeated(given: dict[str, Any], model: type[BaseModel]) -> list[str]:
    """Keys of a YAML that hold the default."""
    found = []
    for key, value in given.items():
        default = model.model_fields[key].get_default(call_default_factory=True) if key != "base" else None
        if isinstance(default, BaseModel):
            same = getattr(default, "kind", None) == value.pop("kind", None)
            found += [f"{key}.{name}" for name in repeated(value, type(default))] if same else []
        elif key != "base" and default == (tuple(value) if isinstance(value, list) else value):
            found.append(key)
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_packaged_configs_are_found_by_name_and_valid(name: str) -> None:
    found = load(Settings, find(f"{name}.yaml"), ["folder=run", "dataset=data"])
    assert found.patches.size % found.model.patch_size == 0
    assert find(f"{name}.yaml").parent.parent.name == "downstream"
