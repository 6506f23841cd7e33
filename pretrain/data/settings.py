"""What a run reads and makes of it: the settings of the training data, and which of them do not fit each other."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from launch.settings import Settings
from pretrain.data.crops import CropSettings
from pretrain.data.masks import MaskSettings
from pretrain.data.window import HuWindow

__all__ = ["CorpusSettings", "DataSettings", "StreamError", "check"]


class StreamError(ValueError):
    """The corpus or the settings cannot give the batches that were asked for."""


class CorpusSettings(Settings):
    """One of several corpora."""

    path: Path = Field(description="folder that `axial curate` wrote")
    weight: float | None = Field(
        None, gt=0, description="its share of the samples beside the other corpora's weights; null: 1 where another "
        "corpus has a weight, else its share of the slices",
    )  # fmt: skip


class DataSettings(Settings):
    """Which slices a run sees, how often and in which order, and what it makes of them."""

    corpus: Path | None = Field(None, description="folder that `axial curate` wrote; or give corpora")
    corpora: tuple[CorpusSettings, ...] = Field((), description="several such folders, mixed by their weights")
    weights: dict[str, float] = Field(
        {}, description="data set -> how often its slices are seen, beside 1 of all others; 0: never"
    )
    split: str | None = Field("train", description="split of the corpora to read; null: all of it")
    batch_size: int = Field(gt=0, description="slices a step over all ranks; the number of ranks must divide it")
    seed: int = Field(0, ge=0, description="of the order, the crops, the masks and the mix of sizes")
    workers: int = Field(
        4, ge=0, description="reading processes of a rank, at most one a CPU; 0: read in the training process"
    )
    prefetch: int = Field(
        2,
        gt=0,
        description="batches that each worker holds ready in shared memory; 0.5 to 1 MB a slice where crops are made "
        "on the device, else the size of its crops",
    )
    start_method: Literal["fork", "spawn", "forkserver"] | None = Field(
        None, description="how workers are started; null: the platform's default"
    )
    crop_on: Literal["auto", "workers", "device"] = Field(
        "auto", description="where crops are made; auto: on the device when it is a GPU, else in the workers"
    )
    max_unreadable: int = Field(
        16, ge=0, description="unreadable slices in a row that are replaced before the run stops"
    )
    max_unreadable_share: float = Field(
        0.01, ge=0, le=1, description="share of a rank's slices that may be unreadable before the run stops, once "
        "there are more of them than max_unreadable",
    )  # fmt: skip
    max_worker_deaths: int = Field(
        3, ge=0, description="reading processes that may die within 1000 steps of a rank before the run stops"
    )
    crops: CropSettings = Field(CropSettings(), description="the crops of a slice")
    masks: MaskSettings = Field(MaskSettings(), description="the masks of the student's global crops")
    window: HuWindow = Field(
        HuWindow(), description="HU window and normalisation; a list of windows gives each a channel of its own"
    )

    @model_validator(mode="after")
    def _sensible(self) -> DataSettings:
        if (self.corpus is None) == (not self.corpora):
            raise ValueError("give corpus (one folder) or corpora (a list of them): which slices to learn from")
        paths = [source.path for source in self.sources]
        if doubled := {str(path) for path in paths if paths.count(path) > 1}:
            raise ValueError(f"corpora: {', '.join(sorted(doubled))} is there twice; give it once, with a weight")
        if wrong := [name for name, weight in self.weights.items() if not 0 <= weight < float("inf")]:
            raise ValueError(f"weights: {wrong[0]} needs a number of 0 or more, got {self.weights[wrong[0]]}")
        if self.window.channels > 1 and self.crops.random_window is not None:
            raise ValueError(f"crops.random_window needs one fixed window, and window has {self.window.channels}")
        return self

    @property
    def sources(self) -> tuple[CorpusSettings, ...]:
        """The corpora, also where there is one."""
        return self.corpora if self.corpus is None else (CorpusSettings(path=self.corpus),)

    @property
    def place(self) -> str:
        """The folders in words."""
        return ", ".join(str(source.path) for source in self.sources)


def check(settings: DataSettings, ranks: int, patch_size: int, in_channels: int = 1) -> None:
    """Refuses settings that cannot work on this many ranks or with this model; reads nothing."""
    if settings.batch_size % ranks:
        near = max(1, settings.batch_size // ranks) * ranks
        raise StreamError(f"data.batch_size: {settings.batch_size} cannot be divided over {ranks} ranks; {near} can")
    images = settings.batch_size // ranks
    if settings.masks.group and images % settings.masks.group:
        raise StreamError(
            f"data.masks.group: {settings.masks.group} does not divide the {images} images of a rank "
            f"(batch_size {settings.batch_size} over {ranks} ranks)"
        )
    try:
        settings.crops.check_patches(patch_size)
    except ValueError as error:
        raise StreamError(f"data.{error}") from None
    windows = settings.window.channels
    if windows > 1 and windows != in_channels:
        raise StreamError(
            f"data.window: {windows} windows make {windows} channels, and model.in_channels is {in_channels}; "
            "give as many windows as channels, or one window, which is repeated"
        )
    if in_channels not in (1, 3):
        raise StreamError(f"in_channels: {in_channels}; a slice has one channel, which can be repeated to 3")
