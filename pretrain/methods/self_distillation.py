"""Self-distillation as in DINOv3: a student, its moving average as the teacher, and loss terms between their views.

Every further phase of the recipe is a matter of settings: weights to start from, a `gram` term, other crops.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import launch.settings
from launch.settings import choice, plugins
from pretrain.data.batch import Batch
from pretrain.data.settings import DataSettings
from pretrain.loop import Guard
from pretrain.losses import Coupled, Given, Term, Views
from pretrain.methods import Source, States
from pretrain.models.vit import Features, VitSettings
from pretrain.models.vit import build as build_vit
from pretrain.parallel import initialised
from pretrain.released import Released, ReleasedError, fit, is_run, read
from pretrain.schedule import Momentum, Schedule

__all__ = ["GramTeacher", "SelfDistillation", "Settings", "build"]

if TYPE_CHECKING:
    Loss = launch.settings.Settings
else:
    Loss = choice("pretrain.losses")


class GramTeacher(launch.settings.Settings):
    """Where the frozen backbone comes from whose patch similarities the student must keep, and when it is renewed."""

    path: Path | None = Field(None, description="run folder, checkpoint, export or published file of an earlier run")
    step: int | None = Field(None, ge=0, description="step of that run's checkpoint; null: its newest")
    update_every: int = Field(0, ge=0, description="steps between two renewals, a copy of the EMA teacher; 0: none")
    first_update: int = Field(0, ge=0, description="no renewal before so many steps are done")
    max_updates: int | None = Field(None, ge=1, description="renewals at most; null: no limit")
    copy_at: int | None = Field(
        None, ge=0, description="step before which the EMA teacher takes the place of what path held; null: never"
    )
    live: bool = Field(
        False, description="no network of its own: the EMA teacher's patches of the global crops, at every step"
    )

    @model_validator(mode="after")
    def _has_one_source(self) -> GramTeacher:
        given = [name for name, value in self if value != type(self).model_fields[name].default and name != "live"]
        if self.live and given:
            raise ValueError(f"live: true is the EMA teacher itself; {', '.join(given)} cannot be given with it")
        if not self.live and self.path is None and self.copy_at is None:
            raise ValueError("set path to an earlier run or file, copy_at to copy the EMA teacher, or live: true")
        return self

    def renewed_after(self, step: int) -> bool:
        """Whether the EMA teacher is copied in after `step` (counted from 0)."""
        if step + 1 == self.copy_at:
            return True
        if not self.update_every:
            return False
        count, early = divmod(step + 1, self.update_every)
        count -= max(-(-self.first_update // self.update_every) - 1, 0)
        return not early and 0 < count <= (self.max_updates or count)


class Settings(launch.settings.Settings):
    """Self-distillation with any set of terms."""

    kind: Literal["self_distillation"] = "self_distillation"
    momentum: Momentum = Field(Schedule(peak=0.994), description="share of the EMA teacher that stays at each step")
    terms: dict[str, Loss | None] = Field(
        default=cast(Any, {}),
        description="loss terms by name, which is the kind unless one is given; dino, ibot and koleo are there without "
        "being named; null takes one away",
    )
    gram_teacher: GramTeacher | None = Field(
        None, description="the Gram teacher; exactly the runs with a gram term have one"
    )
    statistics: Literal["part", "batch"] = Field(
        "part",
        description="of a batch taken in parts (accumulate): whether Sinkhorn and KoLeo see each part alone, or all of "
        "the rank's batch, which gives the numbers of the uncut batch and costs one more forward pass of the student",
    )

    @field_validator("terms", mode="before")
    @classmethod
    def _name_is_kind(cls, terms: Any) -> Any:
        if not isinstance(terms, Mapping):
            return terms
        return {
            name: {"kind": name, **term} if isinstance(term, Mapping) else term
            for name, term in {"dino": {}, "ibot": {}, "koleo": {}, **terms}.items()
        }

    @model_validator(mode="after")
    def _belong_together(self) -> Settings:
        if not self.active:
            raise ValueError("terms: at least one loss term is needed")
        gram = [name for name, term in self.active.items() if getattr(term, "kind", "") == "gram"]
        if gram and self.gram_teacher is None:
            raise ValueError(
                f"terms.{gram[0]} needs a Gram teacher: set gram_teacher.path to the run (and gram_teacher.step) whose "
                "patch features are to be kept; without one the term would be computed against untrained weights"
            )
        if self.gram_teacher is not None and not gram:
            raise ValueError("gram_teacher is given, but no gram term in terms would use it")
        return self

    @property
    def sources(self) -> dict[str, Source]:
        """Weights of earlier runs that it reads, by key; a run that has one goes on from an earlier run."""
        gram = self.gram_teacher
        if gram is None or gram.path is None:
            return {}
        return {"gram_teacher": Source(path=gram.path, step=gram.step)}

    def check_data(self, data: DataSettings) -> None:
        """Refuse crops that it cannot learn from. Raises ValueError."""
        if data.crops.n_global != 2:
            raise ValueError("crops.n_global: self_distillation compares two global crops of a slice; set 2")

    @property
    def active(self) -> dict[str, launch.settings.Settings]:
        """The terms that are there."""
        return {name: term for name, term in self.terms.items() if term is not None}


def build(settings: Settings, *, model: VitSettings, steps: int, guard: Guard) -> SelfDistillation:
    """Build student, teacher and Gram teacher on torch's default device, for a run of `steps`."""
    return SelfDistillation(settings, model, steps, guard)


