"""Distillation of several frozen teachers into one student, after CoMAD (Mandalika and Lalitha, arXiv 2508.04816).

Each teacher sees the same box of a slice by its own input rule and without some of its patches; its features are
brought to the student's grid and width, weighed token by token by a gate without parameters, and learnt by KL. The
paper's body was not to be had: equations follow a secondary account of it, and what that leaves open is a setting.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

import launch.settings
from launch.settings import choice
from pretrain.align import resample_map
from pretrain.data.batch import Batch
from pretrain.data.masks import MaskSettings
from pretrain.data.settings import DataSettings
from pretrain.data.views import TeacherViews
from pretrain.loop import Guard
from pretrain.losses._consensus import Consensus, channel_kl, consensus, figures, mean_over_images, position_kl
from pretrain.methods import Look, Source, States
from pretrain.methods._adapters import (
    KINDS,
    Adapters,
    AdapterSettings,
    Features,
    Maps,
    apply_maps,
    empty_maps,
    fit_maps,
)
from pretrain.methods._gate import Divergence, Gate, Hiding, Spatial
from pretrain.methods._teachers import Crew, Looked
from pretrain.models.vit import VitSettings
from pretrain.models.vit import build as build_vit
from pretrain.parallel import initialised
from pretrain.released import fit, read
from pretrain.schedule import resolved
from pretrain.teachers import TeacherSettings

__all__ = ["MultiTeacher", "Settings", "build"]

if TYPE_CHECKING:
    AnyTeacher = TeacherSettings
else:
    AnyTeacher = choice("pretrain.teachers")


class Settings(launch.settings.Settings):
    """Distillation of several teachers."""

    kind: Literal["multi_teacher"] = "multi_teacher"
    teachers: dict[str, AnyTeacher | None] = Field(
        description="frozen networks by name, which is the kind unless one is given; null takes one away"
    )
    cache: Path | None = Field(
        None, description="folder of `axial features`: what teachers make is read there, and they do not run"
    )
    masks: Hiding = Field(Hiding(), description="which patches the student and the teachers do not see")
    adapter: AdapterSettings = Field(AdapterSettings(), description="how teachers' features get the student's width")
    gate: Gate = Field(Gate(), description="how teachers are weighed")
    token: Divergence = Field(Divergence(), description="KL on the patches that the student sees")
    spatial: Spatial = Field(Spatial(), description="KL on all patches")
    cls: Divergence = Field(Divergence(), description="KL on the class token; weight 0 is the paper's form")
    collapse_below: float = Field(
        0.3, ge=0, lt=1, description="warn when the target's deviation over tokens falls below this share of its size"
    )

    @field_validator("teachers", mode="before")
    @classmethod
    def _name_is_kind(cls, teachers: Any) -> Any:
        if not isinstance(teachers, Mapping):
            return teachers
        return {n: {"kind": n, **given} if isinstance(given, Mapping) else given for n, given in teachers.items()}

    @model_validator(mode="after")
    def _belong_together(self) -> Settings:
        if not self.active:
            raise ValueError("teachers: at least one is needed")
        if wrong := next((name for name in self.active if not name.isidentifier()), None):
            raise ValueError(f"teachers: {wrong!r} is no name; use letters, digits and _")
        if (most := max(self.shares.values())) > self.masks.student:
            raise ValueError(
                f"masks.student: the student must see no more than its teachers; {self.masks.student:g} is hidden from "
                f"it and up to {most:g} from them"
            )
        if self.cache is not None and self.masks.replace:
            raise ValueError(
                "masks.replace: a cache holds what teachers make of whole images, and nothing of mask tokens; set "
                "masks.replace=false, or cache=null"
            )
        if (floors := sum(teacher.floor for teacher in self.active.values())) > 1:
            raise ValueError(f"teachers: their floors add up to {floors:g}, which leaves the gate nothing; 1 at most")
        return self

    @property
    def active(self) -> dict[str, TeacherSettings]:
        """The teachers that are there."""
        return {name: teacher for name, teacher in self.teachers.items() if teacher is not None}

    @property
    def shares(self) -> dict[str, float]:
        """The share of its patches that each teacher does not see: 0.5 to 0.3 in even steps where none is given."""
        last = max(len(self.active) - 1, 1)
        usual = (0.5 - 0.2 * place / last for place in range(len(self.active)))
        most = self.masks.student
        return {
            name: min(share, most) if teacher.mask is None else teacher.mask
            for (name, teacher), share in zip(self.active.items(), usual, strict=True)
        }

    @property
    def always_read(self) -> dict[str, Source]:
        """The teachers' weights by key; no checkpoint holds them. None where their features are read."""
        if self.cache is not None:
            return {}
        sources = {f"teachers.{name}.weights": teacher.source for name, teacher in self.active.items()}
        return {key: source for key, source in sources.items() if source is not None}

    def check_data(self, data: DataSettings) -> None:
        """Refuse crops that it has no use for. Raises ValueError."""
        crops = data.crops
        if self.cache is not None and crops.fixed is None:
            raise ValueError(
                "crops.fixed: method.cache holds features of fixed crops; give the number that it was made with"
            )
        if len(crops.shapes) > 1 or crops.gram_size is not None:
            raise ValueError("crops: multi_teacher takes global crops of one size; drop mix and gram_size")
        if crops.n_local:
            raise ValueError(f"crops.n_local: multi_teacher sees global crops only; set 0 instead of {crops.n_local}")
        if data.masks != MaskSettings():
            raise ValueError(
                "masks: these are self_distillation's; multi_teacher has method.masks and each teacher's mask"
            )


