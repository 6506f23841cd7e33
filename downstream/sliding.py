"""A network over images larger than its patch: where windows stand, how they are weighted, how many go at a time.

Placement and weights are nnU-Net's (arXiv 1904.08128): evenly spaced windows that overlap by a share of their side at
least, and a Gaussian of an eighth of it around the middle, so that what a window sees at its rim counts little.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from downstream.model import SegmentationModel

__all__ = ["Layout", "Pace", "Sliding", "gaussian", "layout", "starts"]

T = TypeVar("T")


def starts(length: int, patch: int, overlap: float) -> list[int]:
    """First pixels of the windows along an axis of at least `patch` pixels: evenly spaced, the last ends at its end."""
    count = math.ceil(max(0, length - patch) / (patch * (1 - overlap))) + 1
    step = (length - patch) / (count - 1) if count > 1 else 0.0
    return [round(step * i) for i in range(count)]


def gaussian(patch: int) -> Tensor:
    """Weights along one axis [patch], float64: a Gaussian of deviation patch / 8 around pixel patch // 2, never 0."""
    distance = torch.arange(patch, dtype=torch.float64) - patch // 2
    return torch.exp(-0.5 * (distance / (patch / 8)) ** 2)


@dataclass(frozen=True)
class Layout:
    """Windows of one image size: rows and columns of each, and its weights [patch, patch], which add up to 1 at every
    pixel; a single window has none.

    `height` and `width` are at least the patch: a smaller image gets `above` rows and `left` columns of air, and the
    rest on the other side.
    """

    patch: int
    height: int
    width: int
    above: int
    left: int
    places: tuple[tuple[slice, slice], ...]
    weights: tuple[Tensor, ...]


def layout(size: tuple[int, int], patch: int, overlap: float, device: torch.device) -> Layout:
    """Windows over images of that many rows and columns."""
    height, width = (max(side, patch) for side in size)
    rows, columns = (starts(side, patch, overlap) for side in (height, width))
    shares, parts = [], []
    for firsts, side in ((rows, height), (columns, width)):
        total = torch.zeros(side, dtype=torch.float64)
        parts.append([slice(first, first + patch) for first in firsts])
        for part in parts[-1]:
            total[part] += gaussian(patch)
        shares.append([gaussian(patch) / total[part] for part in parts[-1]])
    places = tuple((row, column) for row in parts[0] for column in parts[1])
    weights = tuple(torch.outer(row, column).float().to(device) for row, column in itertools.product(*shares))
    above, left = (height - size[0]) // 2, (width - size[1]) // 2
    return Layout(patch, height, width, above, left, places, weights if len(places) > 1 else ())


class Pace:
    """How many windows go through a network at a time: as many as wanted, or as fit into `room` bytes.

    The first one goes alone, and what the network keeps alive meanwhile is counted.
    """

    def __init__(self, wanted: int, room: float) -> None:
        self.wanted, self.room = wanted, room
        self.size = 1 if wanted == 1 else 0  # 0: not measured yet

    def each(self, work: Callable[[slice], T], count: int) -> Iterator[tuple[slice, T]]:
        """What `work` makes of slices that cover 0 to `count` in order."""
        done = 0
        while done < count:
            part = slice(done, min(done + max(self.size, 1), count))
            if self.size:
                made = work(part)
            else:
                with _Live() as live:
                    made = work(part)
                self.size = max(1, min(self.wanted, int(self.room / max(live.peak, 1))))
            yield part, made
            done = part.stop


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The most bytes of tensors made inside that were alive at one time."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self._now = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(tensor.untyped_storage()) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and id(storage := tensor.untyped_storage()) not in given | self._known.keys():
                self._now += storage.nbytes()
                self._known[id(storage)] = weakref.finalize(storage, self._gone, id(storage), storage.nbytes())
        self.peak = max(self.peak, self._now)
        return made

    def _gone(self, name: int, size: int) -> None:
        self._now -= size
        del self._known[name]