class SelfDistillation:
    """A student learns from its own moving average.

    State-dict keys: {student,teacher}.{backbone,<term>_head}.*, gram_teacher.backbone.*.
    """

    constant: frozenset[str] = frozenset()  # the teacher moves, and the Gram teacher may be renewed

    def __init__(self, settings: Settings, model: VitSettings, steps: int, guard: Guard) -> None:
        self._settings, self._model, self._steps, self._guard = settings, model, steps, guard
        self._momentum = settings.momentum.over(steps)
        self.terms, self.student = self._student()
        _, self.teacher = self._student()
        self.teacher.requires_grad_(False).eval()
        self.gram_teacher: nn.ModuleDict | None = None
        gram = settings.gram_teacher
        self._live = gram is not None and gram.live
        if not self._live and any(term.needs_gram for term in self.terms.values()):
            self.gram_teacher = nn.ModuleDict({"backbone": build_vit(model)})
            self.gram_teacher.requires_grad_(False).eval()
        self._pairs: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])

    def _student(self) -> tuple[dict[str, Term], nn.ModuleDict]:
        """The terms, and a backbone with the head of each term that has one."""
        families = plugins("pretrain.losses")
        backbone = build_vit(self._model)
        terms: dict[str, Term] = {
            name: families[cast(Any, term).kind].build(
                term, dim=backbone.dim, patch_size=backbone.patch_size, steps=self._steps
            )
            for name, term in self._settings.active.items()
        }
        heads = {f"{name}_head": term.head for name, term in terms.items() if term.head is not None}
        return terms, nn.ModuleDict({"backbone": backbone, **heads})

    @property
    def networks(self) -> Mapping[str, nn.ModuleDict]:
        """Student, teacher and, with a gram term, Gram teacher."""
        gram = {"gram_teacher": self.gram_teacher} if self.gram_teacher is not None else {}
        return {"student": self.student, "teacher": self.teacher, **gram}

    def initial(self, seed: int, source: Source | None, say: Callable[[str], None] = print) -> States:
        """Weights of a new run: drawn from `seed`, or those of `source`, which may tell teacher from student.

        Heads that the source lacks are drawn. Raises ReleasedError for a source that does not fit.
        """
        with torch.device("meta"):
            _, student = self._student()
        fresh = {name: initialised(part, seed + number) for number, (name, part) in enumerate(student.items())}
        states: dict[str, Mapping[str, Mapping[str, Tensor]]] = {"student": fresh, "teacher": fresh}
        if source is not None:
            # A run has both; a file is one network, read once for both.
            both = (("student",), ("teacher",)) if is_run(source.path) else (("student", "teacher"),)
            registers = fresh["backbone"] if source.registers == "fresh" else None
            for names in both:
                found = read(source.path, source.step, names[0])
                say(f"{' and '.join(names)}:")
                taken = {"backbone": fit(found, self._model, say, registers), **_heads(found, fresh, source, say)}
                states |= dict.fromkeys(names, taken)
        if self.gram_teacher is not None:
            gram = self._settings.gram_teacher
            assert gram is not None, "a gram term without a Gram teacher"
            first = states["teacher"]["backbone"]
            if gram.path is not None and gram.copy_at != 0:
                say("gram teacher:")
                first = fit(read(gram.path, gram.step), self._model, say)
            states["gram_teacher"] = {"backbone": first}
        return states

    def fixed(self, say: Callable[[str], None]) -> States:
        """Nothing."""
        return {}

    def views(self, side: int, whole: bool = False) -> None:
        """All networks see the crops as they are."""

    def calibrate(self, look: object, say: object) -> None:
        """Nothing is fitted."""

    def placed(self) -> None:
        """Pair the parameters of teacher and student, now that sharding has replaced them. Buffers stay as they are."""
        self._pairs = (list(self.teacher.parameters()), list(self.student.parameters()))

    def parts(self, batch: Batch, step: int, count: int, seed: Callable[[int], None]) -> Sequence[Batch]:
        """The batch in `count` parts; with `statistics: batch` each knows what its terms need of the others.

        For that every part is looked at once without gradients. The student then draws as it will when the part is
        learnt from, and nothing but class tokens and bottlenecks of the heads is kept.
        """
        parts = batch.parts(count)
        coupled = {n: t for n, t in self.terms.items() if isinstance(t, Coupled) and (t.head or t.weight(step))}
        if count == 1 or self._settings.statistics == "part" or not coupled:
            return parts
        watched = any(term.sees == "student" for term in coupled.values())
        collected: dict[str, list[Tensor]] = {name: [] for name in coupled}
        with torch.no_grad():
            for number, part in enumerate(parts):
                seed(number)
                teacher = Views(self.teacher["backbone"](part.global_crops))
                student = Views(*self.student["backbone"](*_student_input(part))) if watched else teacher
                for name, term in coupled.items():
                    collected[name].append(term.collect(self._given(name, step, part, student, teacher)))
            shared = {name: term.combine(step, collected[name], self._heads(name)[1]) for name, term in coupled.items()}
        return [
            replace(part, shared={name: shared[name][number] for name in coupled}) for number, part in enumerate(parts)
        ]

    def loss(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Weighted terms of this rank's batch; the teacher sees the global crops whole, the student masked and with the
        local crops."""
        teacher = None
        if batch.shared is None or self._live:
            with torch.no_grad():
                teacher = Views(self.teacher["backbone"](batch.global_crops))
        student = Views(*self.student["backbone"](*_student_input(batch)))
        gram = None
        if self._live and teacher is not None:
            gram, batch = teacher.globals_, replace(batch, gram_crops=None)
        if self.gram_teacher is not None and any(t.needs_gram and t.weight(step) for t in self.terms.values()):
            with torch.no_grad():
                gram = self.gram_teacher["backbone"](
                    batch.global_crops if batch.gram_crops is None else batch.gram_crops
                )
        losses: dict[str, Tensor] = {}
        for name, term in self.terms.items():
            if term.head is None and not term.weight(step):
                losses[name] = student.globals_.cls.new_zeros((), dtype=torch.float32)
                continue
            losses[name] = term.weight(step) * term.loss(self._given(name, step, batch, student, teacher, gram))
        return losses

    def _heads(self, name: str) -> tuple[nn.Module | None, nn.Module | None]:
        """A term's head in student and teacher."""
        key = f"{name}_head"
        return (self.student[key], self.teacher[key]) if key in self.student else (None, None)

    def _given(
        self, name: str, step: int, batch: Batch, student: Views, teacher: Views | None, gram: Features | None = None
    ) -> Given:
        shared = None if batch.shared is None else batch.shared.get(name)
        return Given(step, batch, student, teacher, *self._heads(name), gram, shared)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Move the teacher towards the student, unless the step was skipped; renew the Gram teacher when it is due."""
        # Each rank its own shards: torch 2.11 knows no such step of sharded tensors as a whole.
        teacher, student = ([x.to_local() if isinstance(x, DTensor) else x for x in side] for side in self._pairs)
        weight = (1.0 - self._momentum(step)) * self._guard.keep
        torch._foreach_lerp_(teacher, student, [weight] * len(teacher))
        gram = self._settings.gram_teacher
        if self.gram_teacher is not None and gram is not None and gram.renewed_after(step):
            for old, new in zip(self.gram_teacher.parameters(), self.teacher["backbone"].parameters(), strict=True):
                old.copy_(new)

    def numbers(self) -> dict[str, Tensor]:
        """Nothing beside the terms: the watch looks at targets."""
        return {}

    def remark(self, values: Mapping[str, float]) -> str:
        """Nothing."""
        return ""

    def exported(self) -> nn.Module:
        """The teacher's backbone."""
        return self.teacher["backbone"]

    def state(self) -> dict[str, Any]:
        """Everything but the optimizer's: a count of renewals is not needed, the step tells it."""
        return {name: network.state_dict() for name, network in self.networks.items()}


def _student_input(batch: Batch) -> tuple[list[Tensor], list[Tensor | None]]:
    """The global crops masked and, where there are any, the local crops, as one stream."""
    if not batch.local_crops.numel():
        return [batch.global_crops], [batch.masks]
    return [batch.global_crops, batch.local_crops], [batch.masks, None]


def _heads(
    found: Released, fresh: Mapping[str, Mapping[str, Tensor]], source: Source, say: Callable[[str], None]
) -> dict[str, Mapping[str, Tensor]]:
    """Heads of the source where it has them and they are wanted, else fresh ones."""
    heads: dict[str, Mapping[str, Tensor]] = {}
    for name in fresh:
        if name == "backbone":
            continue
        theirs = found.heads.get(name)
        if not source.heads or theirs is None:
            say(f"  {name}: starts fresh ({'init_from.heads is off' if theirs is not None else 'not in the file'})")
            heads[name] = fresh[name]
            continue
        shapes = {key: tuple(tensor.shape) for key, tensor in fresh[name].items()}
        given = {key: tuple(tensor.shape) for key, tensor in theirs.items()}
        if shapes != given:
            raise ReleasedError(
                f"{found.path}: {name} has other sizes ({given} instead of {shapes}); give "
                f"method.terms.{name.removesuffix('_head')}.head the sizes of the earlier run, or set "
                "init_from.heads=false to start with new heads"
            )
        heads[name] = {key: tensor.float() for key, tensor in theirs.items()}
    return heads
