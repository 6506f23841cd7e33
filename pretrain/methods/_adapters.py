"""From each teacher's features to the student's width: maps fitted once, or trained as in the paper."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from launch.settings import Settings
from pretrain.align import AlignError, Map, Moments, fit_gcca, fit_pca, fit_recon
from pretrain.models.layers import init_linear

__all__ = ["KINDS", "AdapterSettings", "Adapters", "Features", "Maps", "apply_maps", "empty_maps", "fit_maps"]

KINDS = ("patches", "cls")
Maps = dict[str, dict[str, dict[str, Tensor]]]
"""maps["patches"]["mae"]: weight [D_S, D_m] and bias [D_S]."""
Features = Mapping[str, Sequence[Tensor]]
"""By kind, of each teacher the tokens [B, N, D_m] (patches) or [B, 1, D_m] (cls) of the same images."""


class AdapterSettings(Settings):
    """A linear map and a LayerNorm for each teacher."""

    kind: Literal["gcca", "pca", "recon", "joint"] = Field(
        "gcca",
        description="gcca: what the teachers share, in closed form; pca: each teacher's largest components; recon: "
        "what gives the teacher's features back best; joint: trained by the distillation itself, as published",
    )
    slices: int = Field(1024, ge=1, description="slices on which the maps are fitted before the first step")
    tokens: int = Field(64, ge=1, description="patches of a slice that count in the fit, evenly spread, at most")
    spread: bool = Field(
        True, description="gcca and pca: turn the maps so that no channel stands for more of the target than another"
    )
    affine: bool = Field(False, description="joint: the LayerNorm has a factor and a bias of its own")

    @model_validator(mode="after")
    def _belong_together(self) -> AdapterSettings:
        if self.affine and self.kind != "joint":
            raise ValueError(f"affine belongs to kind: joint; with {self.kind} nothing would train it")
        return self


class Adapters(nn.Module):
    """Trainable maps, one for each teacher and kind of token."""

    def __init__(self, kinds: Sequence[str], widths: Mapping[str, int], dim: int, affine: bool) -> None:
        super().__init__()
        self.maps = nn.ModuleDict(
            {f"{kind}_{name}": nn.Linear(width, dim) for kind in kinds for name, width in widths.items()}
        )
        self.norms = nn.ModuleDict({name: nn.LayerNorm(dim, elementwise_affine=affine) for name in self.maps})
        self._names = tuple(widths)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fills every parameter."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                init_linear(module)
            elif isinstance(module, nn.LayerNorm) and module.elementwise_affine:
                module.weight.fill_(1)
                module.bias.zero_()

    def forward(self, features: Features) -> dict[str, list[Tensor]]:
        """Tokens of each teacher in the student's width, by kind."""
        return {
            kind: [self._one(f"{kind}_{name}", x) for name, x in zip(self._names, given, strict=True)]
            for kind, given in features.items()
        }

    def _one(self, name: str, x: Tensor) -> Tensor:
        return self.norms[name](self.maps[name](x))  # type: ignore[no-any-return]


def empty_maps(kinds: Sequence[str], widths: Mapping[str, int], dim: int, device: torch.device) -> Maps:
    """Maps on `device`, all NaN until they are fitted or restored."""

    def nan(*shape: int) -> Tensor:
        return torch.full(shape, math.nan, device=device)

    return {kind: {n: {"weight": nan(dim, w), "bias": nan(dim)} for n, w in widths.items()} for kind in kinds}


def apply_maps(maps: Mapping[str, Mapping[str, Tensor]], features: Sequence[Tensor]) -> list[Tensor]:
    """Features [B, N, D_m] of each teacher to [B, N, D_S], each token of mean 0 and variance 1."""
    with torch.autocast(features[0].device.type, enabled=False):
        mapped = [F.linear(x, m["weight"], m["bias"]) for x, m in zip(features, maps.values(), strict=True)]
        return [F.layer_norm(x, x.shape[-1:]) for x in mapped]


def fit_maps(maps: Maps, settings: AdapterSettings, features: Iterator[Features], say: Callable[[str], None]) -> None:
    """Fit the maps to the first of the features and write them into `maps`, the same on every rank (a collective)."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    samples: dict[str, list[list[Tensor]]] = {kind: [] for kind in maps}
    moments = {kind: _moments(maps[kind]) for kind in maps}
    slices = 0
    while slices < settings.slices:
        given = next(features)
        for kind, tokens in given.items():
            images, count = tokens[0].shape[:2]
            step = -(-count // settings.tokens)
            first = slices // (images * ranks) % step  # so that all positions have their turn
            rows = [x[:, first::step].flatten(0, 1) for x in tokens]
            if settings.kind == "recon":
                samples[kind].append(rows)
            moments[kind].add(rows, images)
        slices += images * ranks
    for kind in maps:
        dim = next(iter(maps[kind].values()))["weight"].shape[0]
        try:
            fitted = _fit(settings, moments[kind].reduce(), samples[kind], dim)
        except AlignError as error:
            named = ", ".join(f"{number} is {name}" for number, name in enumerate(maps[kind]))
            said = f"the {kind} of {settings.slices} slices (method.adapter.slices)"
            raise AlignError(f"adapters cannot be fitted to {said}: {error} (teachers: {named})") from error
        for own, found in zip(maps[kind].values(), fitted, strict=True):
            own["weight"].copy_(found.weight)
            own["bias"].copy_(found.bias)
            if ranks > 1:  # one rank's result for all, should their processors round differently
                dist.broadcast(own["weight"], 0)
                dist.broadcast(own["bias"], 0)
    say(f"adapters: {settings.kind}, fitted on {slices:,} slices")


def _moments(maps: Mapping[str, Mapping[str, Tensor]]) -> Moments:
    weights = [map_["weight"] for map_ in maps.values()]
    return Moments([weight.shape[1] for weight in weights], weights[0].device)


def _fit(settings: AdapterSettings, moments: Moments, samples: Sequence[Sequence[Tensor]], dim: int) -> list[Map]:
    if settings.kind == "gcca":
        return fit_gcca(moments, dim, spread=settings.spread)
    if settings.kind == "pca":
        return fit_pca(moments, dim, spread=settings.spread)
    return fit_recon([_gathered(torch.cat(rows)) for rows in zip(*samples, strict=True)], dim, seed=0)[0]


def _gathered(rows: Tensor) -> Tensor:
    """The rows of all ranks, in their order."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows)
    return torch.cat(parts)
