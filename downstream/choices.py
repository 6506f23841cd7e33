"""What a setting may choose among: the plug-ins of decoders and of ways of tuning, by their `kind`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from launch.settings import Settings, choice

__all__ = ["Decoder", "Tuning"]

if TYPE_CHECKING:
    Decoder = Settings
    Tuning = Settings
else:
    Decoder = choice("downstream.decoders")
    Tuning = choice("downstream.tuning")
