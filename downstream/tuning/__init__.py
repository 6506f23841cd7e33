"""Which weights of a backbone are trained, and what is added to it for that. One way a file, chosen by `tuning.kind`.

`install(settings, model)` changes a model in place, so that it still computes what it did: `frozen`, `lora` and
`adapter` add their modules, and every way says by `requires_grad` what of the backbone is trained. `lora` folds into
the weights when the model is saved; what stays in the network (`adapter`) is named by `kept` and stands in the header.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field
from torch import Tensor, nn

from launch.settings import Settings, plugins
from pretrain.models.layers import Block
from pretrain.models.lean import Side
from pretrain.models.vit import VisionTransformer

if TYPE_CHECKING:
    from downstream.model import SegmentationModel

__all__ = ["Groups", "Part", "groups", "hold", "install", "kept", "merged", "parameter_table", "split", "undisturbed"]

Groups = list[tuple[list[nn.Parameter], float]]
Plain = Literal["norms", "biases"]


class Part(Settings):
    """Settings of the ways that train a part of the backbone only."""

    also: tuple[Plain, ...] = Field(
        (), description="what of the backbone is trained beside that: norms (with their biases), biases (BitFit)"
    )
    last: int | None = Field(None, ge=1, description="only in so many blocks, the last ones; null: in all")
    lr_factor: float = Field(
        10.0, gt=0, description="learning rate of what is added, over that of the backbone: it starts from nothing"
    )


def install(settings: Settings, model: SegmentationModel) -> None:
    """Adds what `settings` of one kind ask for to `model` in place; its function stays as it is until it is trained.

    ValueError where the backbone is not made for it, or where something was installed before.
    """
    backbone = model.backbone
    before = [name for name, module in backbone.named_modules() if isinstance(module, Side) or "adapter" in name]
    if before:
        raise ValueError(f"the backbone is tuned by {before[0]} already; take the one that it started from")
    plugins(__name__)[settings.kind].install(settings, model)  # type: ignore[attr-defined]


def groups(settings: Settings, backbone: VisionTransformer) -> Groups:
    """Trained parameters of an installed backbone, and their share of its learning rate."""
    return plugins(__name__)[settings.kind].groups(settings, backbone)  # type: ignore[attr-defined, no-any-return]


def kept(settings: Settings) -> Settings | None:
    """What a model file must say so that its network can be built again; None where weights alone are enough."""
    return plugins(__name__)[settings.kind].kept(settings)  # type: ignore[attr-defined, no-any-return]


def merged(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state without side branches: W + factor * up @ down, in float64 and rounded once to the weight's precision.

    What is then run differs from what was trained by the rounding of one matrix product (float32: 1e-6 of the logits).
    """
    found = {name: tensor for name, tensor in state.items() if ".side." not in name}
    for name in [name for name in state if name.endswith(".side.up")]:
        layer = name.removesuffix(".side.up")
        up, down, factor = (state[f"{layer}.side.{part}"].double() for part in ("up", "down", "factor"))
        weight = state[f"{layer}.weight"]
        found[f"{layer}.weight"] = (weight.double() + factor * (up @ down)).to(weight.dtype)
    return found


def hold(backbone: VisionTransformer, also: Collection[str], last: int | None = None) -> Sequence[nn.Module]:
    """Nothing of the backbone is trained, but what `also` names of its last blocks and its final norm: those blocks.

    ValueError if there are not that many.
    """
    depth = len(backbone.blocks)
    if last is not None and last > depth:
        raise ValueError(f"tuning.last is {last}, and the backbone has {depth} blocks; give {depth} at most, or null")
    backbone.requires_grad_(False)
    blocks = list(backbone.blocks)[-(last or depth) :]
    for module in [*(module for block in blocks for module in block.modules()), backbone.norm]:
        if "norms" in also and isinstance(module, nn.LayerNorm):
            module.requires_grad_(True)
        if "biases" in also and isinstance(module, nn.Linear | nn.LayerNorm) and module.bias is not None:
            module.bias.requires_grad_(True)
    return blocks


def undisturbed(backbone: VisionTransformer) -> None:
    """No block is skipped in training: what does not learn as a whole needs no disturbance."""
    for block in backbone.blocks:
        assert isinstance(block, Block)
        block.drop_path = 0.0


def split(backbone: VisionTransformer, added: Collection[nn.Parameter], factor: float) -> Groups:
    """What was added at `factor` times the backbone's rate, and what else is trained at that rate; neither if empty."""
    new = {id(parameter) for parameter in added}
    trained = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    own = [parameter for parameter in trained if id(parameter) not in new]
    found = [([parameter for parameter in trained if id(parameter) in new], factor), (own, 1.0)]
    return [(parameters, share) for parameters, share in found if parameters]


def parameter_table(model: SegmentationModel) -> str:
    """Parameters of each part of a model, trained and all, as lines of text."""
    backbone = model.backbone
    added = {
        id(parameter) for name, parameter in backbone.named_parameters() if ".side." in name or ".adapter." in name
    }
    blocks = [parameter for parameter in backbone.blocks.parameters() if id(parameter) not in added]
    inside = {id(parameter) for parameter in blocks} | added
    parts = {
        "stem": [] if model.stem is None else list(model.stem.parameters()),
        "embedding, norm": [parameter for parameter in backbone.parameters() if id(parameter) not in inside],
        "blocks": blocks,
        "added to blocks": [parameter for parameter in backbone.parameters() if id(parameter) in added],
        "fusion": list(model.fusion.parameters()),
        "decoder": list(model.decoder.parameters()),
    }
    parts["all"] = list(model.parameters())
    lines = [f"{'parameters':16}{'trained':>12}{'all':>12}"]
    for name, parameters in parts.items():
        if parameters:
            trained, every = (
                sum(p.numel() for p in parameters if p.requires_grad or not only) for only in (True, False)
            )
            lines.append(f"{name:16}{trained:12,}{every:12,}")
    return "\n".join(lines)
