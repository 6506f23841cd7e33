"""Is it CT, whole and usable? Every answer has a slug that can be counted and a sentence with numbers.

Files without a modality tag are judged by their values. CT in HU is unlike anything else in one respect: fat, lung and
air lie below -50 HU, so a body has many negative voxels. In 25 real scans (crops of a spine and of a lung nodule among
them) the share of voxels from -1100 to -50 HU was 22 % or more; in MR, PET, labels and 8-bit pictures it was 0.
The limit is 0.5 %, a fortieth of the lowest CT.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from data_curation.grid import AIR
from data_curation.volumes import Volume
from launch.settings import Settings

__all__ = ["Limits", "Verdict", "check", "repair"]


class Limits(Settings):
    """What a volume must satisfy to enter the corpus."""

    min_slices: int = Field(2, ge=1, description="fewest axial slices")
    min_side: int = Field(16, ge=1, description="fewest pixels along either side of a slice: one patch of a ViT/16")
    min_spacing: float = Field(0.1, gt=0, description="smallest voxel side, mm")
    max_pixel: float = Field(8.0, gt=0, description="largest pixel side in a slice, mm")
    max_slice_spacing: float = Field(25.0, gt=0, description="largest distance between slices, mm")
    min_below_fat: float = Field(0.005, ge=0, le=1, description="least share of voxels from -1100 to -50 HU")
    min_body: float = Field(0.01, ge=0, le=1, description="least share above -500 HU in the slice that shows most body")
    min_soft: float = Field(0.2, ge=0, le=1, description="least share from -300 to 300 HU of what lies above -300 HU")
    max_median: float = Field(500.0, description="highest median HU, padding apart")
    max_below_air: float = Field(0.05, ge=0, le=1, description="largest share below -1250 HU that is not padding")
    repair_offset: bool = Field(True, description="take 1024 off a CT that was stored without its rescale intercept")
    unknown_spacing: bool = Field(
        False, description="keep 1 x 1 x 1 mm volumes of 512 pixels or more (spacing was lost)"
    )


@dataclass(frozen=True)
class Verdict:
    """`reason` is "" when kept; `detail` is a sentence with numbers and, when refused, what to do."""

    kept: bool
    reason: str = ""
    detail: str = ""


@dataclass(frozen=True)
class _Values:
    """Exact counts of each HU value, on every voxel or, in a large volume, on every second row and column."""

    counts: NDArray[np.int64]  # [65536], of -32768..32767
    low: int
    high: int

    def at(self, value: int) -> float:
        """Share of all voxels that have exactly this value."""
        return float(self.counts[value + 32768]) / float(self.counts.sum())

    def share(self, low: int, high: int) -> float:
        """Share of voxels from `low` to `high`, both included, among those that are not far below air (padding)."""
        total = int(self.counts[-1100 + 32768 :].sum())
        return float(self.counts[max(low, -1100) + 32768 : high + 32768 + 1].sum()) / max(total, 1)

    def quantile(self, q: float) -> int:
        """Of the voxels that are not far below air."""
        sums = np.cumsum(self.counts[-1100 + 32768 :])
        return int(np.searchsorted(sums, q * sums[-1])) - 1100


def check(volume: Volume, limits: Limits) -> Verdict:
    """Kept, or the first reason against it: too few slices, a label, not CT, no body, too small, unlikely spacing."""
    values = _values(volume.hu)
    for question in (_is_stack, _is_image, _is_ct, _has_body, _is_sized):
        reason, detail = question(volume, values, limits)
        if reason:
            return Verdict(False, reason, detail)
    z, y, x = volume.hu.shape
    spacing = " x ".join(f"{side:.3g}" for side in volume.spacing)
    return Verdict(True, "", f"{z} slices of {y} x {x} pixels, {spacing} mm, {values.low} to {values.high} HU")


def repair(volume: Volume, limits: Limits) -> Volume:
    """The volume with 1024 taken off, and a note, where the rescale intercept was lost; else the volume itself."""
    if not limits.repair_offset or volume.hu.min() < 0 or not _lost_offset(_values(volume.hu)):
        return volume
    note = f"rescale intercept was missing: {AIR} added to every voxel"
    return replace(volume, hu=volume.hu + np.int16(AIR), notes=(*volume.notes, note))


def _values(hu: NDArray[np.int16]) -> _Values:
    seen = hu if hu.size < 4_000_000 else hu[:, ::2, ::2]
    counts = np.zeros(65536, np.int64)
    for plane in seen:
        counts += np.bincount(plane.ravel().view(np.uint16), minlength=65536)
    return _Values(np.roll(counts, 32768), int(hu.min()), int(hu.max()))


def _lost_offset(values: _Values) -> bool:
    """Would taking 1024 off make it CT?

    Then most of what is no air is soft tissue within -160..240 HU, and little lies between lung and fat. No scaling of
    an MR, PET or phantom to 12 bits came near both (soft tissue 0.86 but 0.73 in between); real CT has 0.70 to 0.97
    and 0.00 to 0.11, but for a crop around a lung nodule.
    """
    if values.low < 0 or not 1500 <= values.high <= 4096:
        return False
    soft = values.share(-160 + 1024, 240 + 1024)
    body = values.share(-300 + 1024, 4096)
    between = values.share(-650 + 1024, -250 + 1024)
    return soft >= 0.05 and soft >= 0.65 * body and between <= 0.25 * soft


def _is_stack(volume: Volume, values: _Values, limits: Limits) -> tuple[str, str]:
    slices = volume.hu.shape[0]
    if slices >= limits.min_slices:
        return "", ""
    reason = "single_slice" if slices == 1 else "too_few_slices"
    return (
        reason,
        f"{slices} axial slice(s), fewer than min_slices={limits.min_slices}: leave it out or lower the limit",
    )


def _is_image(volume: Volume, values: _Values, limits: Limits) -> tuple[str, str]:
    if values.low == values.high:
        return "constant", f"every voxel is {values.low}: the file is empty, leave it out"
    distinct = int(np.count_nonzero(values.counts))
    if values.low < -1 or distinct > 1024:
        return "", ""
    filled = same = 0
    for plane in volume.hu:
        inside = plane[:, 1:] > 0
        filled += int(np.count_nonzero(inside))
        same += int(np.count_nonzero(inside & (plane[:, 1:] == plane[:, :-1])))
    alike = same / max(filled, 1)
    if distinct <= 2 or alike >= 0.5:
        text = f"{distinct} whole values from {values.low} to {values.high}, {alike:.0%} of the voxels equal to their"
        return "label", f"{text} neighbour: a label map or mask, not an image"
    return "", ""


def _is_ct(volume: Volume, values: _Values, limits: Limits) -> tuple[str, str]:
    median = values.quantile(0.5)
    spread = f"{values.low} to {values.high}, median {median}"
    if _lost_offset(values):
        text = f"values from {spread} are CT without its rescale intercept of {AIR}:"
        return "missing_offset", f"{text} set limits.repair_offset=true, or convert the original again"
    at_low, at_high = (values.at(end) for end in (values.low, values.high))
    if (-900 < values.low < 0 and at_low > 0.05) or (values.low < 0 and values.high <= 500 and at_high > 0.005):
        text = f"{at_low:.1%} of the voxels are exactly {values.low} and {at_high:.1%} exactly {values.high} HU"
        return "windowed", text + ": cut to a display window, which cannot be undone; convert the original again"
    below = values.share(-1100, -50)
    if values.low > -200 or below < limits.min_below_fat:
        text = f"values from {spread}, {below:.1%} of them from -1100 to -50: no air, lung or fat in HU, so not CT"
        return "not_ct", text + " (MR, PET, a picture?): leave it out, or convert the original again"
    if median > limits.max_median:
        text = f"values from {spread}, above max_median={limits.max_median:g}: not HU, convert the original again"
        return "not_ct", text
    soft, body = values.share(-300, 300), values.share(-300, 32767)
    if body > limits.min_below_fat and soft < limits.min_soft * body:
        text = f"{soft / body:.1%} of what is above -300 lies below 300, less than min_soft={limits.min_soft:g}"
        return "not_ct", f"{text} ({spread}): no soft tissue in HU, convert the original again"
    padding = values.counts[: -1250 + 32768].max(initial=0)
    low = float(values.counts[: -1250 + 32768].sum() - padding) / float(values.counts.sum())
    if low > limits.max_below_air:
        return "not_ct", f"{low:.1%} of the voxels lie below -1250, at no single padding value: not HU, leave it out"
    return "", ""


def _has_body(volume: Volume, values: _Values, limits: Limits) -> tuple[str, str]:
    best = 0.0
    for plane in volume.hu:
        best = max(best, float(np.count_nonzero(plane > -500)) / plane.size)
        if best >= limits.min_body:
            return "", ""
    text = f"at most {best:.2%} of a slice is above -500 HU, less than min_body={limits.min_body:g}"
    return "no_body", f"{text} ({values.low} to {values.high} HU): air or noise, leave it out"


def _is_sized(volume: Volume, values: _Values, limits: Limits) -> tuple[str, str]:
    height, width = volume.hu.shape[1:]
    z, y, x = volume.spacing
    sides = f"{z:.3g} x {y:.3g} x {x:.3g} mm"
    if min(height, width) < limits.min_side:
        text = f"slices of {height} x {width} pixels, smaller than min_side={limits.min_side}"
        return "too_small", text + ": leave it out or lower the limit"
    if min(z, y, x) < limits.min_spacing:
        return "spacing", f"voxels of {sides}, a side below min_spacing={limits.min_spacing:g}: correct the header"
    if max(y, x) > limits.max_pixel or z > limits.max_slice_spacing:
        text = (
            f"voxels of {sides}, above max_pixel={limits.max_pixel:g} or max_slice_spacing={limits.max_slice_spacing:g}"
        )
        return "spacing", text + ": correct the header, or raise the limit"
    if not limits.unknown_spacing and (z, y, x) == (1.0, 1.0, 1.0) and min(height, width) >= 512:
        text = f"{height} x {width} pixels at exactly 1 x 1 x 1 mm: the header has lost the true spacing,"
        return "unknown_spacing", text + " take a copy that has it, or set limits.unknown_spacing=true"
    return "", ""
