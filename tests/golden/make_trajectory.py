"""Runs the official DINOv3 trainer on a CPU with a tiny model and writes down what it did, step by step.

    python -m tests.golden.make_trajectory --peer DIR [--site DIR] [--only plain giant]

DIR of `--peer` is your copy of github.com/facebookresearch/dinov3 (its numbers here are those of commit 6876159), that
of `--site` a folder with what it imports (torchvision, omegaconf, torchmetrics, termcolor), where they are not
installed. The official loop `dinov3.train.train.do_train` runs as it is. From outside are replaced: what it takes its
batches from and logs to, the first weights, CUDA calls, FSDP (here plain gradients, averaged over ranks), compilation,
and the size of the model. The numbers are single-precision ones.

Written are tests/golden/trajectory_*.npz: `masks` [steps, ranks, 2B, bytes], a row a step of `losses` (unweighted, as
the official code logs them, mean over ranks), `norms` (of the gradients before clipping), `rates`, and of each network
`<network>.samples` [steps, tensors, numbers] and `<network>.norms` after the step. `names` says what the columns are.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.golden import trajectory
from tests.golden.trajectory import DEPTH, HEAD, HEADS, IMAGES, LOCALS, STEPS, VARIANTS, WIDTH, Variant

LOSSES = ("total_loss", "dino_global_crops_loss", "dino_local_crops_loss", "koleo_loss", "ibot_loss", "gram_loss")
NORMS = ("backbone_grad_norm", "dino_head_grad_norm", "ibot_head_grad_norm")
RATES = ("lr", "last_layer_lr", "wd", "mom")


def reach(peer: Path, site: Path | None) -> None:
    """Make the official packages importable; torchvision's own kernels are not needed, but their names are."""
    sys.path[:0] = [str(folder) for folder in (peer, site) if folder]
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    globals()["_library"] = library  # it lives as long as somebody holds it


def _config(variant: Variant, folder: str) -> Any:
    """The default YAML with the variant's settings; an epoch is one step."""
    from dinov3.configs import get_default_config
    from dinov3.configs.config import apply_scaling_rules_to_cfg
    from omegaconf import OmegaConf

    head = {
        "head_n_prototypes": HEAD["prototypes"],
        "head_hidden_dim": HEAD["hidden"],
        "head_bottleneck_dim": HEAD["bottleneck"],
    }
    common = {
        "student": {"arch": "vit_recorded"},
        "dino": head,
        "ibot": head,
        "train": {"OFFICIAL_EPOCH_LENGTH": 1, "batch_size_per_gpu": IMAGES // variant.ranks, "output_dir": folder},
        "optim": {"epochs": STEPS},
        "crops": {
            "global_crops_size": 64,
            "local_crops_size": 32,
            "local_crops_number": LOCALS,
            "gram_teacher_crops_size": variant.gram_crops,
        },
        "evaluation": {"eval_period_iterations": 0},
        "checkpointing": {"period": 10**9},
    }
    return apply_scaling_rules_to_cfg(OmegaConf.merge(get_default_config(), common, dict(variant.theirs)))


def _batches(variant: Variant, rank: int) -> list[dict[str, Any]]:
    """Recorded crops, and masks as the official collation makes them."""
    from dinov3.data import MaskingGenerator, collate_data_and_cast

    generator = MaskingGenerator(input_size=(4, 4), max_num_patches=8)
    images, found = IMAGES // variant.ranks, []
    for step in range(STEPS):
        random.seed(100 * step + rank)
        np.random.seed(100 * step + rank)  # noqa: NPY002  (the official masks draw from it)
        crops = {kind: x.unflatten(0, (-1, images)) for kind, x in trajectory.crops(variant, step, rank).items()}
        names = {"global": "global_crops", "local": "local_crops", "gram": "gram_teacher_crops"}
        samples = [({names[kind]: list(x[:, i]) for kind, x in crops.items()}, ()) for i in range(images)]
        found.append(
            collate_data_and_cast(
                samples,
                mask_ratio_tuple=(0.1, 0.5),
                mask_probability=0.5,
                dtype=torch.float32,
                n_tokens=16,
                mask_generator=generator,
            )
        )
    return found


class _Recorder:
    """Stands where the official code has its metric logger: hands out the batches and writes down what follows."""

    def __init__(self, model: nn.Module, variant: Variant) -> None:
        self.model, self.variant = model, variant
        self.metrics: list[dict[str, float]] = []
        self.after: list[dict[str, Any]] = []
        self.meters: dict[str, Any] = {}

    def log_every(self, batches: Iterable[Any], *_: object, **__: object) -> Iterator[Any]:
        for step, batch in enumerate(batches):
            self.metrics.append({})
            if self.variant.draws:
                torch.manual_seed(trajectory.step_of(step))
            yield batch
            self.after.append(
                {
                    name: trajectory.picked(name, dict(network.named_parameters()))
                    for name in ("student", "teacher", "gram_teacher")
                    if (network := getattr(self.model, name, None)) is not None
                }
            )

    def update(self, **values: Any) -> None:
        self.metrics[-1] |= {name: float(value) for name, value in values.items()}

    def synchronize_between_processes(self) -> None:
        """Nothing is to be done."""


def _loaded(model: Any) -> None:
    """What `init_weights` would do, with the recorded weights."""
    for part in ("backbone", "dino_head", "ibot_head"):
        model.student[part].init_weights()
    model.teacher.load_state_dict(model.student.state_dict())
    if model.has_gram_teacher:
        model.gram_teacher.backbone.load_state_dict(model.student.backbone.state_dict())
        model.gram_teacher_initialized = True
    for name in ("student", "teacher", "gram_teacher"):
        network = getattr(model, name, None)
        if network is not None:
            shapes = {key: p.shape for key, p in network.named_parameters()}
            network.load_state_dict(trajectory.weights(name, shapes), strict=False)


def _built(config: Any, variant: Variant) -> Any:
    """The official model, small, on the CPU, without FSDP."""
    from dinov3.models import vision_transformer
    from dinov3.train.ssl_meta_arch import SSLMetaArch

    def small(**given: Any) -> nn.Module:
        sizes = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS, "ffn_ratio": 4}
        return vision_transformer.DinoVisionTransformer(**given, **sizes, pos_embed_rope_dtype=variant.rope_dtype)

    vision_transformer.__dict__["vit_recorded"] = small
    with mock.patch.object(nn.Module, "compile"), torch.device("meta"):
        model = SSLMetaArch(config)
    model.to_empty(device="cpu")
    model.init_weights = lambda: _loaded(model)

    def backward(loss: Tensor) -> None:
        loss.backward()
        for parameter in model.student.parameters() if dist.get_world_size() > 1 else ():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()

    model.backprop_loss = backward
    return model


