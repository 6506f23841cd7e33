"""Patch features of the slices of a probe, computed once for each backbone and kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from data_curation.aside import aside, sweep
from downstream.probe_cases import Kept
from launch.progress import progress
from pretrain.data.window import HuWindow
from pretrain.models.vit import VisionTransformer, VitSettings, build
from pretrain.released import load_backbone
from pretrain.watch.labelled import input_size, slice_patches
from pretrain.weights import digest

__all__ = ["RANDOM", "Looked", "Network", "look", "network"]

RANDOM = "random"
AT_ONCE = 8  # slices of a forward pass
VERSION = 1  # of the files


@dataclass(frozen=True)
class Network:
    """A backbone under test; `mark` tells its weights and window from others."""

    name: str
    model: VisionTransformer
    window: HuWindow
    mark: str


@dataclass(frozen=True)
class Looked:
    """What a backbone made of one scan: a file with `block N` float16 [S, h*w, D] and `classes` int32 [S, h*w].

    A class is the commonest label value of the patch, -1 where it is off the body.
    """

    kept: Kept
    path: Path
    grid: tuple[int, int]  # h, w
    patch: int  # pixels

    def features(self, block: int) -> Tensor:
        """[S, h*w, D], float32."""
        with safe_open(self.path, framework="pt") as file:
            found: Tensor = file.get_tensor(f"block {block}")
        return found.float()

    def classes(self) -> NDArray[np.int64]:
        """[S, h*w] label values."""
        with safe_open(self.path, framework="np") as file:
            return np.asarray(file.get_tensor("classes"), np.int64)


def network(given: str, like: VitSettings, window: HuWindow, seed: int, say: Callable[[str], None]) -> Network:
    """The backbone of a file or run folder; for `random` one of the settings `like` with weights drawn by `seed`."""
    if given == RANDOM:
        model = _random(like, seed)
        say(f"backbone random: {model.dim} channels, {len(model.blocks)} blocks, seed {seed}")
    else:
        model, window = load_backbone(Path(given).expanduser(), say=say)
    said = json.dumps([model.settings.model_dump(mode="json"), window.model_dump(mode="json")], sort_keys=True)
    weights = digest(model.state_dict()).numpy().tobytes()
    return Network(given, model.eval(), window, hashlib.sha256(weights + said.encode()).hexdigest()[:16])


def _random(settings: VitSettings, seed: int) -> VisionTransformer:
    with torch.device("meta"):
        model = build(settings)
    model = model.to_empty(device="cpu")
    model.init_weights(torch.Generator().manual_seed(seed))
    return model


def look(
    net: Network, kept: Sequence[Kept], blocks: Sequence[int], longer: int, folder: Path, device: torch.device
) -> list[Looked]:
    """Features of `blocks` of every scan, from `folder` where they lie ready. ValueError: no such block."""
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    model = net.model.to(device)
    found = [
        _look(net, model, one, blocks, longer, folder, device)
        for one in progress(kept, len(kept), f"features of {Path(net.name).name}", "scans")
    ]
    net.model.to("cpu")
    return found


@torch.no_grad()
def _look(
    net: Network,
    model: VisionTransformer,
    kept: Kept,
    blocks: Sequence[int],
    longer: int,
    folder: Path,
    device: torch.device,
) -> Looked:
    patch = model.patch_size
    size = input_size(kept.shape[1:], longer, patch)
    path = folder / kept.path.name
    key = json.dumps([VERSION, net.mark, kept.key, list(blocks), longer])
    looked = Looked(kept, path, (size[0] // patch, size[1] // patch), patch)
    if _is_ready(path, key):
        return looked
    hu, labels = kept.load()
    made: list[list[Tensor]] = [[] for _ in blocks]
    classes = []
    for start in range(0, len(hu), AT_ONCE):
        image, some = slice_patches(
            hu[start : start + AT_ONCE], labels[start : start + AT_ONCE], size, patch, net.window
        )
        classes.append(some)
        maps = model.intermediate(image.to(device).expand(-1, model.in_channels, -1, -1), blocks, reshape=False)
        for found, tokens in zip(made, maps, strict=True):
            found.append(tokens.to(torch.float16).cpu())
    tensors = {f"block {block}": torch.cat(found) for block, found in zip(blocks, made, strict=True)}
    tensors["classes"] = torch.from_numpy(np.concatenate(classes).astype(np.int32))
    with aside(path, lasting=False) as file:
        file.write(save(tensors, {"key": key}))
    return looked


def _is_ready(path: Path, key: str) -> bool:
    try:
        with safe_open(path, framework="pt") as file:
            return bool((file.metadata() or {}).get("key") == key)
    except (OSError, SafetensorError):
        return False
