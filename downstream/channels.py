"""Channels of an image: what they are called, how their values are kept, and how these become the network's input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from launch.settings import Settings
from pretrain.data.window import HuWindow

__all__ = ["AIR", "SCALE", "ZSCORE", "Channel", "channels_through", "image", "kind_of", "network_channels"]

AIR = -1000  # stored value around a slice smaller than the patch: HU, and elsewhere one deviation below the mean
SCALE = 1000.0  # a channel that is no CT is kept as thousandths of its own image's deviation, around its mean
ZSCORE = HuWindow(low=-32 * SCALE, high=32 * SCALE, mean=0.0, std=SCALE)

Kind = Literal["ct", "zscore"]


class Channel(Settings):
    """One channel of the images, in the order of the files CASE_0000, CASE_0001, ..."""

    name: str = Field("CT", description="what it is called in dataset.json")
    kind: Kind = Field("ct", description="ct: values are HU; zscore: each image is brought to mean 0 and deviation 1")
    window: HuWindow = Field(description="stored values -> network input; several windows are several channels of it")

    def said(self) -> str:
        """How it is normalised, in words, for a summary."""
        if self.kind == "ct":
            return self.window.said()
        if self.window == ZSCORE:
            return "each image's own mean becomes 0 and its deviation one"
        return self.window.said().replace("HU ", "thousandths of a deviation ")


def kind_of(name: str) -> Kind:
    """nnU-Net's rule: a channel called CT holds HU, anything else is normalised image by image."""
    return "ct" if name.strip().lower() == "ct" else "zscore"


def network_channels(channels: Sequence[Channel]) -> int:
    """How many channels the network sees."""
    return sum(channel.window.channels for channel in channels)


def channels_through(names: Sequence[str], window: HuWindow | None) -> int:
    """How many channels the network sees, each CT channel through `window`, or where that is None through one."""
    each = window.channels if window is not None else 1
    return sum(each if kind_of(name) == "ct" else 1 for name in names)


def image(stored: Tensor, channels: Sequence[Channel]) -> Tensor:
    """Stored values [..., C, Y, X] -> normalised float32 [..., n, Y, X], the windows of each channel in order."""
    assert stored.shape[-3] == len(channels), f"{tuple(stored.shape)} for {len(channels)} channels"
    return torch.cat([channel.window.image(stored[..., i, :, :]) for i, channel in enumerate(channels)], dim=-3)
