"""Volumes of float numbers: most hold whole HU, or HU that were interpolated; some were normalised, or are PET.

Normalised values, and standard uptake values, span far less than CT does, and with fractions. NaN is refused, since
any number put in its place would be an invention.
"""

from __future__ import annotations

from pydantic import Field

from data_curation.grid import AIR, VolumeError
from launch import settings

__all__ = ["WHOLE", "Settings", "judge"]

WHOLE = 1e-3  # a fraction below this is noise of float arithmetic


class Settings(settings.Settings):
    """What float values are taken for HU."""

    min_float_range: float = Field(100.0, ge=0, description="least span of values with fractions that may be HU")


def judge(low: float, high: float, rounding: float, bad: int, size: int, settings: Settings) -> None:
    """Raises VolumeError `not_finite` or `not_ct`. `rounding` is the largest fraction lost, `bad` counts NaN."""
    if bad:
        raise VolumeError("not_finite", f"{bad:,} of {size:,} voxels are NaN or infinite: write them as {AIR}")
    if rounding > WHOLE and high - low < settings.min_float_range:
        text = f"values run from {low:.3g} to {high:.3g} with fractions, so they are not HU: undo the normalisation"
        raise VolumeError("not_ct", text)
