"""Improved precision and recall: how much of one set lies in the neighbourhoods of the other.

Kynkäänniemi et al. 2019 (arXiv 1904.06991), section 2: the manifold of a set is the union of the balls
around its points that reach to their k-th nearest neighbour. Precision is the share of generated samples
inside the real manifold, recall the share of real ones inside the generated.
"""

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from ddpm_core.metrics.mergeable import IndexedFeatures, check_features

_ROWS = 512  # and columns of a block of distances: 2 MiB


class PrecisionRecall(IndexedFeatures):
    """(precision, recall) against reference features [M, D], float64 scalars in [0, 1].

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

    def compute(self) -> tuple[Float64[Tensor, ""], Float64[Tensor, ""]]:
        generated = self.ordered()
        if len(generated) <= self.k:
            raise ValueError(f"k must be below the number of samples, {len(generated)}; it is {self.k}")
        real = self.reference.to(generated.device)
        precision, recall = inside_manifolds(
            generated, real, squared_radii(generated, self.k), squared_radii(real, self.k)
        )
        return precision.double().mean(), recall.double().mean()


def squared_radii(points: Float[Tensor, "n d"], k: int) -> Float64[Tensor, " n"]:
    """The squared distance of each point to its k-th nearest other point."""
    nearest = torch.full((len(points), k), torch.inf, dtype=torch.float64, device=points.device)

    def look(first: int, distances: Float64[Tensor, "r c"]) -> None:
        """Distances of the points from `first` on to some others."""
        rows = slice(first, first + len(distances))
        nearest[rows] = torch.cat([nearest[rows], distances], 1).topk(k, largest=False).values

    norms = _squared_norms(points)
    for row in range(0, len(points), _ROWS):
        rows = slice(row, row + _ROWS)
        x = points[rows].double()
        # A point is not its own neighbour.
        look(row, _squared_distances(x, x, norms[rows], norms[rows]).fill_diagonal_(torch.inf))
        for column in range(row + _ROWS, len(points), _ROWS):
            columns = slice(column, column + _ROWS)
            distances = _squared_distances(x, points[columns].double(), norms[rows], norms[columns])
            look(row, distances)
            look(column, distances.T)
    return nearest[:, -1]


def inside_manifolds(
    x: Float[Tensor, "n d"], y: Float[Tensor, "m d"], radii_x: Float64[Tensor, " n"], radii_y: Float64[Tensor, " m"]
) -> tuple[Bool[Tensor, " n"], Bool[Tensor, " m"]]:
    """Whether each x lies in the ball (squared radius, closed) of any y, and each y in that of any x."""
    x_inside, y_inside = (torch.zeros(len(each), dtype=torch.bool, device=each.device) for each in (x, y))
    x_norms, y_norms = _squared_norms(x), _squared_norms(y)
    for row in range(0, len(x), _ROWS):
        rows = slice(row, row + _ROWS)
        x_rows = x[rows].double()
        for column in range(0, len(y), _ROWS):
            columns = slice(column, column + _ROWS)
            distances = _squared_distances(x_rows, y[columns].double(), x_norms[rows], y_norms[columns])
            x_inside[rows] |= (distances <= radii_y[columns]).any(1)
            y_inside[columns] |= (distances <= radii_x[rows, None]).any(0)
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
