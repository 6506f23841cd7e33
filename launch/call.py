"""One verb on one run folder, as it travels to where it is executed."""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.run import Outcome
from launch.settings import load

__all__ = ["Call", "resolve"]


@dataclass(frozen=True)
class Call:
    """One verb on one run folder: ``main`` and ``model`` are "module:name" of the function and its settings class."""

    main: str
    model: str
    folder: Path

    def execute(self) -> Outcome:
        """Call the function in this process, with the settings the folder holds."""
        # The folder may have been moved, or be named from another place than when it was made.
        folder = json.dumps(str(self.folder), ensure_ascii=False)
        settings = load(resolve(self.model), self.folder / "settings.yaml", [f"folder={folder}"])
        outcome: Outcome = resolve(self.main)(settings)
        return outcome


def resolve(name: str) -> Any:
    """The object that "module:name" names."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)
