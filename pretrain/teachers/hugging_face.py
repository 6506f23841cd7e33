"""Any vision transformer that the package transformers knows, by its name on the hub or from a folder.

Nothing of a repository is run: what needs code of its own is refused. Where the family has a kind of its own
(`dinov2`, `mae`), that one is better: it can leave patches out.
"""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pretrain.methods import Source, SourceError
from pretrain.models.vit import Features
from pretrain.released import ReleasedError
from pretrain.teachers import Teacher, ranges
from pretrain.teachers._natural import IMAGENET, NaturalSettings, natural_window

__all__ = ["HuggingFaceNetwork", "Settings", "build"]

_NORMS = ("layernorm", "norm", "post_layernorm")  # what models call the norm behind their last block
_SIDE = 224  # of the images that are tried where config.json names none


class Settings(NaturalSettings):
    """A model of transformers. Mean and deviation are those of its preprocessor_config.json, or else ImageNet's."""

    kind: Literal["hugging_face"] = "hugging_face"

    @property
    def source(self) -> Source | None:
        """The folder; null for a name on the hub."""
        return super().source if self._is_folder() else None

    def _is_folder(self) -> bool:
        """A name on the hub is `name` or `owner/name`; where there is such a folder here, it is that."""
        return self.weights.exists() or self.weights.is_absolute() or len(self.weights.parts) > 2


@dataclass(frozen=True)
class _Layout:
    """Where things are in what a model returns."""

    dim: int
    patch_size: int
    prefix: int  # tokens before the patches
    has_cls: bool


