"""Linear maps that bring several teachers' features into one space, found before training; and onto one grid.

A teacher's features have their own width and basis; what teachers agree on can only be told where these are the same.
Maps that are trained with the student sit on the target's side and may make it constant; these are found once.
Everything here is deterministic. Fits run in float64 on the CPU, whatever device the features were on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

__all__ = ["AlignError", "Explained", "Map", "Moments", "fit_gcca", "fit_pca", "fit_recon", "resample_map"]

_ROWS = 8192  # worked on at once
_STEPS, _BATCH, _RATE = 300, 1024, 5e-4


class AlignError(ValueError):
    """The features do not allow the map that was asked for."""


@dataclass(frozen=True)
class Map:
    """x -> weight x + bias, float32 on the CPU: a teacher's features [..., D_m] to [..., width]."""

    weight: Tensor  # [width, D_m]
    bias: Tensor  # [width]


@dataclass(frozen=True)
class Explained:
    """Shares of the variance of a teacher's standardised features that its `width` channels give back."""

    before: float
    after: float


class Moments:
    """Sums over tokens of M teachers' features and of the products of any two channels.

    Products are taken and summed in float64, so that a channel whose mean is a thousand times its spread keeps six
    digits of its variance. It costs 10^13 operations for a million tokens of 2304 channels.
    Sums do not depend on the order of the batches, up to rounding, nor on which rank saw which.
    """

    def __init__(self, dims: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.dims = tuple(dims)
        width = sum(self.dims)
        self.counts = torch.zeros(2, dtype=torch.float64, device=device)  # tokens, images
        self.sums = torch.zeros(width, dtype=torch.float64, device=device)
        self.products = torch.zeros(width, width, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, features: Sequence[Tensor], images: int) -> None:
        """M tensors [n, D_m] whose rows belong together, from ``images`` images that no other call has counted.

        Tokens of one image resemble each other: how far a covariance is to be trusted follows from the images.
        """
        shapes = [tuple(x.shape) for x in features]
        assert shapes == [(len(features[0]), dim) for dim in self.dims], (shapes, self.dims)
        self.counts += torch.tensor([len(features[0]), images], dtype=torch.float64, device=self.counts.device)
        for pieces in zip(*(torch.split(x, _ROWS) for x in features), strict=True):
            rows = torch.cat([piece.to(self.sums) for piece in pieces], dim=1)
            self.sums += rows.sum(0)
            self.products.addmm_(rows.T, rows)

    def merged(self, *others: Moments) -> Moments:
        """The moments of all tokens that these have seen."""
        assert all(other.dims == self.dims for other in others)
        total = Moments(self.dims, self.sums.device)
        for part in (self, *others):
            total.counts += part.counts.to(total.counts)
            total.sums += part.sums.to(total.sums)
            total.products += part.products.to(total.products)
        return total

    def reduce(self) -> Moments:
        """The moments of all ranks' tokens; a collective. These stay as they are."""
        total = self.merged()
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            for values in (total.counts, total.sums, total.products):
                dist.all_reduce(values)
        return total

    def covariance(self, needed: int) -> tuple[Tensor, Tensor]:
        """Mean [sum D_m] and covariance [sum D_m, sum D_m] on the CPU; AlignError where tokens or variance lack."""
        tokens, images = (int(count) for count in self.counts.cpu())
        if tokens < needed or images < 2:
            raise AlignError(
                f"teachers of {list(self.dims)} channels: {needed} tokens of at least 2 images are needed to align"
                f" them, and only {tokens} tokens of {images} images were given; take more images"
            )
        mean, products = self.sums.cpu() / tokens, self.products.cpu() / tokens
        covariance = products - mean.outer(mean)
        for m, (own, sides) in enumerate(
            zip(torch.split(mean, list(self.dims)), _blocks(products, self.dims), strict=True)
        ):
            if not torch.isfinite(sides[m]).all():
                raise AlignError(f"teacher {m} gave features that are not finite")
            if (sides[m].diagonal() - own.square()).sum() <= 1e-12 * sides[m].diagonal().sum():
                raise AlignError(f"teacher {m} gave the same features for all {tokens} tokens; check its weights")
        return mean, covariance


def _blocks(matrix: Tensor, dims: Sequence[int]) -> list[tuple[Tensor, ...]]:
    return [torch.split(row, list(dims), dim=1) for row in torch.split(matrix, list(dims))]


def fit_gcca(moments: Moments, width: int, *, spread: bool = False) -> list[Map]:
    """The ``width`` variables of unit variance that the views predict best, and each view's least-squares map to them.

    MAXVAR generalised canonical correlation (Kettenring 1971) in closed form: the top eigenvectors of the matrix of
    correlations of the whitened views. A variable on which all M views agree has eigenvalue M, one that a single view
    knows 1, and the other views' maps to it are 0. Each view's covariance is shrunk towards its mean eigenvalue as far
    as the number of images demands (oracle approximating shrinkage, Chen et al. 2010), and the eigenvalues and the unit
    variance are those of the shrunk views. One view shares nothing: `fit_pca` is what it gets.

    ``spread`` turns the variables by a fixed rotation, the same for all views, after which no channel stands for more
    of the agreement than another. Raises AlignError where ``width`` exceeds the channels of all views together, and
    where the tokens do not outnumber it. (Shrinking makes up for tokens that do not outnumber the views' channels.)
    """
    dims = moments.dims
    if len(dims) == 1:
        return fit_pca(moments, width, spread=spread)
    if width > sum(dims):
        raise AlignError(
            f"gcca: a width of {width} exceeds the {sum(dims)} channels of teachers of {list(dims)}; take a smaller one"
        )
    mean, covariance = moments.covariance(width + 1)
    blocks = _blocks(covariance, dims)
    images = int(moments.counts[1])
    whiten = [_inverse_root(_shrunk(blocks[m][m], images)) for m in range(len(dims))]
    matrix = torch.eye(sum(dims), dtype=torch.float64)
    sides = _blocks(matrix, dims)
    for m, k in combinations(range(len(dims)), 2):
        sides[m][k].copy_(whiten[m] @ blocks[m][k] @ whiten[k])
        sides[k][m].copy_(sides[m][k].T)
    values, vectors = _top(matrix, width)
    # A variable is v'y / sqrt(value), y the whitened views. Its covariance with view m's y is sqrt(value) v_m.
    vectors = vectors * values.clamp(min=0).sqrt()
    weights = [part.T @ white for part, white in zip(torch.split(vectors, list(dims)), whiten, strict=True)]
    return _maps(weights, torch.split(mean, list(dims)), spread)


def _shrunk(covariance: Tensor, n: int) -> Tensor:
    """Towards the multiple of the unit matrix with the same trace, from ``n`` independent samples: equation 23."""
    p = len(covariance)
    trace, square = covariance.trace(), covariance.square().sum()
    distance = (n + 1 - 2 / p) * (square - trace**2 / p)
    share = min(max(float(((1 - 2 / p) * square + trace**2) / distance), 0.0), 1.0) if distance > 0 else 1.0
    return torch.lerp(covariance, trace / p * torch.eye(p, dtype=covariance.dtype), share)


def _inverse_root(matrix: Tensor) -> Tensor:
    """Symmetric, so that it does not depend on how a solver turns eigenvectors."""
    values, vectors = torch.linalg.eigh(matrix)
    values = values.clamp(min=float(values[-1]) * 1e-10)  # shrunk by nothing, and a channel says nothing
    root: Tensor = (vectors / values.sqrt()) @ vectors.T
    return root


def _top(matrix: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The ``width`` largest eigenvalues, falling, and their vectors [p, width], the largest entry of each positive."""
    values, vectors = torch.linalg.eigh(matrix)
    values, vectors = values[-width:].flip(0), vectors[:, -width:].flip(1)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return values, vectors * largest.sign()


def _maps(weights: Sequence[Tensor], means: Sequence[Tensor], spread: bool) -> list[Map]:
    if spread:
        turn = _rotation(len(weights[0]))
        weights = [turn @ weight for weight in weights]
    return [Map(w.float(), -(w @ mean).float()) for w, mean in zip(weights, means, strict=True)]


def _rotation(width: int) -> Tensor:
    """An orthogonal matrix without a preferred channel, always the same (Haar measure, seed 0)."""
    normal = torch.randn(width, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q, r = torch.linalg.qr(normal)
    turn: Tensor = q * r.diagonal().sign()
    return turn


def fit_pca(moments: Moments, width: int, *, spread: bool = False) -> list[Map]:
    """The ``width`` largest principal components of each view, times one number a view: mean variance of 1 a channel.

    One scale for all channels of a view keeps their proportions, as in PHI-S (Ranzinger et al. 2024). Nothing brings
    the views' axes together. Raises AlignError where ``width`` exceeds a view's channels or the tokens are too few.
    """
    dims = moments.dims
    if width > min(dims):
        raise AlignError(
            f"pca: a width of {width} exceeds the {min(dims)} channels of one of the teachers of {list(dims)}; take a"
            " smaller width, or gcca"
        )
    mean, covariance = moments.covariance(width + 1)
    weights = []
    for m, sides in enumerate(_blocks(covariance, dims)):
        values, vectors = _top(sides[m], width)
        weights.append(vectors.T / values.mean().sqrt())
    return _maps(weights, torch.split(mean, list(dims)), spread)


def fit_recon(samples: Sequence[Tensor], width: int, seed: int) -> tuple[list[Map], list[Explained]]:
    """Maps after which a layer norm (without weights) and a linear decoder give back each teacher's features.

    Each teacher alone: [n, D_m], standardised channel by channel, 300 steps of Adam on batches of at most 1024 tokens
    drawn from ``seed``, beginning with the principal components and the decoder that is best for them. `Explained` is
    of the sample itself. Runs on the sample's device. Raises AlignError as `fit_pca` does.
    """
    fitted = [_fit_recon(x.detach(), width, seed) for x in samples]
    return [one for one, _ in fitted], [share for _, share in fitted]


def _fit_recon(sample: Tensor, width: int, seed: int) -> tuple[Map, Explained]:
    moments = Moments([sample.shape[1]], sample.device)
    moments.add([sample], images=len(sample))
    mean, covariance = moments.covariance(width + 2)
    std = covariance.diagonal().clamp(min=0).sqrt()
    std = std.clamp(min=1e-4 * float(std.mean()))
    x = ((sample.double() - mean.to(sample.device)) / std.to(sample.device)).float()
    standard = Moments(moments.dims, sample.device)
    standard.add([x], images=len(x))
    start = fit_pca(standard, width)[0]
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        encoder = [y.to(x.device).requires_grad_() for y in (start.weight, start.bias)]
        decoder = [y.requires_grad_() for y in _best_decoder(F.layer_norm(F.linear(x, *encoder), (width,)), x)]
        before = _explained(x, encoder, decoder)
        optimizer = torch.optim.Adam([*encoder, *decoder], lr=_RATE)
        generator = torch.Generator().manual_seed(seed)
        for step in range(_STEPS):
            optimizer.param_groups[0]["lr"] = _RATE * (1 - step / _STEPS)
            rows = x[torch.randint(len(x), (min(_BATCH, len(x)),), generator=generator).to(x.device)]
            loss = (F.linear(F.layer_norm(F.linear(rows, *encoder), (width,)), *decoder) - rows).square().mean()
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
        share = Explained(before, _explained(x, encoder, decoder))
    weight, bias = (y.detach().cpu().double() for y in encoder)
    weight = weight / std
    return Map(weight.float(), (bias - weight @ mean).float()), share


def _best_decoder(codes: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares of ``x`` on the codes and a constant, in float64: weight [D, width], bias [D]."""
    inputs = F.pad(codes.detach().double(), (0, 1), value=1.0)
    gram = inputs.T @ inputs
    gram.diagonal().add_(1e-6 * gram.trace() / len(gram))  # the codes of a layer norm sum to 0
    solved = torch.linalg.solve(gram, inputs.T @ x.double()).T.float()
    return solved[:, :-1].contiguous(), solved[:, -1].contiguous()


@torch.no_grad()
def _explained(x: Tensor, encoder: Sequence[Tensor], decoder: Sequence[Tensor]) -> float:
    given_back = F.linear(F.layer_norm(F.linear(x, *encoder), (len(encoder[1]),)), *decoder)
    return 1 - float((given_back - x).double().square().sum() / x.double().square().sum())


@torch.no_grad()
def resample_map(features: Tensor, kept: Tensor | None, grid: int, to: int) -> tuple[Tensor, Tensor]:
    """A teacher's tokens [B, K, D] on another grid, and which of these are known: [B, to * to, D], bool [B, to * to].

    ``kept`` int64 [B, K] are their places on a square of ``grid`` x ``grid``, row by row; None: all, in order. Between
    different grids each token is the mean of the kept ones under its triangle (bilinear, antialiased), known where at
    least half of the triangle's weight lies on kept ones. Between equal grids tokens are copied. Unknown ones are 0.
    """
    batch, _, dim = features.shape
    if grid == to:
        if kept is None:
            return features, features.new_ones(batch, grid**2, dtype=torch.bool)
        places = kept[..., None].expand(-1, -1, dim)
        known = kept.new_zeros(batch, grid**2, dtype=torch.bool).scatter_(1, kept, True)
        return features.new_zeros(batch, grid**2, dim).scatter_(1, places, features), known
    units = torch.eye(grid, dtype=torch.float64, device=features.device)[None, None]
    side = F.interpolate(units, size=(to, grid), mode="bilinear", antialias=True)[0, 0]
    weights = torch.einsum("yi,xj->yxij", side, side).reshape(1, to**2, grid**2)
    if kept is not None:
        weights = weights.expand(batch, -1, -1).gather(2, kept[:, None].expand(-1, to**2, -1))
    total = weights.sum(-1, keepdim=True)
    known = total >= 0.5 - 1e-9
    exact = torch.promote_types(features.dtype, torch.float32)
    weights = torch.where(known, weights / total, 0).to(exact)
    with torch.autocast(features.device.type, enabled=False):
        return (weights @ features.to(exact)).to(features.dtype), known[..., 0].expand(batch, -1)
