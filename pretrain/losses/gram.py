"""Gram anchoring: the student's patches keep the mutual similarities an earlier teacher found (Simeoni et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

import launch.settings
from pretrain.losses import Given
from pretrain.schedule import Schedule, resolved

if TYPE_CHECKING:
    from pretrain.data.batch import Batch

__all__ = ["Gram", "Settings", "build", "chosen_patches", "gram_loss", "resize_patches"]

Negatives = Literal["keep", "drop", "drop_teacher"]
Tokens = Literal["all", "masked", "unmasked"]


class Settings(launch.settings.Settings):
    """Squared difference of patch similarities between student and Gram teacher."""

    kind: Literal["gram"] = "gram"
    weight: Schedule = Field(Schedule(peak=1.0), description="weight of the loss")
    normalized: bool = Field(True, description="cosine similarities; false: dot products")
    within_image: bool = Field(
        True, description="similarities of patches of one crop; false: of all patches of the batch"
    )
    negatives: Negatives = Field("keep", description="what becomes of similarities below zero")
    tokens: Tokens = Field(
        "all", description="which patches count, by the student's masks; other than all: only with within_image: false"
    )
    antialias: bool = Field(
        False, description="low-pass before the teacher's patches are resized to the student's grid"
    )

    @model_validator(mode="after")
    def _crops_keep_their_sizes(self) -> Settings:
        if self.tokens != "all" and self.within_image:
            raise ValueError(
                f"tokens: {self.tokens} takes another number of patches from each crop; set within_image: false"
            )
        return self


def gram_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    normalized: bool = True,
    within_image: bool = True,
    negatives: Negatives = "keep",
) -> Tensor:
    """Mean squared difference of the similarity matrices of patches [B, N, D], in float32 (TF32 on a GPU under bf16).

    ``drop`` takes similarities below zero for zero on both sides, ``drop_teacher`` on the teacher's alone.
    """
    exact = torch.promote_types(student.dtype, torch.float32)
    with torch.autocast(student.device.type, enabled=False):
        student, teacher = student.to(exact), teacher.detach().to(exact)
        if normalized:
            student, teacher = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
        if not within_image:
            student, teacher = student.flatten(0, 1)[None], teacher.flatten(0, 1)[None]
        target = teacher @ teacher.mT
        if negatives == "keep":
            return torch.baddbmm(target, student, student.mT, beta=-1).square().mean()
        similarity = student @ student.mT
        if negatives == "drop":
            similarity = similarity.clamp(min=0)
        return (similarity - target.clamp_(min=0)).square().mean()


def resize_patches(patches: Tensor, grid: tuple[int, int], to: tuple[int, int], antialias: bool = False) -> Tensor:
    """Patches [B, h*w, D] of one grid, bicubically resized to another, in float32."""
    if grid == to:
        return patches
    images = torch.unflatten(patches.to(torch.promote_types(patches.dtype, torch.float32)).mT, -1, grid)
    resized = F.interpolate(images, size=to, mode="bicubic", align_corners=False, antialias=antialias)
    return resized.flatten(2).mT


def chosen_patches(patches: Tensor, batch: Batch, tokens: Tokens) -> Tensor:
    """Patches [2B, N, D] of global crops, or as [1, M, D] those of them that the student saw masked or unmasked."""
    if tokens == "all":
        return patches
    chosen = batch.mask_indices
    if tokens == "unmasked":  # sorted to the front: how many they are is known without asking the device
        order = batch.masks.flatten().to(torch.uint8).argsort(stable=True)
        chosen = order[: batch.masks.numel() - len(batch.mask_indices)]
    return patches.flatten(0, 1).index_select(0, chosen)[None]


@dataclass(frozen=True)
class Gram:
    """The term: patches of the student's global crops, masked ones too, against the Gram teacher's larger view."""

    settings: Settings
    patch_size: int
    head: nn.Module | None = None
    needs_gram: bool = True

    @property
    def weight(self) -> Schedule:
        """The weight by step."""
        return self.settings.weight

    def loss(self, given: Given) -> Tensor:
        """Raises ValueError where no Gram teacher has looked."""
        if given.gram is None:
            raise ValueError("the gram term has no Gram teacher: name the checkpoint or the copy it is to be")
        s, batch = self.settings, given.batch
        seen = batch.global_crops if batch.gram_crops is None else batch.gram_crops
        grids = self._grid(seen), self._grid(batch.global_crops)
        target = resize_patches(given.gram.patches.detach(), *grids, s.antialias)
        student, target = (chosen_patches(x, batch, s.tokens) for x in (given.student.globals_.patches, target))
        if not student.numel():
            return 0 * given.student.globals_.patches.float().sum()
        return gram_loss(
            student,
            target,
            normalized=s.normalized,
            within_image=s.within_image,
            negatives=s.negatives,
        )

    def _grid(self, crops: Tensor) -> tuple[int, int]:
        return crops.shape[-2] // self.patch_size, crops.shape[-1] // self.patch_size


def build(settings: Settings, *, dim: int, patch_size: int, steps: int) -> Gram:
    """The term with its schedules resolved for a run of ``steps``."""
    return Gram(resolved(settings, steps), patch_size)
