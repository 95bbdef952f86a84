"""The evaluation's metrics: FID, FID-infinity and its interval, Inception score, KID, precision and recall.

All are torchmetrics metrics that merge in any order, save (`statistics()`) and start from what was saved
(`merge_state`). They work on features and logits, whichever extractor made them (`features.py`). This module
is where to import them from; the score and KID are defined here, the others beside what they need.
"""

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from ddpm_core.frechet import (
    ExtrapolatedFrechetDistance,
    FeatureStatistics,
    FrechetDistance,
    frechet_distance,
)
from ddpm_core.intervals import frechet_interval
from ddpm_core.mergeable import IndexedFeatures, Mergeable, check_features
from ddpm_core.precision_recall import PrecisionRecall
from ddpm_core.rng import permutation

__all__ = [
    "ExtrapolatedFrechetDistance",
    "FeatureStatistics",
    "FrechetDistance",
    "InceptionScore",
    "KernelDistance",
    "PrecisionRecall",
    "frechet_distance",
    "frechet_interval",
]


class InceptionScore(Mergeable):
    """exp of the mean KL divergence of p(y|x) from the marginal p(y): (mean, std) over contiguous splits.

    Salimans et al. 2016, as TTUR computes it: split s holds the samples s N // S to (s + 1) N // S - 1 *by
    index*, the marginal is the split's own, and the std has ddof = 0. Real sets that are sorted by class
    must be permuted first. The state is sums per split, 80 kB for 10 splits of 1008 classes, whatever the
    number of samples.
    """

    n: Tensor
    probabilities: Tensor
    negentropy: Tensor

    def __init__(self, num_samples: int, splits: int = 10, num_logits: int = 1008) -> None:
        super().__init__()
        if not 1 <= splits <= num_samples:
            raise ValueError(f"splits must be in 1..num_samples, 1..{num_samples}; it is {splits}")
        self.num_samples, self.num_logits = num_samples, num_logits
        self.bounds = [split * num_samples // splits for split in range(splits + 1)]
        zeros = torch.zeros(splits, dtype=torch.float64)
        self.add_state("n", zeros, dist_reduce_fx="sum")
        self.add_state("probabilities", zeros[:, None].repeat(1, num_logits), dist_reduce_fx="sum")
        self.add_state("negentropy", zeros, dist_reduce_fx="sum")

    def update(self, logits: Float[Tensor, "n k"], indices: Int[Tensor, " n"]) -> None:
        """Add the samples with these indices (0..num_samples-1). ValueError where one is out of range."""
        check_features(logits, self.num_logits, "logits")
        if indices.shape != logits.shape[:1]:
            raise ValueError(f"indices must be [{len(logits)}], one a sample; they are {list(indices.shape)}")
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < self.num_samples:
            raise ValueError(
                f"indices must be in 0..{self.num_samples - 1}; they go from {int(indices.min())} to "
                f"{int(indices.max())}"
            )
        log_p = torch.log_softmax(logits.detach().to(self.n.device, torch.float64), dim=1)
        p = log_p.exp()
        inner = torch.tensor(self.bounds[1:-1], device=self.n.device)
        split = torch.bucketize(indices.to(self.n.device), inner, right=True)
        self.n = self.n.index_add(0, split, torch.ones_like(p[:, 0]))
        self.probabilities = self.probabilities.index_add(0, split, p)
        self.negentropy = self.negentropy.index_add(0, split, (p * log_p).sum(1))

    def compute(self) -> tuple[Float64[Tensor, ""], Float64[Tensor, ""]]:
        limits = zip(self.n.tolist(), self.bounds[:-1], self.bounds[1:], strict=True)
        for split, (seen, low, high) in enumerate(limits):
            if seen != high - low:
                raise ValueError(
                    f"InceptionScore wants each of its {self.num_samples} samples once; of split {split}, "
                    f"{high - low} samples from index {low}, it has seen {int(seen)}"
                )
        marginal = self.probabilities / self.n[:, None]
        scores = (self.negentropy / self.n - torch.xlogy(marginal, marginal).sum(1)).exp()
        return scores.mean(), scores.std(correction=0)


class KernelDistance(IndexedFeatures):
    """KID: the unbiased squared MMD with the kernel (x.y / d + 1)^3, (mean, std) over random subsets.

    Binkowski et al. 2018, section 4; the std has ddof = 0. Subset s, of generated samples by index and of
    reference features [M, D] by row, is a function of (seed, s, N) and (seed, s, M), so the value does not
    depend on the order of the updates. Its expectation does not depend on N; values below 0 are as they
    should be.
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

    def compute(self) -> tuple[Float64[Tensor, ""], Float64[Tensor, ""]]:
        generated = self.ordered()
        if len(generated) < self.subset_size:
            raise ValueError(
                f"subset_size must be at most the number of samples, {len(generated)}; it is {self.subset_size}"
            )
        reference = self.reference.to(generated.device)
        values = torch.stack(
            [
                _polynomial_mmd(
                    self._subset(generated, "kid-generated", subset),
                    self._subset(reference, "kid-reference", subset),
                )
                for subset in range(self.subsets)
            ]
        )
        return values.mean(), values.std(correction=0)

    def _subset(self, features: Tensor, purpose: str, subset: int) -> Tensor:
        chosen = permutation(self.seed, purpose, subset, len(features))[: self.subset_size]
        return features[chosen.to(features.device)].double()


def _polynomial_mmd(x: Float64[Tensor, "n d"], y: Float64[Tensor, "n d"]) -> Float64[Tensor, ""]:
    n, d = x.shape
    xx, yy, xy = ((a @ b.T / d + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    # Without the diagonal: a sample with itself is no pair, and leaving it out makes the estimate unbiased.
    within = xx.sum() - xx.trace() + yy.sum() - yy.trace()
    return within / (n * (n - 1)) - 2 * xy.mean()
