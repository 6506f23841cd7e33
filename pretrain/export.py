"""`axial export`: a run's checkpoint -> one safetensors file that says in its header how to use it; and other forms."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, ValidationInfo, field_validator, model_validator
from torch import Tensor

import launch.settings
from data_curation.aside import aside, sweep
from launch.run import Outcome, command
from pretrain.hugging_face import write_folder
from pretrain.released import Released, ReleasedError, read
from pretrain.weights import write_weights

__all__ = ["Settings", "main", "write", "write_pth"]

_ENDINGS = {"axial": ".safetensors", "pth": ".pth"}


class Settings(launch.settings.Settings):
    """Export of a pretraining run, or of any file that a backbone can be read from."""

    folder: Path = Field(description="run folder of `axial pretrain`; also a checkpoint, an export or a published file")
    format: Literal["axial", "hugging_face", "pth"] = Field(
        "axial",
        description="axial: one safetensors; hugging_face: a folder that DINOv3ViTModel of transformers loads; pth: "
        "{'teacher': {'backbone.x': ...}} as DINOv3's own code and MedDINOv3's read it",
    )
    step: int | None = Field(None, ge=0, description="step of the checkpoint; null: the newest")
    which: Literal["teacher", "student"] = Field(
        "teacher", description="which network; the EMA teacher is the better one; a run without one gives its student"
    )
    heads: bool = Field(False, description="with the projection heads, as a further pretraining can use them")
    output: Path | None = Field(
        None,
        description="file to write, NAME.safetensors or NAME.pth, or the folder of hugging_face; null: in the run "
        "folder export.safetensors, export.pth or hugging_face",
    )

    @field_validator("output")
    @classmethod
    def _is_of_the_format(cls, output: Path | None, info: ValidationInfo) -> Path | None:
        ending = _ENDINGS.get(info.data.get("format", ""), "")
        if output is not None and ending and output.suffix != ending:
            raise ValueError(f"must end in {ending}, by which it is known when it is read")
        if output is not None and not ending and output.suffix in _ENDINGS.values():
            raise ValueError("must be a folder: hugging_face is three files")
        return output

    @model_validator(mode="after")
    def _has_heads(self) -> Settings:
        if self.heads and self.format == "hugging_face":
            raise ValueError("heads=true: DINOv3ViTModel has none; use format=axial or format=pth")
        return self


def main(settings: Settings) -> Outcome:
    """Export the backbone; an existing export is replaced only once the new one is whole."""
    released = read(settings.folder, settings.step, settings.which)
    if settings.which == "student" and released.about.get("which") != "student":
        raise ReleasedError(f"{settings.folder} ({released.form}) has no student; choose it in a run folder")
    if settings.heads and not released.heads:
        raise ReleasedError(f"heads=true: {settings.folder} ({released.form}) has none; leave it out, or give the run")
    name = {"axial": "export.safetensors", "pth": "export.pth", "hugging_face": "hugging_face"}[settings.format]
    if settings.output is None and settings.folder.is_file():
        raise ValueError(f"{settings.folder} is a file, beside which nothing is written unasked; give output=NAME")
    output = settings.output or settings.folder / name
    if settings.format == "hugging_face":
        if output.is_file():
            raise ValueError(f"output {output} is a file; give a folder")
        made = write_folder(released, output)
    else:
        if output.is_dir():
            raise ValueError(f"output {output} is a folder; give a file in it")
        (write if settings.format == "axial" else write_pth)(released, output, heads=settings.heads)
        made = [output]
    size = made[-1].stat().st_size / 2**20
    which = released.about.get("which", "backbone")
    print(f"{which} of {released.form}: {len(released.backbone)} tensors, {size:.1f} MiB as {settings.format}")
    if settings.format == "pth":
        print(f"the file has no place for the window: {released.window.said()}")
    return Outcome(made=tuple(map(str, made)), next=(command("finetune", "CONFIG.yaml", f"backbone={output}"),))


def write_pth(released: Released, output: Path, *, heads: bool) -> None:
    """Write {'teacher': {'backbone.x': ...}} aside, then rename; with `heads` their tensors beside the backbone's."""
    output.parent.mkdir(parents=True, exist_ok=True)
    sweep(output.parent, output.name)
    with aside(output) as file:
        torch.save({"teacher": _joined(released, heads)}, file)


def _joined(released: Released, heads: bool) -> dict[str, Tensor]:
    parts = {"backbone": released.backbone, **(released.heads if heads else {})}
    return {f"{part}.{name}": tensor.contiguous() for part, state in parts.items() for name, tensor in state.items()}


def write(released: Released, output: Path, *, heads: bool) -> None:
    """Write aside, then rename; `axial` in the header is JSON: model, window, step, corpus, which, axial."""
    tensors = _joined(released, heads) if heads else dict(released.backbone)
    header = {
        "axial": version("axial-ct"),
        "which": released.about.get("which"),
        "model": released.settings.model_dump(mode="json"),
        "window": released.window.model_dump(mode="json"),
        "step": released.about.get("step"),
        "corpus": released.about.get("corpus"),
    }
    write_weights(output, tensors, {"format": "pt", "axial": json.dumps(header)})
