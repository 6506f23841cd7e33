"""What the trainer needs of a method beyond what the loop needs: its networks, and the weights they start from.

One plug-in a file, with `class Settings` (a `kind`) and `build(settings, *, model, steps, guard) -> Trainable`, which
builds on torch's default device, here the meta device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from torch import Tensor, nn

from pretrain.loop import Method
from pretrain.released import Source

__all__ = ["States", "Trainable"]

States = Mapping[str, Mapping[str, Mapping[str, Tensor]]]
"""Whole tensors on the CPU by network, part and name: states["teacher"]["backbone"]["cls_token"]."""


class Trainable(Method, Protocol):
    """A method that `pretrain.train` can place on any number of ranks."""

    @property
    def networks(self) -> Mapping[str, nn.ModuleDict]:
        """Every network by name, the student among them; the others are frozen."""
        ...

    def initial(self, seed: int, source: Source | None, say: Callable[[str], None]) -> States:
        """Return the weights a new run starts from, the same on every rank; `source` is a run or a published file."""
        ...

    def placed(self) -> None:
        """Take note that the networks now have their final parameters (sharded, on the device)."""
        ...
