"""What is watched of a run, and how often."""

from __future__ import annotations

import math
from pathlib import Path

from pydantic import Field, model_validator

from launch.settings import Settings
from pretrain.watch.probe import ProbeSettings

__all__ = ["RunProbe", "WatchSettings"]


class RunProbe(ProbeSettings):
    """A probe of the teacher's patches on labelled scans during the run."""

    every: int = Field(2000, ge=1, description="steps between two probes")
    images: Path | None = Field(None, description="folder of images, named as in nnU-Net: CASE_0000.nii.gz")
    labels: Path | None = Field(None, description="folder of their label maps: CASE.nii.gz")
    pairs: Path | None = Field(
        None, description="a JSON or Parquet list of image, label and patient instead of the two folders"
    )

    @model_validator(mode="after")
    def _one_source(self) -> RunProbe:
        if (self.images is None) != (self.labels is None) or (self.images is None) == (self.pairs is None):
            raise ValueError("give the two folders images and labels, or the list pairs")
        return self


class WatchSettings(Settings):
    """What is looked at beside the loss; the start and the end of a run are always looked at."""

    every: int = Field(500, ge=0, description="steps between two looks at features and targets; 0: none")
    images_every: int = Field(2000, ge=0, description="steps between two sets of pictures; 0: none")
    slices: int = Field(32, ge=1, description="slices of the corpus that are looked at, the same over the run")
    pictures: int = Field(4, ge=1, description="how many of them are drawn")
    seed: int = Field(0, ge=0, description="of the choice of slices, crops and masks")
    probe: RunProbe | None = Field(None, description="labelled scans on which the teacher's patches are probed")

    @property
    def period(self) -> int:
        """Steps between two calls at each of which something may be due; 0: never."""
        return math.gcd(self.every, self.images_every, self.probe.every if self.probe is not None else 0)
