"""The projection head of DINO and iBOT: features to logits over prototypes."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from launch.settings import Settings
from pretrain.models.layers import init_linear

__all__ = ["DinoHead", "HeadSettings"]


class HeadSettings(Settings):
    """Sizes of a projection head."""

    prototypes: int = Field(65536, gt=1, description="outputs; fewer for small batches")
    hidden: int = Field(2048, gt=0, description="width of the hidden layers")
    bottleneck: int = Field(256, gt=0, description="width of the normalised layer before the prototypes")
    layers: int = Field(3, ge=1, description="linear layers before the prototypes")

    def build(self, dim: int) -> DinoHead:
        """The head on features of ``dim`` channels, initialised unless on the meta device."""
        return DinoHead(dim, self.hidden, self.bottleneck, self.prototypes, self.layers)


class DinoHead(nn.Module):
    """Linear layers with GELU between, a unit-length bottleneck, and one weight vector a prototype, free in length."""

    def __init__(self, in_dim: int, hidden: int, bottleneck: int, prototypes: int, layers: int = 3) -> None:
        super().__init__()
        widths = [in_dim, *[hidden] * (layers - 1), bottleneck]
        linears = [nn.Linear(a, b) for a, b in pairwise(widths)]
        stack: list[nn.Module] = []
        for linear in linears:
            stack += [linear, nn.GELU()]
        self.mlp = nn.Sequential(*stack[:-1]) if layers > 1 else linears[0]
        self.last_layer = nn.Linear(bottleneck, prototypes, bias=False)
        if not self.last_layer.weight.is_meta:
            self.init_weights()

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Fills every parameter. Logits start with a deviation near 0.02, so that the loss starts at ln(prototypes)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                init_linear(module, generator)

    def forward(self, x: Tensor, *, no_last: bool = False, only_last: bool = False) -> Tensor:
        """Features [..., in_dim] to logits [..., prototypes]; ``no_last`` stops at the bottleneck, ``only_last`` starts
        there.

        Without gradients (a teacher) the logits are computed in float32 also under bf16 (on a GPU with TF32 products,
        as `axial pretrain` sets it): they are divided by a temperature near 0.05 and exponentiated, which would make
        bf16's rounding a factor.
        """
        if not only_last:
            x = self.mlp(x)
            x = F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)
        if no_last:
            return x
        if torch.is_grad_enabled() or x.dtype == torch.float64:
            return self.last_layer(x.to(self.last_layer.weight.dtype))  # type: ignore[no-any-return]
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.last_layer.weight.float())
