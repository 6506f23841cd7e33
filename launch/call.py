"""One verb on one run folder, as it travels to where it is executed."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.run import Outcome
from launch.settings import load

__all__ = ["Call", "resolve", "samples_of"]


@dataclass(frozen=True)
class Call:
    """One verb on one run folder: ``main`` and ``model`` are "module:name" of the function and its settings class."""

    main: str
    model: str
    folder: Path

    def execute(self) -> Outcome:
        """Call the function in this process, with the settings the folder holds."""
        outcome: Outcome = resolve(self.main)(self.settings())
        return outcome

    def settings(self) -> Any:
        """The settings the folder holds."""
        # The folder may have been moved, or be named from another place than when it was made.
        folder = json.dumps(str(self.folder), ensure_ascii=False)
        return load(resolve(self.model), self.folder / "settings.yaml", [f"folder={folder}"])


def samples_of(call: Call, step: int) -> Sequence[str]:
    """Keys of the samples that step ``step`` (the first is 1) of the call's run sees; none where its verb has none.

    A verb tells them by a function ``samples(settings, step)`` beside its main.
    """
    samples = getattr(importlib.import_module(call.main.partition(":")[0]), "samples", None)
    found: Sequence[str] = samples(call.settings(), step) if samples is not None else ()
    return found


def resolve(name: str) -> Any:
    """The object that "module:name" names."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)
