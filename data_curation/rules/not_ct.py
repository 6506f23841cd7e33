"""MR, PET, pictures and wrong scales, known by their values, where no header tells.

CT in HU is unlike anything else in one respect: fat, lung and air lie below -50 HU, so a body has many negative
voxels. In 25 real scans (crops of a spine and of a lung nodule among them) the share of voxels from -1100 to -50 HU
was 22 % or more; in MR, PET, labels and 8-bit pictures it was 0. The limit is 0.5 %, a fortieth of the lowest CT.
"""

from __future__ import annotations

from pydantic import Field

from data_curation.grid import Volume, VolumeError
from data_curation.histogram import ZERO
from launch import settings

__all__ = ["Settings", "apply"]


class Settings(settings.Settings):
    """What the values of a CT satisfy."""

    min_below_fat: float = Field(0.005, ge=0, le=1, description="least share of voxels from -1100 to -50 HU")
    min_soft: float = Field(0.2, ge=0, le=1, description="least share from -300 to 300 HU of what lies above -300 HU")
    max_median: float = Field(500.0, description="highest median HU, padding apart")
    max_below_air: float = Field(0.05, ge=0, le=1, description="largest share below -1250 HU that is not padding")


def apply(volume: Volume, settings: Settings) -> Volume:
    """The volume; VolumeError `not_ct`."""
    values = volume.values
    median = values.quantile(0.5)
    spread = f"{values.low} to {values.high}, median {median}"
    below = values.share(-1100, -50)
    if values.low > -200 or below < settings.min_below_fat:
        text = f"values from {spread}, {below:.1%} of them from -1100 to -50: no air, lung or fat in HU, so not CT"
        raise VolumeError("not_ct", text + " (MR, PET, a picture?): leave it out, or convert the original again")
    if median > settings.max_median:
        text = f"values from {spread}, above max_median={settings.max_median:g}: not HU, convert the original again"
        raise VolumeError("not_ct", text)
    soft, body = values.share(-300, 300), values.share(-300, 32767)
    if body > settings.min_below_fat and soft < settings.min_soft * body:
        text = f"{soft / body:.1%} of what is above -300 lies below 300, less than min_soft={settings.min_soft:g}"
        raise VolumeError("not_ct", f"{text} ({spread}): no soft tissue in HU, convert the original again")
    deep = values.counts[: -1250 + ZERO]
    low = float(deep.sum() - deep.max(initial=0)) / float(values.counts.sum())
    if low > settings.max_below_air:
        text = f"{low:.1%} of the voxels lie below -1250, at no single padding value: not HU, leave it out"
        raise VolumeError("not_ct", text)
    return volume
