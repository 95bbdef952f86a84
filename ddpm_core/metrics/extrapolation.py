"""FID-infinity, the Frechet distance at n -> infinity (Chong & Forsyth 2020, section 3), and its standard error over the samples.

It is the intercept of a line through the distances F_p of subsets p of n_p samples, so it is sum_p w_p F_p with weights
of the sizes alone. With g the influence of a sample on the distance and h that of a pair beyond its two samples,

    F_p = F + 1 / n_p sum_(i in p) g(x_i) + 1 / (2 n_p^2) sum_(i, j in p) h(x_i, x_j) + ...

the variance of the intercept, given subsets and reference, is Hoeffding's: with zeta_1 the variance of g and zeta_2 that of h,

    zeta_1 sum_i a_i^2 + zeta_2 / 2 sum_(i != j) b_ij^2,   a_i = sum_(p with i) w_p / n_p,   b_ij = sum_(p with i, j) w_p / n_p^2.

If the distributions are equal, zeta_1 is 0.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from ddpm_core.metrics.frechet import FeatureStatistics, cholesky, distance_given_factor, root_derivative
from ddpm_core.metrics.mergeable import IndexedFeatures
from ddpm_core.rng import permutation

_PROBES = 4096  # samples that the variances of influences are those of: good to 2 % for normal ones


class Extrapolation(NamedTuple):
    """distance: at n -> infinity. error: its standard error over the samples, given the reference; it has no part of what
    the line leaves of the bias."""

    distance: Float64[Tensor, ""]
    error: Float64[Tensor, ""]


class ExtrapolatedFrechetDistance(IndexedFeatures):
    """FID-infinity: the Frechet distance at n -> infinity, by a line in 1/n.

    Fits the distances of `num_points` random subsets, of sizes evenly spaced from `min_samples` to all
    samples; `compute()` is the intercept, which may be below 0 by sampling error, and its standard error. Subset p is
    a function of (seed, p, number of samples). The bias of the reference's own n remains.

    The distance also has a term in 1/n^2, for which the intercept is too low: for equal Gaussians of 2,048 equal variances
    by 8 % of what it corrects at 50,000 samples (subsets from 5,000 on), 15 % at 30,000 and 25 % at 20,490
    (tests/core/metrics/test_extrapolation.py).
    """

    def __init__(
        self, reference: FeatureStatistics, *, min_samples: int = 5_000, num_points: int = 15, seed: int = 0
    ) -> None:
        super().__init__(reference.dim)
        if num_points < 2 or min_samples < 2:
            raise ValueError(f"num_points and min_samples must be 2 or more; they are {num_points} and {min_samples}")
        self.reference = reference
        self.min_samples, self.num_points, self.seed = min_samples, num_points, seed

    def compute(self) -> Extrapolation:
        features = self.ordered()
        if len(features) <= self.min_samples:
            raise ValueError(
                f"min_samples must be below the number of samples, {len(features)}; it is {self.min_samples}"
            )
        sizes = np.linspace(self.min_samples, len(features), self.num_points).astype(int)
        subsets = [
            permutation(self.seed, "fid-infinity", point, len(features))[:size] for point, size in enumerate(sizes)
        ]
        mean, cov = (moment.to(features.device) for moment in self.reference.moments())
        factor = cholesky(cov)
        distances = []
        for subset in subsets:
            statistics = FeatureStatistics(self.dim).to(features.device)
            statistics.update(features[subset.to(features.device)])
            subset_mean, subset_cov = statistics.moments()
            distances.append(distance_given_factor(subset_mean, subset_cov, mean, cov, factor))
        slope_and_intercept = np.polyfit(1 / sizes, distances, deg=1)
        # The last subset is all samples, in a random order.
        probes = features[subset[:_PROBES].to(features.device)]
        alone, pairs = influences(probes, subset_mean, subset_cov, mean, cov)
        # As its moments are these samples' own, the mean square of g holds each pair's part, too.
        second = pairs.square().mean()
        first = (alone.var() - second / len(features)).clamp(min=0)
        of_first, of_second = _squared_weights(subsets, len(features))
        distance = torch.tensor(slope_and_intercept[1], dtype=torch.float64, device=features.device)
        return Extrapolation(distance, (first * of_first + second / 2 * of_second).sqrt())


def influences(
    x: Float[Tensor, "n d"],
    mean: Float64[Tensor, " d"],
    cov: Float64[Tensor, "d d"],
    reference_mean: Float64[Tensor, " d"],
    reference_cov: Float64[Tensor, "d d"],
) -> tuple[Float64[Tensor, " n"], Float64[Tensor, " n"]]:
    """(g(x_i) but for a constant, h(x_i, x_{i-1})): derivatives of the Frechet distance at a distribution of these moments,
    along what one and what two samples add to it."""
    difference = mean - reference_mean
    others = difference.square().sum() + cov.trace() + reference_cov.trace()
    roots, half = root_derivative(cov, reference_cov, others.item())
    centred = x - mean  # float64, as the mean is
    # z = H^T (x - mean), with covariance diag(s)
    z = centred @ half
    # g = 2 (x - mean).(mean - reference mean) + |x - mean|^2 - |z|^2
    norms = z.square().sum(1)
    alone = 2 * (centred @ difference) + centred.square().sum(1) - norms
    del centred
    # h(x, y) = 2 z_x.z_y + sum_ab (z_xa z_xb - s_a [a = b]) (z_ya z_yb - s_a [a = b]) / (s_a + s_b)
    products = z * z.roll(1, 0)
    inverse = (roots[:, None] + roots).clamp(min=torch.finfo(roots.dtype).tiny).reciprocal()
    diagonal = (roots.sum() - norms - norms.roll(1)) / 2
    return alone, 2 * products.sum(1) + (products @ inverse).mul_(products).sum(1) + diagonal


def _squared_weights(subsets: list[Tensor], n: int) -> tuple[float, float]:
    """(sum_i a_i^2, sum_(i != j) b_ij^2) of n samples, by how many samples two subsets share."""
    inside = torch.zeros(len(subsets), n, dtype=torch.float64)
    for row, subset in zip(inside, subsets, strict=True):
        row[subset] = 1.0
    sizes = np.array([len(subset) for subset in subsets])
    # The intercepts of the unit vectors.
    weights = np.polyfit(1 / sizes, np.eye(len(sizes)), deg=1)[1]
    shared = (inside @ inside.T).numpy()
    single, double = weights / sizes, weights / sizes**2
    return float(single @ shared @ single), float(double @ (shared * (shared - 1)) @ double)
