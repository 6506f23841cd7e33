"""The settings of `axial curate`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from data_curation.catalogue import CATALOGUE
from data_curation.checks import Limits
from data_curation.slices import CODECS, DEFAULT_CODEC, SliceRule
from launch.documents import near
from launch.settings import Settings as Base

__all__ = ["Evaluation", "Settings", "Source", "Splits", "Terms"]


@dataclass(frozen=True)
class Terms:
    """The licence of a data set, and whether it allows commercial use."""

    licence: str
    commercial: bool


class Source(Base):
    """One data set on this machine."""

    name: str = Field(description="name in the catalogue; `folder` takes any tree of images")
    root: Path = Field(description="folder of the data set")
    id: str = Field("", description="its name in the corpus, needed to use a catalogue name twice; default: the name")
    licence: str = Field("", description="its licence, where the catalogue does not know it")
    commercial: bool | None = Field(None, description="may it be used commercially; default: what the catalogue says")

    @property
    def terms(self) -> Terms:
        """What a user says, else what the catalogue does."""
        known = CATALOGUE[self.name]
        commercial = known.commercial if self.commercial is None else self.commercial
        return Terms(self.licence or known.licence, commercial)

    @property
    def called(self) -> str:
        """Its name in the corpus."""
        return self.id or self.name

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in CATALOGUE:
            raise ValueError(
                f"no data set is called {name!r}{near(name, CATALOGUE)}; there are: {', '.join(CATALOGUE)}"
            )
        return name


class Evaluation(Base):
    """A data set in nnU-Net's raw format that models will be scored on: its imagesTs and one fold of its imagesTr."""

    root: Path = Field(description="the folder that holds imagesTr and imagesTs")
    id: str = Field("", description="its name in the lists; default: evaluation 1, 2, ...")
    fold: int = Field(0, ge=0, description="the fold that validates")
    folds: int = Field(5, ge=2, description="folds the training cases are cut into")

    @model_validator(mode="after")
    def _exists(self) -> Self:
        if self.fold >= self.folds:
            raise ValueError(f"fold {self.fold} does not exist among {self.folds} folds, numbered from 0")
        return self


class Splits(Base):
    """Shares of the patients; they add up to 1. Which patient goes where is a hash, so small corpora deviate."""

    train: float = Field(0.95, ge=0, le=1, description="share of the patients to train on")
    val: float = Field(0.05, ge=0, le=1, description="share of the patients to validate on")

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if abs(self.train + self.val - 1) > 1e-9:
            raise ValueError(f"train + val must be 1, got {self.train} + {self.val}")
        return self


class Settings(Base):
    """What goes into the corpus, and how it is cut up."""

    folder: Path = Field(description="the corpus: shards/, rows/, index.parquet and what is private")
    datasets: tuple[Source, ...] = Field(min_length=1, description="data sets, the preferred copy of a scan first")
    evaluation: tuple[Evaluation, ...] = Field(
        (), description="labelled data sets of one's own whose test and validation scans must stay out, under any name"
    )
    licence: Literal["any", "commercial"] = Field(
        "any", description="commercial: leave out data sets that may not be used commercially"
    )
    limits: Limits = Field(Limits(), description="what a volume must satisfy")
    slices: SliceRule = Field(SliceRule(), description="which slices of a volume are kept")
    duplicates: Literal["mark", "drop"] = Field(
        "mark", description="slices seen before: keep them marked, or not at all"
    )
    likeness: bool = Field(True, description="also find mirrored, re-clipped, resliced and resampled copies of a scan")
    include_held_out: bool = Field(False, description="also take cases that are kept for testing")
    extend: bool = Field(
        False, description="add to a finished corpus in new shards; its own shards, and all its data sets, stay"
    )
    shard_slices: int = Field(2000, ge=1, description="slices after which a shard is full; a volume is never divided")
    codec: str = Field(DEFAULT_CODEC, description=f"how slices are stored: {', '.join(CODECS)}")
    split: Splits = Field(Splits(), description="shares of train and val")
    seed: int = Field(0, description="draws the split and the order of slices")
    salt: str = Field(
        "", description="secret mixed into all hashed names; without one the seed is, which anyone may guess"
    )
    workers: int = Field(0, ge=0, description="processes; 0: one for each core")
    timeout_s: float | None = Field(3600.0, gt=0, description="seconds a volume or shard may take; null: no limit")
    memory_gib: float | None = Field(None, gt=0, description="GiB a process may allocate; null: no limit")

    @field_validator("codec")
    @classmethod
    def _codec(cls, codec: str) -> str:
        if codec not in CODECS:
            raise ValueError(f"no codec {codec!r}; there are: {', '.join(CODECS)}")
        return codec

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        names = Counter([*(one.called for one in self.datasets), *(one.id for one in self.evaluation if one.id)])
        twice = [name for name, count in names.items() if count > 1]
        if twice:
            raise ValueError(f"two data sets are called {', '.join(twice)}: give each its own `id:`")
        return self
