"""Improved precision and recall: how much of one set lies in the neighbourhoods of the other.

Kynkäänniemi et al. 2019 (arXiv 1904.06991), section 2: the manifold of a set is the union of the balls
around its points that reach to their k-th nearest neighbour. Precision is the share of generated samples
inside the real manifold, recall the share of real ones inside the generated.
"""

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from ddpm_core.metrics.mergeable import IndexedFeatures, check_features

_ROWS, _COLUMNS = 1024, 4096  # of a block of distances: 32 MiB


class PrecisionRecall(IndexedFeatures):
    """(precision, recall) against reference features [M, D], float64 scalars in [0, 1].

    The paper uses M = N = 50,000 and k = 3; both depend on M and N. Memory beyond the features is a few
    blocks of 1024 x 4096 distances; the time is that of (M + N)^2 distances.
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
        precision = inside_manifold(generated, real, squared_radii(real, self.k))
        recall = inside_manifold(real, generated, squared_radii(generated, self.k))
        return precision.double().mean(), recall.double().mean()


def squared_radii(points: Float[Tensor, "n d"], k: int) -> Float64[Tensor, " n"]:
    """The squared distance of each point to its k-th nearest other point."""
    radii = []
    for row in range(0, len(points), _ROWS):
        rows = points[row : row + _ROWS]
        nearest = torch.full((len(rows), k), torch.inf, dtype=torch.float64, device=points.device)
        for column in range(0, len(points), _COLUMNS):
            columns = points[column : column + _COLUMNS]
            distances = _squared_distances(rows, columns)
            # A point is not its own neighbour: its column of this block, if it lies in it.
            itself = torch.arange(len(rows), device=points.device) + (row - column)
            inside = (itself >= 0) & (itself < len(columns))
            distances[inside, itself[inside]] = torch.inf
            nearest = torch.cat([nearest, distances], 1).topk(k, largest=False).values
        radii.append(nearest[:, -1])
    return torch.cat(radii)


def inside_manifold(
    queries: Float[Tensor, "q d"], points: Float[Tensor, "n d"], radii: Float64[Tensor, " n"]
) -> Bool[Tensor, " q"]:
    """Whether each query lies in the ball (squared radius, closed) of any point."""
    inside = torch.zeros(len(queries), dtype=torch.bool, device=queries.device)
    for row in range(0, len(queries), _ROWS):
        rows = queries[row : row + _ROWS]
        for column in range(0, len(points), _COLUMNS):
            distances = _squared_distances(rows, points[column : column + _COLUMNS])
            inside[row : row + _ROWS] |= (distances <= radii[column : column + _COLUMNS]).any(1)
    return inside


def _squared_distances(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> Float64[Tensor, "n m"]:
    # |x - y|^2 = |x|^2 + |y|^2 - 2 x.y
    x, y = x.double(), y.double()
    scale = x.square().sum(1)[:, None] + y.square().sum(1)
    distances = scale - 2 * x @ y.T
    # Equal points must be at distance 0 exactly, else a copy falls out of the ball of radius 0 of its copies.
    # The difference above is only good to about 1e-13 of its terms; unequal float32 features differ by more.
    return distances.masked_fill_(distances < 1e-12 * scale, 0.0)
