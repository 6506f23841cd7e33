"""Packed attention against one sequence at a time, and xformers' mask against ours."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings

import pytest
import torch
import torch.nn.functional as F

from pretrain.models.attention import Group, block_diagonal, offsets, packed_attention

GROUPS = (Group(2, 37), Group(5, 12), Group(1, 64))


def _stream(groups: tuple[Group, ...], dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (offsets(groups)[-1], 4, 16)
    return [torch.randn(shape, dtype=dtype, generator=generator, requires_grad=True) for _ in range(3)]


def dense_mask(groups: tuple[Group, ...]) -> torch.Tensor:
    """The rule as a matrix: bool [T, T], true where two tokens are of one sequence."""
    lengths = torch.tensor([length for sequences, length in groups for _ in range(sequences)])
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    return sequence[:, None] == sequence[None, :]


def _one_by_one(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, groups: tuple[Group, ...]) -> torch.Tensor:
    lengths = [length for sequences, length in groups for _ in range(sequences)]
    parts = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    found = []
    for a, b, c in parts:
        scores = torch.einsum("qhd,khd->hqk", a, b) / a.shape[-1] ** 0.5
        found.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), c))
    return torch.cat(found)


@pytest.mark.parametrize("groups", [GROUPS, GROUPS[:1], (Group(3, 1),)], ids=["three", "one", "single tokens"])
def test_equals_each_sequence_alone_with_gradients(groups: tuple[Group, ...]) -> None:
    inputs = _stream(groups)
    weight = torch.randn(inputs[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours, theirs = packed_attention(*inputs, groups), _one_by_one(*inputs, groups)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad((x * weight).sum(), inputs) for x in (ours, theirs)]
    for own, other in zip(*gradients, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-12)


def test_dense_mask_is_the_same_rule() -> None:
    q, k, v = _stream(GROUPS)
    masked = F.scaled_dot_product_attention(
        *(x.transpose(0, 1) for x in (q, k, v)), attn_mask=dense_mask(GROUPS)
    ).transpose(0, 1)
    torch.testing.assert_close(packed_attention(q, k, v, GROUPS), masked, rtol=0, atol=1e-12)


def test_xformers_mask_is_ours() -> None:
    """xformers has no kernel for the CPU; that it would attend to the same tokens can be seen here all the same."""
    pytest.importorskip("xformers", exc_type=ImportError)
    logging.getLogger("xformers").setLevel(logging.ERROR)  # it complains that its CUDA part does not load
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        mask = block_diagonal(GROUPS, torch.device("cpu"))
    tokens = offsets(GROUPS)[-1]
    assert torch.equal(mask.materialize((tokens, tokens)) == 0, dense_mask(GROUPS))
    assert block_diagonal(GROUPS, torch.device("cpu")) is mask


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_kernel_equals_cpu(dtype: torch.dtype) -> None:
    inputs = [x.detach().to("cuda", dtype).requires_grad_() for x in _stream(GROUPS, torch.float32)]
    exact = [x.detach().double().cpu().requires_grad_() for x in inputs]
    ours, theirs = packed_attention(*inputs, GROUPS), packed_attention(*exact, GROUPS)
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(ours.double().cpu(), theirs, rtol=0, atol=tolerance)
    ours.float().square().sum().backward()
    theirs.square().sum().backward()
    for own, other in zip(inputs, exact, strict=True):
        assert own.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(own.grad.double().cpu(), other.grad, rtol=0, atol=10 * tolerance)


def test_flops_are_counted_on_the_meta_device() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    q, k, v = (torch.empty(offsets(GROUPS)[-1], 4, 16, device="meta") for _ in range(3))
    with FlopCounterMode(display=False) as counter:
        packed_attention(q, k, v, GROUPS)
    assert counter.get_total_flops() == sum(4 * 4 * 16 * length**2 * sequences for sequences, length in GROUPS)
