"""Improved precision and recall: how much of one set lies in the neighbourhoods of the other.

Kynkäänniemi et al. 2019 (arXiv 1904.06991), section 2: the manifold of a set is the union of the balls
around its points that reach to their k-th nearest neighbour. Precision is the share of generated samples
inside the real manifold, recall the share of real ones inside the generated.

Whether a real sample is covered depends on several generated ones together, for which jackknives of recall are too wide. Two
halves of the generated samples, each with radii of its own, are independent: with c and c' whether they cover a real
sample, half of (mean c - mean c')^2 is on average exactly the variance of recall for half as many samples. Of that, what real
samples have each by itself, mean (c - c')^2 / 2M, does not fall with the number of generated samples, and what they have in
common falls as its inverse:

    var recall = 1/2 [ mean (c - c')^2 / 2M + (mean c - mean c')^2 / 2 ],   averaged over divisions into halves.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from ddpm_core.metrics.mergeable import IndexedFeatures, check_features
from ddpm_core.rng import permutation

_ROWS = 512  # and columns of a block of distances: 2 MiB
_DIVISIONS = 8  # of the samples into halves
_NEIGHBOURS = 8  # times k: fewer than k of them lie in a half once in 50,000 times, for k = 3


class Manifolds(NamedTuple):
    """precision, recall: in [0, 1]. recall_error: the standard error of recall over the generated samples, given the
    reference; NaN if a half of them is too few for k neighbours."""

    precision: Float64[Tensor, ""]
    recall: Float64[Tensor, ""]
    recall_error: Float64[Tensor, ""]


class PrecisionRecall(IndexedFeatures):
    """Precision and recall against reference features [M, D], with the standard error of recall.

    The paper uses M = N = 50,000 and k = 3; both depend on M and N. Memory beyond the features is a few
    blocks of 512 x 512 distances; the time is that of (M + N)^2 / 2 distances, for each serves both its points.
    """

    def __init__(self, reference: Float[Tensor, "m d"], k: int = 3) -> None:
        check_features(reference, reference.shape[-1], "reference")
        if not 1 <= k < len(reference):
            raise ValueError(f"k must be in 1..{len(reference) - 1}, below the reference's size; it is {k}")
        super().__init__(reference.shape[1])
        self.reference = reference.detach()
        self.k = k

    def compute(self) -> Manifolds:
        generated = self.ordered()
        if len(generated) <= self.k:
            raise ValueError(f"k must be below the number of samples, {len(generated)}; it is {self.k}")
        real = self.reference.to(generated.device)
        distances, numbers = _nearest(generated, min(_NEIGHBOURS * self.k, len(generated) - 1))
        radii = torch.stack([distances[:, self.k - 1], *_radii_in_halves(distances, numbers, self.k)])
        generated_inside, real_inside = inside_manifolds(generated, real, radii, squared_radii(real, self.k))
        recall, *halves = real_inside.double()
        one, other = torch.stack(halves[::2]), torch.stack(halves[1::2])
        alone = (one - other).square().mean() / (2 * len(real))
        together = (one.mean(1) - other.mean(1)).square().mean() / 2
        error = ((alone + together) / 2).sqrt()
        if len(generated) < 2 * (self.k + 1):
            error = torch.full_like(error, torch.nan)
        return Manifolds(generated_inside.double().mean(), recall.mean(), error)


def squared_radii(points: Float[Tensor, "n d"], k: int) -> Float64[Tensor, " n"]:
    """The squared distance of each point to its k-th nearest other point."""
    return _nearest(points, k)[0][:, -1]


def _radii_in_halves(
    distances: Float64[Tensor, "n near"], numbers: Int64[Tensor, "n near"], k: int
) -> list[Float64[Tensor, " n"]]:
    """The squared radii of either half of each division of n points, -1 for points of the other half. distances, numbers: of
    each point's nearest others."""
    n, near = distances.shape
    radii = []
    for division in range(_DIVISIONS):
        inside = torch.zeros(n, dtype=torch.bool, device=distances.device)
        inside[permutation(0, "recall-halves", division, n)[: n // 2].to(inside.device)] = True
        same = inside[numbers] == inside[:, None]
        kth = (same.cumsum(1) < k).sum(1).clamp(max=near - 1)
        radius = distances.gather(1, kth[:, None])[:, 0]
        radii += [radius.where(inside, -1.0), radius.where(~inside, -1.0)]
    return radii


def _nearest(points: Float[Tensor, "n d"], k: int) -> tuple[Float64[Tensor, "n k"], Int64[Tensor, "n k"]]:
    """The squared distances of each point to its k nearest others, ascending, and their numbers."""
    nearest = torch.full((len(points), k), torch.inf, dtype=torch.float64, device=points.device)
    numbers = torch.zeros(len(points), k, dtype=torch.int64, device=points.device)

    def look(first: int, others: int, distances: Float64[Tensor, "r c"]) -> None:
        """Distances of the points from `first` on to those from `others` on."""
        rows = slice(first, first + len(distances))
        columns = torch.arange(others, others + distances.shape[1], device=points.device).expand(distances.shape)
        found = torch.cat([nearest[rows], distances], 1).topk(k, largest=False)
        nearest[rows] = found.values
        numbers[rows] = torch.cat([numbers[rows], columns], 1).gather(1, found.indices)

    norms = _squared_norms(points)
    for row in range(0, len(points), _ROWS):
        rows = slice(row, row + _ROWS)
        x = points[rows].double()
        # A point is not its own neighbour.
        look(row, row, _squared_distances(x, x, norms[rows], norms[rows]).fill_diagonal_(torch.inf))
        for column in range(row + _ROWS, len(points), _ROWS):
            columns = slice(column, column + _ROWS)
            distances = _squared_distances(x, points[columns].double(), norms[rows], norms[columns])
            look(row, column, distances)
            look(column, row, distances.T)
    return nearest, numbers


def inside_manifolds(
    x: Float[Tensor, "n d"],
    y: Float[Tensor, "m d"],
    radii_x: Float64[Tensor, "*sets n"],
    radii_y: Float64[Tensor, " m"],
) -> tuple[Bool[Tensor, " n"], Bool[Tensor, "*sets m"]]:
    """Whether each x lies in the ball (squared radius, closed; below 0 is none) of any y, and each y in that of any x, for each
    set of radii."""
    x_inside = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    y_inside = torch.zeros(*radii_x.shape[:-1], len(y), dtype=torch.bool, device=y.device)
    sets = list(zip(y_inside.view(-1, len(y)), radii_x.reshape(-1, len(x)), strict=True))
    x_norms, y_norms = _squared_norms(x), _squared_norms(y)
    for row in range(0, len(x), _ROWS):
        rows = slice(row, row + _ROWS)
        x_rows = x[rows].double()
        for column in range(0, len(y), _ROWS):
            columns = slice(column, column + _ROWS)
            distances = _squared_distances(x_rows, y[columns].double(), x_norms[rows], y_norms[columns])
            x_inside[rows] |= (distances <= radii_y[columns]).any(1)
            for inside, radii in sets:
                inside[columns] |= (distances <= radii[rows, None]).any(0)
    return x_inside, y_inside


def _squared_norms(points: Float[Tensor, "n d"]) -> Float64[Tensor, " n"]:
    return torch.cat([block.double().square().sum(1) for block in points.split(_ROWS)])


def _squared_distances(
    x: Float64[Tensor, "n d"], y: Float64[Tensor, "m d"], x_norms: Float64[Tensor, " n"], y_norms: Float64[Tensor, " m"]
) -> Float64[Tensor, "n m"]:
    # |x - y|^2 = |x|^2 + |y|^2 - 2 x.y
    scale = x_norms[:, None] + y_norms
    distances = torch.addmm(scale, x, y.T, alpha=-2)
    # Equal points must be at distance 0 exactly, else a copy falls out of the ball of radius 0 of its copies.
    # The difference above is only good to about 1e-13 of its terms; unequal float32 features differ by more.
    return distances.masked_fill_(distances < 1e-12 * scale, 0.0)
