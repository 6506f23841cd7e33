"""What one training step of a network needs, counted without computing it.

The step runs on fake tensors, which have sizes but no values, and every storage is counted while it lives: weights,
what is kept for the backward pass, gradients, and what comes and goes. AdamW's two averages are added.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from downstream.cases import Labels
from downstream.context import Context
from downstream.losses import SegmentationLoss
from downstream.model import SegmentationModel, build
from launch.settings import Settings
from pretrain.models.vit import VitSettings
from pretrain.models.vit import build as build_vit
from pretrain.parallel import Recompute, recompute_blocks

__all__ = ["Network", "step_bytes"]


@dataclass(frozen=True)
class Network:
    """What is trained: backbone, decoder, how it is tuned, and how many channels the images have."""

    vit: VitSettings
    decoder: Settings
    tuned: Settings
    labels: Labels
    channels: int = 1
    context: Context = field(default_factory=Context)

    def built(self) -> SegmentationModel:
        """The network with fresh weights, on whatever device is the default, in training mode."""
        heads = len(self.labels.heads)
        backbone = build_vit(self.vit)
        model = build(backbone, self.decoder, heads, context=self.context, channels=self.channels, tuning=self.tuned)
        return model.train()


def step_bytes(network: Network, patch: int, batch: int, *, recompute: Recompute = "none", bf16: bool = True) -> int:
    """Most bytes that live at once in a step of `batch` patches of `patch` px: weights, activations, gradients, AdamW.

    Scratch space of kernels, the context of a GPU and what its allocator wastes are not in it.
    """
    with FakeTensorMode():
        model = network.built()
        recompute_blocks(model.backbone, recompute)
        loss = SegmentationLoss(network.labels)
        views = () if network.context.slices == 0 else (network.context.size,)
        images = torch.empty(batch, *views, network.channels, patch, patch)
        classes = torch.zeros(batch, patch, patch, dtype=torch.int64)
        with _counted() as count:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                terms = loss(model(images), classes)
            sum(terms.values()).backward()
    trained = sum(_size(p) for p in model.parameters() if p.requires_grad)
    held = sum(_size(p) for p in [*model.parameters(), *model.buffers()])
    return held + 2 * trained + _size(images) + _size(classes) + count.peak


def _size(tensor: Tensor | nn.Parameter) -> int:
    return tensor.numel() * tensor.element_size()


class _Count(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the storages that were made while it is on and still live, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor) and _storage(leaf) not in given:
                self._add(leaf.untyped_storage())
        return made

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def gone(_: object) -> None:
            del self._known[key]
            self.live -= size

        self._known[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)


def _storage(tensor: Tensor) -> int:
    """Which storage a tensor has."""
    return int(tensor.untyped_storage()._cdata)


@contextlib.contextmanager
def _counted() -> Iterator[_Count]:
    with _Count() as count:
        yield count
