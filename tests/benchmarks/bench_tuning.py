"""What each way to tune a backbone costs: time of a step, what is kept for the backward pass, gradients and AdamW.

    python -m tests.benchmarks.bench_tuning [--size s] [--side 256] [--batch 2] [--turns 5]

The ways take turns, so that what else the machine does meets all of them; told is the least processor time of a step
over the turns, in seconds of all threads together.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor

from downstream import tuning
from downstream.decoders import linear
from downstream.model import SegmentationModel, build
from downstream.tuning import adapter, frozen, full, lora
from launch.settings import Settings
from pretrain.models.vit import VitSettings
from pretrain.models.vit import build as build_vit

WAYS: dict[str, Settings] = {
    "full": full.Settings(),
    "full, last 4 blocks": full.Settings(last=4),
    "lora, all layers, rank 16": lora.Settings(),
    "lora, qkv, rank 16": lora.Settings(targets=("qkv",)),
    "adapter, width 64": adapter.Settings(),
    "frozen": frozen.Settings(),
}


def kept(model: SegmentationModel, images: Tensor) -> int:
    """Bytes that the backward pass holds, beside parameters."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    found: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(images)
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="s")
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--turns", type=int, default=5)
    given = parser.parse_args()
    images = torch.randn(given.batch, 1, given.side, given.side)
    labels = torch.randint(0, 5, (given.batch, given.side, given.side))
    models, optimizers = {}, {}
    for name, chosen in WAYS.items():
        model = build(build_vit(VitSettings(size=given.size)), linear.Settings(), 5, tuning=chosen).train()
        models[name] = model
        optimizers[name] = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    for turn in range(given.turns + 1):  # the first is not counted
        for name, model in models.items():
            start = time.process_time()
            optimizers[name].zero_grad()
            torch.nn.functional.cross_entropy(model(images), labels).backward()
            optimizers[name].step()
            if turn:
                times[name].append(time.process_time() - start)
    print(f"{'':28}{'step':>9}{'of full':>9}{'kept':>11}{'grad + AdamW':>15}{'trained':>10}")
    for name, model in models.items():
        step = min(times[name])
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        print(
            f"{name:28}{step:7.2f} s{step / min(times['full']):9.2f}"
            f"{kept(model, images) / 2**20:7.0f} MiB{12 * trained / 2**20:11.1f} MiB{trained / 1e6:8.2f} M"
        )
    print(tuning.parameter_table(models["lora, all layers, rank 16"]))


if __name__ == "__main__":
    main()
