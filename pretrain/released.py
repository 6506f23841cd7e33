"""Reads backbones: our exports and checkpoints, the published files of DINOv3 and MedDINOv3. Strict, and never silent.

ReleasedError(ValueError)    not a backbone this model can hold; the text names the file, what it is and what to do
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pretrain.checkpoint_files import Progress, complete, newest, read_tensors
from pretrain.data.window import HuWindow
from pretrain.models.layers import k_mask
from pretrain.models.rope import Rope, RopeSettings
from pretrain.models.vit import SIZES, VisionTransformer, VitSettings, build

__all__ = ["Released", "ReleasedError", "fit", "load_backbone", "read"]

_WRAPPERS = re.compile(r"^module\.|_orig_mod\.|_checkpoint_wrapped_module\.|_fsdp_wrapped_module\.")
# A key of another family -> what the file is. The first that occurs decides.
_FOREIGN = {
    "pos_embed": "a model with learned positions (DINOv2, MAE, MoCo v3, iBOT or timm)",
    "embeddings.cls_token": "a Hugging Face model; its keys are others",
    "encoder.conv1.weight": "a convolutional network",
    "conv1.weight": "a convolutional network",
}
_LANDMARKS = {"cls_token", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "rope_embed.periods"}


class ReleasedError(ValueError):
    """A file or folder that holds no backbone we can read, or one that does not fit."""


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


def read(path: Path, step: int | None = None, which: str = "teacher") -> Released:
    """Read a run folder (its newest checkpoint or that of `step`), a checkpoint folder, a .safetensors or a .pth.

    `which` (teacher or student) matters for runs and checkpoints.
    """
    if not path.exists():
        raise ReleasedError(f"{path} does not exist; give a run folder, a checkpoint, an export or a published file")
    if path.is_dir():
        return _read_checkpoint(path, step, which)
    if step is not None:
        raise ReleasedError(f"{path} is one file: a step can only be chosen in a run folder")
    tensors, header = _read_tensors(path)
    if header:
        return _ours(path, f"axial {header.get('axial')} export", header, tensors)
    return _published(path, tensors)


def _read_checkpoint(path: Path, step: int | None, which: str) -> Released:
    folder: Path | None = path
    if (path / "checkpoints").is_dir():
        folder = newest(path, step)
    elif (path / "progress.json").is_file():
        if reason := complete(path):
            raise ReleasedError(f"{path} is not a complete checkpoint: {reason}")
    else:
        raise ReleasedError(
            f"{path} is neither a run folder (no checkpoints/ in it) nor a checkpoint (no progress.json in it)"
        )
    if folder is None:
        raise ReleasedError(f"{path}/checkpoints holds no complete checkpoint; let the run reach its first one")
    about = Progress.read(folder)
    tensors = read_tensors(folder, f"method.{which}.")
    if not tensors:
        raise ReleasedError(f"{folder} holds no {which}; a run of `axial pretrain` is needed")
    return _ours(folder, f"checkpoint of step {about.step}", {**about.about, "step": about.step}, tensors)


def _ours(path: Path, form: str, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Released:
    if missing := sorted({"model", "window"} - header.keys()):
        raise ReleasedError(f"{path} ({form}) does not state its {' and '.join(missing)}: it is no backbone to hand on")
    settings, window = VitSettings.model_validate(header["model"]), HuWindow.model_validate(header["window"])
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


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of a file and, of our own exports, the header."""
    with path.open("rb") as opened:
        start = opened.read(64)
    if start.startswith(b"version https://git-lfs"):
        raise ReleasedError(f"{path} is a Git LFS pointer, not the weights; run `git lfs pull` where it came from")
    if start.lstrip()[:1] == b"<":
        raise ReleasedError(f"{path} is a web page, not weights; a gated download answers so without a login")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt") as file:
                header = json.loads((file.metadata() or {}).get("axial", "{}"))
                return {name: file.get_tensor(name) for name in file.keys()}, header  # noqa: SIM118  (not a mapping)
        except (SafetensorError, ValueError) as error:
            raise ReleasedError(
                f"{path} is not a whole safetensors file ({error}); fetch or export it again"
            ) from error
    if not (zipfile.is_zipfile(path) or start.startswith(b"\x80")):  # the two forms of torch.save
        raise ReleasedError(f"{path} is no file of weights, or not whole; fetch it again")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ReleasedError(
            f"{path} holds more than tensors, and loading it would run code ({str(error).splitlines()[0]}); if you "
            "trust it, save its tensors alone: "
            "torch.save({'teacher': torch.load(path, weights_only=False)['teacher']}, new_path)"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise ReleasedError(f"{path} is no file of weights, or not whole ({error}); fetch it again") from error
    for key in ("teacher", "model_ema", "model", "state_dict"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
            break
    if not isinstance(found, dict):
        raise ReleasedError(f"{path} holds a {type(found).__name__}, not named tensors")
    if "network_weights" in found:
        raise ReleasedError(f"{path} is an nnU-Net checkpoint, not a backbone (DINOv3, MedDINOv3, axial)")
    return {str(name): value for name, value in found.items() if isinstance(value, Tensor)}, {}


def _published(path: Path, tensors: Mapping[str, Tensor]) -> Released:
    named, renamed = {}, 0
    for name, tensor in tensors.items():
        clean = _WRAPPERS.sub("", name)
        renamed += clean != name
        named[clean] = tensor
    backbone, heads = _parts(named)
    for key, what in _FOREIGN.items():
        if key in backbone:
            raise ReleasedError(f"{path} is {what} (it has {key!r}); a DINOv3, MedDINOv3 or axial backbone is needed")
    gated_or_not = {"blocks.0.mlp.fc1.weight", "blocks.0.mlp.w1.weight"}
    if _LANDMARKS - backbone.keys() or not gated_or_not & backbone.keys():
        raise ReleasedError(
            f"{path} holds no DINOv3 backbone; its first keys are {', '.join(list(tensors)[:4]) or '(none)'}"
        )
    whole = not any(name.startswith("backbone.") for name in named)
    form = "DINOv3 hub keys" if whole else "{'teacher': {'backbone.*'}} (MedDINOv3)"
    notes = [f"renamed {renamed} keys (wrappers removed)"] if renamed else []
    settings, guessed = _settings(backbone, hub=whole)
    state, repaired = _repaired(backbone)
    window = HuWindow()
    notes += [
        *guessed,
        *repaired,
        f"the file states no HU window: taking [{window.low:g}, {window.high:g}], mean {window.mean:.4f}, "
        f"deviation {window.std:.4f}",
    ]
    return Released(path, form, settings, window, state, heads, notes=tuple(notes))


def _settings(state: Mapping[str, Tensor], hub: bool) -> tuple[VitSettings, list[str]]:
    """Model settings from shapes and names; what they cannot say (the epsilon) is guessed and said."""
    width = state["cls_token"].shape[-1]
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    periods = state["rope_embed.periods"].double()
    shape = (width, depth, width // (4 * len(periods)))
    size = next((name for name, known in SIZES.items() if known == shape), "custom")
    given = dict(zip(("width", "depth", "heads"), shape, strict=True)) if size == "custom" else {}
    gated = "blocks.0.mlp.w1.weight" in state
    hidden = state[f"blocks.0.mlp.{'w1' if gated else 'fc1'}.weight"].shape[0]
    base = float(periods[-1]) ** (len(periods) / (len(periods) - 1)) if len(periods) > 1 else 100.0
    base = 100.0 if abs(base - 100) < 2 else base  # periods stored in bfloat16 give 99 or 101
    eps = 1e-5 if hub or "blocks.0.attn.qkv.bias" in state else 1e-6
    settings = VitSettings.model_validate(
        {
            "size": size,
            **given,
            "patch_size": state["patch_embed.proj.weight"].shape[-1],
            "in_channels": state["patch_embed.proj.weight"].shape[1],
            "registers": state["storage_tokens"].shape[1] if "storage_tokens" in state else 0,
            "ffn": "swiglu" if gated else "mlp",
            "ffn_ratio": hidden * (1.5 if gated else 1.0) / width,
            "qkv_bias": "blocks.0.attn.qkv.bias" in state,
            "mask_k_bias": "blocks.0.attn.qkv.bias_mask" in state or "blocks.0.attn.qkv.bias" not in state,
            "layerscale": 1e-5 if "blocks.0.ls1.gamma" in state else None,
            "norm_eps": eps,
            "untie_cls_and_patch_norms": "cls_norm.weight" in state,
            "untie_global_and_local_cls_norm": "local_cls_norm.weight" in state,
            "rope": RopeSettings(base=base),
        }
    )
    return settings, [f"the file states no epsilon of its norms: {eps:g} is assumed"]


def _repaired(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Move what a file's own masks hide into the numbers, so that the masks can be the architecture's: same function.

    The released DINOv3 files carry a bias mask of zeros: loaded as it is, their biases could never train.
    """
    out, notes = {name: tensor.float() for name, tensor in state.items()}, []
    masks = [name for name in state if name.endswith("attn.qkv.bias_mask")]
    odd = 0
    for name in masks:
        mask, bias = out.pop(name), name.removesuffix("_mask")
        architecture = k_mask(len(mask) // 3)
        odd += not torch.equal(mask, architecture)
        out[bias] = out[bias] * mask.nan_to_num(0) * architecture
        out[name] = architecture
    if odd:
        notes.append(
            f"warning: {odd} of {len(masks)} bias masks are not (1, 0, 1) for (q, k, v); multiplied into the biases, "
            "and reset, so that biases can train"
        )
    if state["rope_embed.periods"].dtype == torch.bfloat16:
        notes.append("the periods of the positions were stored in bfloat16; computed anew in float32")
        del out["rope_embed.periods"]
    return out, notes


def fit(released: Released, settings: VitSettings, say: Callable[[str], None] = print) -> dict[str, Tensor]:
    """Return the state of a model of `settings` that computes what the file's model does, else raise ReleasedError.

    Allowed are changes that leave the function as it is: stem channels (for grey images), absent or zero biases of q, k
    and v, their masks, an untied norm that starts as the tied one. Another epsilon of the norms is warned of.
    """
    with torch.device("meta"):
        wanted = build(settings).state_dict()
    have, notes = dict(released.backbone), list(released.notes)
    if settings.norm_eps != released.settings.norm_eps:
        notes.append(
            f"warning: model.norm_eps is {settings.norm_eps:g}, that of the file {released.settings.norm_eps:g}: "
            "not quite the same function"
        )
    stem = have["patch_embed.proj.weight"]
    if stem.shape[1] == 3 and settings.in_channels == 1:
        have["patch_embed.proj.weight"] = stem.sum(1, keepdim=True)
        notes.append("stem of 3 channels summed to 1: the same for a grey image repeated 3 times")
    elif stem.shape[1] == 1 and settings.in_channels == 3:
        have["patch_embed.proj.weight"] = stem.expand(-1, 3, -1, -1) / 3
        notes.append("stem of 1 channel spread over 3")
    made = []
    for name in sorted(wanted.keys() - have.keys()):
        made_of = _made(name, wanted[name], have, settings)
        if made_of is not None:
            have[name] = made_of
            made.append(name)
    dropped = sorted(have.keys() - wanted.keys())
    harmless = [n for n in dropped if n.endswith((".bias_mask", "local_cls_norm.weight", "local_cls_norm.bias"))
                or (n.endswith("qkv.bias") and not have[n].any())]  # fmt: skip
    wrong = [f"{name} is missing" for name in sorted(wanted.keys() - have.keys())]
    wrong += [f"{name} has no place" for name in dropped if name not in harmless]
    wrong += [
        f"{name} is {tuple(have[name].shape)}, the model has {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in have and have[name].shape != tensor.shape
    ]
    if wrong:
        own = released.settings.model_dump(exclude_defaults=True, exclude={"rope", "drop_path"})
        raise ReleasedError(
            f"{released.path} ({released.form}) does not fit the model: {'; '.join(wrong[:6])}"
            + (f" and {len(wrong) - 6} more" if len(wrong) > 6 else "")
            + f". Its own settings are model={own}"
        )
    used = len(wanted) - len(made)
    say(f"backbone from {released.path} ({released.form}): {used} of {len(released.backbone)} tensors used")
    for line in [
        *notes,
        _listed("made", made),
        _listed("dropped", harmless),
        _listed("heads in the file", list(released.heads)),
    ]:
        if line:
            say(f"  {line}")
    return {name: have[name] for name in wanted}


def _listed(what: str, names: list[str]) -> str:
    return f"{what}: {', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}" if names else ""


def _made(name: str, like: Tensor, have: Mapping[str, Tensor], settings: VitSettings) -> Tensor | None:
    """Make a tensor that the file lacks, where there is a value that changes nothing."""
    if name.endswith("attn.qkv.bias"):
        return torch.zeros(like.shape)
    if name.endswith("attn.qkv.bias_mask"):
        return k_mask(len(like) // 3)
    if name == "rope_embed.periods":
        width, _, heads = settings.shape
        rope = Rope(width // heads, settings.rope)
        rope.init_weights()
        return rope.periods
    if name.startswith(("local_cls_norm.", "cls_norm.")):
        return have["norm." + name.split(".")[1]].clone()
    return None


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
