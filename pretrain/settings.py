"""The settings of `axial pretrain`: one group for each part, which gets its group and nothing else."""

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from pydantic import Field, model_validator

import launch.settings
from launch.settings import choice
from pretrain.checkpoint import CheckpointSettings
from pretrain.checkpoint_files import CheckpointError, newest
from pretrain.data.stream import DataSettings
from pretrain.loop import LoopSettings
from pretrain.methods import Source, SourceError
from pretrain.models.vit import VitSettings
from pretrain.optim import OptimSettings
from pretrain.parallel import ParallelSettings
from pretrain.precision import Residual
from pretrain.watch.settings import WatchSettings
from pretrain.watchdog import WatchdogSettings

__all__ = ["LogSettings", "Settings"]

if TYPE_CHECKING:
    MethodSettings = launch.settings.Settings
else:
    MethodSettings = choice("pretrain.methods")


class LogSettings(launch.settings.Settings):
    """What is said of a run, and how often."""

    every: int = Field(10, ge=1, description="steps between two lines; the device is read only then")
    tensorboard: bool = Field(True, description="write TensorBoard files into the run folder")


class Settings(launch.settings.Settings):
    """Pretraining of a backbone on a corpus."""

    folder: Path = Field(description="run folder: settings, checkpoints, metrics")
    steps: int = Field(gt=0, description="optimizer steps of the run; schedules are relative to it")
    seed: int = Field(
        0, ge=0, description="seed of the weights and of every draw on the device; data.seed is the data's"
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    precision: Literal["fp32", "bf16"] = Field(
        "bf16", description="bf16: networks compute in bfloat16; weights, optimizer, averages and losses stay fp32"
    )
    residual: Residual = Field(
        "bf16", description="stream of tokens between blocks, with precision: bf16; fp32: exact sums, more memory"
    )
    init_from: Source | None = Field(
        None,
        description="weights to start from, for student and teacher; null: fresh ones; the word scratch: fresh ones "
        "also where the method reads an earlier run's weights, which is refused otherwise",
    )
    model: VitSettings = Field(VitSettings(), description="the backbone")
    method: MethodSettings = Field(
        default=cast(Any, {"kind": "self_distillation"}), description="what is learnt, with its loss terms"
    )
    data: DataSettings = Field(description="the corpus and what is made of its slices")
    optim: OptimSettings = Field(OptimSettings(), description="optimizer and its schedules")
    parallel: ParallelSettings = Field(ParallelSettings(), description="sharding, compilation, recomputation")
    checkpoint: CheckpointSettings = Field(CheckpointSettings(), description="when checkpoints are written and kept")
    log: LogSettings = Field(LogSettings(), description="lines, metrics.jsonl, TensorBoard")
    watch: WatchSettings = Field(WatchSettings(), description="what is looked at beside the loss")
    accumulate: int = Field(
        1,
        ge=1,
        description="parts in which a rank takes its share of data.batch_size, one after the other: less memory, the "
        "same images a step (see method.statistics)",
    )
    watchdog: WatchdogSettings = Field(WatchdogSettings(), description="what happens when a run stands still")
    clip: float | None = Field(
        3.0, gt=0, description="largest gradient norm, of backbone and each head on its own; null: no clipping"
    )
    gc_every: int = Field(
        150, ge=1, description="steps between two garbage collections, at the same steps on all ranks"
    )
    max_bad: int = Field(
        5, ge=1, description="steps in a row that may be skipped because a loss or gradient is not finite"
    )

    @model_validator(mode="after")
    def _crops_are_whole_patches(self) -> "Settings":
        try:
            self.data.crops.check_patches(self.model.patch_size)
        except ValueError as error:
            raise ValueError(f"data.{error}") from None
        try:
            self.method.check_data(self.data)  # type: ignore[attr-defined]  # every method's settings have it
        except ValueError as error:
            raise ValueError(f"data.{error}") from None
        return self

    @property
    def source(self) -> Source | None:
        """The weights to start from, where they are not fresh ones."""
        return None if self.init_from is None or self.init_from.is_scratch else self.init_from

    def _of_method(self, what: str) -> dict[str, Source]:
        return getattr(self.method, what, {})

    @property
    def earlier(self) -> dict[str, Source]:
        """Weights of earlier runs that the method reads, by key below `method`."""
        return self._of_method("sources")

    def check_sources(self, coming: Collection[Path] = ()) -> None:
        """Refuse a new run whose weights are not there or not named, all at once, before anything is built.

        Raises SourceError. A run that goes on from its own checkpoint needs only what no checkpoint holds. The run
        folders that are `coming` need not be there yet.
        """
        named: dict[str, Source | None] = {**self._of_method("always_read")}
        earlier, new = self.earlier, not any(self.folder.glob("checkpoints/step_*"))
        if new:
            named |= {"init_from": self.source, **earlier}
        missing = [
            f"{key if key == 'init_from' else 'method.' + key}: {wrong}"
            for key, of in named.items()
            if of is not None and of.path not in coming and (wrong := _missing(of))
        ]
        if new and self.init_from is None and (read := list(earlier)):
            missing.append(
                f"init_from: a run with method.{read[0]} goes on from an earlier one; name that (a run folder, a "
                "checkpoint or a file), or say init_from=scratch if it is to begin from random weights"
            )
        if missing:
            raise SourceError("\n  ".join([f"{len(missing)} source(s) of weights missing:", *missing]))

    @property
    def loop(self) -> LoopSettings:
        """What the loop needs of them."""
        return LoopSettings(
            steps=self.steps,
            seed=self.seed,
            precision="fp32",  # the networks compute in bf16 by themselves; the loop's autocast would undo their norms
            accumulate=self.accumulate,
            clip=self.clip,
            log_every=self.log.every,
            gc_every=self.gc_every,
            max_bad=self.max_bad,
            validate_every=self.watch.period,
            watchdog=self.watchdog,
        )


def _missing(source: Source) -> str:
    """What is wrong with where the weights are said to be; empty where they can be read as far as a look can tell."""
    if not source.path.exists():
        where = source.where or "give a run folder, a checkpoint, an export or a published file"
        return f"{source.path} does not exist; {where}"
    if not (source.path / "checkpoints").is_dir():
        return ""
    try:
        found = newest(source.path, source.step, say=lambda _: None)
    except CheckpointError as error:
        return str(error)
    return "" if found else f"{source.path}/checkpoints holds no complete checkpoint; let the run reach its first one"
