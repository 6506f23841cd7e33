"""A backbone that was trained on several HU windows as channels: exported, fine-tuned, used; or refused clearly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_curation import phantom
from downstream import finetune
from downstream.inference import head_scores
from downstream.model import load_model
from pretrain import export
from pretrain.data.window import HuWindow
from pretrain.models.vit import VitSettings, build
from pretrain.released import Released, load_backbone

THREE = HuWindow(low=(-1350.0, -160.0, -500.0), high=(150.0, 240.0, 1300.0), mean=(-600.0, 40.0, 400.0), std=300.0)
VIT = VitSettings.model_validate(
    {"size": "custom", "width": 24, "depth": 2, "heads": 2, "patch_size": 8, "in_channels": 3, "layerscale": None}
)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("backbone") / "export.safetensors"
    torch.manual_seed(0)
    released = Released(path, "made up", VIT, THREE, build(VIT).state_dict(), about={"step": 1, "corpus": "none"})
    export.write(released, path, heads=False)
    return path


def settings(folder: Path, backbone: Path, **changes: Any) -> finetune.Settings:
    phantom.write("nnunet", folder / "data", range(3), shape=(4, 40, 40), spacing=(20.0, 7.0, 8.0), organs=["liver"])
    given: dict[str, Any] = {
        "folder": folder / "run",
        "dataset": folder / "data",
        "backbone": backbone,
        "normalisation": "pretraining",
        "decoder": {"kind": "linear"},
        "steps": 2,
        "precision": "fp32",
        "split": {"val_fraction": 0.25},
        "patches": {"size": 32, "batch_size": 4, "workers": 1},
        "log": {"every": 1, "tensorboard": False},
    }
    (folder / "run").mkdir()
    return finetune.Settings.model_validate(given | changes)


def test_three_windows_reach_the_segmentation_model(
    tmp_path: Path, backbone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert load_backbone(backbone)[1] == THREE
    assert finetune.main(settings(tmp_path, backbone)).ok
    assert "HU -1350 to 150, -600.0 becomes 0 and 300.0 one; HU -160 to 240" in capsys.readouterr().out
    model, header = load_model(tmp_path / "run" / "model.safetensors")
    assert header.channels[0].window == THREE
    hu = np.random.default_rng(0).integers(-900, 900, (2, 32, 32)).astype(np.int16)
    ((_, got),) = head_scores(model, header, hu[None], 5.0)
    with torch.no_grad():
        assert torch.allclose(got, model(THREE.image(torch.from_numpy(hu))), atol=1e-5)


@pytest.mark.parametrize("shape", [(20, 27), (20, 50), (33, 9)])
def test_a_slice_smaller_than_the_patch_stands_in_air(tmp_path: Path, backbone: Path, shape: tuple[int, int]) -> None:
    """The same as a slice that was stored with that air around it, in every window."""
    assert finetune.main(settings(tmp_path, backbone, steps=1)).ok
    model, header = load_model(tmp_path / "run" / "model.safetensors")
    hu = np.random.default_rng(0).integers(-900, 900, (1, *shape)).astype(np.int16)
    grown = [max(0, 32 - side) for side in shape]
    pads = [(0, 0), *((more // 2, more - more // 2) for more in grown)]
    ((_, whole),) = head_scores(model, header, np.pad(hu, pads, constant_values=-1000)[None], 5.0)
    (_, (top, _), (left, _)) = pads
    ((_, got),) = head_scores(model, header, hu[None], 5.0)
    assert got.shape[-2:] == shape
    assert torch.equal(got, whole[..., top : top + shape[0], left : left + shape[1]])


def test_one_window_of_the_data_set_does_not_replace_three(tmp_path: Path, backbone: Path) -> None:
    with pytest.raises(ValueError, match=r"was trained on 3 as channels; use normalisation=pretraining"):
        finetune.main(settings(tmp_path, backbone, normalisation="dataset"))
