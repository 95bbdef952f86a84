"""The Inception score (Salimans et al. 2016), as TTUR computes it."""

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from ddpm_core.metrics.mergeable import Mergeable, check_features


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
        self.num_samples, self.splits, self.num_logits = num_samples, splits, num_logits
        self.bounds = [split * num_samples // splits for split in range(splits + 1)]
        zeros = torch.zeros(splits, dtype=torch.float64)
        self.add_state("n", zeros, dist_reduce_fx="sum")
        self.add_state("probabilities", zeros[:, None].repeat(1, num_logits), dist_reduce_fx="sum")
        self.add_state("negentropy", zeros, dist_reduce_fx="sum")

    def update(self, logits: Float[Tensor, "n k"], indices: Int[Tensor, " n"]) -> None:
        """Add the samples with these indices (0..num_samples-1). Raises ValueError if one is out of range."""
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
        inner_bounds = torch.tensor(self.bounds[1:-1], device=self.n.device)
        split = torch.bucketize(indices.to(self.n.device), inner_bounds, right=True)
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
        # exp(mean KL(p(y|x) || p(y))) = exp(mean sum p(y|x) ln p(y|x) - sum p(y) ln p(y)), per split
        marginal = self.probabilities / self.n[:, None]
        scores = (self.negentropy / self.n - torch.xlogy(marginal, marginal).sum(1)).exp()
        return scores.mean(), scores.std(correction=0)
