"""Reads backbones: our exports and checkpoints, and published files of every family in `released_keys`.

Strict, and never silent: every tensor of a file is used, renamed or dropped, every other one made, and the report says
which. ReleasedError(ValueError): not a backbone this model can hold; the text names the file, what it is, what to do.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pydantic
import torch
from torch import Tensor

from pretrain.checkpoint_files import Progress, complete, newest, read_tensors
from pretrain.data.window import HuWindow
from pretrain.models.layers import k_mask
from pretrain.models.rope import Rope
from pretrain.models.vit import VisionTransformer, VitSettings, build
from pretrain.released_files import ReleasedError, Weights, is_hugging_face, read_weights
from pretrain.released_keys import name_tensors
from pretrain.released_shapes import differences, doubts, settings_of, trainable

__all__ = ["Released", "ReleasedError", "fit", "is_run", "load_backbone", "published", "read"]


@dataclass(frozen=True)
class Released:
    """What a file holds: backbone tensors by the released names, heads by part, and what they were trained with."""

    path: Path
    form: str
    settings: VitSettings
    window: HuWindow
    backbone: Mapping[str, Tensor]
    heads: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()  # settings that the file does not state
    renamed: tuple[str, ...] = ()  # "old -> new"
    dropped: tuple[str, ...] = ()  # tensors that are no part of a backbone
    family: str = "axial"  # of `released_keys`, for a published file


def is_run(path: Path) -> bool:
    """Tell a run folder or a checkpoint, which have a teacher and a student, from a published folder or a file."""
    return path.is_dir() and ((path / "checkpoints").is_dir() or (path / "progress.json").is_file())


def read(path: Path, step: int | None = None, which: str = "teacher", encoder: str = "base") -> Released:
    """Read a run folder (its newest checkpoint or that of `step`), a checkpoint, a file, or a Hugging Face folder.

    `which` (teacher or student) matters for runs and checkpoints that have both, with a method that has an EMA teacher;
    of a published file with both it is the teacher.
    `encoder` (base or momentum) is the one of MoCo v3's two that is read.
    """
    if not path.exists():
        raise ReleasedError(f"{path} does not exist; give a run folder, a checkpoint, an export or a published file")
    if path.is_dir() and (is_run(path) or not is_hugging_face(path)):
        return _read_checkpoint(path, step, which)
    if step is not None:
        raise ReleasedError(f"{path} is one set of weights: a step can only be chosen in a run folder")
    weights = read_weights(path)
    if "axial" in weights.metadata:
        header = _header(path, weights.metadata["axial"])
        return _ours(path, f"axial {header.get('axial')} export", header, weights.tensors)
    if weights.metadata.get("format", "").startswith("axial"):
        raise ReleasedError(
            f"{path} is a segmentation model of `axial finetune`; give the backbone that it started from"
        )
    return published(weights, encoder)


def _read_checkpoint(path: Path, step: int | None, which: str) -> Released:
    folder: Path | None = path
    if (path / "checkpoints").is_dir():
        folder = newest(path, step)
    elif (path / "progress.json").is_file():
        if reason := complete(path):
            raise ReleasedError(f"{path} is not a complete checkpoint: {reason}")
        if step is not None and step != (own := Progress.read(path).step):
            raise ReleasedError(f"{path} is the checkpoint of step {own}, not of {step}; give the run folder to choose")
    else:
        raise ReleasedError(
            f"{path} is neither a run folder (no checkpoints/ in it) nor a checkpoint (no progress.json in it) nor a "
            "Hugging Face folder (no model.safetensors in it)"
        )
    if folder is None:
        raise ReleasedError(f"{path}/checkpoints holds no complete checkpoint; let the run reach its first one")
    about = Progress.read(folder)
    tensors, found = read_tensors(folder, f"method.{which}."), which
    if not tensors and which == "teacher":  # a method without one, whose student is what it is for
        tensors, found = read_tensors(folder, "method.student."), "student"
    if not tensors:
        raise ReleasedError(f"{folder} holds no {which}; a run of `axial pretrain` is needed")
    return _ours(
        folder, f"checkpoint of step {about.step}", {**about.about, "step": about.step, "which": found}, tensors
    )


def _header(path: Path, text: str) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except ValueError:
        header = None
    if not isinstance(header, dict):
        raise ReleasedError(f"{path} has a header that is no JSON object; export it again")
    return header


def _ours(path: Path, form: str, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Released:
    if missing := sorted({"model", "window"} - header.keys()):
        raise ReleasedError(f"{path} ({form}) does not state its {' and '.join(missing)}: it is no backbone to hand on")
    try:
        settings, window = VitSettings.model_validate(header["model"]), HuWindow.model_validate(header["window"])
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(key) for key in first["loc"]) or error.title
        raise ReleasedError(
            f"{path} ({form}) states a model or window that this version does not know: {place}: {first['msg']}; "
            "read it with the version that wrote it, or train anew"
        ) from error
    backbone, heads = _parts(tensors)
    return Released(path, form, settings, window, backbone, heads, header)


def _parts(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Split "backbone.x", "dino_head.x" by part; keys without a part are the backbone's."""
    if not any(name.startswith("backbone.") for name in tensors):
        return dict(tensors), {}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = tensor
    return parts.pop("backbone"), {part: state for part, state in parts.items() if part.endswith("_head")}


