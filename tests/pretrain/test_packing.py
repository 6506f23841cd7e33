"""One stream of crops of any sizes = each group of crops by itself, in outputs and in every parameter's gradient."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pretrain.models.vit import Features, VisionTransformer, VitSettings, build

Groups = list[tuple[int, int, int, bool]]
GROUPS = st.lists(
    st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.booleans()), min_size=1, max_size=4
)


def _model(drop_path: float, registers: int) -> VisionTransformer:
    shape = {"size": "custom", "width": 16, "depth": 2, "heads": 2, "in_channels": 1, "patch_size": 4}
    torch.manual_seed(0)
    model = build(VitSettings(**shape, registers=registers, layerscale=0.5, drop_path=drop_path)).double().train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def _same_samples(count: int, device: object = None) -> Tensor:
    """A permutation that depends on the number of crops alone, so that both ways keep the same ones."""
    return torch.arange(count).roll(1)


def _gradients(model: VisionTransformer, outputs: list[Features]) -> dict[str, Tensor]:
    model.zero_grad()
    generator = torch.Generator().manual_seed(3)
    total = torch.zeros((), dtype=torch.float64)
    for features in outputs:
        for x in (features.cls, features.registers, features.patches):
            total = total + (x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum()
    total.backward()  # type: ignore[no-untyped-call]
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("drop_path", [0.0, 0.4])
@settings(max_examples=12, deadline=None)
@given(groups=GROUPS, registers=st.integers(0, 2))
def test_a_stream_equals_its_groups(drop_path: float, groups: Groups, registers: int) -> None:
    model = _model(drop_path, registers)
    generator = torch.Generator().manual_seed(1)
    crops = [torch.randn(b, 1, 4 * h, 4 * w, generator=generator, dtype=torch.float64) for b, h, w, _ in groups]
    masks = [torch.rand(b, h * w, generator=generator) < 0.5 if masked else None for b, h, w, masked in groups]
    with mock.patch("torch.randperm", _same_samples):
        together = model(crops, masks)
        alone = [model(crop, mask) for crop, mask in zip(crops, masks, strict=True)]
    for one, other in zip(together, alone, strict=True):
        for name in ("cls", "registers", "patches"):
            torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=0, atol=1e-11)
    ours, theirs = _gradients(model, together), _gradients(model, alone)
    assert ours.keys() == theirs.keys() == dict(model.named_parameters()).keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-9, atol=1e-9, msg=name)
