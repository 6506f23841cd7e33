"""The training loop: time, steps, guards and messages. What a step means is the method's business.

The loop asks no method its kind, reads the device once every `log_every` steps and keeps no random state: step s of
rank r draws from a seed made of (seed, s, r), so a run continued after a kill makes the same steps bit for bit.

    LoopError(ValueError)    a run that cannot go on: too many steps in a row whose loss or gradient is not finite
"""

from __future__ import annotations

import gc
import hashlib
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn

from launch.distributed import World, agree
from launch.log import Log
from launch.settings import Settings
from pretrain.checkpoint import Checkpoints
from pretrain.optim import clip_gradients
from pretrain.schedule import Schedules

__all__ = ["Ended", "Guard", "LoopError", "LoopSettings", "Method", "Stop", "step_seed", "train"]


class LoopError(ValueError):
    """The run cannot go on; the text names step, rank, term and samples."""


class LoopSettings(Settings):
    """How long and how carefully the loop runs."""

    steps: int = Field(ge=0, description="steps of the whole run")
    seed: int = Field(0, ge=0, description="seed of every random draw of the run")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="bf16: matrix products in bfloat16 by autocast; weights stay fp32"
    )
    clip: float | None = Field(
        3.0, gt=0, description="largest gradient norm, for each part of the student on its own; null: no clipping"
    )
    log_every: int = Field(10, ge=1, description="steps between two readings of the device and two lines")
    gc_every: int = Field(150, ge=1, description="steps between two garbage collections, the same on all ranks")
    max_bad: int = Field(5, ge=1, description="steps in a row that may be skipped because something was not finite")
    validate_every: int = Field(0, ge=0, description="steps between two validations; 0: none")


class _Batch(Protocol):
    @property
    def keys(self) -> Sequence[str]: ...


class Method(Protocol):
    """What is trained. `state()` returns live tensors only: a restore fills them in place."""

    @property
    def student(self) -> nn.Module:
        """What the optimizer trains; gradients are clipped for each of its children on its own."""
        ...

    def loss(self, batch: Any, step: int) -> dict[str, Tensor]:
        """Return the weighted terms, fp32 scalars; the loop differentiates their sum."""
        ...

    def after_step(self, step: int) -> None:
        """Do what follows the optimizer: EMA, the Gram teacher."""
        ...

    def exported(self) -> nn.Module:
        """Return the module that the run is for."""
        ...

    def state(self) -> dict[str, Any]:
        """Return all tensors that a later step depends on, besides the optimizer's."""
        ...


class Guard:
    """Whether the step in progress may change weights: one number on the device, the same on all ranks, read by nobody.

    `keep` is 1 when every loss and gradient norm is finite, else 0. The fused optimizer gets it as `found_inf`; a
    method's EMA multiplies by it.
    """

    def __init__(self, device: torch.device) -> None:
        self.keep = torch.ones((), device=device)

    def judge(self, values: Tensor) -> None:
        """Set `keep` from this rank's losses and norms, then agree over all ranks (a collective)."""
        keep = torch.isfinite(values).all().float()
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(keep, op=dist.ReduceOp.MIN)
        self.keep.copy_(keep)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Step the optimizer unless `keep` is 0: on the device where its kernel can, else after reading the number."""
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer.found_inf = 1.0 - self.keep  # type: ignore[attr-defined]  # the fused kernels' own device-side switch
            optimizer.step()
        elif bool(self.keep):
            optimizer.step()


class Stop:
    """Turns SIGTERM, SIGINT and SIGUSR2 into a wish to stop, honoured at the next step boundary by all ranks together.

    A handler that saved by itself would wait for ranks that never got the signal. A second Ctrl-C stops at once,
    unsaved.
    """

    def __init__(self) -> None:
        self.name = ""
        self._old: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
                self._old[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def agreed(self) -> bool:
        """True on every rank once any rank was asked to stop (a collective)."""
        return agree(bool(self.name))


@dataclass(frozen=True)
class Ended:
    """How a run ended: after `step` finished steps, by itself or by a signal (`stopped_by`, on some rank)."""

    step: int
    stopped_by: str = ""
    skipped: int = 0


def step_seed(seed: int, step: int, rank: int) -> int:
    """Mix (seed, step, rank) into 63 bits, so that neighbouring steps and ranks draw independently."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=8).digest(), "big") >> 1


@contextmanager
def _collected() -> Iterator[None]:
    """Leave garbage collection to the loop: a rank that collects when it likes makes all others wait."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _resident_gib() -> float:
    """The most memory that this process has had at once."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)


