"""The training loop: time, steps, guards and messages. What a step means is the method's business.

The loop asks no method its kind, reads the device once every `log_every` steps and keeps no random state: step s of
rank r draws from a seed made of (seed, s, r), so a run continued after a kill makes the same steps bit for bit.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn

from launch.distributed import World
from launch.log import Log
from launch.settings import Settings
from pretrain.checkpoint import Checkpoints
from pretrain.checkpoint_files import CheckpointError
from pretrain.meter import LoopError, Meter
from pretrain.optim import clip_gradients
from pretrain.parallel import reduce_gradients
from pretrain.schedule import Schedules
from pretrain.signals import Stop
from pretrain.watchdog import Watchdog, WatchdogSettings

__all__ = ["Ended", "Guard", "LoopSettings", "Method", "step_seed", "train"]


class LoopSettings(Settings):
    """How long and how carefully the loop runs."""

    steps: int = Field(ge=0, description="steps of the whole run")
    seed: int = Field(0, ge=0, description="seed of every random draw of the run")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="bf16: matrix products in bfloat16 by autocast; weights stay fp32"
    )
    accumulate: int = Field(1, ge=1, description="parts in which a rank takes its batch, one after the other")
    clip: float | None = Field(
        3.0, gt=0, description="largest gradient norm, for each part of the student on its own; null: no clipping"
    )
    log_every: int = Field(10, ge=1, description="steps between two readings of the device and two lines")
    gc_every: int = Field(150, ge=1, description="steps between two garbage collections, the same on all ranks")
    max_bad: int = Field(5, ge=1, description="steps in a row that may be skipped because something was not finite")
    validate_every: int = Field(0, ge=0, description="steps between two validations; 0: none")
    watchdog: WatchdogSettings = Field(WatchdogSettings(), description="what happens when a run stands still")


class Method(Protocol):
    """What is trained. `state()` returns live tensors only: a restore fills them in place."""

    @property
    def student(self) -> nn.Module:
        """What the optimizer trains; gradients are clipped for each of its children on its own."""
        ...

    def parts(self, batch: Any, step: int, count: int, seed: Callable[[int], None]) -> Sequence[Any]:
        """Cut a batch into `count` equal parts; `seed(i)` makes random draws those of part i."""
        ...

    def loss(self, batch: Any, step: int) -> dict[str, Tensor]:
        """Return the weighted terms, fp32 scalars; the loop differentiates their sum."""
        ...

    def after_step(self, step: int) -> None:
        """Do what follows the optimizer: EMA, the Gram teacher."""
        ...

    def numbers(self) -> dict[str, Tensor]:
        """Return what else is to be logged of the step, 0-dim tensors that stay on the device; always the same names.

        A step in which one of them is not finite is skipped like one with a loss that is not.
        """
        ...

    def remark(self, values: Mapping[str, float]) -> str:
        """Return what a reader of the log should be told of the means since the last line; mostly nothing."""
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
        """Set `keep` from this rank's losses, norms and other numbers, then agree over all ranks (a collective)."""
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


@dataclass(frozen=True)
class Ended:
    """How a run ended: after `step` finished steps, by itself or by a signal (`stopped_by`, its name on every rank)."""

    step: int
    stopped_by: str = ""
    skipped: int = 0


def step_seed(seed: int, step: int, rank: int, part: int = 0) -> int:
    """Mix (seed, step, rank, part of the batch) into 63 bits, so that neighbours draw independently."""
    text = f"{seed}/{step}/{rank}/{part}" if part else f"{seed}/{step}/{rank}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def _due(step: int, every: int) -> bool:
    """Whether something is to be done after ``step`` finished steps; never where ``every`` is 0."""
    return every > 0 and step % every == 0


@contextmanager
def _collected(every: int) -> Iterator[Callable[[int], None]]:
    """Collect garbage at steps that are multiples of `every`: a rank that does as it likes makes the others wait."""

    def collect(step: int) -> None:
        if step % every == 0:
            gc.collect()

    was = gc.isenabled()
    gc.disable()
    try:
        yield collect
    finally:
        if was:
            gc.enable()


