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
from ddpm_core.precision import full_float32
from ddpm_core.rng import permutation

_ROWS = 512  # and columns of a block of distances: 1 MiB
_DIVISIONS = 8  # of the samples into halves
_NEIGHBOURS = 8  # times k: fewer than k of them lie in a half once in 50,000 times, for k = 3
_SPARE = 4  # neighbours more than asked for, which tell that none nearer was missed


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
    The distances of float32 features are in float32 first; those that its rounding could decide are made again in
    float64, so that the result is that of float64.
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
        with full_float32(generated.device):
            near = _nearest(_Points(generated), min(_NEIGHBOURS * self.k, len(generated) - 1))
            radii = torch.stack([near.distances[:, self.k - 1], *_radii_in_halves(near, self.k)])
            generated_inside, real_inside = inside_manifolds(generated, real, radii, squared_radii(real, self.k))
        recall, *halves = real_inside.double()
        one, other = torch.stack(halves[::2]), torch.stack(halves[1::2])
        alone = (one - other).square().mean() / (2 * len(real))
        together = (one.mean(1) - other.mean(1)).square().mean() / 2
        error = ((alone + together) / 2).sqrt()
        if len(generated) < 2 * (self.k + 1):
            error = torch.full_like(error, torch.nan)
        return Manifolds(generated_inside.double().mean(), recall.mean(), error)


class _Points:
    """Features [n, d] with what blocks of their distances are made of."""

    def __init__(self, features: Float[Tensor, "n d"]) -> None:
        self.features = features
        self.norms: Float64[Tensor, " n"] = torch.cat(
            [block.double().square().sum(1) for block in features.split(_ROWS)]
        )
        # Squares of float32 overflow beyond 1e38.
        narrow = features.dtype != torch.float64 and bool(self.norms.max() < 1e36)
        self.dtype = torch.float32 if narrow else torch.float64

    def __len__(self) -> int:
        return len(self.features)


def _distances(x: _Points, rows: slice, y: _Points, columns: slice) -> Float[Tensor, "n m"]:
    """Squared distances of points of x and points of y, with an error of `_error` at most."""
    dtype = torch.promote_types(x.dtype, y.dtype)
    # |x - y|^2 = |x|^2 + |y|^2 - 2 x.y
    norms = x.norms[rows].to(dtype)[:, None] + y.norms[columns].to(dtype)
    return torch.addmm(norms, x.features[rows].to(dtype), y.features[columns].to(dtype).T, alpha=-2)


def _error(x: _Points, rows: slice, y: _Points, columns: slice) -> Float64[Tensor, " n"]:
    """How much the distances of each point of x to those of y may be off."""
    d, limits = x.features.shape[1], torch.finfo(torch.promote_types(x.dtype, y.dtype))
    # A sum of d products in any order is within d u / (1 - d u) of |x| |y| <= (|x|^2 + |y|^2) / 2, u = eps / 2 (Higham, Accuracy
    # and Stability of Numerical Algorithms, section 3.1); 32 for the norms, sums and radii around it, tiny for what underflows.
    relative = (d + 32) * limits.eps / 2
    return relative / (1 - relative) * (x.norms[rows] + y.norms[columns].max()) + 4 * d * limits.tiny


