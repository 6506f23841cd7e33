"""One model, or several that decide together, by the place where they lie."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from downstream.labels import Labels
from downstream.model import Header, ModelError, SegmentationModel, load_model

__all__ = ["Ensemble", "load_models", "model_files"]

FILE = "model.safetensors"


@dataclass(frozen=True)
class Ensemble:
    """Models in evaluation mode on one device, each with its header; they agree on channels and labels."""

    files: tuple[Path, ...]
    models: tuple[SegmentationModel, ...]
    headers: tuple[Header, ...]

    @property
    def labels(self) -> Labels:
        """What is told apart."""
        return self.headers[0].labels

    @property
    def digest(self) -> str:
        """SHA-256 over the files, in an order of its own."""
        digests = []
        for path in self.files:
            with path.open("rb") as file:
                digests.append(hashlib.file_digest(file, "sha256").hexdigest())
        return digests[0] if len(digests) == 1 else hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()


def model_files(given: Path | Sequence[Path]) -> tuple[Path, ...]:
    """Model files of a file, of a run folder, or of a folder of runs `fold_0`, `fold_1`, ...; of each of several.

    ModelError where there is none; a fold that is not finished is one too, since it would be left out in silence.
    """
    several = [given] if isinstance(given, Path) else list(given)
    if not several:
        raise ModelError("model= is empty; give a model.safetensors, a run folder, or several of them")
    found = [path for one in several for path in _of(one)]
    if len({path.resolve() for path in found}) < len(found):
        raise ModelError(f"a model is named twice among {', '.join(map(str, found))}; name each once")
    return tuple(found)


def _of(given: Path) -> list[Path]:
    if not given.is_dir():
        return [given]  # `load_model` says what is wrong with it
    if (given / FILE).is_file():
        return [given / FILE]
    folds = sorted(path for path in given.glob("fold_*") if path.is_dir())
    unfinished = [path.name for path in folds if not (path / FILE).is_file()]
    if not folds:
        raise ModelError(
            f"{given} has neither {FILE} nor folders fold_0, fold_1, ...; give the folder of a finetune run"
        )
    if unfinished:
        raise ModelError(
            f"{given}: {', '.join(unfinished)} have no {FILE} yet; let them finish, or name the others: "
            f"model=[{', '.join(str(path) for path in folds if path.name not in unfinished)}]"
        )
    return [path / FILE for path in folds]


def load_models(given: Path | Sequence[Path], device: torch.device | str = "cpu") -> Ensemble:
    """The models that a path, or several, name. ModelError where one is damaged, or they do not fit together."""
    files = model_files(given)
    loaded = [load_model(path, device) for path in files]
    first = _agreed(loaded[0][1])
    for path, (_, header) in zip(files, loaded, strict=True):
        for what, value in _agreed(header).items():
            if value != first[what]:
                raise ModelError(
                    f"{path} has other {what} than {files[0]}: {value} and {first[what]}; models that decide together "
                    "are trained on one data set"
                )
    return Ensemble(files, tuple(model for model, _ in loaded), tuple(header for _, header in loaded))


def _agreed(header: Header) -> dict[str, object]:
    return {
        "channels": [(channel.name, channel.kind) for channel in header.channels],
        "organs": dict(header.organs),
        "label values": header.values,
        "regions": header.order,
        "value to ignore": header.ignore,
    }