def _parts(method: Method, batch: Any, step: int, world: World, settings: LoopSettings) -> Iterator[tuple[Any, float]]:
    """The parts of a batch, each with its share in the mean; when one is yielded, it may be learnt from."""

    def seed(part: int) -> None:
        torch.manual_seed(step_seed(settings.seed, step, world.rank, part))

    with _autocast(world, settings):
        parts = method.parts(batch, step, settings.accumulate, seed)
    for number, part in enumerate(parts):
        seed(number)
        if len(parts) > 1:
            reduce_gradients(method.student, number == len(parts) - 1)
        yield part, 1 / len(parts)


def _autocast(world: World, settings: LoopSettings) -> torch.autocast:
    return torch.autocast(world.device.type, torch.bfloat16, enabled=settings.precision == "bf16")


@contextmanager
def _finished(checkpoints: Checkpoints, world: World, log: Log) -> Iterator[None]:
    """See the checkpoint in flight to its end when an error comes that all ranks find together; a lone rank does so for
    any but a second Ctrl-C."""
    try:
        yield
    except Exception as error:
        if world.size == 1 or isinstance(error, LoopError):
            try:
                checkpoints.wait()
            except CheckpointError as lost:  # the first error is the one to be told at the end
                log.event(f"error: {lost}")
        raise


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
    """Run the steps that the newest checkpoint leaves to do; `batches` must yield the batch of that step first, each
    with the `keys` of its samples and what was `replaced`. Every rank calls `validate(step)` after `validate_every`
    steps. A method whose EMA is to skip bad steps shares `guard`. `flops` of a step on this rank, `peak` FLOP/s."""
    guard = guard or Guard(world.device)
    start = step = checkpoints.restore()
    meter = Meter(world, settings.steps, settings.max_bad, log, flops, peak, method.remark)
    dog = Watchdog(checkpoints.run, world, settings.watchdog, log.event if world.rank == 0 else print)
    batches, checkpoints.tick = dog.over(batches), dog.tick
    with Stop() as stop, _collected(settings.gc_every) as collect, dog, _finished(checkpoints, world, log):
        for step in range(start + 1, settings.steps + 1):
            dog.begin(step)
            schedules.apply(optimizer, step - 1)
            batch = meter.next(batches)
            optimizer.zero_grad(set_to_none=True)
            means: list[Tensor] = []
            for part, share in _parts(method, batch, step - 1, world, settings):
                dog.tick()
                with _autocast(world, settings):
                    terms = method.loss(part, step - 1)
                losses = torch.stack([term.float() for term in terms.values()]) * share
                losses.sum().backward()  # type: ignore[no-untyped-call]
                means.append(losses.detach())
            norms = clip_gradients(method.student, settings.clip)
            watched = {f"grad/{name}": norm for name, norm in norms.items()} | method.numbers()
            values = torch.cat([torch.stack(means).sum(0), torch.stack(list(watched.values()))])
            dog.at("optimizer")
            guard.judge(values)
            guard.step(optimizer)
            method.after_step(step - 1)
            meter.add(step - 1, batch, (*terms, *watched), values, guard.keep)
            collect(step)
            last = step == settings.steps
            dog.at("validation")
            seen = validate(step) if validate and _due(step, settings.validate_every) else {}
            dog.at("agreement")
            stopping = stop.agreed()
            dog.at("log")
            if seen or last or stopping or _due(step, settings.log_every):
                meter.report({"lr": schedules.lr(step - 1)}, len(terms), seen)
            dog.at("checkpoint")
            checkpoints.maybe_save(step, last=last or bool(stopping))
            if stopping and not last:
                log.event(f"stopped by {stopping} after step {step}; the same command continues")
                return Ended(step, stopping, meter.skipped)
    return Ended(step, "", meter.skipped)
