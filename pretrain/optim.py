"""The optimizer of DINOv3: layer-wise learning rates, weight decay on matrices, gradients clipped part by part."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from launch.settings import Settings
from pretrain.schedule import Length, NotNegative, Schedule, Schedules, scale_lr, whole

__all__ = [
    "Beta",
    "Multipliers",
    "OptimSettings",
    "build_optimizer",
    "clip_gradients",
    "multipliers",
    "param_groups",
]

_TOKENS = ("cls_token", "storage_tokens", "mask_token", "pos_embed")
Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimSettings(Settings):
    """AdamW and what it is told at each step."""

    lr: NotNegative = Field(
        Schedule(peak=1e-3, end=1e-6, warmup=0.1), description="learning rate, before the rule for the batch size"
    )
    lr_rule: Literal["sqrt_wrt_1024", "none"] = Field(
        "sqrt_wrt_1024", description="DINOv3 multiplies by 4 sqrt(images a step / 1024); none: the rate is what it says"
    )
    weight_decay: NotNegative = Field(Schedule(peak=0.04), description="decoupled weight decay of matrices and tokens")
    exclude_tokens: bool = Field(
        False, description="no weight decay on class, register and mask tokens (DINOv3 has it)"
    )
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="decay of Adam's two averages")
    eps: float = Field(1e-8, gt=0, description="Adam's epsilon")
    layer_decay: float = Field(
        0.9, gt=0, le=1, description="factor of the learning rate from each block to the one before"
    )
    patch_embed_lr: float = Field(0.2, gt=0, description="further factor for the patch embedding")
    freeze_last_layer: Length = Field(
        0, description="first steps, or share of the run, in which the heads' prototypes stand still"
    )
    freeze_backbone: Length = Field(
        0,
        description="first steps, or share of the run, in which the backbone stands still and new heads find their "
        "place on loaded weights",
    )

    def schedules(self, steps: int, batch: int) -> Schedules:
        """The schedules of a run of ``steps`` with ``batch`` images a step on all ranks together."""
        lr, factor = self.lr.over(steps), scale_lr(1.0, batch, self.lr_rule)
        scaled: dict[str, Any] = {"peak": lr.peak * factor, "start": lr.start * factor}
        if lr.values is not None:
            scaled["values"] = tuple(value * factor for value in lr.values)
        if lr.end is not None:
            scaled["end"] = lr.end * (factor if lr.form == "v2" else 1.0)  # v1 leaves the end as it is
        frozen = [whole(length, steps) for length in (self.freeze_last_layer, self.freeze_backbone)]
        return Schedules(lr.model_copy(update=scaled), self.weight_decay.over(steps), *frozen)


class Multipliers(NamedTuple):
    """What a parameter makes of the learning rate and the weight decay."""

    lr: float
    wd: float
    is_last_layer: bool


def multipliers(module: nn.Module, settings: OptimSettings) -> dict[str, Multipliers]:
    """By parameter name within ``module``. A module with ``blocks`` gets layer-wise rates, any other the full rate."""
    blocks = getattr(module, "blocks", None)
    depth = len(blocks) if isinstance(blocks, nn.ModuleList) else None
    return {name: _of(name, depth, settings) for name, p in module.named_parameters() if p.requires_grad}


def _of(name: str, depth: int | None, settings: OptimSettings) -> Multipliers:
    lr = 1.0
    if depth is not None:
        block = re.match(r"blocks\.(\d+)\.", name)
        layer = depth + 1
        if block:
            layer = int(block[1]) + 1
        elif name in _TOKENS or name.startswith("patch_embed."):
            layer = 0
        lr = settings.layer_decay ** (depth + 1 - layer)
        if name.startswith("patch_embed."):
            lr *= settings.patch_embed_lr
    free = name.endswith("bias") or "norm" in name or "gamma" in name or (settings.exclude_tokens and name in _TOKENS)
    return Multipliers(lr, 0.0 if free else 1.0, "last_layer" in name)


def param_groups(student: nn.Module, settings: OptimSettings) -> list[dict[str, object]]:
    """The optimizer's groups: parameters of one part with equal multipliers together, in order of appearance.

    The parts of a student are its children: backbone and heads, or backbone and decoder.
    """
    loose = [name for name, _ in student.named_parameters(recurse=False)]
    assert not loose, f"{loose} belong to no part of the student"
    groups: dict[tuple[str, Multipliers], list[nn.Parameter]] = {}
    for part, module in student.named_children():
        parameters = dict(module.named_parameters())
        for name, factors in multipliers(module, settings).items():
            groups.setdefault((part, factors), []).append(parameters[name])
    return [
        {
            "params": parameters,
            "lr_multiplier": m.lr,
            "wd_multiplier": m.wd,
            "is_last_layer": m.is_last_layer,
            "is_backbone": part == "backbone",
        }
        for (part, m), parameters in groups.items()
    ]


def build_optimizer(student: nn.Module, settings: OptimSettings) -> torch.optim.AdamW:
    """AdamW over the trainable parameters, one fused kernel a group; rates come from `Schedules.apply` at each step."""
    groups = param_groups(student, settings)
    fused = all(p.device.type in {"cpu", "cuda"} for p in student.parameters())
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=settings.betas, eps=settings.eps, weight_decay=0.0, fused=fused)
    optimizer.register_step_pre_hook(_without_frozen)
    return optimizer


def _without_frozen(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Hide the gradients of frozen groups from the step: Adam's averages of them begin when they first move."""
    for group in optimizer.param_groups:
        if group.get("frozen"):
            for parameter in group["params"]:
                parameter.grad = None


@torch.no_grad()
def clip_gradients(student: nn.Module, largest: float | None) -> dict[str, Tensor]:
    """Scales the gradients of each part to a norm of at most ``largest``; its norm before, on the device, by name.

    With None it only measures. Never waits for the device. A norm that is not finite makes that part's gradients so
    too: look before stepping.
    """
    norms = {}
    for part, module in student.named_children():
        parameters = [p for p in module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norms[part] = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if largest is not None and parameters:
            torch.nn.utils.clip_grads_with_norm_(parameters, largest, norms[part])
    return norms
