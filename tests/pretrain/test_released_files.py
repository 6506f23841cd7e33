"""Files and folders that hold no backbone: each is named for what it is, with a remedy, and no code of it is run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pretrain.models.positions import PositionSettings
from pretrain.models.vit import VitSettings, build
from pretrain.released import ReleasedError, load_backbone, read

OLD = VitSettings(size="custom", width=128, depth=2, heads=2, patch_size=14, registers=0, mask_k_bias=False,
                  positions=PositionSettings(grid=4))  # fmt: skip


class Payload:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return print, ("code has run",)


def _linear(state: dict[str, Tensor]) -> Any:
    return {
        "state_dict": {f"module.{name}": t for name, t in state.items()} | {"module.head.weight": torch.ones(10, 128)}
    }


REFUSED: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "linear probe": (_linear, r"a classifier or linear probe; give the file from before.*\(it has 'head.weight'\)"),
    "fine-tuned": (lambda s: {"model": s | {"fc_norm.weight": torch.ones(128)}}, "fine-tuned to classify.*fc_norm"),
    "hf classifier": (lambda s: {"classifier.weight": torch.ones(3, 8), "vit.x": torch.ones(8)}, "a classifier or"),
    "decoder": (lambda s: {"model": {"decoder_embed.weight": torch.ones(2, 2)}}, "a decoder only; give the file with"),
    "convnext": (lambda s: {"downsample_layers.0.0.weight": torch.ones(1)}, "ConvNeXt; give a ViT's file"),
    "convnext hf": (lambda s: {"model.stages.0.layers.0.depthwise_conv.weight": torch.ones(1)}, "ConvNeXt"),
    "resnet": (lambda s: {"state_dict": {"module.base_encoder.conv1.weight": torch.ones(1)}}, r"ResNet"),
    "moco conv": (lambda s: {"patch_embed.proj.0.weight": torch.ones(1)}, "stem of several convolutions"),
    "swin": (lambda s: {"layers.0.blocks.0.attn.relative_position_bias_table": torch.ones(1)}, "Swin or BEiT"),
    "clip": (lambda s: {"visual.class_embedding": torch.ones(1)}, "CLIP"),
    "nnunet": (lambda s: {"network_weights": {}, "trainer_name": "x"}, "nnU-Net"),
    "code": (lambda s: {"model": Payload()}, r"would run code \(it names \S*print\)"),
    "whole module": (lambda s: nn.Linear(2, 2), "would run code"),
    "nan": (lambda s: s | {"norm.bias": torch.full((128,), torch.nan)}, "not finite in norm.bias"),
    "integers": (lambda s: s | {"norm.bias": torch.ones(128, dtype=torch.int8)}, "norm.bias as torch.int8"),
    "twice": (lambda s: s | {"module.cls_token": torch.ones(1, 1, 128)}, "several tensors of one name"),
    "oblong": (lambda s: s | {"pos_embed": torch.ones(1, 12, 128)}, "no square grid"),
    "two channels": (lambda s: s | {"patch_embed.proj.weight": torch.ones(128, 2, 14, 14)}, "build: in_channels"),
    "an extra": (lambda s: s | {"dist_token": torch.ones(1, 1, 128)}, "dist_token has no place"),
    "a lack": (lambda s: {k: v for k, v in s.items() if "1.norm1.bias" not in k}, r"blocks\.1\.norm1\.bias is missing"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_file_is_refused_by_name(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    make, says = REFUSED[name]
    torch.save(make(build(OLD).state_dict()), tmp_path / "wrong.pth")
    with pytest.raises(ReleasedError, match=says) as error:
        load_backbone(tmp_path / "wrong.pth")
    assert str(tmp_path / "wrong.pth") in str(error.value)
    assert "code has run" not in capsys.readouterr().out


def test_a_wrong_folder_is_refused_by_name(tmp_path: Path) -> None:
    def wrong(says: str, **files: Any) -> None:
        for name, content in files.items():
            name = {"config": "config.json", "index": "model.safetensors.index.json"}[name]
            (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
        with pytest.raises(ReleasedError, match=says):
            load_backbone(tmp_path)

    wrong("has a config.json but none of model.safetensors", config={})
    wrong("config.json is no whole JSON file", config="{")
    wrong("config.json holds a list", config=[])
    wrong("has no weight_map", config={}, index={})
    wrong("which is not in its own folder", index={"weight_map": {"a": "../a.safetensors"}})
    wrong("names a.safetensors, which is not there", index={"weight_map": {"a": "a.safetensors"}})
    save_file({"b": torch.ones(1)}, tmp_path / "a.safetensors")
    wrong("lacks 1 tensors, a first", index={"weight_map": {"a": "a.safetensors"}})
    save_file({"backbone.cls_token": torch.ones(1)}, tmp_path / "model.safetensors", {"format": "axial segmentation 1"})
    wrong("a segmentation model of `axial finetune`")
    with pytest.raises(ReleasedError, match="a step can only be chosen in a run folder"):
        read(tmp_path, 3)


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ("{not json", "no JSON object"),
        ("[1]", "no JSON object"),
        ('{"axial": "9", "model": {"later": 1}, "window": {}}', r"axial 9 export.*does not know: later: .*the version"),
    ],
)
def test_an_export_of_another_version_is_refused_by_name(tmp_path: Path, header: str, says: str) -> None:
    save_file(build(OLD).state_dict(), tmp_path / "export.safetensors", {"axial": header})
    with pytest.raises(ReleasedError, match=says):
        load_backbone(tmp_path / "export.safetensors")
