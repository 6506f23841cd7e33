"""A plan as the YAML file that `axial finetune` reads: each value with its reason."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Choice", "Plan", "written"]


@dataclass(frozen=True)
class Choice:
    """A value of plain types, and why it is this one."""

    value: Any
    why: str


@dataclass(frozen=True)
class Plan:
    """What a plan decides; `given` is what the user decided."""

    about: str
    given: Mapping[str, Any]
    spacing: Choice
    size: Choice
    batch: Choice
    recompute: Choice
    windows: Choice
    flip: Choice
    split: Choice


def written(plan: Plan) -> str:
    """The file's text; what it does not hold stays at the recipe's defaults."""
    lines = [
        *_comment(f"Made by `axial plan`. {plan.about}"),
        *_comment("Change what you like; `axial finetune --help` tells all settings."),
        *(f"{name}: {_plain(value)}" for name, value in plan.given.items()),
        *_comment(f"spacing, mm: {plan.spacing.why}"),
        f"spacing: {_plain(plan.spacing.value)}",
        *_comment(f"size: {plan.size.why}"),
        *_comment(f"batch_size: {plan.batch.why}"),
        f"patches: {{size: {plan.size.value}, batch_size: {plan.batch.value}}}",
        *_comment("precision: bf16 halves what is kept for the backward pass; the memory above is counted so"),
        "precision: bf16",
        *_comment(f"recompute: {plan.recompute.why}"),
        f"parallel: {{recompute: {plan.recompute.value}}}",
        *_comment(f"normalisation: {plan.windows.why}"),
        *_listed("normalisation", plan.windows.value),
        *_comment(f"flip: {plan.flip.why}"),
        f"augmentation: {{flip: {_plain(plan.flip.value)}}}",
        *_comment(f"split: {plan.split.why}"),
        f"split: {_plain(plan.split.value)}",
    ]
    return "\n".join(lines) + "\n"


def _comment(text: str) -> list[str]:
    return textwrap.wrap(text, 118, initial_indent="# ", subsequent_indent="#   ", break_long_words=False)


def _listed(name: str, value: Any) -> list[str]:
    if isinstance(value, str):
        return [f"{name}: {value}"]
    return [f"{name}:", *(f"  - {_plain(one)}" for one in value)]


def _plain(value: Any) -> str:
    """YAML on one line: JSON is that."""
    return json.dumps(value, ensure_ascii=False)
