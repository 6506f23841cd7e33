"""Settings of `axial finetune`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from downstream.augment import Augmentation
from downstream.cases import Split
from downstream.choices import Decoder, Tuning
from downstream.context import Context
from downstream.decoders import pyramid
from downstream.inference import Window
from downstream.segmentation import PatchSettings
from downstream.tuning import full
from launch import settings as base
from pretrain.checkpoint import CheckpointSettings
from pretrain.data.window import HuWindow
from pretrain.models.vit import VitSettings
from pretrain.optim import Beta
from pretrain.parallel import ParallelSettings
from pretrain.settings import LogSettings
from pretrain.watchdog import WatchdogSettings

__all__ = ["OptimSettings", "Settings"]


class OptimSettings(base.Settings):
    """AdamW with two learning rates that fall linearly to 0."""

    lr: float = Field(3e-4, gt=0, description="learning rate of the decoder")
    backbone_lr: float = Field(3e-5, ge=0, description="learning rate of what is trained in the backbone")
    weight_decay: float = Field(0.05, ge=0, description="decoupled weight decay, of all parameters")
    betas: tuple[Beta, Beta] = Field((0.9, 0.98), description="decay of Adam's two averages")
    clip: float | None = Field(12.0, gt=0, description="largest gradient norm; null: no clipping")


class Settings(base.Settings):
    """Settings of `axial finetune`."""

    folder: Path = Field(description="run folder: settings, cache, checkpoints, metrics, the model")
    dataset: Path = Field(description="nnU-Net raw data set: imagesTr, labelsTr, dataset.json")
    backbone: Path | None = Field(
        None, description="an export, a run folder or a released checkpoint; null: random weights"
    )
    model: VitSettings = Field(
        VitSettings(size="b", in_channels=1), description="the backbone where `backbone` is null"
    )
    drop_path: float = Field(
        0.2, ge=0, lt=1, description="share of the sequences that skip a branch in training; only with tuning full"
    )
    decoder: Decoder = Field(pyramid.Settings(), description="what makes classes of the backbone's maps")
    tuning: Tuning = Field(full.Settings(), description="what is trained of the backbone")
    context: Context = Field(Context(), description="neighbours of a slice that are seen with it (2.5D)")
    steps: int = Field(250_000, gt=0, description="optimizer steps")
    seed: int = Field(0, ge=0, description="seed of the decoder's weights and of every draw")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    precision: Literal["fp32", "bf16"] = Field(
        "bf16", description="bf16: matrix products in bfloat16; weights stay fp32"
    )
    accumulate: int = Field(
        1, ge=1, description="parts in which a rank takes its batch; Dice is then that of each part"
    )
    split: Split = Field(Split(), description="which cases validate")
    spacing: float | None = Field(None, gt=0, description="in-plane mm that slices are brought to; null: as they are")
    normalisation: Literal["dataset", "pretraining"] | tuple[HuWindow, ...] = Field(
        "dataset",
        description="HU window: nnU-Net's of the training foreground, or the one the backbone was trained with, or a "
        "list of one for each channel",
    )
    cache: Path | None = Field(
        None, description="where prepared cases are kept, which runs may share; null: in the run folder"
    )
    patches: PatchSettings = Field(PatchSettings(), description="what a batch is made of")
    augmentation: Augmentation = Field(Augmentation(), description="distortions of the patches")
    optim: OptimSettings = Field(OptimSettings(), description="optimizer")
    validate_every: int = Field(2500, ge=0, description="steps between two validations; 0: at the end only")
    window: Window = Field(Window(), description="how validation goes over slices")
    maps: Literal["none", "last", "best"] = Field(
        "last", description="weights whose label maps of the validation cases are written and scored at the end"
    )
    prepare_workers: int = Field(0, ge=0, description="processes that prepare cases; 0: one after the other")
    checkpoint: CheckpointSettings = Field(CheckpointSettings(), description="when checkpoints are written and kept")
    parallel: ParallelSettings = Field(
        ParallelSettings(), description="compilation and recomputation; sharding: replicate"
    )
    log: LogSettings = Field(LogSettings(), description="lines, metrics.jsonl, TensorBoard")
    watchdog: WatchdogSettings = Field(WatchdogSettings(), description="what happens when a run stands still")

    @model_validator(mode="after")
    def _batch_has_parts(self) -> Settings:
        if self.patches.batch_size % self.accumulate:
            raise ValueError(
                f"patches.batch_size {self.patches.batch_size} cannot be cut into accumulate={self.accumulate} parts"
            )
        return self