class HuggingFaceNetwork(nn.Module):
    """A model of transformers that is called as `VisionTransformer` is, but sees every patch: `kept` must be None.

    Hidden patches are given to it as pixels of 0, the mean of its images.
    """

    def __init__(self, model: nn.Module, layout: _Layout) -> None:
        super().__init__()
        self.model, self.layout = model, layout
        self.dim, self.patch_size = layout.dim, layout.patch_size

    def forward(self, images: Tensor, masks: Tensor | None = None, kept: Tensor | None = None) -> Features:
        """Features of images [B, C, H, W]."""
        assert kept is None, "a model of transformers sees every patch"
        patch = self.layout.patch_size
        if masks is not None:
            hidden = torch.unflatten(masks, 1, (images.shape[-2] // patch, images.shape[-1] // patch))[:, None]
            hidden = hidden.repeat_interleave(patch, -2).repeat_interleave(patch, -1)
            images = images.masked_fill(hidden, 0)
        tokens = _returned(self.model, images)
        if tokens.ndim == 4:
            tokens = tokens.flatten(2).mT
        first, patches = tokens[:, : self.layout.prefix], tokens[:, self.layout.prefix :]
        cls = first[:, 0] if self.layout.has_cls else patches.mean(1)
        return Features(cls.clone(), first[:, int(self.layout.has_cls) :].clone(), patches)


def build(settings: Settings) -> Teacher:
    """Build it on torch's default device. It is tried on an image of noise, which shows what it returns."""
    path, place = settings.weights, torch.get_default_device()
    if settings._is_folder() and not path.is_dir():
        where = settings.where or "give a folder of Hugging Face, or a name on its hub"
        raise SourceError(f"{path} is no folder; {where}")
    with torch.device("cpu"), torch.random.fork_rng(devices=[]), _explained(path):
        model, config = _made(settings, None)
        channels = int(getattr(config, "num_channels", 3))
        layout, sizes = _found(path, model, config, channels)
        mean, std = _normalisation(path, channels)
        window = settings.window or natural_window(settings.hu, mean, std)
        network = HuggingFaceNetwork(model, layout).requires_grad_(False).eval()
    if place.type != "cpu":
        network = network.to(place)

    def weights(say: Callable[[str], None]) -> dict[str, Tensor]:
        with torch.random.fork_rng(devices=[]), _explained(path):
            return HuggingFaceNetwork(_made(settings, say)[0], layout).state_dict()

    what = f"{config.model_type}, width {layout.dim}, patches of {layout.patch_size}"
    return Teacher(
        network=network,
        dim=layout.dim,
        patch_size=layout.patch_size,
        in_channels=channels,
        window=window,
        said=f"hugging_face: {path} ({what}), {ranges(window)}",
        read=weights,
        has_cls=layout.has_cls,
        drops=False,
        sizes=sizes,
    )


def _made(settings: Settings, say: Callable[[str], None] | None) -> tuple[Any, Any]:
    """The vision model with random numbers, or with those of the file where there is a `say`; and its config."""
    try:
        import transformers
    except ImportError as error:
        raise ReleasedError(
            "kind: hugging_face needs the package transformers; run `pip install transformers`, or use the kind of "
            "the model's family (mae, moco_v3, ibot, dinov2, dinov3), which needs nothing"
        ) from error
    name, options = str(settings.weights), {"trust_remote_code": False}
    config = transformers.AutoConfig.from_pretrained(name, **options)
    if say is None:
        model = transformers.AutoModel.from_config(config, dtype=torch.float32, **options)
    else:
        model, info = transformers.AutoModel.from_pretrained(
            name, config=config, dtype=torch.float32, output_loading_info=True, weights_only=True, **options
        )
        _report(settings.weights, model, info, say)
    if not hasattr(config, "num_channels") and hasattr(model, "vision_model"):  # its other half reads texts
        model, config = model.vision_model, config.vision_config
    _shorten(settings, model, config)
    for module in model.modules():
        module._non_persistent_buffers_set.clear()  # they are part of what the weights must bring
        for key, value in list(vars(module).items()):
            if isinstance(value, Tensor):
                delattr(module, key)
                module.register_buffer(key, value)
    return model.eval(), config


def _report(path: Path, model: nn.Module, info: Mapping[str, Any], say: Callable[[str], None]) -> None:
    """Refuse a file that lacks something; only a pooler, of which no feature is made, may be missing."""
    missing = sorted(name for name in info["missing_keys"] if "pooler" not in name)
    wrong = missing or sorted(str(entry[0]) for entry in info.get("mismatched_keys", ()))
    if wrong:
        how = "lacks" if missing else "has another shape of"
        raise ReleasedError(f"{path} {how} {len(wrong)} tensors of the model, {wrong[0]} first; fetch it again")
    with torch.no_grad():
        for name in info["missing_keys"]:
            model.get_parameter(name).zero_()
    dropped = sorted(info["unexpected_keys"])
    more = f", dropped {len(dropped)} of the file, {dropped[0]} first" if dropped else ""
    say(f"backbone from {path} (Hugging Face): {len(model.state_dict())} tensors{more}")


def _shorten(settings: Settings, model: Any, config: Any) -> None:
    """Take away the blocks after `settings.block`, and the final norm if it is not wanted."""
    depth = getattr(config, "num_hidden_layers", 0)
    if settings.block not in (-1, depth - 1):
        lists = [
            (module, name)
            for module in model.modules()
            for name, inner in module.named_children()
            if isinstance(inner, nn.ModuleList) and len(inner) == depth
        ]
        if len(lists) != 1 or not -depth <= settings.block < depth:
            raise ReleasedError(
                f"{settings.weights} has no block {settings.block} that can be told ({depth} blocks are named in its "
                "config.json); leave block at -1"
            )
        parent, name = lists[0]
        setattr(parent, name, getattr(parent, name)[: settings.block % depth + 1])
    if not settings.norm:
        found = next((name for name in _NORMS if isinstance(getattr(model, name, None), nn.Module)), None)
        if found is None:
            raise ReleasedError(f"{settings.weights} has no final norm that can be told; leave norm at true")
        setattr(model, found, nn.Identity())


def _returned(model: Any, images: Tensor) -> Tensor:
    """The tokens [B, L, D], or a map [B, D, h, w]."""
    more = {"interpolate_pos_encoding": True} if _interpolates(model) else {}
    out: Tensor = model(pixel_values=images, **more).last_hidden_state
    return out


def _interpolates(model: nn.Module) -> bool:
    return "interpolate_pos_encoding" in inspect.signature(type(model).forward).parameters


def _found(path: Path, model: nn.Module, config: Any, channels: int) -> tuple[_Layout, tuple[int, ...] | None]:
    """The layout, and the only side of images that it takes, or None; by small images where they will do."""
    side, patch = _pair(getattr(config, "image_size", None)) or _SIDE, _pair(getattr(config, "patch_size", None))
    small = 3 * patch if patch is not None else side
    tokens = _tried(path, model, channels, small) if small != side else None
    if tokens is not None and (layout := _plain(tokens, small, config)):
        return layout, None
    tokens = _tried(path, model, channels, side)
    if tokens is None:
        raise ReleasedError(f"{path} fails on images of {side} x {side} pixels; give a vision transformer")
    layout = _layout(tokens, side, config, path)
    other = side + layout.patch_size
    return layout, None if _works(_tried(path, model, channels, other), other, layout) else (side,)


@torch.no_grad()
def _tried(path: Path, model: nn.Module, channels: int, side: int) -> Tensor | None:
    """What the model returns for an image; None where it cannot take one of that side."""
    images = torch.randn(1, channels, side, side, generator=torch.Generator().manual_seed(0))
    model = deepcopy(model)  # those with windows of attention make them as small as an image, and leave them so
    try:
        first, again = (_returned(model, images) for _ in range(2))
    except (RuntimeError, ValueError, AssertionError, TypeError):
        return None
    if not torch.equal(first, again):
        raise ReleasedError(f"{path} sees another part of an image each time (an MAE?); use kind: mae for its encoder")
    return first


def _works(tokens: Tensor | None, side: int, layout: _Layout) -> bool:
    """Whether what was returned for an image of another side is what it should be."""
    if tokens is None:
        return False
    patches = tokens.shape[-1] * tokens.shape[-2] if tokens.ndim == 4 else tokens.shape[1] - layout.prefix
    return side % layout.patch_size == 0 and patches == (side // layout.patch_size) ** 2


def _plain(tokens: Tensor, side: int, config: Any) -> _Layout | None:
    """The layout of a model whose patches are those of its config.json, whatever stands before them."""
    patch, registers = _pair(getattr(config, "patch_size", None)), int(getattr(config, "num_register_tokens", 0) or 0)
    if tokens.ndim == 3 and patch is not None:
        prefix = tokens.shape[1] - (side // patch) ** 2
        if prefix in (0, *range(registers, registers + 3)):
            return _Layout(tokens.shape[2], patch, prefix, prefix > registers)
    return None


def _layout(tokens: Tensor, side: int, config: Any, path: Path) -> _Layout:
    """Tell the patches in what was returned for an image of `side` pixels; those of a pyramid's last grid are large."""
    if tokens.ndim == 4 and tokens.shape[-1] == tokens.shape[-2] and side % tokens.shape[-1] == 0:
        return _Layout(tokens.shape[1], side // tokens.shape[-1], 0, False)
    if plain := _plain(tokens, side, config):
        return plain
    if tokens.ndim == 3:
        length, dim = tokens.shape[1:]
        grid = isqrt(length)
        if grid**2 == length and side % grid == 0:
            return _Layout(dim, side // grid, 0, False)
    raise ReleasedError(
        f"{path} returns {tuple(tokens.shape)} for an image of {side} x {side} pixels, in which no square grid of "
        "patches can be told; give a vision transformer"
    )


def _pair(value: Any) -> int | None:
    """A number, or the same one twice."""
    if isinstance(value, list | tuple) and len(set(value)) == 1:
        value = value[0]
    return value if isinstance(value, int) else None


def _normalisation(path: Path, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel of an image from 0 to 1."""
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        found, _ = ImageProcessingMixin.get_image_processor_dict(str(path))
    except (OSError, ValueError):  # none there
        found = {}
    values = [found.get(key) or known for key, known in zip(("image_mean", "image_std"), IMAGENET, strict=True)]
    if found.get("do_normalize") is False:
        values = [(0.0,) * channels, (1.0,) * channels]
    mean, std = (tuple(float(x) for x in each)[:channels] for each in values)
    return mean, std


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Say of which model it is that transformers, or torch, refuses something."""
    try:
        yield
    except (ReleasedError, SourceError):
        raise
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:400]
        raise ReleasedError(f"{path} cannot be loaded as a model of transformers: {reason}") from error
