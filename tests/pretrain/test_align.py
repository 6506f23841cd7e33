"""Maps of several teachers' features into one space, and of their tokens onto one grid."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from launch.distributed import world
from pretrain.align import AlignError, Map, Moments, fit_gcca, fit_pca, fit_recon, resample_map
from tests.gloo import run_ranks

DIMS = (12, 9, 15)
SHARED, OWN = 4, 3


def planted(n: int, seed: int = 0, noise: float = 0.05) -> tuple[Tensor, list[Tensor]]:
    """Signals [n, SHARED] that all teachers know, in three bases, beside signals of each and noise."""
    mixing = torch.Generator().manual_seed(99)
    mixes = [torch.randn(SHARED + OWN, dim, generator=mixing, dtype=torch.float64) for dim in DIMS]
    offsets = [5 * torch.randn(dim, generator=mixing, dtype=torch.float64) for dim in DIMS]
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(n, SHARED, generator=generator, dtype=torch.float64)
    views = []
    for m, (mix, offset) in enumerate(zip(mixes, offsets, strict=True)):
        own = torch.randn(n, OWN, generator=generator, dtype=torch.float64)
        extra = noise * torch.randn(n, DIMS[m], generator=generator, dtype=torch.float64)
        views.append((torch.cat([shared, own], 1) @ mix + extra) * 10**m + offset)
    return shared, views


def moments_of(views: list[Tensor], images: int | None = None) -> Moments:
    moments = Moments([x.shape[1] for x in views])
    moments.add(views, len(views[0]) if images is None else images)
    return moments


def mapped(maps: list[Map], views: list[Tensor]) -> list[Tensor]:
    return [F.linear(x, m.weight.double(), m.bias.double()) for m, x in zip(maps, views, strict=True)]


def same(ours: list[Map], theirs: list[Map], tolerance: float = 1e-5) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.weight, b.weight, rtol=tolerance, atol=tolerance * float(b.weight.abs().max()))
        torch.testing.assert_close(a.bias, b.bias, rtol=tolerance, atol=tolerance * float(b.bias.abs().max()))


def test_moments_are_those_of_all_tokens() -> None:
    _, views = planted(500)
    mean, covariance = moments_of(views).covariance(2)
    everything = torch.cat(views, 1)
    torch.testing.assert_close(mean, everything.mean(0))
    torch.testing.assert_close(covariance, torch.cov(everything.T, correction=0))


@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.randoms())
@settings(max_examples=20, deadline=None)
def test_moments_do_not_depend_on_the_order(sizes: list[int], random: Random) -> None:
    _, views = planted(sum(sizes))
    pieces = list(zip(*(torch.split(x, sizes) for x in views), strict=True))
    random.shuffle(pieces)
    parts = []
    for piece in pieces:
        parts.append(Moments(DIMS))
        parts[-1].add(piece, 1)
    total, whole = parts[0].merged(*parts[1:]), moments_of(views, len(sizes))
    assert torch.equal(total.counts, whole.counts)
    torch.testing.assert_close(total.sums, whole.sums, rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(total.products, whole.products, rtol=1e-12, atol=1e-9)
    assert torch.equal(parts[0].counts, torch.tensor([len(pieces[0][0]), 1]).double()), "merging changed a part"


def test_a_mean_far_from_zero_costs_no_digits_that_matter() -> None:
    _, views = planted(400)
    far = [x.float() + 1000 * float(x.std()) for x in views]
    expected = torch.cov(torch.cat([x.double() for x in far], 1).T, correction=0)
    std = expected.diagonal().sqrt()
    error = (moments_of(far).covariance(2)[1] - expected) / std.outer(std)
    assert error.abs().max() < 1e-6


def test_gcca_is_the_dense_computation() -> None:
    """MAXVAR as the generalised eigenproblem of all covariances against the views' own, shrinkage written out."""
    _, views = planted(300, noise=0.5)
    width, images = 20, 60
    full = np.cov(torch.cat(views, 1).numpy().T, bias=True)
    own, start = np.zeros_like(full), 0
    for dim in DIMS:
        part = slice(start, start + dim)
        s, p = full[part, part], dim
        top = (1 - 2 / p) * np.trace(s @ s) + np.trace(s) ** 2
        share = min(1.0, top / ((images + 1 - 2 / p) * (np.trace(s @ s) - np.trace(s) ** 2 / p)))
        own[part, part] = (1 - share) * s + share * np.trace(s) / p * np.eye(p)
        full[part, part] = own[part, part]
        start += dim
    values, vectors = scipy.linalg.eigh(full, own)  # full v = value own v, v' own v = 1
    expected = vectors[:, ::-1][:, :width].T * np.sqrt(values[::-1][:width])[:, None]
    found = torch.cat([m.weight for m in fit_gcca(moments_of(views, images), width)], 1).double().numpy()
    expected *= np.sign((found * expected).sum(1, keepdims=True))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_gcca_finds_what_all_views_share() -> None:
    _, views = planted(6000)
    maps = fit_gcca(moments_of(views), SHARED)
    fresh, new = planted(500, seed=1)
    for found in mapped(maps, new):
        given_back = torch.linalg.lstsq(F.pad(found, (0, 1), value=1.0), fresh).solution
        rest = fresh - F.pad(found, (0, 1), value=1.0) @ given_back
        assert rest.square().mean() < 0.02 * fresh.square().mean()
        torch.testing.assert_close(found.var(0), torch.ones(SHARED).double(), rtol=0.2, atol=0)
    a, *others = mapped(maps, new)
    assert all(F.cosine_similarity(a, b, dim=1).mean() > 0.97 for b in others)
    apart = mapped(fit_pca(moments_of(views), SHARED), new)
    assert F.cosine_similarity(apart[0], apart[1], dim=1).mean() < 0.5, "any map would have passed"


