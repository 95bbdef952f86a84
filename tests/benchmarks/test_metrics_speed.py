"""Feature statistics, Frechet distance, KID, precision and recall against numpy, torchmetrics and torch-fidelity."""

import pytest
import torch
from support.contest import contest, peer_module
from torch import Tensor

from ddpm_core.metrics import FeatureStatistics, frechet_distance

pytestmark = pytest.mark.bench
DIM = 2048


def features(seed: int, count: int) -> Tensor:
    """Like Inception's: at least 0, correlated, with a spectrum that falls by 1e5."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(0, -2.5, DIM)
    turn = torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(99)) / DIM**0.5
    x = (1 + 0.05 * seed) * torch.randn(count, DIM, generator=generator) * scales
    return (x @ turn + 0.3).relu_()


def statistics_of(x: Tensor) -> FeatureStatistics:
    statistics = FeatureStatistics(DIM)
    statistics.update(x)
    return statistics


def test_the_frechet_distance_of_two_statistics() -> None:
    moments = [tuple(m.clone() for m in statistics_of(features(seed, 10_000)).moments()) for seed in (0, 1)]
    (mu1, sigma1), (mu2, sigma2) = moments
    from torchmetrics.image.fid import _compute_fid

    def ours() -> float:
        return frechet_distance(mu1, sigma1, mu2, sigma2)

    assert ours() == pytest.approx(_compute_fid(mu1, sigma1, mu2, sigma2).item(), rel=1e-6)
    row = contest("Frechet distance", "torchmetrics", ours, lambda: _compute_fid(mu1, sigma1, mu2, sigma2))
    assert row.ratio > 2.0
    by_numpy = [{"mu": mu.numpy(), "sigma": sigma.numpy()} for mu, sigma in moments]
    fidelity = peer_module("torch_fidelity.metric_fid")
    row = contest("", "torch-fidelity", ours, lambda: fidelity.fid_statistics_to_metric(*by_numpy, verbose=False))
    assert row.ratio > 2.0
