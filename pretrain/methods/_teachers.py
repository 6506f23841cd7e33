"""The teachers of `multi_teacher`: networks that look at a batch, or what they once made of it, read from a folder.

Both are looked at through the same function, by a run and by `axial features`, so that they cannot differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pretrain.data.batch import Batch
from pretrain.data.cached import Kept
from pretrain.data.views import TeacherView
from pretrain.methods import SourceError
from pretrain.released import ReleasedError
from pretrain.teachers import Teacher, TeacherSettings
from pretrain.teachers import build as build_teacher
from pretrain.weights import digest

__all__ = ["Crew", "Looked", "built", "view_of"]


class Looked(NamedTuple):
    """What one teacher made of a batch, on its own grid."""

    patches: Tensor  # [B, K, D_m]
    cls: Tensor  # [B, D_m]
    kept: Tensor | None  # int64 [B, K], places of the patches; None: all, in order
    grid: int  # patches on a side


def view_of(teacher: Teacher, size: int | None, grid: int) -> TeacherView:
    """How a teacher sees a crop of which the student has grid x grid patches: as many, unless another size is set."""
    alike = grid * teacher.patch_size
    near = alike if teacher.sizes is None else min(teacher.sizes, key=lambda side: abs(side - alike))
    return TeacherView(teacher.window, size or near, teacher.grid(size or near), 0.0)


def built(name: str, settings: TeacherSettings) -> Teacher:
    """The teacher of a run on torch's default device. Raises ReleasedError that names it."""
    try:
        return build_teacher(settings)
    except ReleasedError as error:
        raise ReleasedError(f"method.teachers.{name}: {error}") from error


class Crew:
    """All teachers of a run. `shares` are those of its patches that each does not see; with `replace` it gets mask
    tokens there. With a `cache` none is built. Raises SourceError for a share that a network cannot leave out."""

    def __init__(
        self, settings: Mapping[str, TeacherSettings], shares: Mapping[str, float], replace: bool, cache: Path | None
    ) -> None:
        self._settings, self._replace = settings, replace
        self.kept = None if cache is None else Kept(cache, tuple(settings))
        self._made = {} if self.kept is not None else {name: built(name, own) for name, own in settings.items()}
        if self.kept is not None:
            drops = {name: bool(facts["drops"]) for name, facts in self.kept.teachers.items()}
            self.widths = self.kept.widths
        else:
            drops = {name: teacher.drops for name, teacher in self._made.items()}
            self.widths = {name: teacher.dim for name, teacher in self._made.items()}
        self._shares = {name: self._share(name, shares[name], drops[name]) for name in settings}
        self.networks = nn.ModuleDict({name: teacher.network for name, teacher in self._made.items()})
        self.networks.requires_grad_(False).eval()

    def _share(self, name: str, share: float, drops: bool) -> float:
        """The share of its patches that a teacher does not see: none, unasked, of one that cannot leave any out."""
        if drops or self._replace:
            return share
        if asked := self._settings[name].mask:
            raise SourceError(
                f"method.teachers.{name}.mask: this network cannot leave out {asked:g} of its patches; set it to 0, or "
                "method.masks.replace=true"
            )
        return 0.0

    def views(self, grid: int, whole: bool) -> tuple[TeacherView, ...]:
        """What each sees of crops of which the student has grid x grid patches; all of it if `whole`."""
        rules = self.kept.rules if self.kept is not None else {
            name: view_of(teacher, self._settings[name].size, grid) for name, teacher in self._made.items()
        }  # fmt: skip
        return tuple(replace(rule, mask=0.0 if whole else self._shares[name]) for name, rule in rules.items())

    def states(self, marks: Tensor, say: Callable[[str], None]) -> dict[str, Mapping[str, Tensor]]:
        """The networks' weights, none where features are read; `marks` [M, 4] are those that the run began with, or 0,
        and are set. Raises SourceError where others are there now."""
        states: dict[str, Mapping[str, Tensor]] = {}
        if self.kept is not None:
            self._say_of_cache(say)
        for number, name in enumerate(self._settings):
            if self.kept is not None:
                place = f"{self.kept.folder} holds features of"
                mark = torch.frombuffer(bytearray.fromhex(self.kept.teachers[name]["digest"]), dtype=torch.int64)
            else:
                say(f"teacher {name}: {self._made[name].said}")
                states[name] = self._made[name].weights(say)
                place, mark = f"{self._settings[name].weights} holds", digest(states[name])
            if marks[number].any() and not torch.equal(mark, marks[number]):
                raise SourceError(
                    f"method.teachers.{name}: {place} other weights than when this run began; put the old file back, "
                    "or start another folder"
                )
            marks[number] = mark
        return states

    def _say_of_cache(self, say: Callable[[str], None]) -> None:
        assert self.kept is not None
        for name, facts in self.kept.teachers.items():
            grid = f"{facts['grid']} x {facts['grid']}"
            say(f"teacher {name}: features of width {facts['width']} on {grid}, read from {self.kept.folder}")
        if masked := [f"method.teachers.{name}.mask={share:g}" for name, share in self._shares.items() if share]:
            say(
                "warning: method.cache holds features of whole images; patches are taken away from them afterwards, "
                f"which is not what a network makes without these patches. For exactly that set {masked[0]} to 0"
                + (f" (and {len(masked) - 1} more)" if masked[1:] else "")
            )

    @torch.no_grad()
    def look(self, batch: Batch) -> list[Looked]:
        """What each makes of the batch, or once made of it, in the precision of its parameters."""
        if self.kept is not None:
            rules = self.kept.rules.values()
            each = zip(batch.features, batch.kept, rules, strict=True)
            return [Looked(made[:, 1:], made[:, 0], kept, rule.grid) for made, kept, rule in each]
        found = []
        for (name, teacher), images, kept in zip(self._made.items(), batch.views, batch.kept, strict=True):
            side, masks = images.shape[-1] // teacher.patch_size, None
            if kept is not None and self._replace:
                masks = torch.ones(len(images), side * side, dtype=torch.bool, device=kept.device)
                masks, kept = masks.scatter_(1, kept, False), None
            network = self.networks[name]
            made = network(images.expand(-1, teacher.in_channels, -1, -1), masks, kept)
            kind = next(network.parameters()).dtype
            found.append(Looked(made.patches.to(kind), made.cls.to(kind), kept, side))
        return found
