"""Confidence intervals, all of what evaluations of this n have on average over their seeds, given checkpoint, sampler and
reference: of a Frechet distance, from the statistics of an evaluation's chunks, of FID-infinity, of a KID, of an Inception
score, of recall, and of a proportion, which precision is.

The method for the Frechet distance is a delete-one-chunk jackknife. Its m replicates come from one
eigen-decomposition: the mean and the traces of each leave-one-out sample are exact, and only the trace of the root is
replaced by its first-order term (`frechet.root_derivative`).
"""

import math
from collections.abc import Sequence

import scipy.stats
import torch
from jaxtyping import Float64
from torch import Tensor

from ddpm_core.metrics.extrapolation import Extrapolation
from ddpm_core.metrics.frechet import FeatureStatistics, FeatureSums, moments, root_derivative
from ddpm_core.metrics.kernel_distance import Kid
from ddpm_core.metrics.precision_recall import Manifolds
from ddpm_core.metrics.products import add_gram
from ddpm_core.verdicts import Interval, known_interval

_MIN_CHUNKS = 5
KEPT_BYTES = 336 << 20  # of chunks' outer products; one of 2048 dimensions takes 16 MiB


class ChunkSums:
    """Sums of chunks, each of which is read once.

    total: of all. counts [m], sums [m, d], traces [m]: each chunk's n, sum and trace of the outer product. The upper
    triangles of the outer products are kept up to KEPT_BYTES; what is beyond them is read again when it is asked for, so
    that `chunks` may load them lazily. Raises ValueError if a chunk is empty or there is none.
    """

    def __init__(self, chunks: "Sequence[FeatureSums | FeatureStatistics]") -> None:
        if not len(chunks):
            raise ValueError("chunks must be 1 or more; they are 0")
        self._chunks = chunks
        self._triangles: list[Float64[Tensor, " triangle"]] = []
        counts, sums, traces = [], [], []
        for number, chunk in enumerate(chunks):
            if chunk.n < 1:
                raise ValueError("chunks must not be empty; one has no samples")
            if number == 0:
                self.total = FeatureSums(*(torch.zeros_like(each) for each in (chunk.n, chunk.sum, chunk.outer)))
                self._upper = torch.ones_like(chunk.outer, dtype=torch.bool).triu()
            self.total.n += chunk.n
            self.total.sum += chunk.sum
            self.total.outer += chunk.outer
            counts.append(chunk.n)
            sums.append(chunk.sum)
            traces.append(chunk.outer.trace())
            if (number + 1) * chunk.outer.nbytes // 2 <= KEPT_BYTES:
                self._triangles.append(chunk.outer[self._upper])
        self.counts, self.sums, self.traces = torch.stack(counts), torch.stack(sums), torch.stack(traces)

    def __len__(self) -> int:
        return len(self._chunks)

    def inner(self, triangle: Float64[Tensor, "d d"]) -> Float64[Tensor, " m"]:
        """The sum of each outer product's upper triangle times this one, 0 below it."""
        packed, flat = triangle[self._upper], triangle.flatten()
        kept = [packed @ each for each in self._triangles]
        again = [flat @ self._chunks[number].outer.flatten() for number in range(len(kept), len(self))]
        return torch.stack(kept + again)


def frechet_interval(
    chunks: Sequence[FeatureSums | FeatureStatistics] | ChunkSums, reference: FeatureStatistics, level: float = 0.95
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

    `chunks` is read as `ChunkSums` says, or has been read so. Raises ValueError below 5 chunks, if a chunk is empty or if
    `level` is not inside (0, 1).
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
    chunks: Sequence[FeatureSums | FeatureStatistics] | ChunkSums, reference: FeatureStatistics
) -> tuple[float, Float64[Tensor, " m"], Float64[Tensor, " m"]]:
    """(distance of all chunks, distance without chunk j to first order, number of samples of chunk j)."""
    if len(chunks) < _MIN_CHUNKS:
        raise ValueError(f"chunks must be {_MIN_CHUNKS} or more for an interval; they are {len(chunks)}")
    if not isinstance(chunks, ChunkSums):
        chunks = ChunkSums(chunks)
    total = chunks.total
    reference_mean, reference_cov = reference.moments()
    mean, cov = moments(total)
    reference_trace = reference_cov.trace()
    others = (mean - reference_mean).square().sum() + cov.trace() + reference_trace
    roots, half = root_derivative(cov, reference_cov, others.item())
    del cov, reference_cov
    # <half half^T, cov> is the sum of roots.
    weight = torch.zeros_like(half)
    add_gram(weight, half.T)
    # With a symmetric matrix what is above the diagonal counts twice.
    weight = 2 * weight.triu() - weight.diagonal().diag()

    # Of all but chunk j.
    n = total.n - chunks.counts
    left = (total.sum - chunks.sums) / n[:, None]
    trace = total.outer.trace() - chunks.traces
    weighted = weight.flatten() @ total.outer.flatten() - chunks.inner(weight)
    cov_trace = (trace - n * left.square().sum(1)) / (n - 1)
    cov_weighted = (weighted - n * (left @ half).square().sum(1)) / (n - 1)
    replicates = (left - reference_mean).square().sum(1) + cov_trace + reference_trace - roots.sum() - cov_weighted
    return max(0.0, (others - 2 * roots.sum()).item()), replicates, chunks.counts


