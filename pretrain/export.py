"""`axial export`: a run's checkpoint -> one safetensors file that says in its header how to use it."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator
from torch import Tensor

import launch.settings
from launch.run import Outcome
from pretrain.released import Released, read
from pretrain.weights import write_weights

__all__ = ["Settings", "main", "write"]


class Settings(launch.settings.Settings):
    """Export of a pretraining run."""

    folder: Path = Field(description="run folder of `axial pretrain`")
    step: int | None = Field(None, ge=0, description="step of the checkpoint; null: the newest")
    which: Literal["teacher", "student"] = Field(
        "teacher", description="which network; the EMA teacher is the better one; a run without one gives its student"
    )
    heads: bool = Field(False, description="with the projection heads, as a further pretraining can use them")
    output: Path | None = Field(
        None, description="file to write, NAME.safetensors; null: export.safetensors in the run folder"
    )

    @field_validator("output")
    @classmethod
    def _is_safetensors(cls, output: Path | None) -> Path | None:
        if output is not None and output.suffix != ".safetensors":
            raise ValueError("must end in .safetensors, by which it is known when it is read")
        return output


def main(settings: Settings) -> Outcome:
    """Export the backbone; an existing export is replaced only once the new one is whole."""
    released = read(settings.folder, settings.step, settings.which)
    output = settings.output or settings.folder / "export.safetensors"
    write(released, output, heads=settings.heads)
    size = output.stat().st_size / 2**20
    print(f"{released.about['which']} of {released.form}: {len(released.backbone)} tensors, {size:.1f} MiB")
    return Outcome(made=(str(output),), next=(f"axial finetune CONFIG.yaml backbone={output}",))


def write(released: Released, output: Path, *, heads: bool) -> None:
    """Write aside, then rename; `axial` in the header is JSON: model, window, step, corpus, which, axial."""
    tensors: dict[str, Tensor] = dict(released.backbone)
    if heads:
        tensors = {f"backbone.{name}": tensor for name, tensor in released.backbone.items()}
        tensors |= {
            f"{part}.{name}": tensor for part, state in released.heads.items() for name, tensor in state.items()
        }
    header = {
        "axial": version("axial-ct"),
        "which": released.about.get("which"),
        "model": released.settings.model_dump(mode="json"),
        "window": released.window.model_dump(mode="json"),
        "step": released.about.get("step"),
        "corpus": released.about.get("corpus"),
    }
    write_weights(output, tensors, {"format": "pt", "axial": json.dumps(header)})
