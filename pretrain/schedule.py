"""Values that change over a run: learning rate, weight decay, temperatures, momentum, loss weights.

Everything is counted in steps of this run. Where a schedule is asked for, a plain number is a constant, and a list of
numbers has the value of each step, the last of which stays.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import Field, ValidationError, model_serializer, model_validator
from pydantic.functional_validators import AfterValidator
from pydantic_core import InitErrorDetails, PydanticCustomError

from launch.settings import Settings

__all__ = ["Length", "Momentum", "NotNegative", "Positive", "Schedule", "Schedules", "resolved", "scale_lr", "whole"]

S = TypeVar("S", bound=Settings)


def _steps_or_share(value: float) -> float:
    if value >= 1 and value != int(value):
        raise ValueError("give whole steps, or a share of the run between 0 and 1")
    return value


Length = Annotated[float, Field(ge=0), AfterValidator(_steps_or_share)]
"""Steps, or below 1 a share of the run."""


def whole(length: float, steps: int) -> int:
    """The steps of ``length`` in a run of ``steps``."""
    return round(length * steps) if length < 1 else int(length)


class Schedule(Settings):
    """Zero while frozen, then linear from ``start`` to ``peak``, then half a cosine from ``peak`` to ``end``, then
    ``end``.

    Lengths are steps, or below 1 a share of the run. ``form`` tells apart the two families of DINOv3's settings, which
    differ at the ends of their pieces: in ``v2`` the warm-up stops short of the peak by one increment and the cosine
    reaches ``end``; in ``v1`` the warm-up reaches the peak and the cosine stops short of ``end``.
    """

    peak: float = Field(description="value after the warm-up")
    start: float = Field(0.0, description="value at the first step of the warm-up")
    end: float | None = Field(None, description="value after the cosine; null: peak")
    freeze: Length = Field(0, description="first steps at zero, before the warm-up")
    warmup: Length = Field(0, description="steps from start to peak")
    cosine: Length | None = Field(None, description="steps from peak to end; null: the rest of the run")
    truncate: float = Field(
        0.0, ge=0, description="v1: the cosine is longer by this share, cut to length and stretched to end"
    )
    form: Literal["v1", "v2"] = Field("v2", description="which family of DINOv3's schedules")
    values: tuple[float, ...] | None = Field(
        None, min_length=1, description="the value of each step in the place of all this; the last one stays"
    )

    @model_validator(mode="before")
    @classmethod
    def _number_is_constant(cls, data: Any) -> Any:
        if isinstance(data, list | tuple):
            return {"peak": data[-1] if data else 0.0, "values": data}
        return {"peak": data} if isinstance(data, int | float | str) and not isinstance(data, bool) else data

    @model_validator(mode="after")
    def _belongs_together(self) -> Schedule:
        if self.truncate and self.form != "v1":
            raise ValueError("truncate belongs to form: v1")
        return self

    @model_serializer(mode="wrap")
    def _constant_is_number(self, handler: Any) -> Any:
        values = handler(self)
        if self.values is not None:
            return values["values"]
        defaults = {name: field.default for name, field in type(self).model_fields.items() if name != "peak"}
        return self.peak if all(values[name] == default for name, default in defaults.items()) else values

    @property
    def highest(self) -> float:
        """The peak, or the largest of the values that were listed."""
        return self.peak if self.values is None else max(self.values)

    def over(self, steps: int) -> Schedule:
        """The same schedule with every length in whole steps, for a run of ``steps``."""
        freeze, warmup = whole(self.freeze, steps), whole(self.warmup, steps)
        cosine = max(steps - freeze - warmup, 0) if self.cosine is None else whole(self.cosine, steps)
        return self.model_copy(update={"freeze": freeze, "warmup": warmup, "cosine": cosine})

    def __call__(self, step: int) -> float:
        """The value at ``step``; a share of the run, or its rest, needs `over` first."""
        if self.values is not None:
            return self.values[min(step, len(self.values) - 1)]
        end = self.peak if self.end is None else self.end
        freeze, warmup = self._whole(self.freeze), self._whole(self.warmup)
        if step < freeze:
            return 0.0
        step -= freeze
        if step < warmup:
            intervals = warmup if self.form == "v2" else max(warmup - 1, 1)
            return self.start + (self.peak - self.start) * step / intervals
        if end == self.peak:
            return end
        step, cosine = step - warmup, self._whole(self.cosine)
        if step >= cosine:
            return end
        if self.form == "v2":
            return _half_cosine(self.peak, end, step / max(cosine - 1, 1))
        if not self.truncate:
            return _half_cosine(self.peak, end, step / cosine)
        return _truncated(self.peak, end, step, cosine, self.truncate)

    @staticmethod
    def _whole(length: float | None) -> int:
        if length is None or 0 < length < 1:
            raise ValueError("this schedule depends on the length of the run; resolve it with over(steps)")
        return int(length)


@dataclass(frozen=True)
class _Within:
    """Refuses a schedule that takes a value outside of the bounds, at the key that the value comes from."""

    rule: str
    low: float
    high: float = math.inf
    open: bool = False  # the lower bound itself is outside

    def __call__(self, schedule: Schedule) -> Schedule:
        taken = {"peak": schedule.peak}
        if schedule.warmup:
            taken["start"] = schedule.start
        if schedule.end is not None:
            taken["end"] = schedule.end
        if schedule.values is not None:
            taken = {"values": next((v for v in schedule.values if not self._holds(v)), schedule.values[0])}
        wrong = [
            self._error(name, value, f"must be {self.rule}") for name, value in taken.items() if not self._holds(value)
        ]
        if schedule.freeze and not self._holds(0.0):
            wrong.append(
                self._error("freeze", schedule.freeze, f"keeps the value at 0 at first, but it must be {self.rule}")
            )
        if wrong:
            raise ValidationError.from_exception_data("Schedule", wrong)
        return schedule

    def _holds(self, value: float) -> bool:
        return (self.low < value if self.open else self.low <= value) and value <= self.high

    @staticmethod
    def _error(name: str, value: float, text: str) -> InitErrorDetails:
        return {"type": PydanticCustomError("schedule", "{text}", {"text": text}), "loc": (name,), "input": value}


Positive = Annotated[Schedule, AfterValidator(_Within("greater than 0", 0.0, open=True))]
NotNegative = Annotated[Schedule, AfterValidator(_Within("0 or greater", 0.0))]
Momentum = Annotated[Schedule, AfterValidator(_Within("between 0 and 1", 0.0, 1.0))]


def resolved(settings: S, steps: int) -> S:
    """The same settings with each of their schedules resolved for a run of ``steps``."""
    schedules = {name: value for name, value in settings if isinstance(value, Schedule)}
    return settings.model_copy(update={name: value.over(steps) for name, value in schedules.items()})


def _half_cosine(first: float, last: float, share: float) -> float:
    return last + (first - last) * (1 + math.cos(math.pi * share)) / 2


def _truncated(first: float, last: float, step: int, steps: int, extra: float) -> float:
    """The first ``steps`` of a cosine longer by ``extra``, stretched so that the last of them is ``last``."""
    intervals = max(int((1 + extra) * steps) - 1, 1)
    tail = (1 + math.cos(math.pi * (steps - 1) / intervals)) / 2
    share = ((1 + math.cos(math.pi * step / intervals)) / 2 - tail) / (1 - tail)
    return last + (first - last) * share


def scale_lr(lr: float, batch: int, rule: Literal["none", "sqrt_wrt_1024"]) -> float:
    """The learning rate for ``batch`` images a step on all ranks together; DINOv3's rule is 4 lr sqrt(batch / 1024)."""
    return lr * 4 * math.sqrt(batch / 1024) if rule == "sqrt_wrt_1024" else lr


@dataclass(frozen=True)
class Schedules:
    """What the optimizer's groups get at each step."""

    lr: Schedule
    weight_decay: Schedule
    freeze_last_layer: int = 0  # first steps in which the prototypes of the heads have learning rate zero
    freeze_backbone: int = 0  # first steps in which the backbone does not move

    def apply(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Sets learning rate and weight decay of every group, by the group's own multipliers."""
        lr, decay = self.lr(step), self.weight_decay(step)
        for group in optimizer.param_groups:
            still = group["is_last_layer"] and step < self.freeze_last_layer
            # Prototypes keep their gradients meanwhile, as in DINOv3; a backbone that stands still has none to keep.
            group["frozen"] = bool(group.get("is_backbone")) and step < self.freeze_backbone
            group["lr"] = 0.0 if still or group["frozen"] else lr * group["lr_multiplier"]
            group["weight_decay"] = decay * group["wd_multiplier"]