@dataclass
class _Meter:
    """The steps since the last line: their numbers stay on the device until `report` reads them all at once."""

    world: World
    settings: LoopSettings
    log: Log
    flops: float  # of one step on this rank; 0: unknown
    peak: float  # the device's FLOP/s; 0: unknown
    names: tuple[str, ...] = ()
    rows: list[tuple[int, Sequence[str], Tensor]] = field(default_factory=list)
    streak: list[str] = field(default_factory=list)
    skipped: int = 0
    waited: float = 0.0
    since: float = field(default_factory=time.perf_counter)

    def next(self, batches: Iterator[_Batch]) -> _Batch:
        start = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - start
        return batch

    def add(self, step: int, keys: Sequence[str], names: tuple[str, ...], values: Tensor, keep: Tensor) -> None:
        assert not self.rows or names == self.names, f"terms changed within {self.settings.log_every} steps: {names}"
        self.names = names
        self.rows.append((step, keys, torch.cat([values, keep[None]])))

    def report(self, rates: Mapping[str, float], terms: int, extra: Mapping[str, float]) -> None:
        """Read the device (the one synchronisation), write the line; LoopError after too many bad steps in a row.

        The first `terms` names are the loss's, the rest gradient norms; means are over ranks and the steps kept.
        """
        step = self.rows[-1][0] + 1
        matrix = torch.stack([row for _, _, row in self.rows]).double().cpu()  # [steps, names + keep]
        kept = matrix[:, -1] > 0
        mean = matrix[kept].mean(0) if kept.any() else torch.full_like(matrix[0], float("nan"))
        if self.world.size > 1:
            dist.all_reduce(mean)
            mean /= self.world.size
        elapsed = max(time.perf_counter() - self.since, 1e-9)
        by_name = dict(zip(self.names, mean.tolist(), strict=False))
        losses = dict(list(by_name.items())[:terms])
        norms = dict(list(by_name.items())[terms:])
        values = {
            "loss": sum(losses.values()),
            "grad": sum(n * n for n in norms.values()) ** 0.5,
            **rates,
            **extra,
        }
        if self.skipped or not kept.all():
            values["skipped"] = float(self.skipped + int((~kept).sum()))
        cuda = self.world.device.type == "cuda"
        self.log.step(
            step,
            self.settings.steps,
            values,
            terms=losses,
            slices_per_step=len(self.rows[-1][1]) * self.world.size,
            wait=min(self.waited / elapsed, 1.0),
            memory_gib=torch.cuda.max_memory_allocated(self.world.device) / 2**30 if cuda else _resident_gib(),
            mfu=self.flops * len(self.rows) / elapsed / self.peak if self.flops and self.peak else None,
        )
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
            if len(self.streak) >= self.settings.max_bad:
                raise LoopError(
                    f"{len(self.streak)} steps in a row were not finite and changed nothing; first: {self.streak[0]}."
                    " Look at these samples, lower the learning rate or use precision=fp32, and run the command again:"
                    " the newest checkpoint holds finite weights"
                )


def train(
    method: Method,
    batches: Iterator[Any],
    optimizer: torch.optim.Optimizer,
    schedules: Schedules,
    checkpoints: Checkpoints,
    log: Log,
    world: World,
    settings: LoopSettings,
    validate: Callable[[int], Mapping[str, float]] | None = None,
    *,
    guard: Guard | None = None,
    flops: float = 0.0,
    peak: float = 0.0,
) -> Ended:
    """Run the steps that the newest checkpoint leaves to do. `batches` must yield the batch of that step first.

    `validate(step)` is called on every rank after each `validate_every` steps. A method whose EMA is to skip bad steps
    shares `guard`. `flops` are those of one step on this rank, `peak` the device's FLOP/s; both 0 where not known.
    """
    guard = guard or Guard(world.device)
    start = step = checkpoints.restore()
    meter = _Meter(world, settings, log, flops, peak)
    with Stop() as stop, _collected():
        for step in range(start + 1, settings.steps + 1):
            torch.manual_seed(step_seed(settings.seed, step - 1, world.rank))
            schedules.apply(optimizer, step - 1)
            batch = meter.next(batches)
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(world.device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
                terms = method.loss(batch, step - 1)
            losses = torch.stack([term.float() for term in terms.values()])
            losses.sum().backward()  # type: ignore[no-untyped-call]
            norms = clip_gradients(method.student, settings.clip)
            values = torch.cat([losses.detach(), torch.stack(list(norms.values()))])
            guard.judge(values)
            guard.step(optimizer)
            method.after_step(step - 1)
            meter.add(step - 1, batch.keys, (*terms, *(f"grad/{name}" for name in norms)), values, guard.keep)
            if step % settings.gc_every == 0:
                gc.collect()
            last = step == settings.steps
            seen = (
                validate(step) if validate and settings.validate_every and step % settings.validate_every == 0 else {}
            )
            stopping = stop.agreed()
            if seen or last or stopping or step % settings.log_every == 0:
                meter.report({"lr": schedules.lr(step - 1)}, len(terms), seen)
            checkpoints.maybe_save(step, last=last or stopping)
            if stopping and not last:
                log.event(f"stopped by {stop.name or 'another rank'} after step {step}; the same command continues")
                return Ended(step, stop.name or "another rank", meter.skipped)
    return Ended(step, "", meter.skipped)