def _mean(reduce: Any) -> Any:
    """gloo has no mean over ranks."""

    def reduced(values: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None) -> None:
        reduce(values, op=dist.ReduceOp.SUM if op == dist.ReduceOp.AVG else op, group=group)
        if op == dist.ReduceOp.AVG:
            values /= dist.get_world_size()

    return reduced


def _gathered(gather: Any) -> Any:
    """gloo gathers no numbers without a dimension."""
    return lambda out, value, group=None: gather(out, value.reshape(1), group=group)


def run(name: str, rank: int, address: str) -> dict[str, Any]:
    """One variant through the official loop, on this rank."""
    import dinov3.train.train as official
    from dinov3.distributed import torch_distributed_wrapper as wrapper

    variant = VARIANTS[name]
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=variant.ranks)
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(wrapper, "_DEFAULT_PROCESS_GROUP", dist.group.WORLD),
    ):
        config, batches = _config(variant, folder), _batches(variant, rank)
        model = _built(config, variant)
        recorder = _Recorder(model, variant)
        with (
            mock.patch.object(Tensor, "cuda", lambda self, *_, **__: self),
            mock.patch.object(dist, "all_reduce", _mean(dist.all_reduce)),
            mock.patch.object(dist, "all_gather_into_tensor", _gathered(dist.all_gather_into_tensor)),
            mock.patch.object(official, "MetricLogger", return_value=recorder),
            mock.patch.object(official, "build_multi_resolution_data_loader_from_cfg", return_value=batches),
        ):
            official.do_train(config, model)
    masks = torch.from_numpy(np.stack([trajectory.packed(batch["collated_masks"]) for batch in batches]))
    every = [torch.empty_like(masks) for _ in range(variant.ranks)]
    dist.all_gather(every, masks)
    dist.destroy_process_group()
    return _arrays(recorder, torch.stack(every, 1).numpy())


def _arrays(recorder: _Recorder, masks: Any) -> dict[str, Any]:
    columns = {
        key: [name for name in names if name in recorder.metrics[0]]
        for key, names in (("losses", LOSSES), ("norms", NORMS), ("rates", RATES))
    }
    arrays: dict[str, Any] = {
        key: np.array([[row[name] for name in names] for row in recorder.metrics]) for key, names in columns.items()
    }
    for network in recorder.after[0]:
        for index, what in enumerate(("samples", "norms")):
            arrays[f"{network}.{what}"] = np.stack([row[network][index] for row in recorder.after])
        columns[network] = sorted(key for key, _ in getattr(recorder.model, network).named_parameters())
    return {**arrays, "masks": masks, "names": json.dumps(columns)}


def _rank(rank: int, name: str, arguments: argparse.Namespace, address: str) -> None:
    reach(arguments.peer, arguments.site)
    torch.set_num_threads(1)
    arrays = run(name, rank, address)
    if rank == 0:
        path = arguments.out / f"trajectory_{name}.npz"
        np.savez_compressed(path, **arrays)
        print(f"{path}: {path.stat().st_size:,} bytes, losses {arrays['losses'][:, 0].round(4).tolist()}")
        print(f"  norms {arrays['norms'].round(2).tolist()}")


def main() -> None:
    """Each variant in fresh processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, required=True, help="folder that holds the official package dinov3")
    parser.add_argument("--site", type=Path, help="folder with the packages it needs, where they are not installed")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent, help="where the files go")
    parser.add_argument("--only", nargs="*", choices=list(VARIANTS), default=list(VARIANTS), help="which runs")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for name in arguments.only:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
        torch.multiprocessing.spawn(_rank, (name, arguments, address), nprocs=VARIANTS[name].ranks)


if __name__ == "__main__":
    main()
