"""Verb `onnx`: a segmentation model -> one ONNX file, HU in and logits out, for runtimes without Python or torch.

The windows are inside the graph; what else is needed (organs, spacing, patch) is the model's header, in the metadata.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

import launch.settings
from data_curation.aside import aside
from downstream.channels import Channel, image
from downstream.ensemble import model_files
from downstream.model import FORMAT, Header, ModelError, SegmentationModel, load_model
from launch.run import Outcome

__all__ = ["Settings", "Whole", "main", "serialised"]

TOLERANCE = 1e-4  # of the largest logit, or of 1
ROUNDINGS = 4  # so many times what float32 rounds is let pass too: onnxruntime rounds in other places
_MOST = 2**31 - 2**20  # bytes of one protobuf message
_INPUT = (
    "float32 [batch, channel, row, column]: HU of a ct channel; of a zscore channel 1000 * (value - mean) / deviation "
    "of its image. With a context [batch, slice, channel, row, column], the slice to be labelled in the middle"
)
_OUTPUT = "float32 [batch, head, row, column]: a softmax over heads, or a sigmoid each where the header has `order`"


class Settings(launch.settings.Settings):
    """Export of a segmentation model to ONNX."""

    model: Path = Field(description="model.safetensors of a finetune run, or its folder")
    output: Path | None = Field(None, description="file to write, NAME.onnx; null: beside the model")
    size: tuple[int, int] | None = Field(
        None, description="rows and columns of a slice, px; null: the model's patch. The batch is free"
    )
    check: bool = Field(True, description="run it with onnxruntime and compare before it is written")

    @field_validator("output")
    @classmethod
    def _is_onnx(cls, output: Path | None) -> Path | None:
        if output is not None and output.suffix != ".onnx":
            raise ValueError("must end in .onnx")
        return output

    @field_validator("size")
    @classmethod
    def _is_positive(cls, size: tuple[int, int] | None) -> tuple[int, int] | None:
        if size is not None and min(size) < 1:
            raise ValueError("needs two sides of at least 1 px")
        return size


class Whole(nn.Module):
    """Stored values [B, (S,) C, Y, X] float32 -> logits [B, heads, Y, X]: the windows, then the model."""

    def __init__(self, model: SegmentationModel, channels: Sequence[Channel]) -> None:
        super().__init__()
        self.model, self.channels = model, tuple(channels)

    def forward(self, stored: Tensor) -> Tensor:
        """See the class."""
        logits: Tensor = self.model(image(stored, self.channels)).float()
        return logits


def main(settings: Settings) -> Outcome:
    """Export; an existing file is replaced only once the new one is whole and gives the model's logits."""
    _installed("onnx", "onnxscript", *(["onnxruntime"] if settings.check else []))
    source, *more = model_files(settings.model)
    if more:
        raise ModelError(f"{settings.model} holds {1 + len(more)} models, and an ONNX file is one; give one of them")
    model, header = load_model(source)
    size = settings.size or (header.patch, header.patch)
    output = settings.output or source.with_suffix(".onnx")
    if output.is_dir():
        raise ModelError(f"output {output} is a folder; give a file in it, NAME.onnx")
    example = _example(header, size)
    data = serialised(model, header, example)
    said = ""
    if settings.check:
        worst = _compared(Whole(model, header.channels), data, example)
        own = 0.0 if worst <= TOLERANCE else _rounding(model, header, example)
        if not worst <= max(TOLERANCE, ROUNDINGS * own):
            raise ModelError(
                f"{source}: onnxruntime's logits differ by {worst:.1e}, where float32 itself is uncertain by "
                f"{own:.0e}; nothing is written"
            )
        said = f", logits equal to {worst:.0e}"
    output.parent.mkdir(parents=True, exist_ok=True)
    with aside(output) as file:
        file.write(data)
    shape = ", ".join(str(side) for side in example.shape[1:])
    values = "HU" if all(channel.kind == "ct" for channel in header.channels) else "HU, or thousandths of a deviation"
    print(f"input `image` [batch, {shape}]: {values}; output `logits`; {len(data) / 2**20:.1f} MiB{said}")
    return Outcome(made=(str(output),))


def _installed(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelError(f"axial onnx needs {', '.join(missing)}: pip install 'axial-ct[onnx]' (or check=false)")


def _example(header: Header, size: tuple[int, int]) -> Tensor:
    """Two images of every value between air and bone, the same each time."""
    context = (header.context.size,) if header.context.slices else ()
    draw = torch.Generator().manual_seed(0)
    return torch.randint(-1024, 1500, (2, *context, len(header.channels), *size), generator=draw).float()


def serialised(model: SegmentationModel, header: Header, example: Tensor) -> bytes:
    """The ONNX file of a model for images of the form of `example` [2, ...], in any number. ModelError if too large."""
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    if weights > _MOST:
        raise ModelError(f"{weights / 2**30:.1f} GiB of weights: an ONNX file holds 2 GiB")
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            Whole(model, header.channels).eval(),
            (example,),
            dynamo=True,
            input_names=["image"],
            output_names=["logits"],
            dynamic_shapes={"stored": {0: torch.export.Dim("batch")}},
            verbose=False,
        )
    assert program is not None
    _forget_source(program.model)
    program.model.metadata_props.update(
        {"format": FORMAT, "header": header.model_dump_json(), "input": _INPUT, "output": _OUTPUT}
    )
    data: bytes = program.model_proto.SerializeToString(deterministic=True)
    return data


def _forget_source(model: Any) -> None:
    """Take out what torch notes of each node: its place in our source, with the paths of this machine."""
    for graph in model.graphs():
        graph.metadata_props.clear()
        for value in [*graph.inputs, *graph.outputs, *graph.initializers.values()]:
            value.metadata_props.clear()
        for node in graph:
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()


def _compared(whole: Whole, data: bytes, example: Tensor) -> float:
    """Largest difference of onnxruntime's logits for one and for two images, over the largest logit or 1."""
    import onnxruntime

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    worst = 0.0
    for images in (example[:1], example):
        with torch.no_grad():
            want = whole(images)
        found = torch.from_numpy(session.run(None, {"image": images.numpy()})[0])
        if found.shape != want.shape:
            return float("inf")
        worst = max(worst, float((found - want).abs().max() / want.abs().max().clamp(min=1)))
    return worst


def _rounding(model: SegmentationModel, header: Header, example: Tensor) -> float:
    """What the model's own logits of one image lose by float32, over the largest logit or 1."""
    images = image(example[:1], header.channels)
    with torch.no_grad():
        exact = deepcopy(model).double()(images.double())
        lost = (model(images) - exact).abs().max()
    return float(lost / exact.abs().max().clamp(min=1))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter tells its own developers."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        logging.disable(before)