def test_gcca_maps_are_the_least_squares_ones() -> None:
    """With so many images that nothing is shrunk, regressions of the shared variables on each view give the same."""
    _, views = planted(4000, noise=0.5)
    maps = fit_gcca(moments_of(views, 10**9), 6)
    outputs = mapped(maps, views)
    # sum over views of sqrt(value) v_m' y_m = sqrt(value) * sqrt(value) * the variable of unit variance
    total = torch.stack(outputs).sum(0)
    variable = total / total.std(0, correction=0)
    for x, output in zip(views, outputs, strict=True):
        inputs = F.pad(x, (0, 1), value=1.0)
        fitted = inputs @ torch.linalg.lstsq(inputs, variable).solution
        torch.testing.assert_close(output, fitted, rtol=0, atol=2e-4)


def test_the_order_of_teachers_only_reorders_the_maps() -> None:
    _, views = planted(400, noise=0.5)
    order = [2, 0, 1]
    for fit in (fit_gcca, fit_pca):
        maps = fit(moments_of(views, 50), 8)
        turned = fit(moments_of([views[m] for m in order], 50), 8)
        same(turned, [maps[m] for m in order], 1e-4)


def test_signs_are_fixed_and_fits_repeat() -> None:
    _, views = planted(400, noise=0.5)
    first, again = (fit_gcca(moments_of(views), 10, spread=True) for _ in range(2))
    assert all(
        torch.equal(a.weight, b.weight) and torch.equal(a.bias, b.bias) for a, b in zip(first, again, strict=True)
    )
    for found in fit_pca(moments_of(views), 8):
        largest = found.weight.abs().argmax(1, keepdim=True)
        assert (found.weight.gather(1, largest) > 0).all()


