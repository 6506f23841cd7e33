"""Is it CT, whole and usable? Every answer has a slug that can be counted and a sentence with numbers.

Files without a modality tag are judged by their values; the rules, one a file, lie in `data_curation.rules`.
"""

from __future__ import annotations

from dataclasses import dataclass

from data_curation.grid import Volume, VolumeError
from data_curation.rules import REFUSALS, REPAIRS, Limits

__all__ = ["Limits", "Verdict", "check", "repair"]


@dataclass(frozen=True)
class Verdict:
    """`reason` is "" when kept; `detail` is a sentence with numbers and, when refused, what to do."""

    kept: bool
    reason: str = ""
    detail: str = ""


def check(volume: Volume, limits: Limits) -> Verdict:
    """Kept, or the first reason against it: too few slices, a label, not CT, no body, too small, unlikely spacing."""
    try:
        for rule in REFUSALS:
            volume = rule(volume, limits)
    except VolumeError as error:
        return Verdict(False, error.reason, error.message)
    z, y, x = volume.hu.shape
    spacing = " x ".join(f"{side:.3g}" for side in volume.spacing)
    values = volume.values
    return Verdict(True, "", f"{z} slices of {y} x {x} pixels, {spacing} mm, {values.low} to {values.high} HU")


def repair(volume: Volume, limits: Limits) -> Volume:
    """The volume with what the rules can mend and a note on it; else the volume itself."""
    for rule in REPAIRS:
        volume = rule(volume, limits)
    return volume