def extrapolation_interval(extrapolation: Extrapolation) -> Interval | None:
    """(low, high): the 95 % interval of FID-infinity by its standard error; below 0 is as it should be.

    It covers what a Frechet distance's does: what FID-infinity is on average over the seeds of evaluations of this n. It does
    not cover what that average is off by, of which `ExtrapolatedFrechetDistance` says how much. Of 400 simulated evaluations
    each, the error was 0.95 to 1.11 times the right one, and the interval held the mean in 93 to 97 % of cases, for 400 to
    2,000 Gaussian samples of 8 to 64 dimensions or skewed ones of 16 and 64, be they distributed as the reference or not
    (tests/core/metrics/test_extrapolation.py).
    """
    return _normal_interval(extrapolation.distance.item(), extrapolation.error.item())


def kid_interval(kid: Kid) -> Interval | None:
    """(low, high): the 95 % interval of a KID by its standard error; None if it has none.

    It covers what a Frechet distance's does, with the reference's features as they are; below 0 is as it should be. Of 300 to
    400 simulated evaluations each, the error was 0.92 to 1.04 times the right one, and the interval held the
    mean in 89 to 96 % of cases for 200 to 1,000 Gaussian samples of 4 to 64 dimensions, the fewest with 200 samples of 4,
    for the cube of the kernel has heavy tails.
    """
    return _normal_interval(kid.mean.item(), kid.error.item())


def _normal_interval(value: float, error: float) -> Interval | None:
    """The 95 % interval by a standard error, None if that is not finite."""
    reach = float(scipy.stats.norm.ppf(0.975)) * error
    return known_interval(value - reach, value + reach)


def score_interval(mean: float, std: float, splits: int) -> Interval | None:
    """(low, high): the 95 % interval of an Inception score from its mean and standard deviation (ddof = 0) over splits; None
    below two.

    Splits are independent samples, so that it is Student's. It covers the score of samples as many as a split has, which is
    below that of infinitely many.
    """
    if splits < 2:
        return None
    reach = float(scipy.stats.t.ppf(0.975, splits - 1)) * std / math.sqrt(splits - 1)
    return known_interval(mean - reach, mean + reach)


def recall_interval(manifolds: Manifolds) -> Interval | None:
    """(low, high): the 95 % interval of recall by its standard error, inside [0, 1]; None if it has none, or if no half of the
    samples covers other images than its other half.

    It covers what a Frechet distance's does, of as many samples against these reference images. Of 200 to 300 simulated
    evaluations each, the error was 0.90 to 1.13 times the right one, and the interval held the mean in 88 to 97 % of cases,
    for 300 Gaussian samples and references of 2 to 32 dimensions and 1,000 of 2 to 4, alike or not, of recall from 0.005 to
    0.98; the fewest in 2 dimensions, for an error of 8 divisions scatters by 0.16 to 0.37 of itself.
    """
    recall, error = manifolds.recall.item(), manifolds.recall_error.item()
    interval = _normal_interval(recall, error)
    return None if interval is None or error == 0 else (max(0.0, interval[0]), min(1.0, interval[1]))


def proportion_interval(hits: int, n: int) -> tuple[float, float]:
    """(low, high): Wilson's 95 % interval for a probability of which `hits` in n > 0 independent trials were seen; honest at 0
    and n, at which the naive one has no width."""
    interval = scipy.stats.binomtest(hits, n).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)
