"""The official DINOv3 code, imported from a folder the user has, as a yardstick; nothing of it is edited or copied.

    peer = load(Path("dinov3"), site=Path("site-packages-of-torchvision"))
    step = build_step(peer, settings, states, device)      # our settings and weights, their networks and losses

Only the calls that a machine without a GPU cannot make are replaced, in this process and from outside: `Tensor.cuda`
returns the tensor itself, and their networks are compiled by their own functions but not wrapped by FSDP, which they
ask for on CUDA only. On a GPU their own preparation runs as it is, in a group of one process.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.data.batch import Batch
from pretrain.settings import Settings

__all__ = ["PeerError", "build_step", "config", "load"]

_ARCH = {"s": "vit_small", "b": "vit_base", "l": "vit_large"}
_OPS = "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
Step = Callable[[Batch], dict[str, float]]


class PeerError(ValueError):
    """The official code is not where the user said, or cannot do what ours was told to do."""


def load(folder: Path, site: Path | None = None) -> ModuleType:
    """Import the package `dinov3` that lies in `folder`; `site` may hold what it needs and this Python lacks.

    torchvision's compiled operators do not load beside every build of torch; it then still imports, and its image
    transforms work, once the schemas of the two operators it looks for are declared.
    """
    if not (folder / "dinov3" / "__init__.py").exists():
        raise PeerError(
            f"{folder} holds no package `dinov3`: give the folder of a checkout of facebookresearch/dinov3, "
            "the one that hubconf.py lies in"
        )
    sys.path[:0] = [str(folder), *([str(site)] if site else [])]
    try:
        import torchvision  # noqa: F401
    except ImportError as error:
        raise PeerError(
            f"the official code needs torchvision ({error}); install it or name its folder: --peer-site DIR"
        ) from error
    except RuntimeError:  # "operator torchvision::nms does not exist"
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for schema in (_OPS, "q" + _OPS):
            library.define(schema)
        _KEPT.append(library)
    try:
        importlib.import_module("dinov3.train.ssl_meta_arch")
    except ImportError as error:
        raise PeerError(f"the official code in {folder} does not import: {error}; give --peer-site DIR") from error
    return importlib.import_module("dinov3")


_KEPT: list[Any] = []  # a library's operators last as long as it does


def config(settings: Settings) -> Any:
    """Their configuration of the same step. Raises PeerError for settings that their code does not have."""
    model, terms, crops = settings.model, settings.method.active, settings.data.crops  # type: ignore[attr-defined]
    odd = {
        "model.size is not s, b or l": model.size not in _ARCH,
        "model.in_channels is not 3": model.in_channels != 3,
        "model.ffn is not mlp": model.ffn != "mlp",
        "terms are not dino, ibot, koleo": set(terms) != {"dino", "ibot", "koleo"},
        "crops are mixed": len(crops.shapes) > 1,
        "data.crops.n_local is 0": not crops.n_local,
    }
    if any(odd.values()):
        raise PeerError(
            f"the official code has no such step: {', '.join(text for text, is_odd in odd.items() if is_odd)}"
        )
    made = importlib.import_module("dinov3.configs").get_default_config()
    for name in ("dino", "ibot"):
        head = terms[name].head
        made[name].update(
            head_n_prototypes=head.prototypes, head_bottleneck_dim=head.bottleneck,
            head_hidden_dim=head.hidden, head_nlayers=head.layers,
        )  # fmt: skip
    made.student.update(
        arch=_ARCH[model.size], drop_path_rate=model.drop_path, n_storage_tokens=model.registers,
        mask_k_bias=model.mask_k_bias, norm_layer="layernormbf16", layerscale=model.layerscale,
        pos_embed_rope_rescale_coords=model.rope.rescale,
    )  # fmt: skip
    made.crops.update(
        global_crops_size=crops.global_size, local_crops_size=crops.local_size, local_crops_number=crops.n_local
    )
    made.train.batch_size_per_gpu = settings.data.batch_size
    made.compute_precision.param_dtype = settings.precision
    made.optim.update(layerwise_decay=settings.optim.layer_decay, clip_grad=settings.clip or 0.0)
    return made


def build_step(settings: Settings, states: Any, device: torch.device, compiled: bool) -> Step:
    """One step of theirs, from data to moving average, as a function of our batch; it returns their losses.

    `states` are our initial weights; `compiled` is their `train.compile`.
    """
    cfg = config(settings)
    cfg.train.compile = compiled
    _one_process(device)
    arch = importlib.import_module("dinov3.train.ssl_meta_arch")
    with torch.device("meta"):
        model = arch.SSLMetaArch(cfg)
    _prepare(model, cfg, device)
    model.init_weights()
    _fill(model, states)
    model.train()
    loop = importlib.import_module("dinov3.train.train")
    optimizer = loop.build_optimizer(cfg, model.get_params_groups())
    optim, batch_size = settings.optim, settings.data.batch_size
    lr = optim.schedules(settings.steps, batch_size).lr.peak
    decay, method = optim.weight_decay.peak, settings.method
    momentum = method.momentum.peak  # type: ignore[attr-defined]
    heat = method.active["dino"].teacher_temperature.peak  # type: ignore[attr-defined]

    def step(batch: Batch) -> dict[str, float]:
        loop.apply_optim_scheduler(optimizer, lr, decay, lr)
        optimizer.zero_grad(set_to_none=True)
        total, terms = model.forward_backward(_data(batch, settings), teacher_temp=heat, iteration=0)
        if cfg.optim.clip_grad:
            for name, part in model.student.items():
                norm = torch.nn.utils.clip_grad_norm_(part.parameters(), max_norm=cfg.optim.clip_grad)
                terms[f"{name}_grad_norm"] = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()
        everyone = total.new_empty(1)
        dist.all_gather_into_tensor(everyone, total.detach()[None])
        assert not everyone.isnan().any()
        optimizer.step()
        model.update_ema(momentum)
        said = {
            name: float(torch.as_tensor(value).detach()) for name, value in terms.items()
        }  # as their logger does at every step
        local, both = cfg.crops.local_crops_number * 2, cfg.crops.local_crops_number * 2 + 2
        return {
            "dino": local / both * said["dino_local_crops_loss"] + 2 / both * said["dino_global_crops_loss"],
            "ibot": said["ibot_loss"],
            "koleo": 0.1 * 2 * said["koleo_loss"],
            "norm": sum(said[f"{name}_grad_norm"] ** 2 for name in model.student) ** 0.5 if settings.clip else 0.0,
        }

    return step


def _one_process(device: torch.device) -> None:
    """A group of one, which their Sinkhorn asks for, told to their own module that keeps it."""
    store = dist.FileStore(tempfile.mkstemp()[1], 1)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=0, world_size=1)
    wrapper = importlib.import_module("dinov3.distributed.torch_distributed_wrapper")
    wrapper._DEFAULT_PROCESS_GROUP = dist.group.WORLD  # type: ignore[attr-defined]
    if device.type == "cpu":
        torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign,assignment]


def _prepare(model: Any, cfg: Any, device: torch.device) -> None:
    """Compile and place: by their own call on a GPU, by the parts of it that a CPU has elsewhere."""
    if device.type == "cuda":
        model.prepare_for_distributed_training()
        return
    parallel = importlib.import_module("dinov3.fsdp.ac_compile_parallelize")
    for networks in (model.student, model.model_ema) if cfg.train.compile else ():
        for name in networks:
            if name == "backbone":
                parallel.compile_transformer(cfg, networks[name])
            else:
                networks[name] = parallel.wrap_compile_block(
                    networks[name], use_cuda_graphs=False, is_backbone_block=False
                )
    model.to_empty(device=device)
    # They make the angles in bf16 whatever is asked; in float32 they cost a CPU less and agree with ours.
    for networks in (model.student, model.model_ema):
        rope = networks.backbone.rope_embed
        rope.dtype, rope.periods = torch.float32, rope.periods.float()


@torch.no_grad()
def _fill(model: Any, states: Mapping[str, Mapping[str, Mapping[str, Tensor]]]) -> None:
    """Our weights in their networks; the names are the same."""
    from pretrain.parallel import fill

    for ours, theirs in (("student", model.student), ("teacher", model.model_ema)):
        for name, state in states[ours].items():
            own = theirs[name].state_dict()
            plain = {key.replace("_orig_mod.", ""): value for key, value in own.items()}
            assert plain.keys() == state.keys(), sorted(plain.keys() ^ state.keys())
            fill(_Named(plain), state)  # type: ignore[arg-type]


class _Named:
    """What `fill` needs of a module."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self._state = state

    def state_dict(self) -> dict[str, Tensor]:
        return self._state


def _data(batch: Batch, settings: Settings) -> dict[str, Any]:
    """Our batch under their names; crops in their parameters' precision, as their collation has them."""
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    return {
        "collated_global_crops": batch.global_crops.to(dtype),
        "collated_local_crops": batch.local_crops.to(dtype),
        "collated_masks": batch.masks,
        "mask_indices_list": batch.mask_indices,
        "masks_weight": batch.mask_weights,
        "n_masked_patches": torch.full((1,), len(batch.mask_indices), dtype=torch.long),
        "upperbound": len(batch.mask_indices),
        "global_batch_size": settings.data.batch_size,
    }
