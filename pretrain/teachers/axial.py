"""A backbone that `axial pretrain` made: run folder, checkpoint or export. Its window is in the file."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pretrain.teachers import Teacher, TeacherSettings
from pretrain.teachers._vit import Published, build_teacher

__all__ = ["PUBLISHED", "Settings", "build"]

PUBLISHED = Published(families=("axial",))


class Settings(TeacherSettings):
    """A backbone of an earlier run."""

    kind: Literal["axial"] = "axial"
    which: Literal["teacher", "student"] = Field("teacher", description="which network of a run; an export has one")


def build(settings: Settings) -> Teacher:
    """Build it on torch's default device."""
    return build_teacher(settings, PUBLISHED, None, which=settings.which)
