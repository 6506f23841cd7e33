"""What is told of the steps: means, speed, and which steps were not finite, read from the device once a line.

LoopError(ValueError)    a run that cannot go on: too many steps in a row whose loss or gradient is not finite
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from launch.distributed import World
from launch.log import Log

__all__ = ["LoopError", "Meter"]

B = TypeVar("B")


class LoopError(ValueError):
    """The run cannot go on; the text names step, rank, term and samples."""


def _resident_gib() -> float:
    """The most memory that this process has had at once."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)


@dataclass
class Meter:
    """The steps since the last line: their numbers stay on the device until `report` reads them all at once."""

    world: World
    steps: int  # of the whole run
    max_bad: int  # skipped steps in a row after which the run stops
    log: Log
    flops: float  # of one step on this rank; 0: unknown
    peak: float  # the device's FLOP/s; 0: unknown
    remark: Callable[[Mapping[str, float]], str]  # the method's, on the means
    names: tuple[str, ...] = ()
    rows: list[tuple[int, Sequence[str], Tensor]] = field(default_factory=list)
    streak: list[str] = field(default_factory=list)
    skipped: int = 0
    replaced: int = 0  # samples of this rank that could not be read, since the start
    waited: float = 0.0
    since: float = field(default_factory=time.perf_counter)

    def next(self, batches: Iterator[B]) -> B:
        """Return the next batch; how long it took goes into the share of time spent waiting."""
        start = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - start
        return batch

    def add(self, step: int, batch: Any, names: tuple[str, ...], values: Tensor, keep: Tensor) -> None:
        """Keep the numbers of one step, `values` named by `names`, where they are."""
        assert not self.rows or names == self.names, f"terms changed between two lines: {names}"
        self.names = names
        self.rows.append((step, batch.keys, torch.cat([values, keep[None]])))
        self.replaced += len(batch.replaced)

    def report(self, rates: Mapping[str, float], terms: int, extra: Mapping[str, float]) -> None:
        """Read the device (the one synchronisation), write the line; LoopError after too many bad steps in a row.

        The first `terms` names are the loss's, `grad/...` gradient norms, the rest the method's; means are over ranks
        and the steps kept.
        """
        step = self.rows[-1][0] + 1
        matrix = torch.stack([row for _, _, row in self.rows]).double().cpu()  # [steps, names + keep]
        kept = matrix[:, -1] > 0
        mean = matrix[kept].mean(0) if kept.any() else torch.full_like(matrix[0], float("nan"))
        replaced = torch.tensor([float(self.replaced)], dtype=torch.float64)
        if self.world.size > 1:
            dist.all_reduce(sums := torch.cat([mean, replaced]))
            mean, replaced = sums[:-1] / self.world.size, sums[-1:]
        elapsed = max(time.perf_counter() - self.since, 1e-9)
        by_name = dict(zip(self.names, mean.tolist(), strict=False))
        losses = dict(list(by_name.items())[:terms])
        more = dict(list(by_name.items())[terms:])
        values = {
            "loss": sum(losses.values()),
            "grad": sum(n * n for name, n in more.items() if name.startswith("grad/")) ** 0.5,
            **rates,
            **extra,
        }
        if self.skipped or not kept.all():
            values["skipped"] = float(self.skipped + int((~kept).sum()))
        if replaced.item():
            values["replaced"] = replaced.item()
        cuda = self.world.device.type == "cuda"
        self.log.step(
            step,
            self.steps,
            values,
            terms=losses,
            more=more,
            slices_per_step=len(self.rows[-1][1]) * self.world.size,
            wait=min(self.waited / elapsed, 1.0),
            memory_gib=torch.cuda.max_memory_allocated(self.world.device) / 2**30 if cuda else _resident_gib(),
            mfu=self.flops * len(self.rows) / elapsed / self.peak if self.flops and self.peak else None,
        )
        if said := self.remark(by_name):
            self.log.event(said)
        self._judge(matrix, kept)
        self.rows, self.waited, self.since = [], 0.0, time.perf_counter()

    def _judge(self, matrix: Tensor, kept: Tensor) -> None:
        """Name what was not finite, on every rank alike; stop after too many in a row."""
        mine: list[str] = []
        for (step, keys, _), row, good in zip(self.rows, matrix, kept.tolist(), strict=True):
            bad = [name for name, value in zip(self.names, row.tolist(), strict=False) if not abs(value) < float("inf")]
            where = f"step {step}, rank {self.world.rank}: {', '.join(bad)} not finite; samples {', '.join(keys)}"
            mine.append("" if good else where if bad else "-")
        if kept.all():
            self.streak = []
            return
        everyone: list[list[str]] = [mine]
        if self.world.size > 1:
            everyone = [[] for _ in range(self.world.size)]
            dist.all_gather_object(everyone, mine)
        for lines, good in zip(zip(*everyone, strict=True), kept.tolist(), strict=True):
            if good:
                self.streak = []
                continue
            self.skipped += 1
            self.streak += [said := "; ".join(line for line in lines if line != "-")]
            self.log.event(f"skipped: {said}")
            if len(self.streak) >= self.max_bad:
                raise LoopError(
                    f"{len(self.streak)} steps in a row were not finite and changed nothing; first: {self.streak[0]}."
                    " Look at these samples; the newest checkpoint holds finite weights, from which the same command"
                    " continues, or with another learning rate or precision=fp32 a run in another folder"
                )
