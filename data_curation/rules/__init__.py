"""What a scan must satisfy, one rule a file, in the order in which the rules are asked.

A rule is `apply(subject, settings) -> subject`: it returns what it was given, changed and with a note where that
mends it, or raises VolumeError with a slug, what was found, and what to do. A new rule is a file and a line here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from data_curation.grid import Grid, Volume
from data_curation.rules import (
    body,
    few_slices,
    floats,
    gaps,
    label,
    lost_offset,
    max_voxels,
    not_ct,
    oblique,
    padding,
    phases,
    spacing,
    stored_axis,
    tails,
    tilt,
    too_small,
    uneven,
    unknown_spacing,
    windowed,
)

__all__ = ["OF_GRIDS", "OF_VOLUMES", "REFUSALS", "REPAIRS", "Limits"]


class Limits(
    too_small.Settings,
    unknown_spacing.Settings,
    spacing.Settings,
    body.Settings,
    not_ct.Settings,
    few_slices.Settings,
    lost_offset.Settings,
    padding.Settings,
    floats.Settings,
    oblique.Settings,
    stored_axis.Settings,
    tilt.Settings,
    uneven.Settings,
    gaps.Settings,
    phases.Settings,
    max_voxels.Settings,
):
    """What a volume must satisfy to enter the corpus: the settings of all rules."""


GridRule: TypeAlias = Callable[[Grid, Limits], Grid]
VolumeRule: TypeAlias = Callable[[Volume, Limits], Volume]

# On voxels as stored, before they are turned to LPS; by `volumes.of_grid`.
OF_GRIDS: tuple[GridRule, ...] = (
    phases.apply,
    gaps.apply,
    uneven.apply,
    tilt.apply,
    stored_axis.apply,
    oblique.apply,
)
# On whole HU; by `volumes.of_grid`.
OF_VOLUMES: tuple[VolumeRule, ...] = (padding.apply, tails.apply)
# By `checks.repair` and `checks.check`.
REPAIRS: tuple[VolumeRule, ...] = (lost_offset.repair, unknown_spacing.repair)
REFUSALS: tuple[VolumeRule, ...] = (
    few_slices.apply,
    label.apply,
    lost_offset.apply,
    windowed.apply,
    not_ct.apply,
    body.apply,
    too_small.apply,
    spacing.apply,
    unknown_spacing.apply,
)
