"""How a network that learnt from photographs sees CT: a range of HU takes the place of black to white."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field, model_validator

from pretrain.data.window import HuWindow
from pretrain.teachers import TeacherSettings

__all__ = ["IMAGENET", "NaturalSettings", "Range", "natural_window"]

Range = tuple[float, float]
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and deviation of red, green and blue, of 0 to 1


class NaturalSettings(TeacherSettings):
    """A teacher that was trained on photographs.

    The default range is that of the student's default window. With a narrow one, such as [-160, 240] for soft tissue,
    lungs and bone are flat, and there the teacher would have nothing to teach; where contrast between soft tissues
    counts most, give three ranges, for instance [[-1000, 1000], [-160, 240], [-1350, 150]].
    """

    hu: Range | tuple[Range, Range, Range] = Field(
        (-1000.0, 1000.0),
        description="HU that become black and white, in all three channels; or three such ranges, one a channel",
    )

    @model_validator(mode="after")
    def _is_a_window(self) -> NaturalSettings:
        natural_window(self.hu)
        return self


def natural_window(
    hu: Range | tuple[Range, ...], mean: Sequence[float] = IMAGENET[0], std: Sequence[float] = IMAGENET[1]
) -> HuWindow:
    """Window by which HU are clipped to a range, scaled to 0 to 1 and normalised by `mean` and `std` of each channel.

    `hu` is (low, high), or such a pair for each of as many channels as there are numbers in `mean`.
    Raises ValueError for a range that is empty.
    """
    each: list[Any] = list(hu) if isinstance(hu[0], tuple) else [hu] * len(mean)
    if len(each) != len(mean):
        raise ValueError(f"{len(each)} ranges of HU are given for images of {len(mean)} channel(s)")
    rows = []
    for (low, high), m, s in zip(each, mean, std, strict=True):
        if not low < high:
            raise ValueError(f"hu needs low < high, got [{low:g}, {high:g}]")
        rows.append({"low": low, "high": high, "mean": low + m * (high - low), "std": s * (high - low)})
    return HuWindow.model_validate(rows)
