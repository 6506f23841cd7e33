"""Settings of `multi_teacher`: who sees what, how teachers are weighed, and what the student is held against."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from launch.settings import Settings
from pretrain.schedule import NotNegative, Positive, Schedule

__all__ = ["Divergence", "Gate", "Hiding", "Spatial"]


class Hiding(Settings):
    """Which patches the networks do not see; each teacher's share of them is its own setting, `mask`."""

    student: float = Field(0.75, ge=0, lt=1, description="share of the patches that the student has to guess")
    nested: bool = Field(
        False, description="a network that sees less sees a part of what the others see; false: each its own draw"
    )
    replace: bool = Field(
        False,
        description="teachers get mask tokens in the place of hidden patches and speak for all of them, as the "
        "published equations have it; false: they get nothing there and do not vote",
    )
    region: int = Field(1, ge=1, description="side, in the student's patches, of squares that are hidden as one")


class Gate(Settings):
    """How teachers are weighed at a token: softmax of (affinity + agreement) / temperature."""

    affinity: NotNegative = Field(Schedule(peak=1.0), description="factor of the cosine with the student")
    agreement: NotNegative = Field(
        Schedule(peak=1.0), description="factor of the mean cosine with the other teachers; both 0: a plain average"
    )
    temperature: Positive = Field(Schedule(peak=0.1), description="the lower, the more the best one takes")


class Divergence(Settings):
    """One KL divergence of the student from the fused target."""

    weight: NotNegative = Field(Schedule(peak=1.0), description="weight of the loss")
    temperature: float = Field(1.0, gt=0, description="divides both sides before the softmax")


class Spatial(Divergence):
    """The one on all tokens."""

    axis: Literal["channels", "positions"] = Field(
        "channels", description="softmax over the channels of a token, or over the positions of a channel"
    )