def _exact(
    x: Float[Tensor, "n d"], i: Int64[Tensor, " p"], y: Float[Tensor, "m d"], j: Int64[Tensor, "p q"]
) -> Float64[Tensor, "p q"]:
    """The squared distances of each x[i] to its y[j], 0 of equal points."""
    parts, at_once = [], max(1, _ROWS**2 // (j.shape[1] * x.shape[1]))
    for some, others in zip(i.split(at_once), j.split(at_once), strict=True):
        pair = x[some, None].double(), y[others].double()
        parts.append(torch.cdist(*pair, compute_mode="donot_use_mm_for_euclid_dist")[:, 0])
    return torch.cat(parts).square_()


class _Nearest(NamedTuple):
    """Of each point its nearest others: squared distances, ascending, and numbers."""

    distances: Float[Tensor, "n k"]
    numbers: Int64[Tensor, "n k"]

    @staticmethod
    def none_yet(n: int, k: int, like: Tensor) -> "_Nearest":
        return _Nearest(like.new_full((n, k), torch.inf), like.new_zeros((n, k), dtype=torch.int64))

    def look(self, rows: slice, distances: Float[Tensor, "r c"], others: slice) -> None:
        """Take in what is nearer among the distances of these rows to other points."""
        columns = torch.arange(others.start, others.start + distances.shape[1], device=distances.device)
        numbers = torch.cat([self.numbers[rows], columns.expand(distances.shape)], 1)
        found = torch.cat([self.distances[rows], distances], 1).topk(self.distances.shape[1], largest=False)
        self.distances[rows] = found.values
        self.numbers[rows] = numbers.gather(1, found.indices)

    def exactly(self, points: Float[Tensor, "m d"], rows: Int64[Tensor, " n"], k: int) -> "_Nearest":
        """The k nearest of these, with their distances in float64; the points are `rows` of all."""
        distances, order = _exact(points, rows, points, self.numbers).sort(1)
        return _Nearest(distances[:, :k].clone(), self.numbers.gather(1, order)[:, :k].clone())


def squared_radii(points: Float[Tensor, "n d"], k: int) -> Float64[Tensor, " n"]:
    """The squared distance of each point to its k-th nearest other point."""
    return _nearest(_Points(points), k).distances[:, -1]


def _nearest(points: _Points, k: int) -> _Nearest:
    """The k nearest others of each point, with distances in float64."""
    n, every = len(points), slice(0, len(points))
    kept = min(k + _SPARE, n - 1)
    near = _Nearest.none_yet(n, kept, points.norms.to(points.dtype))
    for row in range(0, n, _ROWS):
        rows = slice(row, row + _ROWS)
        # A point is not its own neighbour.
        near.look(rows, _distances(points, rows, points, rows).fill_diagonal_(torch.inf), rows)
        for column in range(row + _ROWS, n, _ROWS):
            columns = slice(column, column + _ROWS)
            distances = _distances(points, rows, points, columns)
            near.look(rows, distances, columns)
            near.look(columns, distances.T, rows)
    found = near.exactly(points.features, torch.arange(n, device=near.numbers.device), k)
    if kept < n - 1 and points.dtype != torch.float64:
        # No point that was not kept is nearer than this, and none at all nearer than 0.
        others = near.distances[:, -1].double() - _error(points, every, points, every)
        kth = found.distances[:, -1]
        for rows in ((kth > others) & (kth > 0)).nonzero()[:, 0].split(_ROWS):
            again = _nearest_in_float64(points, rows, kept).exactly(points.features, rows, k)
            found.distances[rows], found.numbers[rows] = again
    return found


def _nearest_in_float64(points: _Points, rows: Int64[Tensor, " n"], k: int) -> _Nearest:
    """Of a few points, for which float32 could not tell."""
    some, all_points = _Points(points.features[rows].double()), slice(0, len(rows))
    near = _Nearest.none_yet(len(rows), k, some.norms)
    for column in range(0, len(points), _ROWS):
        columns = slice(column, column + _ROWS)
        distances = _distances(some, all_points, points, columns)
        own = (rows >= column) & (rows < column + _ROWS)
        distances[own.nonzero()[:, 0], rows[own] - column] = torch.inf
        near.look(all_points, distances, columns)
    return near


def _radii_in_halves(near: _Nearest, k: int) -> list[Float64[Tensor, " n"]]:
    """The squared radii of either half of each division of n points, -1 for points of the other half."""
    n, count = near.distances.shape
    radii = []
    for division in range(_DIVISIONS):
        inside = torch.zeros(n, dtype=torch.bool, device=near.distances.device)
        inside[permutation(0, "recall-halves", division, n)[: n // 2].to(inside.device)] = True
        same = inside[near.numbers] == inside[:, None]
        kth = (same.cumsum(1) < k).sum(1).clamp(max=count - 1)
        radius = near.distances.gather(1, kth[:, None])[:, 0]
        radii += [radius.where(inside, -1.0), radius.where(~inside, -1.0)]
    return radii


def inside_manifolds(
    x: Float[Tensor, "n d"],
    y: Float[Tensor, "m d"],
    radii_x: Float64[Tensor, "*sets n"],
    radii_y: Float64[Tensor, " m"],
) -> tuple[Bool[Tensor, " n"], Bool[Tensor, "*sets m"]]:
    """Whether each x lies in the ball (squared radius, closed; below 0 is none) of any y, and each y in that of any x, for each
    set of radii."""
    x_inside = torch.zeros(len(x), dtype=torch.bool, device=radii_x.device)
    y_inside = torch.zeros(*radii_x.shape[:-1], len(y), dtype=torch.bool, device=radii_x.device)
    sets_x, sets_inside = radii_x.reshape(-1, len(x)), y_inside.view(-1, len(y))
    x_points, y_points = _Points(x), _Points(y)
    for row in range(0, len(x), _ROWS):
        rows = slice(row, row + _ROWS)
        for column in range(0, len(y), _ROWS):
            columns = slice(column, column + _ROWS)
            distances = _distances(x_points, rows, y_points, columns)
            error = _error(x_points, rows, y_points, columns).max()
            block = distances, error, x[rows], y[columns]
            _, i, _ = _inside(*block, radii_y[None, None, columns], ~x_inside[rows, None])
            x_inside[row + i] = True
            number, _, j = _inside(*block, sets_x[:, rows, None], ~sets_inside[:, columns].all(0, keepdim=True))
            sets_inside[number, column + j] = True
    return x_inside, y_inside


def _inside(
    distances: Float[Tensor, "r c"],
    error: Float64[Tensor, ""],
    x: Float[Tensor, "r d"],
    y: Float[Tensor, "c d"],
    radii: Float64[Tensor, "sets #r #c"],
    undecided: Bool[Tensor, "#r #c"],
) -> tuple[Int64[Tensor, " p"], Int64[Tensor, " p"], Int64[Tensor, " p"]]:
    """(set, i, j) of the undecided pairs that a radius of the set reaches; the distances are within `error`."""
    # Few pairs are near enough; of those, a few so near a ball's surface that their distance is made exactly.
    near = distances <= (radii.max(0).values + error).to(distances.dtype)
    i, j = (near & undecided).nonzero(as_tuple=True)
    measured = distances[i, j].double()
    limits = radii[
        :, i.clamp(max=radii.shape[1] - 1), j.clamp(max=radii.shape[2] - 1)
    ]  # one for all i or all j is at 0
    unsure = ((measured - limits).abs() <= error).any(0)
    measured[unsure] = _exact(x, i[unsure], y, j[unsure, None])[:, 0]
    number, pair = (measured <= limits).nonzero(as_tuple=True)
    return number, i[pair], j[pair]