def published(weights: Weights, encoder: str = "base") -> Released:
    """Give a published file's tensors our names and tell its model; what it leaves open is assumed, and said."""
    named = name_tensors(weights, encoder)
    settings, assumed = settings_of(weights, named)
    state, notes = trainable(weights, named.state)
    places = [
        *([f"under {weights.container!r}"] if weights.container else []),
        *([f"prefix {named.prefix!r}"] if named.prefix else []),
        *(["with its config.json"] if named.family.config and weights.config else []),
    ]
    if settings.registers == 0:
        state.pop("storage_tokens", None)  # transformers writes one of no rows
    window = _stated_window(weights) if named.family.config else None
    if weights.aside:
        notes.append(f"left aside in the file: {_listed(weights.aside)}")
    return Released(
        weights.path,
        ", ".join([named.family.name, *places]),
        settings,
        HuWindow() if window is None else window,
        state,
        named.heads,
        notes=tuple(notes),
        assumed=(*assumed, "window") if window is None else assumed,
        renamed=named.renamed,
        dropped=named.dropped,
        family=named.family.name,
    )


def _stated_window(weights: Weights) -> HuWindow | None:
    """The window in config.json, which our own exports for Hugging Face have."""
    if "hu_window" not in weights.config:
        return None
    try:
        return HuWindow.model_validate(weights.config["hu_window"])
    except pydantic.ValidationError as error:
        raise ReleasedError(
            f"{weights.path}: hu_window in config.json is no window: {error.errors()[0]['msg']}; export it again"
        ) from error


def fit(
    released: Released,
    settings: VitSettings,
    say: Callable[[str], None] = print,
    fresh: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return the state of a model of `settings` that computes what the file's model does, else raise ReleasedError.

    Allowed are changes that leave the function as it is: stem channels (for grey images), absent or zero biases of q, k
    and v, their masks, an untied norm that starts as the tied one, a mask token. Another epsilon of the norms or rule
    of interpolation is warned of. Registers are the file's, or those of `fresh` (a new model's state) if that is given.
    """
    with torch.device("meta"):
        wanted = build(settings).state_dict()
    have = dict(released.backbone)
    if (windows := released.window.channels) > 1 and settings.in_channels != released.settings.in_channels:
        raise ReleasedError(
            f"{released.path} ({released.form}) sees {windows} HU windows as channels ({released.window.said()}); "
            f"no other number of channels computes the same, and {settings.in_channels} is asked for: give "
            f"model.in_channels={released.settings.in_channels}"
        )
    notes = [*released.notes, *doubts(released.settings, settings, released.assumed), *_stem(have, settings)]
    if fresh is not None:
        notes.append(f"registers: {settings.registers} drawn anew, {released.settings.registers} of the file dropped")
        have.pop("storage_tokens", None)
        have |= {name: fresh[name] for name in wanted if name == "storage_tokens"}
    ignored = (*released.assumed, *(["registers"] if fresh is not None else []))
    wrong, remedy = differences(released.settings, settings, have, wanted, ignored)
    made: dict[str, str] = {}
    for name in [] if wrong else sorted(wanted.keys() - have.keys()):
        found = _made(name, wanted[name], have, settings)
        if found is not None:
            have[name], made[name] = found
    left = sorted(have.keys() - wanted.keys())
    for mask in (name for name in left if name.endswith(".bias_mask")):  # what it hid stays without effect
        have[mask.removesuffix("_mask")] = have[mask.removesuffix("_mask")] * have[mask]
    harmless = [n for n in left if n.endswith((".bias_mask", "local_cls_norm.weight", "local_cls_norm.bias"))
                or (n.endswith("qkv.bias") and not have[n].any())]  # fmt: skip
    if not wrong:
        wrong = [f"{name} is missing" for name in sorted(wanted.keys() - have.keys())]
        wrong += [f"{name} has no place" for name in left if name not in harmless]
        wrong += [
            f"{name} is {tuple(have[name].shape)}, the model has {tuple(tensor.shape)}"
            for name, tensor in wanted.items()
            if name in have and have[name].shape != tensor.shape
        ]
    if wrong:
        more = f"\n  and {len(wrong) - 12} more" if len(wrong) > 12 else ""
        lines = "\n  ".join(wrong[:12])
        raise ReleasedError(f"{released.path} ({released.form}) does not fit the model:\n  {lines}{more}{remedy}")
    say(_report(released, len(wanted), made, [*released.dropped, *harmless], notes))
    return {name: have[name] for name in wanted}


def _stem(have: dict[str, Tensor], settings: VitSettings) -> list[str]:
    """Give the stem the model's channels, for grey images; say so."""
    name = "patch_embed.proj.weight"
    stem = have[name]
    if stem.shape[1] == 3 and settings.in_channels == 1:
        have[name] = stem.sum(1, keepdim=True)
        return ["stem of 3 channels summed to 1: the same for a grey image repeated 3 times"]
    if stem.shape[1] == 1 and settings.in_channels == 3:
        have[name] = stem.expand(-1, 3, -1, -1) / 3
        return ["stem of 1 channel spread over 3"]
    return []


