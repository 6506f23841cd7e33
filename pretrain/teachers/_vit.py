"""Teachers that are a `VisionTransformer`: of a published family, or of a run of our own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from launch.settings import plugins
from pretrain.data.window import HuWindow
from pretrain.methods import SourceError
from pretrain.models.vit import VisionTransformer, VitSettings
from pretrain.models.vit import build as build_vit
from pretrain.released import Released, ReleasedError, fit, read
from pretrain.teachers import Teacher, TeacherSettings, ranges

__all__ = ["Published", "build_teacher"]


@dataclass(frozen=True)
class Published:
    """What is known of a kind. What a file leaves open is taken from here; what it says is believed."""

    families: tuple[str, ...]  # of `pretrain.released_keys`, whose files it takes
    where: str = ""  # where such a file can be had
    heads: Mapping[int, int] = field(default_factory=dict)  # attention heads by width
    eps: float | None = None  # of the norms
    antialias: bool = False  # how a table of positions comes to another grid: see PositionSettings
    offset: float = 0.0
    bias: Callable[[int], bool] | None = None  # whether q, k and v have biases, by width; None: either will do

    def fits(self, found: Released) -> bool:
        """Whether it is a file of this kind."""
        same = self.bias is None or self.bias(found.settings.shape[0]) == found.settings.qkv_bias
        return found.family in self.families and same

    def settled(self, released: Released, window: HuWindow | None) -> Released:
        """The file with what it left open decided; `window` is that of its images, or None to believe the file."""
        settings, assumed = released.settings, set(released.assumed)
        change: dict[str, Any] = {}
        width, depth, heads = settings.shape
        if "heads" in assumed and self.heads.get(width, heads) != heads:
            change |= {"size": "custom", "width": width, "depth": depth, "heads": self.heads[width]}
        if "norm_eps" in assumed and self.eps is not None:
            change["norm_eps"] = self.eps
        if "interpolation" in assumed and settings.positions is not None:
            rule = {"antialias": self.antialias, "offset": self.offset}
            change["positions"] = settings.positions.model_copy(update=rule)
        known = {"heads": width in self.heads, "norm_eps": self.eps is not None, "interpolation": True, "window": True}
        return replace(
            released,
            settings=settings.model_copy(update=change),
            window=window or released.window,
            assumed=tuple(name for name in released.assumed if not known.get(name)),
        )


def build_teacher(
    settings: TeacherSettings, facts: Published, window: HuWindow | None, which: str = "teacher", encoder: str = "base"
) -> Teacher:
    """The teacher of a file or run on torch's default device; `window` is the kind's rule, None: the file says it."""
    path, kind = settings.weights, str(getattr(settings, "kind", ""))
    if not path.exists():
        where = settings.where or facts.where or "give the path of its weights"
        raise SourceError(f"{path} does not exist; {where}")
    key = (settings.step, which, encoder)
    found = _looked_at(path, _stamp(path), *key)
    _check_family(found, kind, facts)
    found = facts.settled(found, settings.window or window)
    network, built = _network(found, settings.block, settings.norm)

    def weights(say: Callable[[str], None]) -> dict[str, Tensor]:
        again = facts.settled(read(path, *key), settings.window or window)
        if again.settings != found.settings:
            raise ReleasedError(f"{path} is no longer the file that it was when the run began; give that one")
        state = fit(again, again.settings, say)
        return {name: state[name] for name in network.state_dict()}

    width, depth, heads = found.settings.shape
    last = f"{built.shape[1]} of {depth} blocks" + ("" if settings.norm else " and no final norm")
    return Teacher(
        network=network,
        dim=width,
        patch_size=found.settings.patch_size,
        in_channels=found.settings.in_channels,
        window=found.window,
        said=f"{kind}: {path.name} ({found.form}): {last}, width {width}, {heads} heads, patches of "
        f"{found.settings.patch_size}, {ranges(found.window)}",
        read=weights,
    )


@lru_cache(maxsize=32)
def _looked_at(path: Path, stamp: tuple[Any, ...], step: int | None, which: str, encoder: str) -> Released:
    """What a file says of itself, without its tensors; read again only when it changed."""
    with torch.device("cpu"):
        return replace(read(path, step, which, encoder), backbone={}, heads={})


def _stamp(path: Path) -> tuple[Any, ...]:
    """Changes when a file, or one in the folder, does."""
    files = [path] if path.is_file() else sorted(inner for inner in path.rglob("*") if inner.is_file())
    return tuple((file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in files)


def _check_family(found: Released, kind: str, facts: Published) -> None:
    if facts.fits(found):
        return
    every = {name: getattr(module, "PUBLISHED", None) for name, module in plugins("pretrain.teachers").items()}
    others = [name for name, other in every.items() if other is not None and other.fits(found)]
    remedy = f"kind: {' or '.join(others)} takes it" if others else "no kind of teacher takes it"
    raise ReleasedError(f"{found.path} is no file for a teacher of kind {kind}: it is of {found.form}; {remedy}")


def _network(found: Released, block: int, norm: bool) -> tuple[VisionTransformer, VitSettings]:
    """The blocks up to `block`, with the final norm or without."""
    settings = found.settings
    width, depth, heads = settings.shape
    if not -depth <= block < depth:
        raise ReleasedError(f"{found.path} has {depth} blocks, so there is no block {block}: give 0 to {depth - 1}")
    if block % depth + 1 < depth:
        shape = {"size": "custom", "width": width, "depth": block % depth + 1, "heads": heads}
        settings = settings.model_copy(update=shape)
    network = build_vit(settings)
    if not norm:
        network.norm = nn.Identity()  # type: ignore[assignment]
        network.cls_norm = network.local_cls_norm = None
    return network.requires_grad_(False).eval(), settings
