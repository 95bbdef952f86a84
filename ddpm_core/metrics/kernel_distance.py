"""KID, the kernel distance (Binkowski et al. 2018)."""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from ddpm_core.metrics.mergeable import IndexedFeatures, check_features
from ddpm_core.metrics.products import add_gram
from ddpm_core.rng import permutation


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
    """The unbiased estimate of the squared maximum mean discrepancy of two samples of equal size."""
    n, d = x.shape
    # k(x, y) = (x.y / d + 1)^3
    across = (x @ y.T).div_(d).add_(1).pow_(3).mean()
    return (_sum_of_pairs(x) + _sum_of_pairs(y)) / (n * (n - 1)) - 2 * across


def _sum_of_pairs(x: Float64[Tensor, "n d"]) -> Float64[Tensor, ""]:
    """The sum of k over all pairs. A sample with itself is no pair: leaving it out makes the estimate unbiased."""
    products = x.new_zeros(len(x), len(x))
    add_gram(products, x.T)
    return 2 * products.div_(x.shape[1]).add_(1).pow_(3).triu_(1).sum()