def _made(name: str, like: Tensor, have: Mapping[str, Tensor], settings: VitSettings) -> tuple[Tensor, str] | None:
    """Make a tensor that the file lacks, where there is a value that changes nothing; and say what it is."""
    if name.endswith("attn.qkv.bias") or name == "mask_token":
        return torch.zeros(like.shape), "zeros"
    if name.endswith("attn.qkv.bias_mask"):
        return k_mask(len(like) // 3), "no bias of k"
    if name == "rope_embed.periods":
        width, _, heads = settings.shape
        rope = Rope(width // heads, settings.rope)
        rope.init_weights()
        return rope.periods, f"base {settings.rope.base:g}" if settings.rope.base else "of model.rope"
    if name.startswith(("local_cls_norm.", "cls_norm.")):
        return have["norm." + name.split(".")[1]].clone(), "as norm"
    return None


def _report(released: Released, total: int, made: Mapping[str, str], dropped: list[str], notes: Iterable[str]) -> str:
    """Say in one block what became of every tensor, and what had to be assumed."""
    s, window = released.settings, released.window
    values = {"norm_eps": f"epsilon of the norms {s.norm_eps:g}", "heads": f"heads {s.shape[2]}"}
    values["interpolation"] = "antialiasing of positions for other grids (DINO and iBOT: model.positions.offset=0.1)"
    assumed = [values[name] for name in released.assumed if name in values]
    lines = [
        ("used", f"{total - len(made)} of the model's {total} tensors come from the file"),
        ("renamed", _counted(released.renamed)),
        ("made", _counted(f"{name} ({how})" for name, how in made.items())),
        ("missing", "none"),
        ("dropped", _counted(dropped)),
        ("heads", ", ".join(released.heads) or "none in the file"),
        ("assumed", f"{' and '.join(assumed)}: the file does not say" if assumed else "nothing"),
        ("window", window.said() + (", assumed: the file does not say" if "window" in released.assumed else "")),
        *(("note", note) for note in notes),
    ]
    return "\n".join(
        [f"backbone from {released.path} ({released.form})", *(f"  {what:8}{text}" for what, text in lines)]
    )


def _counted(names: Iterable[str]) -> str:
    names = list(names)
    return f"{len(names)}: {_listed(names)}" if names else "none"


def _listed(names: Iterable[str]) -> str:
    """Names of all blocks as one, four at most."""
    kinds = list(Counter(re.sub(r"\.\d+(?=\.)", ".*", name) for name in names))
    return ", ".join(kinds[:4]) + (f" and {len(kinds) - 4} more kinds" if len(kinds) > 4 else "")


def load_backbone(
    path: Path,
    *,
    in_channels: int | None = None,
    step: int | None = None,
    which: str = "teacher",
    say: Callable[[str], None] = print,
) -> tuple[VisionTransformer, HuWindow]:
    """Load a backbone onto the CPU in eval mode, and the window its images need; `in_channels` adapts the stem."""
    released = read(path, step, which)
    settings = (
        released.settings if in_channels is None else released.settings.model_copy(update={"in_channels": in_channels})
    )
    state = fit(released, settings, say)
    with torch.device("meta"):
        model = build(settings)
    model = model.to_empty(device="cpu")
    model.load_state_dict(state)
    return model.eval(), released.window
