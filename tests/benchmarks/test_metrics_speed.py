"""Inception features, their statistics, Frechet distance, KID, precision and recall: numpy, torchmetrics, torch-fidelity."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.contest import contest, peer_module
from support.gaussian_case import statistics_of
from torch import Tensor

from ddpm_core.inception import InceptionV3
from ddpm_core.metrics import FeatureStatistics, FrechetDistance, KernelDistance, PrecisionRecall, frechet_distance
from ddpm_core.metrics.extrapolation import influences
from pipelines.evaluate.measure import distance_and_interval

pytestmark = pytest.mark.bench
DIM, BATCH = 2048, 1_000


def features(seed: int, count: int) -> Tensor:
    """Like Inception's: at least 0, correlated, with a spectrum that falls by 1e5."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(0, -2.5, DIM)
    turn = torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(99)) / DIM**0.5
    x = (1 + 0.05 * (seed > 0)) * torch.randn(count, DIM, generator=generator) * scales
    return (x @ turn + 0.3).relu_()


class Features(torch.nn.Module):
    """torchmetrics takes features by a network that makes them: here of features."""

    num_features = DIM

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_feature_statistics() -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    x = features(0, 50_000)
    array = x.numpy()

    def by_torchmetrics() -> Any:
        metric = FrechetInceptionDistance(feature=Features())
        for batch in x.split(BATCH):
            metric.update(batch, real=True)
        return metric.real_features_cov_sum

    def ours() -> FeatureStatistics:
        statistics = FeatureStatistics(DIM)
        for batch in x.split(BATCH):
            statistics.update(batch)
        return statistics

    torch.testing.assert_close(ours().statistics()["outer"], by_torchmetrics(), rtol=1e-12, atol=0)
    work = f"statistics of 50,000 x {DIM} features"
    row = contest(f"{work}, by {BATCH:,}", "torchmetrics", ours, by_torchmetrics)
    assert row.ratio > 1.3
    row = contest(work, "numpy.cov", lambda: statistics_of(x).moments(), lambda: np.cov(array, rowvar=False))
    assert row.ratio > 0.8
    assert row.memory[0] < row.memory[1]


@pytest.mark.timeout(1800)
def test_the_interval_costs_little_more_than_the_distance() -> None:
    reference = statistics_of(features(0, 10_000))
    chunks = [features(1 + number, 10_000) for number in range(20)]
    distances: dict[str, float] = {}

    def alone() -> None:
        metric = FrechetDistance(reference)
        for chunk in chunks:
            metric.update(chunk)
        distances["alone"] = float(metric.compute())

    def both() -> None:
        distances["with interval"] = distance_and_interval(chunks, reference)[0]

    work = f"distance and interval of 20 chunks of 10,000 x {DIM}"
    row = contest(work, "the distance alone", both, alone, pairs=2)
    assert distances["with interval"] == pytest.approx(distances["alone"], rel=1e-9)
    assert row.ratio > 1 / 1.3
    assert row.memory[0] < 700


@pytest.mark.timeout(1800)
def test_the_error_of_an_extrapolated_distance_costs_less_than_two_of_its_fifteen_distances() -> None:
    reference = statistics_of(features(0, 10_000)).moments()
    samples = features(1, 27_500)
    moments = statistics_of(samples).moments()

    def distance() -> float:
        return frechet_distance(*statistics_of(samples).moments(), *reference)

    work = f"the error of FID-infinity, 50,000 x {DIM}"
    row = contest(
        work, "a distance of the mean size", lambda: influences(samples[:4096], *moments, *reference), distance, pairs=3
    )
    assert row.ratio > 0.5


@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # pytorch-fid's use of scipy
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
    by_sqrtm = peer_module("pytorch_fid.fid_score").calculate_frechet_distance
    arrays = [each.numpy() for each in (mu1, sigma1, mu2, sigma2)]
    row = contest("", "pytorch-fid", ours, lambda: by_sqrtm(*arrays), pairs=1)
    assert row.ratio > 2.0


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance` will save all extracted features")
def test_kernel_distance() -> None:
    from torchmetrics.image.kid import KernelInceptionDistance

    generated, real = features(1, 5_000), features(0, 5_000)

    def ours() -> float:
        metric = KernelDistance(real, subsets=20, subset_size=1_000)
        metric.update(generated, torch.arange(len(generated)))
        return metric.compute()[0].item()

    def by_torchmetrics(dtype: torch.dtype) -> float:
        metric = KernelInceptionDistance(feature=Features(), subsets=20, subset_size=1_000).set_dtype(dtype)
        metric.update(real.to(dtype), real=True)
        metric.update(generated.to(dtype), real=False)
        return float(metric.compute()[0].item())

    def by_fidelity(dtype: torch.dtype) -> Any:
        choices = {"kid_subsets": 20, "kid_subset_size": 1_000, "verbose": False}
        return peer_module("torch_fidelity.metric_kid").kid_features_to_metric(
            generated.to(dtype), real.to(dtype), **choices
        )

    assert ours() == pytest.approx(by_torchmetrics(torch.float64), abs=5e-5)  # other subsets
    work = f"KID of 5,000 x {DIM} features, 20 subsets of 1,000"
    assert contest(work, "torchmetrics in float64", ours, lambda: by_torchmetrics(torch.float64)).ratio > 1.0
    assert contest("", "torchmetrics in float32", ours, lambda: by_torchmetrics(torch.float32)).ratio > 0.5
    assert contest("", "torch-fidelity in float64", ours, lambda: by_fidelity(torch.float64)).ratio > 0.8
    assert contest("", "torch-fidelity in float32", ours, lambda: by_fidelity(torch.float32)).ratio > 0.3


def test_precision_and_recall() -> None:
    generated, real = features(1, 4_000), features(0, 4_000)

    def ours() -> tuple[float, float]:
        metric = PrecisionRecall(real)
        metric.update(generated, torch.arange(len(generated)))
        manifolds = metric.compute()
        return manifolds.precision.item(), manifolds.recall.item()

    fidelity = peer_module("torch_fidelity.metric_prc")

    def by_fidelity(dtype: torch.dtype) -> tuple[float, float]:
        found = fidelity.prc_features_to_metric(generated.to(dtype), real.to(dtype), verbose=False)
        return found["precision"], found["recall"]

    assert ours() == pytest.approx(by_fidelity(torch.float64), abs=1e-7)
    assert ours() == pytest.approx(by_fidelity(torch.float32), abs=2e-3)  # some features on the other side of a ball
    work = f"precision and recall of 4,000 x {DIM} features"
    assert contest(work, "torch-fidelity in float64", ours, lambda: by_fidelity(torch.float64)).ratio > 1.0
    assert contest("", "torch-fidelity in float32", ours, lambda: by_fidelity(torch.float32)).ratio > 0.75


def test_inception_features(tmp_path: Path) -> None:
    """Of random weights, in the file that both read: the same bits."""
    network, images = InceptionV3(), torch.randint(0, 256, (16, 3, 64, 64), dtype=torch.uint8)
    torch.save(dict(network.state_dict()), tmp_path / "weights.pth")
    fidelity = peer_module("torch_fidelity.feature_extractor_inceptionv3")
    wanted, path = ["2048", "logits_unbiased"], str(tmp_path / "weights.pth")
    peer = fidelity.FeatureExtractorInceptionV3("bench", wanted, feature_extractor_weights_path=path)
    with torch.no_grad():
        assert torch.equal(network(images)[0], peer(images)[0])
        row = contest(
            "Inception features of 16 images", "torch-fidelity", lambda: network(images), lambda: peer(images)
        )
    assert row.ratio > 1.1
