"""What the trainer needs of a method beyond what the loop needs: its networks, and the weights they start from.

One plug-in a file, with `class Settings` and `build(settings, *, model, steps, guard) -> Trainable`, which builds on
torch's default device, here the meta device. The settings have a `kind`, `check_data(data)` and, where the method reads
weights, `sources` (of an earlier run, for a new one) and `always_read` (at every start), both Source by key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from launch.settings import Settings, plugins
from pretrain.data.batch import Batch
from pretrain.data.views import TeacherViews
from pretrain.loop import Guard, Method

if TYPE_CHECKING:
    import pretrain.settings

__all__ = ["Look", "Source", "SourceError", "States", "Trainable", "build_method"]

States = Mapping[str, Mapping[str, Mapping[str, Tensor]]]
"""Whole tensors on the CPU by network, part and name: states["teacher"]["backbone"]["cls_token"]."""


class Look(Protocol):
    """Opens a run's first batches anew, of which all networks but the student see all patches."""

    def __call__(self) -> AbstractContextManager[Iterator[Batch]]:
        """The batches, closed at the end of the block."""
        ...


class SourceError(ValueError):
    """Weights that a run is to read are not there; the text names every one of them and where it can be had."""


class Source(Settings):
    """Weights to start from; a plain path will do."""

    path: Path = Field(description="run folder, checkpoint, export, or published file or Hugging Face folder of a ViT")
    where: str = Field("", description="where it can be had, said when it is missing")
    step: int | None = Field(None, ge=0, description="step of a run's checkpoint; null: its newest")
    heads: bool = Field(True, description="take the heads too, where the source has them")
    registers: Literal["file", "fresh"] = Field(
        "file", description="fresh: draw the registers anew, where the source has none, or another number of them"
    )

    @property
    def is_scratch(self) -> bool:
        """Whether it is the word for no weights at all: the run begins from random ones, and that is meant."""
        return self.path == Path("scratch")

    @model_validator(mode="before")
    @classmethod
    def _path_will_do(cls, data: Any) -> Any:
        return {"path": data} if isinstance(data, str | Path) else data


class Trainable(Method, Protocol):
    """A method that `pretrain.train` can place on any number of ranks."""

    @property
    def networks(self) -> Mapping[str, nn.ModuleDict]:
        """Every network by name, the student among them; the others are frozen."""
        ...

    def initial(self, seed: int, source: Source | None, say: Callable[[str], None]) -> States:
        """Return the weights a new run starts from, the same on every rank; `source` is a run or a published file."""
        ...

    @property
    def constant(self) -> frozenset[str]:
        """Names of networks that no step changes and no checkpoint holds: read anew by `fixed` at every start."""
        ...

    def placed(self) -> None:
        """Take note that the networks now have their final parameters (sharded, on the device)."""
        ...

    def fixed(self, say: Callable[[str], None]) -> States:
        """Return the weights of the `constant` networks; called after a checkpoint was restored, where there is one."""
        ...

    def views(self, side: int, whole: bool = False) -> TeacherViews | None:
        """What other networks see of each global crop of `side` pixels, without hidden patches if `whole`; None: all
        see the same."""
        ...

    def calibrate(self, look: Look, say: Callable[[str], None]) -> None:
        """Fit what is fitted before a new run's first step; a collective."""
        ...


def build_method(settings: pretrain.settings.Settings, guard: Guard, device: str = "meta") -> Trainable:
    """The method of the settings with its networks on `device`; on the meta device they hold no numbers yet."""
    family = plugins("pretrain.methods")
    kind: str = settings.method.kind  # type: ignore[attr-defined]  # every plug-in's settings have one
    with torch.device(device):
        built: Trainable = family[kind].build(settings.method, model=settings.model, steps=settings.steps, guard=guard)
    return built
