"""Whether samples are copies of training images, by their nearest neighbours.

The rule is that of Carlini et al. 2023 ("Extracting Training Data from Diffusion Models", section 5): a distance says
little by itself, since flat images are near everything, so a sample counts as memorized if its nearest training image
is not farther than THRESHOLD times the mean distance of its NEAREST nearest ones. Real images that were never trained on
give the rate at which the rule errs: near duplicates are common in data sets.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

NEAREST = 50
THRESHOLD = 0.5


class Neighbours(NamedTuple):
    """For each query its nearest items: Euclidean distances ascending, and the items' numbers; of equals the lower first."""

    distances: Float64[Tensor, "q k"]
    numbers: Int64[Tensor, "q k"]


def nearest(
    queries: Float64[Tensor, "q d"], items: Float64[Tensor, "n d"], first: int, count: int = NEAREST
) -> Neighbours:
    """The `count` nearest of the items numbered first, first + 1, ..., or all if they are fewer. Distances between
    integers are exact."""
    squared = (queries**2).sum(1)[:, None] + (items**2).sum(1)[None] - 2.0 * (queries @ items.T)
    order = squared.clamp(min=0.0).sqrt().sort(dim=1, stable=True)
    return Neighbours(order.values[:, :count], order.indices[:, :count] + first)


def merge_neighbours(parts: Sequence[Neighbours], count: int = NEAREST) -> Neighbours:
    """The nearest of several sets of items, given in the order of their numbers."""
    order = torch.cat([part.distances for part in parts], dim=1).sort(dim=1, stable=True)
    numbers = torch.cat([part.numbers for part in parts], dim=1).gather(1, order.indices)
    return Neighbours(order.values[:, :count], numbers[:, :count])


def nearness(distances: Float64[Tensor, "q k"]) -> Float64[Tensor, " q"]:
    """The nearest distance over the mean of all: 1 if no item stands out, 0 for a copy."""
    mean = distances.mean(dim=1)
    return torch.where(mean > 0.0, distances[:, 0] / mean, torch.zeros_like(mean))


def memorized(distances: Float64[Tensor, "q k"]) -> Bool[Tensor, " q"]:
    """Which queries the rule calls copies."""
    return nearness(distances) <= THRESHOLD