def test_pca_has_one_scale_a_view() -> None:
    _, views = planted(500)
    for found, x, one in zip(
        fit_pca(moments_of(views), 6), views, mapped(fit_pca(moments_of(views), 6), views), strict=True
    ):
        covariance = torch.cov(one.T, correction=0)
        assert float(covariance.trace() / 6) == pytest.approx(1, rel=1e-4)
        torch.testing.assert_close(covariance, covariance.diagonal().diag(), rtol=0, atol=1e-4)
        gram = found.weight.double() @ found.weight.double().T
        torch.testing.assert_close(gram, gram[0, 0] * torch.eye(6).double(), rtol=0, atol=1e-5 * float(gram[0, 0]))
        top = torch.linalg.eigvalsh(torch.cov(x.T, correction=0)).flip(0)[:6]
        torch.testing.assert_close(covariance.diagonal() / covariance[0, 0], top / top[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fit", [fit_gcca, fit_pca])
def test_spreading_is_one_rotation_of_all_views(fit: Callable[..., list[Map]]) -> None:
    _, views = planted(400, noise=0.5)
    plain = fit(moments_of(views), 9)
    spread = fit(moments_of(views), 9, spread=True)
    turn = spread[0].weight.double() @ torch.linalg.pinv(plain[0].weight.double())
    torch.testing.assert_close(turn @ turn.T, torch.eye(9).double(), rtol=0, atol=1e-4)
    same(spread, [Map((turn @ m.weight.double()).float(), (turn @ m.bias.double()).float()) for m in plain], 1e-4)


def test_one_view_gets_its_principal_components() -> None:
    _, views = planted(300)
    same(fit_gcca(moments_of(views[:1]), 5), fit_pca(moments_of(views[:1]), 5))


def test_what_cannot_be_fitted_is_said() -> None:
    _, views = planted(300)
    with pytest.raises(AlignError, match=r"width of 37 exceeds the 36 channels of teachers of \[12, 9, 15\]"):
        fit_gcca(moments_of(views), 37)
    with pytest.raises(AlignError, match=r"width of 10 exceeds the 9 channels.*gcca"):
        fit_pca(moments_of(views), 10)
    few = [x[:5] for x in views]
    with pytest.raises(AlignError, match=r"6 tokens of at least 2 images are needed.*only 5 tokens of 5 images"):
        fit_gcca(moments_of(few), 5)
    with pytest.raises(AlignError, match="only 300 tokens of 1 images"):
        fit_gcca(moments_of(views, 1), 5)
    with pytest.raises(AlignError, match="only 0 tokens"):
        fit_pca(Moments(DIMS), 5)
    with pytest.raises(AlignError, match="teacher 1 gave the same features"):
        fit_gcca(moments_of([views[0], views[1][:1].expand(300, -1), views[2]]), 5)
    views[2][3, 1] = torch.nan
    with pytest.raises(AlignError, match="teacher 2 gave features that are not finite"):
        fit_gcca(moments_of(views), 5)


def test_a_channel_that_says_nothing_does_no_harm() -> None:
    _, views = planted(400)
    dead = [F.pad(x, (0, 1), value=7.0) for x in views]
    for fit in (fit_gcca, fit_pca):
        for found in fit(moments_of(dead, 10**9), 5):
            assert torch.isfinite(found.weight).all() and torch.isfinite(found.bias).all()
    maps, shares = fit_recon([dead[0]], 5, seed=0)
    assert torch.isfinite(maps[0].weight).all() and shares[0].after > 0.5


def fitted(rank: int, size: int, views: list[Tensor]) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    moments = Moments(DIMS)
    with world("cpu"):
        moments.add([x[rank::size] for x in views], 20 + rank)
        total = moments.reduce()
        return [(m.weight, m.bias) for m in fit_gcca(total, 10)], total.counts


def test_two_ranks_are_one(tmp_path: Path) -> None:
    _, views = planted(301, noise=0.5)
    results = run_ranks(f"{__file__}:fitted", 2, tmp_path, views=views)
    expected = fit_gcca(moments_of(views, 41), 10)
    for maps, counts in results:
        same([Map(*one) for one in maps], expected)
        assert counts.tolist() == [301, 41]


def test_recon_gives_back_more_than_it_began_with() -> None:
    _, views = planted(600, noise=0.3)
    maps, shares = fit_recon([x.float() for x in views[:2]], 4, seed=3)
    for found, share, x in zip(maps, shares, views, strict=False):
        assert 0.3 < share.before < share.after <= 1
        codes = F.layer_norm(F.linear(x.float(), found.weight, found.bias), (4,)).double()
        standard = (x - x.mean(0)) / x.std(0, correction=0)
        inputs = F.pad(codes, (0, 1), value=1.0)
        best = torch.linalg.lstsq(inputs, standard, driver="gelsd").solution
        # What the map alone is worth to the best decoder: at least what its own decoder made of it.
        assert 1 - float((standard - inputs @ best).square().sum() / standard.square().sum()) >= share.after - 1e-4
    again, _ = fit_recon([x.float() for x in views[:2]], 4, seed=3)
    assert all(
        torch.equal(a.weight, b.weight) and torch.equal(a.bias, b.bias) for a, b in zip(maps, again, strict=True)
    )


def by_loops(features: Tensor, kept: Tensor, grid: int, to: int) -> tuple[Tensor, Tensor]:
    """Each target token's triangle on each source token, one by one."""
    reach = max(grid / to, 1.0)
    out = torch.zeros(len(features), to * to, features.shape[-1], dtype=torch.float64)
    known = torch.zeros(len(features), to * to, dtype=torch.bool)

    def side(target: int) -> list[float]:
        middle = (target + 0.5) * grid / to
        raw = [max(0.0, 1 - abs((i + 0.5 - middle) / reach)) for i in range(grid)]
        return [w / sum(raw) for w in raw]

    for b in range(len(features)):
        for y in range(to):
            for x in range(to):
                rows, columns, total = side(y), side(x), 0.0
                value = torch.zeros(features.shape[-1], dtype=torch.float64)
                for token, place in zip(features[b], kept[b].tolist(), strict=True):
                    weight = rows[place // grid] * columns[place % grid]
                    total += weight
                    value += weight * token
                if total >= 0.5 - 1e-9:
                    out[b, y * to + x], known[b, y * to + x] = value / total, True
    return out, known


@pytest.mark.parametrize(("grid", "to"), [(7, 5), (4, 6), (8, 4), (5, 5), (3, 7), (6, 1)])
def test_resampling_by_loops(grid: int, to: int) -> None:
    generator = torch.Generator().manual_seed(0)
    count = (grid * grid * 3) // 5
    kept = torch.stack([torch.randperm(grid * grid, generator=generator)[:count].sort()[0] for _ in range(3)])
    features = torch.randn(3, count, 4, generator=generator, dtype=torch.float64)
    found, known = resample_map(features, kept, grid, to)
    expected, seen = by_loops(features, kept, grid, to)
    assert torch.equal(known, seen)
    assert int(known.sum()) > 0
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert (found[~known] == 0).all()


@pytest.mark.parametrize(("grid", "to"), [(16, 14), (14, 16), (7, 7)])
def test_all_tokens_kept_is_torch_interpolation(grid: int, to: int) -> None:
    features = torch.randn(2, grid * grid, 5, generator=torch.Generator().manual_seed(0))
    found, known = resample_map(features, None, grid, to)
    square = features.mT.reshape(2, 5, grid, grid)
    expected = F.interpolate(square, size=(to, to), mode="bilinear", antialias=True).flatten(2).mT
    assert known.all() and known.shape == (2, to * to)
    torch.testing.assert_close(found, expected)
    every = torch.arange(grid * grid).expand(2, -1)
    torch.testing.assert_close(resample_map(features, every, grid, to)[0], found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_equal_grids_are_copies(dtype: torch.dtype) -> None:
    features = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    kept = torch.tensor([[0, 2, 3, 7, 8], [1, 2, 4, 5, 6]])
    found, known = resample_map(features, kept, 3, 3)
    assert found.dtype == dtype and known.sum(1).tolist() == [5, 5]
    for b in range(2):
        assert torch.equal(found[b, kept[b]], features[b]) and torch.equal(known[b].nonzero()[:, 0], kept[b])
    assert (found[~known] == 0).all()


def test_a_constant_map_stays_constant_wherever_it_is_known() -> None:
    kept = torch.stack([torch.randperm(256, generator=torch.Generator().manual_seed(b))[:128] for b in range(4)])
    found, known = resample_map(torch.full((4, 128, 2), 3.0), kept, 16, 14)
    assert 0 < int(known.sum()) < known.numel()
    torch.testing.assert_close(found, 3.0 * known[..., None].float().expand_as(found))
