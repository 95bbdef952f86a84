"""Confidence intervals: of a Frechet distance, from the statistics of an evaluation's chunks, and of a proportion.

The former's method is a delete-one-chunk jackknife. Its m replicates come from one eigen-decomposition: the mean and
the traces of each leave-one-out sample are exact, and only the trace of the root is replaced by its
first-order term,

    d tr M^(1/2) = 1/2 tr[ S2^(1/2) M^(-1/2) S2^(1/2) dS1 ],   M = S2^(1/2) S1 S2^(1/2).

Leaving samples out keeps S1 inside its range, so if M is singular its pseudo-inverse is the right one.
"""

from collections.abc import Sequence

import scipy.stats
import torch
from jaxtyping import Float64
from torch import Tensor

from ddpm_core.metrics.frechet import FeatureStatistics, symmetric_root

_MIN_CHUNKS = 5


def frechet_interval(
    chunks: Sequence[FeatureStatistics], reference: FeatureStatistics, level: float = 0.95
) -> tuple[float, float]:
    """(low, high): a two-sided confidence interval for the Frechet distance of all chunks from the reference.

    It covers the sampling error of the generated images, given the checkpoint, the sampler and the
    reference: the distance that evaluations of this n have on average over their seeds lies inside with
    probability `level`. It does not cover the bias of small n (that average is above the distance at
    infinity), nor other training seeds, nor another reference set. Chunks must be independent and may differ
    in size.

    Measured on Gaussians at level 95 % (as in tests/core/metrics/test_intervals.py, for d of 8 and 32, 10 to
    50 chunks, n of 20 to 5,000): 92 to 98 % if the distributions differ by more than the bias of n, and 94 to
    100 %, too wide by up to a half, if they are equal, because then the first-order term that a jackknife
    measures vanishes. A bootstrap over chunks is two to five times too wide then: each resample holds fewer
    distinct chunks, so it adds the bias of a smaller n.

    `chunks` is read twice, one at a time, so that it may load them lazily. Raises ValueError below 5 chunks, if
    a chunk is empty or if `level` is not inside (0, 1).
    """
    if not 0 < level < 1:
        raise ValueError(f"level must be inside (0, 1); it is {level}")
    distance, replicates, counts = leave_one_out_distances(chunks, reference)
    quantile = float(scipy.stats.t.ppf((1 + level) / 2, len(counts) - 1))
    reach = quantile * jackknife_error(distance, replicates, counts)
    return max(0.0, distance - reach), distance + reach


def jackknife_error(value: float, replicates: Float64[Tensor, " m"], counts: Float64[Tensor, " m"]) -> float:
    """The standard error of `value` from what it is without chunk j, for chunks of any size.

    Busing et al. 1999, "Delete-m jackknife for unequal m"; the textbook's jackknife if counts are equal.
    """
    # h_j = n / n_j; pseudo-value_j = h_j value - (h_j - 1) value_(-j); variance = mean (pseudo-value_j - centre)^2 / (h_j - 1)
    ratio = counts.sum() / counts
    centre = len(counts) * value - ((1 - 1 / ratio) * replicates).sum()
    pseudo = ratio * value - (ratio - 1) * replicates
    return ((pseudo - centre).square() / (ratio - 1)).mean().sqrt().item()


def leave_one_out_distances(
    chunks: Sequence[FeatureStatistics], reference: FeatureStatistics
) -> tuple[float, Float64[Tensor, " m"], Float64[Tensor, " m"]]:
    """(distance of all chunks, distance without chunk j to first order, number of samples of chunk j)."""
    if len(chunks) < _MIN_CHUNKS:
        raise ValueError(f"chunks must be {_MIN_CHUNKS} or more for an interval; they are {len(chunks)}")
    total = FeatureStatistics(reference.dim)
    for chunk in chunks:
        total.merge_state(chunk)
    reference_mean, reference_cov = reference.moments()
    root = symmetric_root(reference_cov)
    mean, cov = total.moments()
    eigenvalues, vectors = torch.linalg.eigh(root @ cov @ root)
    # Below this an eigenvalue is the rounding of a 0.
    kept = eigenvalues > eigenvalues[-1] * len(eigenvalues) * torch.finfo(torch.float64).eps
    roots = eigenvalues.clamp(min=0).sqrt()
    inverse = torch.where(kept, 1 / roots, 0.0)
    weight = root @ (vectors * inverse) @ vectors.T @ root
    trace = reference_cov.trace() - roots.sum()  # <weight, cov> is the other sum of roots

    replicates, counts = [], []
    for chunk in chunks:
        if chunk.n < 1:
            raise ValueError("chunks must not be empty; one has no samples")
        n = total.n - chunk.n
        left = (total.sum - chunk.sum) / n
        rest = total.outer - chunk.outer
        cov_trace = (rest.trace() - n * left.square().sum()) / (n - 1)
        weighted = ((weight * rest).sum() - n * (left @ weight @ left)) / (n - 1)
        replicates.append((left - reference_mean).square().sum() + cov_trace + trace - weighted)
        counts.append(chunk.n)
    distance = (mean - reference_mean).square().sum() + cov.trace() + reference_cov.trace() - 2 * roots.sum()
    return max(0.0, distance.item()), torch.stack(replicates), torch.stack(counts)


def proportion_interval(hits: int, n: int) -> tuple[float, float]:
    """(low, high): Wilson's 95 % interval for a probability of which `hits` in n > 0 independent trials were seen; honest at 0
    and n, at which the naive one has no width."""
    interval = scipy.stats.binomtest(hits, n).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)
