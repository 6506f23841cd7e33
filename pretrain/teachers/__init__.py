"""Frozen teachers that are read from files: what a method needs of one, whatever network it is.

One plug-in a file (``mae``, ``axial``, ``hugging_face``), with ``class Settings(TeacherSettings)`` with a ``kind`` and
``build(settings) -> Teacher``, which builds on torch's default device, for instance the meta device. A file that begins
with an underscore is shared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

import launch.settings
from launch.settings import plugins
from pretrain.data.window import HuWindow
from pretrain.methods import Source
from pretrain.released import ReleasedError

__all__ = ["Teacher", "TeacherSettings", "build", "ranges"]


class TeacherSettings(launch.settings.Settings):
    """What every teacher has."""

    weights: Path = Field(description="file, Hugging Face folder, run folder, checkpoint or export with its weights")
    step: int | None = Field(None, ge=0, description="step of a run's checkpoint; null: its newest")
    where: str = Field("", description="where the weights can be had, said when they are missing")
    mask: float | None = Field(None, ge=0, lt=1, description="share of its patches that it does not see")
    size: int | None = Field(None, gt=0, description="side of its images in pixels")
    window: HuWindow | None = Field(
        None, description="HU window of its images, one for all channels or one a channel; null: the kind's own rule"
    )
    block: int = Field(
        -1, description="block whose tokens are the features, 0 for the first, negative from the end; no later is built"
    )
    norm: bool = Field(True, description="the final norm is applied to them")
    floor: float = Field(0.0, ge=0, lt=1, description="least weight in the gate")

    @property
    def source(self) -> Source | None:
        """The weights as a look can tell whether they are there; null for a name that only a hub can resolve."""
        return Source(path=self.weights, step=self.step, where=self.where)


@dataclass(frozen=True)
class Teacher:
    """A frozen network in evaluation mode and what is to be known of it.

    ``network(images [B, in_channels, S, S], masks=None, kept=None)`` gives `Features`; ``masks`` (bool [B, N], True =
    hidden) and ``kept`` (int64 [B, K]) as `VisionTransformer` has them.
    """

    network: nn.Module
    dim: int
    patch_size: int
    in_channels: int
    window: HuWindow  # of one channel, which is repeated for all of the image, or of as many as that has
    said: str  # a line for a summary
    read: Callable[[Callable[[str], None]], dict[str, Tensor]] = field(repr=False)
    has_cls: bool = True  # without, `Features.cls` is the mean of the patches
    drops: bool = True  # whether `kept` works
    sizes: tuple[int, ...] | None = None  # sides of the images that it takes; None: all multiples of the patch size

    def weights(self, say: Callable[[str], None] = print) -> dict[str, Tensor]:
        """Read the state of `network`, whole and on the CPU; `say` is told what became of every tensor of the file.

        Raises ReleasedError for a file that is no longer what it was.
        """
        with torch.device("cpu"):
            state = self.read(say)
        assert state.keys() == self.network.state_dict().keys()
        return state

    def grid(self, size: int) -> int:
        """Patches on the side of an image of `size` pixels. Raises ReleasedError for one that it does not take."""
        if self.sizes is not None and size not in self.sizes:
            raise ReleasedError(f"{self.said}: takes images of {' or '.join(map(str, self.sizes))} pixels, not {size}")
        if size % self.patch_size:
            raise ReleasedError(
                f"{self.said}: an image of {size} pixels is no whole number of patches of {self.patch_size}; give a "
                f"size that is a multiple of {self.patch_size}"
            )
        return size // self.patch_size


def ranges(window: HuWindow) -> str:
    """The HU that a window tells apart, in words; of several windows each once."""
    found = {f"{part.low:g} to {part.high:g}": None for part in window.parts}
    return "HU " + ", ".join(found)


def build(settings: TeacherSettings) -> Teacher:
    """The teacher of these settings on torch's default device; under ``torch.device("meta")`` it holds no numbers yet.

    The file is looked at to tell the architecture. Raises SourceError where it is missing, ReleasedError where it is
    not what the settings say, or its images could not be made.
    """
    kind: Any = settings
    teacher: Teacher = plugins("pretrain.teachers")[kind.kind].build(settings)
    if teacher.window.channels not in (1, teacher.in_channels):
        raise ReleasedError(
            f"{teacher.said}: its images have {teacher.in_channels} channel(s), and {teacher.window.channels} windows "
            f"are given for them; give `window` with one or {teacher.in_channels}"
        )
    if settings.size is not None:
        teacher.grid(settings.size)
    return teacher