def build(settings: Settings, *, model: VitSettings, steps: int, guard: Guard) -> MultiTeacher:
    """Build student and teachers on torch's default device, for a run of `steps`."""
    return MultiTeacher(settings, model, steps)


class Seen(NamedTuple):
    """What one teacher made of a batch."""

    patches: Tensor  # [B, N, D_m] on the student's grid
    valid: Tensor  # bool [B, N]
    cls: Tensor  # [B, D_m]


class MultiTeacher:
    """A student learns what its teachers agree on.

    State-dict keys: student.{backbone,adapters}.*, adapters.NAME.*, and marks of the teachers' weights, which are not
    part of a checkpoint.
    """

    constant = frozenset({"teachers"})

    def __init__(self, settings: Settings, model: VitSettings, steps: int) -> None:
        self._settings, self._model = settings, model
        self._gate, self._losses = resolved(settings.gate, steps), {}
        for name in ("token", "spatial", "cls"):
            self._losses[name] = resolved(getattr(settings, name), steps)
        self._adapter = settings.adapter
        self._kinds = KINDS if settings.cls.weight.highest else KINDS[:1]
        self._crew = Crew(settings.active, settings.shares, settings.masks.replace, settings.cache)
        self.student = self._student()
        self._maps: Maps = {}
        self._marks = torch.zeros(len(settings.active), 4, dtype=torch.int64, device="cpu")
        self._numbers: list[dict[str, Tensor]] = []
        self._warned = False

    def _student(self) -> nn.ModuleDict:
        backbone = build_vit(self._model)
        if self._adapter.kind != "joint":
            return nn.ModuleDict({"backbone": backbone})
        adapters = Adapters(self._kinds, self._crew.widths, backbone.dim, self._adapter.affine)
        return nn.ModuleDict({"backbone": backbone, "adapters": adapters})

    @property
    def networks(self) -> Mapping[str, nn.ModuleDict]:
        """Student and teachers; the student alone where their features are read."""
        teachers = self._crew.networks
        return {"student": self.student, **({"teachers": teachers} if len(teachers) else {})}

    def initial(self, seed: int, source: Source | None, say: Callable[[str], None] = print) -> States:
        """Weights of a new student: drawn from `seed`, its backbone from `source` where there is one."""
        with torch.device("meta"):
            student = self._student()
        states = {name: initialised(part, seed + number) for number, (name, part) in enumerate(student.items())}
        if source is not None:
            registers = states["backbone"] if source.registers == "fresh" else None
            say("student:")
            states["backbone"] = fit(read(source.path, source.step), self._model, say, registers)
        if self._adapter.kind == "joint":
            say(
                "warning: method.adapter.kind=joint trains the adapters through their own target, where all tokens "
                "alike is a minimum of the loss; watch target_std, or take gcca"
            )
        return {"student": states}

    def placed(self) -> None:
        """Make room for the fitted maps where the student's parameters are; NaN until fitted or restored."""
        if self._adapter.kind != "joint":
            device = next(self.student.parameters()).device
            self._maps = empty_maps(self._kinds, self._crew.widths, self._model.shape[0], device)

    def fixed(self, say: Callable[[str], None]) -> States:
        """Read the teachers; a run that goes on must find those it began with. Raises SourceError."""
        states = self._crew.states(self._marks, say)
        return {"teachers": states} if states else {}

    def views(self, side: int, whole: bool = False) -> TeacherViews:
        """What the teachers see of crops of `side` pixels; all of it if `whole`."""
        masks, views = self._settings.masks, self._crew.views(side // self._model.patch_size, whole)
        return TeacherViews(views, masks.student, masks.nested, masks.region, self._crew.kept)

    def calibrate(self, look: Look, say: Callable[[str], None]) -> None:
        """Fit the maps to what the teachers make of the first slices, seen whole; nothing to do for `joint`."""
        if self._adapter.kind == "joint":
            return
        with look() as batches:
            fit_maps(self._maps, self._adapter, (self._features(self._see(batch)) for batch in batches), say)

    def parts(self, batch: Batch, step: int, count: int, seed: Callable[[int], None]) -> Sequence[Batch]:
        """The batch in `count` parts, whose mean loss is that of the batch, as no image's loss depends on another."""
        return batch.parts(count)

    def look(self, batch: Batch) -> list[Looked]:
        """What each teacher makes of the batch, or once made of it, on its own grid."""
        return self._crew.look(batch)

    @torch.no_grad()
    def _see(self, batch: Batch) -> list[Seen]:
        """What the teachers make of the batch, on the student's grid, in float32."""
        grid = batch.global_crops.shape[-1] // self._model.patch_size
        found = []
        for looked in self.look(batch):
            patches, valid = resample_map(looked.patches.float(), looked.kept, looked.grid, grid)
            found.append(Seen(patches, valid, looked.cls.float()))
        return found

    def loss(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """The weighted divergences of this rank's batch, a mean over images each."""
        seen = self._see(batch)
        student = self.student["backbone"](batch.global_crops, batch.masks)
        adapted = self._adapted(seen)
        valid = torch.stack([each.valid for each in seen])
        fused = self._fuse(student.patches, adapted["patches"], valid, step)
        self._numbers.append(figures(fused, list(self._settings.active)))
        token, spatial, summary = (self._losses[name] for name in ("token", "spatial", "cls"))
        divergence = channel_kl(student.patches, fused.target, token.temperature)
        losses = {"token": token.weight(step) * mean_over_images(divergence, ~batch.masks & fused.known)}
        if spatial.axis == "positions":
            by_channel = position_kl(student.patches, fused.target, fused.known, spatial.temperature)
            losses["spatial"] = spatial.weight(step) * by_channel.mean()
        else:
            if spatial.temperature != token.temperature:
                divergence = channel_kl(student.patches, fused.target, spatial.temperature)
            losses["spatial"] = spatial.weight(step) * mean_over_images(divergence, fused.known)
        if "cls" in adapted:
            everywhere = valid.new_ones(adapted["cls"].shape[:3])
            whole = self._fuse(student.cls[:, None], adapted["cls"], everywhere, step)
            by_image = channel_kl(student.cls[:, None], whole.target, summary.temperature)
            losses["cls"] = summary.weight(step) * by_image.mean()
        return losses

    def _fuse(self, student: Tensor, teachers: Tensor, valid: Tensor, step: int) -> Consensus:
        """The target [B, N, D] of teachers' features [M, B, N, D] in the student's width."""
        gate = self._gate
        floors = [teacher.floor for teacher in self._settings.active.values()]
        return consensus(
            student,
            teachers,
            valid,
            affinity=gate.affinity(step),
            agreement=gate.agreement(step),
            temperature=gate.temperature(step),
            floor=torch.tensor(floors, device=valid.device) if any(floors) else None,
        )

    def _features(self, seen: Sequence[Seen]) -> Features:
        tokens = {"patches": [each.patches for each in seen], "cls": [each.cls[:, None] for each in seen]}
        return {kind: tokens[kind] for kind in self._kinds}

    def _adapted(self, seen: Sequence[Seen]) -> dict[str, Tensor]:
        """Patches [M, B, N, D] and class tokens [M, B, 1, D] in the student's width, each of mean 0 and variance 1."""
        features = self._features(seen)
        if "adapters" in self.student:
            made = self.student["adapters"](features)
        else:
            made = {kind: apply_maps(self._maps[kind], x) for kind, x in features.items()}
        return {kind: torch.stack(x).float() for kind, x in made.items()}

    def after_step(self, step: int) -> None:
        """Nothing follows the optimizer."""

    def numbers(self) -> dict[str, Tensor]:
        """How the gate and the target of patches were, a mean over the parts of the batch: `losses._consensus`."""
        found, self._numbers = self._numbers, []
        return {f"gate/{name}": torch.stack([part[name] for part in found]).mean() for name in found[0]}

    def remark(self, values: Mapping[str, float]) -> str:
        """Warn of a target that grows alike everywhere, once."""
        spread, least = values["gate/target_std"], self._settings.collapse_below
        if self._warned or not spread < least:
            return ""
        self._warned = True
        remedy = "start again with method.adapter.kind=gcca" if "adapters" in self.student else "look at the teachers"
        return (
            f"warning: the fused target is collapsing: it deviates over tokens by {spread:.2f} of its size, less than "
            f"method.collapse_below={least:g}; {remedy}"
        )

    def exported(self) -> nn.Module:
        """The student's backbone."""
        return self.student["backbone"]

    def state(self) -> dict[str, Any]:
        """Student, fitted maps, marks of the teachers; not the teachers, which are read again."""
        return {"student": self.student.state_dict(), "adapters": self._maps, "marks": {"teachers": self._marks}}
