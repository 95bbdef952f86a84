"""KID, the kernel distance (Binkowski et al. 2018), and its standard error over the samples.

Given the reference, KID is a sum over generated samples and pairs of them. Its variance is Hoeffding's: with zeta_1 the
variance of what a sample adds by itself, zeta_2 that of what a pair adds beyond its two samples, and of S subsets of m of N
samples,

    var KID = 4 / (S m)^2 sum_i c_i^2 zeta_1 + w zeta_2,   w = 2 / (m (m - 1)) (1 / S + (1 - 1 / S) m (m - 1) / (N (N - 1))),

where c_i counts the subsets that hold sample i. If the distributions are equal the first term is small, and a plain
jackknife, which counts the second twice, too wide.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from ddpm_core.metrics.mergeable import IndexedFeatures, check_features
from ddpm_core.metrics.products import add_gram
from ddpm_core.rng import permutation


class Kid(NamedTuple):
    """mean, std: over the subsets. error: the standard error of `mean` over the samples, given the reference; NaN for
    subsets of 3 or fewer, which have none."""

    mean: Float64[Tensor, ""]
    std: Float64[Tensor, ""]
    error: Float64[Tensor, ""]


class KernelDistance(IndexedFeatures):
    """KID: the unbiased squared MMD with the kernel (x.y / d + 1)^3, (mean, std, standard error) over random subsets.

    Binkowski et al. 2018, section 4; the std has ddof = 0. It is that of subsets, which share samples, and no error of
    their mean: that is `error`, as the module says. Subset s, of generated samples by index and of reference features
    [M, D] by row, is a function of (seed, s, N) and (seed, s, M), so the value does not depend on the order of the
    updates. Its expectation does not depend on N; values below 0 are as they should be.
    """

    def __init__(
        self,
        reference: Float[Tensor, "m d"],
        *,
        subsets: int = 100,
        subset_size: int = 1_000,
        seed: int = 0,
    ) -> None:
        check_features(reference, reference.shape[-1], "reference")
        super().__init__(reference.shape[1])
        if subsets < 1 or not 2 <= subset_size <= len(reference):
            raise ValueError(
                f"subsets must be 1 or more and subset_size in 2..{len(reference)}, the reference's size; "
                f"they are {subsets} and {subset_size}"
            )
        self.reference = reference.detach()
        self.subsets, self.subset_size, self.seed = subsets, subset_size, seed

    def compute(self) -> Kid:
        generated = self.ordered()
        N, S, m = len(generated), self.subsets, self.subset_size
        if m > N:
            raise ValueError(f"subset_size must be at most the number of samples, {N}; it is {m}")
        reference = self.reference.to(generated.device)
        values, pair_variances = [], []
        shares = torch.zeros(N, dtype=torch.float64, device=generated.device)
        for subset in range(S):
            chosen = self._chosen("kid-generated", subset, generated)
            others = self._chosen("kid-reference", subset, reference)
            terms = _polynomial_mmd(generated[chosen].double(), reference[others].double())
            values.append(terms.mmd)
            pair_variances.append(terms.pair_variance)
            shares[chosen] += terms.effects * (2 / (S * m))
        mmds = torch.stack(values)
        # The sum of squares holds each pair's part twice, once for either sample.
        pairs = 2 / (m * (m - 1)) * (1 / S + (1 - 1 / S) * m * (m - 1) / (N * (N - 1)))
        variance = shares.square().sum() * (N / (N - 1)) - pairs * torch.stack(pair_variances).mean()
        return Kid(mmds.mean(), mmds.std(correction=0), variance.clamp(min=0).sqrt())

    def _chosen(self, purpose: str, subset: int, features: Tensor) -> Int64[Tensor, " m"]:
        return permutation(self.seed, purpose, subset, len(features))[: self.subset_size].to(features.device)


class _Terms(NamedTuple):
    """mmd: the unbiased estimate of the squared maximum mean discrepancy. effects: half of what each x adds to it beyond
    the mean x. pair_variance: of what pairs of x add beyond their two effects, NaN for 3 or fewer."""

    mmd: Float64[Tensor, ""]
    effects: Float64[Tensor, " n"]
    pair_variance: Float64[Tensor, ""]


def _polynomial_mmd(x: Float64[Tensor, "n d"], y: Float64[Tensor, "n d"]) -> _Terms:
    """Of two samples of equal size."""
    n, d = x.shape
    # k(x, y) = (x.y / d + 1)^3
    across, pairs = (x @ y.T).div_(d).add_(1).pow_(3), _pairs(x)
    within = 2 * pairs.sum()
    mmd = (within + 2 * _pairs(y).sum()) / (n * (n - 1)) - 2 * across.mean()
    if n <= 3:
        unknown = torch.full_like(x[:, 0], torch.nan)
        return _Terms(mmd, unknown, unknown[0])
    # k(x_i, x_j) = mean + a_i + a_j + rest_ij without a diagonal: a_i = (sum_j k_ij - (n - 1) mean) / (n - 2), and the rest
    # has n (n - 3) / 2 degrees of freedom.
    mean = within / (n * (n - 1))
    alone = (pairs.sum(0) + pairs.sum(1) - (n - 1) * mean) / (n - 2)
    scatter = pairs.sub_(mean).triu_(1).square().sum()
    rest = (scatter - (n - 2) * alone.square().sum()) / (n * (n - 3) / 2)
    return _Terms(mmd, alone - (across.mean(1) - across.mean()), rest)


def _pairs(x: Float64[Tensor, "n d"]) -> Float64[Tensor, "n n"]:
    """k over all pairs, above the diagonal. A sample with itself is no pair: leaving it out makes the estimate unbiased."""
    products = x.new_zeros(len(x), len(x))
    add_gram(products, x.T)
    return products.div_(x.shape[1]).add_(1).pow_(3).triu_(1)