class Sliding:
    """One model over stacks of slices of one size. `pace` is asked for how many windows go together."""

    def __init__(
        self,
        model: SegmentationModel,
        where: Layout,
        *,
        pace: Callable[[], Pace],
        autocast: Callable[[], AbstractContextManager[object]],
        mirror: bool = False,
        floor: Tensor | None = None,
    ) -> None:
        """`floor` [c]: the least value of each input channel. Windows that hold nothing else have one result between
        them, which is made once; None: every window is gone over."""
        self._model, self._where, self._autocast, self._floor = model, where, autocast, floor
        flips = [list(axes) for n in range(3) for axes in itertools.combinations((2, 3), n)]
        self._flips: list[list[int]] = flips if mirror else [[]]
        self._pace, self._encoding = pace(), pace()
        self._nothing: Tensor | None = None

    def __call__(self, images: Tensor, around: Tensor) -> Tensor:
        """Images [N, c, H, W] of the layout's size; `around` [n, S] are those that the model sees for each of n slices,
        the slice itself in the middle -> logits [n, heads, H, W], fp32."""
        where, found, share = self._where, None, 1 / len(self._flips)
        loud = self._loud(images, around)
        for i, (rows, columns) in enumerate(where.places):
            slices = [z for z in range(len(around)) if loud[i][z]]
            quiet = [z for z in range(len(around)) if not loud[i][z]]
            results = self._results(images[..., rows, columns], around, slices)
            if quiet:
                results = itertools.chain(results, self._of_nothing(quiet, images))
            for own, logits in results:
                if found is None:
                    shape = (len(around), logits.shape[1], where.height, where.width)
                    found = torch.zeros(shape, device=images.device)
                target = found[..., rows, columns]
                for z, one in zip(own, logits, strict=True):
                    if where.weights:
                        target[z].addcmul_(one, where.weights[i], value=share)
                    else:
                        target[z].add_(one, alpha=share)
        assert found is not None
        return found

    def _loud(self, images: Tensor, around: Tensor) -> list[list[bool]]:
        """For each window and slice: is there anything in it? One answer from the device for all."""
        if self._floor is None or around.shape[1] > 1:
            return [[True] * len(around)] * len(self._where.places)
        own = images[around[:, 0]]
        most = [own[..., rows, columns].amax((2, 3)) for rows, columns in self._where.places]
        found: list[list[bool]] = (torch.stack(most) > self._floor).any(2).tolist()
        return found

    def _results(self, windows: Tensor, around: Tensor, slices: list[int]) -> Iterator[tuple[list[int], Tensor]]:
        """(slices, their logits [., heads, patch, patch]) in turn, each slice as often as it is mirrored."""
        seen = around[torch.tensor(slices, dtype=torch.long, device=around.device)]
        for axes in self._flips:
            mirrored = windows.flip(axes) if axes else windows
            work = self._flat(mirrored, seen) if around.shape[1] == 1 else self._deep(mirrored, seen)
            for part, logits in self._pace.each(work, len(slices)):
                yield slices[part], logits.flip(axes) if axes else logits

    def _of_nothing(self, quiet: list[int], images: Tensor) -> Iterator[tuple[list[int], Tensor]]:
        if self._nothing is None:
            assert self._floor is not None
            windows = self._floor.view(1, -1, 1, 1).expand(-1, -1, self._where.patch, self._where.patch)
            around = torch.zeros(1, 1, dtype=torch.long, device=images.device)
            self._nothing = torch.cat([logits for _, logits in self._results(windows, around, [0])])
        for one in self._nothing:
            yield quiet, one.expand(len(quiet), -1, -1, -1)

    def _flat(self, windows: Tensor, seen: Tensor) -> Callable[[slice], Tensor]:
        """Each slice by itself."""

        def work(part: slice) -> Tensor:
            with self._autocast():
                logits: Tensor = self._model(windows[seen[part, 0]])
            return logits.float()

        return work

    def _deep(self, windows: Tensor, seen: Tensor) -> Callable[[slice], Tensor]:
        """With neighbours: every image goes through the backbone once, however many slices see it."""

        def encoded(part: slice) -> list[Tensor]:
            with self._autocast():
                return self._model.encode(windows[part])

        parts = [maps for _, maps in self._encoding.each(encoded, len(windows))]
        maps = [torch.cat(some) for some in zip(*parts, strict=True)]

        def work(part: slice) -> Tensor:
            with self._autocast():
                logits = self._model.decode([each[seen[part]] for each in maps], (self._where.patch, self._where.patch))
            return logits.float()

        return work
