"""The Frechet distance against scipy and closed forms; its statistics as a value."""

from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.gaussian_case import statistics_of
from torch import Tensor

from ddpm_core.metrics import (
    FeatureStatistics,
    FrechetDistance,
    frechet,
    frechet_distance,
)

Array = NDArray[np.float64]


def gaussian_features(seed: int, n: int, d: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=torch.Generator().manual_seed(99), dtype=torch.float64) / 4
    mixing += torch.eye(d)  # correlated, and of condition number 10 or so
    return torch.randn(n, d, generator=generator, dtype=torch.float64) @ mixing * scale + shift


def by_scipy(mu1: Array, sigma1: Array, mu2: Array, sigma2: Array) -> float:
    root = scipy.linalg.sqrtm(sigma1 @ sigma2)
    return float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * np.trace(root).real)


@pytest.mark.parametrize("d", [1, 2, 7, 40])
def test_distance_equals_scipys_matrix_root(d: int) -> None:
    rng = np.random.default_rng(d)
    a, b = rng.standard_normal((2, d + 5, d))
    mu1, mu2 = rng.standard_normal((2, d))
    sigma1, sigma2 = a.T @ a / d, b.T @ b / d
    expected = by_scipy(mu1, sigma1, mu2, sigma2)
    # Condition numbers are below 1e3, their product's square 1e6 times 2e-16.
    assert frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(expected, rel=1e-9)
    as_tensors = [torch.tensor(x) for x in (mu1, sigma1, mu2, sigma2)]
    assert frechet_distance(*as_tensors) == frechet_distance(mu1, sigma1, mu2, sigma2)


def test_distance_of_commuting_covariances_is_that_of_their_roots() -> None:
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.standard_normal((6, 6)))[0]
    a, b = rng.uniform(0, 3, (2, 6))
    a[0], b[1] = 0, 0  # each singular, in another direction
    mu1, mu2 = rng.standard_normal((2, 6))
    got = frechet_distance(mu1, axes * a**2 @ axes.T, mu2, axes * b**2 @ axes.T)
    # A zero eigenvalue comes back as rounding, 1e-15, and its root is 3e-8: that much per singular direction.
    assert got == pytest.approx(((mu1 - mu2) ** 2).sum() + ((a - b) ** 2).sum(), abs=5e-7)


def test_distance_in_one_dimension_is_in_mean_and_deviation() -> None:
    got = frechet_distance(np.array([1.0]), np.array([[4.0]]), np.array([-2.0]), np.array([[0.25]]))
    assert got == pytest.approx(3**2 + (2 - 0.5) ** 2, rel=1e-14)


def test_distance_of_singular_covariances_equals_the_singular_value_form() -> None:
    # tr (S1 S2)^(1/2) = the nuclear norm of X1 X2^T for S = X^T X: no root of a matrix is taken at all.
    rng = np.random.default_rng(1)
    x1, x2 = rng.standard_normal((8, 50)), rng.standard_normal((12, 50))
    nuclear = np.linalg.svd(x1 @ x2.T, compute_uv=False).sum()
    sigma1, sigma2 = x1.T @ x1, x2.T @ x2
    expected = np.trace(sigma1) + np.trace(sigma2) - 2 * nuclear
    # 42 eigenvalues are 0 up to about 1e-14 of the largest (1e4): 2 * 42 * sqrt(1e-10) = 8e-4 at worst.
    assert frechet_distance(np.zeros(50), sigma1, np.zeros(50), sigma2) == pytest.approx(expected, abs=8e-4)
    assert frechet_distance(np.zeros(50), sigma1, np.zeros(50), sigma1) == pytest.approx(0, abs=8e-4)


@pytest.mark.parametrize("d", [4, 60])
@pytest.mark.parametrize("decades", [1, 3, 5, 8, 14])
@pytest.mark.parametrize("other", ["same axes", "near", "nearer", "other axes", "round", "large"])
def test_cholesky_and_the_symmetric_root_give_one_distance(d: int, decades: int, other: str) -> None:
    """Whichever is taken: of any condition, and if rounding is all that the distance consists of."""
    rng = np.random.default_rng(decades)
    axes, others = (np.linalg.qr(rng.standard_normal((d, d)))[0] for _ in range(2))
    spectrum = 10.0 ** (-decades * np.arange(d) / (d - 1))
    change = np.eye(d) + {"near": 0.1, "nearer": 1e-7}.get(other, 0.0) * rng.standard_normal((d, d)) / np.sqrt(d)
    root = {
        "same axes": axes * np.sqrt(1.3 * spectrum),
        "near": axes * np.sqrt(spectrum) @ change,
        "nearer": axes * np.sqrt(spectrum) @ change,
        "other axes": others * np.sqrt(spectrum),
        "round": others * np.sqrt(np.linspace(0.5, 1.5, d)),
        "large": others * np.sqrt(1e6 * spectrum),
    }[other]
    mu = torch.zeros(d, dtype=torch.float64)
    sigma1, sigma2 = (torch.tensor(x @ x.T) for x in (axes * np.sqrt(spectrum), root))
    by_root = frechet.distance_given_factor(mu, sigma1, mu, sigma2, factor2=None)
    assert frechet_distance(mu, sigma1, mu, sigma2) == pytest.approx(by_root, rel=1e-10, abs=0)


def test_cholesky_is_taken_unless_a_covariance_is_nearly_singular(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frechet, "symmetric_root", lambda sigma: pytest.fail("the slower way"))
    one, other = statistics_of(gaussian_features(0, 500, 40)), statistics_of(gaussian_features(1, 600, 40, scale=1.1))
    assert frechet_distance(*one.moments(), *other.moments()) > 0
    few = statistics_of(gaussian_features(2, 30, 40))
    for pair in ((one, few), (few, one)):
        with pytest.raises(pytest.fail.Exception, match="the slower way"):
            frechet_distance(*pair[0].moments(), *pair[1].moments())


def test_distance_is_symmetric_and_never_negative() -> None:
    a, b = statistics_of(gaussian_features(0, 50, 5)), statistics_of(gaussian_features(1, 60, 5, scale=2))
    forward, backward = (frechet_distance(*x.moments(), *y.moments()) for x, y in ((a, b), (b, a)))
    assert forward == pytest.approx(backward, rel=1e-12)
    for seed in range(30):  # rounding alone would put about half of these below 0
        same = statistics_of(gaussian_features(seed, 20, 5)).moments()
        assert 0 <= frechet_distance(*same, *same) < 1e-6


@pytest.mark.parametrize(
    ("position", "value", "sentence"),
    [
        (0, np.zeros((2, 2)), r"^mu1 must be a vector"),
        (0, np.array([0.0, np.nan]), r"^mu1 must be finite"),
        (1, np.zeros((3, 3)), r"^sigma1 must be \[2, 2\]"),
        (1, np.array([[1.0, 0.5], [0.2, 1.0]]), r"^sigma1 must be symmetric"),
        (2, np.zeros(3), r"^sigma2 must be \[3, 3\], to fit mu2"),
        (3, np.array([[1.0, np.inf], [np.inf, 1.0]]), r"^sigma2 must be finite"),
    ],
)
def test_distance_names_the_argument_that_is_wrong(position: int, value: Array, sentence: str) -> None:
    arguments: list[Array] = [np.zeros(2), np.eye(2), np.zeros(2), np.eye(2)]
    arguments[position] = value
    with pytest.raises(ValueError, match=sentence):
        frechet_distance(*arguments)


def test_distance_names_dimensions_that_differ() -> None:
    with pytest.raises(ValueError, match=r"^mu2 must be \[2\] as mu1 is; it is \[3\]"):
        frechet_distance(np.zeros(2), np.eye(2), np.zeros(3), np.eye(3))


def test_statistics_give_the_mean_and_the_unbiased_covariance() -> None:
    features = gaussian_features(0, 9000, 4, shift=0.5).float()  # over more than one block of 2048
    mean, cov = statistics_of(features).compute()
    double = features.double().numpy()
    np.testing.assert_allclose(mean, double.mean(0), rtol=1e-12)
    np.testing.assert_allclose(cov, np.cov(double.T), rtol=1e-11, atol=1e-12)


def test_stored_statistics_are_symmetric_and_those_of_earlier_versions_still_merge() -> None:
    features = gaussian_features(0, 50, 5)
    stored = statistics_of(features).statistics()
    assert torch.equal(stored["outer"], stored["outer"].T)
    # As they were made before: the whole product, symmetric up to rounding.
    earlier = {"n": torch.tensor(50.0, dtype=torch.float64), "sum": features.sum(0), "outer": features.T @ features}
    merged = FeatureStatistics(5)
    merged.merge_state(earlier)
    merged.update(features)
    for moment, expected in zip(merged.moments(), statistics_of(features.repeat(2, 1)).moments(), strict=True):
        torch.testing.assert_close(moment, expected, rtol=1e-12, atol=1e-14)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_frechet_distance_merges_in_any_partition_and_order(data: st.DataObject) -> None:
    features = gaussian_features(5, 60, 4, scale=1.5, shift=0.3)
    reference = statistics_of(gaussian_features(6, 80, 4))
    whole = FrechetDistance(reference)
    whole.update(features)
    owners = torch.tensor(data.draw(st.lists(st.integers(0, 4), min_size=60, max_size=60)))
    parts = []
    for owner in range(5):
        part = FrechetDistance(reference)
        part.update(features[owners == owner])
        parts.append(part)
    merged = FrechetDistance(reference)
    for position in data.draw(st.permutations(range(5))):
        merged.merge_state(parts[position])
    # Sums of 60 terms in another order differ by at most 60 units of rounding, 1e-14 of their largest entry.
    for name, value in whole.statistics().items():
        limit = 1e-12 * value.abs().max().item()
        torch.testing.assert_close(merged.statistics()[name], value, rtol=0, atol=limit)
    # Times the condition number, at most 100 here.
    assert merged.compute().item() == pytest.approx(whole.compute().item(), rel=1e-12)


def test_a_result_is_not_kept_across_a_merge() -> None:
    reference = statistics_of(gaussian_features(0, 50, 3))
    metric, other = FrechetDistance(reference), statistics_of(gaussian_features(1, 50, 3, shift=2))
    metric.update(gaussian_features(2, 50, 3))
    before = metric.compute()
    metric.merge_state(other)
    assert metric.compute() > before + 0.5


def test_statistics_save_load_and_start_a_metric(tmp_path: Any) -> None:
    from safetensors.torch import load_file, save_file

    chunk = statistics_of(gaussian_features(0, 50, 3))
    save_file(chunk.statistics(), tmp_path / "chunk.safetensors")
    stored = load_file(tmp_path / "chunk.safetensors")
    reference = statistics_of(gaussian_features(1, 50, 3))
    fresh = FrechetDistance(reference)
    fresh.merge_state(stored)
    fresh.update(gaussian_features(2, 20, 3))
    direct = FrechetDistance(reference)
    direct.update(gaussian_features(0, 50, 3))
    direct.update(gaussian_features(2, 20, 3))
    assert fresh.compute() == direct.compute()
    again = FeatureStatistics(3)
    again.merge_state(stored)
    for stored_moment, moment in zip(again.compute(), chunk.compute(), strict=True):
        assert torch.equal(stored_moment, moment)


def test_reset_forgets_the_samples_but_not_the_reference() -> None:
    metric = FrechetDistance(statistics_of(gaussian_features(0, 50, 3)))
    metric.update(gaussian_features(1, 50, 3))
    first = metric.compute()
    metric.reset()
    with pytest.raises(ValueError, match="FrechetDistance has 0"):
        metric.compute()
    metric.update(gaussian_features(1, 50, 3))
    assert metric.compute() == first


def test_features_that_do_not_fit_are_named() -> None:
    statistics = FeatureStatistics(3)
    with pytest.raises(ValueError, match=r"^features must be floating-point \[N, 3\]; .* \[5, 4\]"):
        statistics.update(torch.zeros(5, 4))
    broken = torch.zeros(5, 3)
    broken[2, 1] = torch.nan
    with pytest.raises(ValueError, match=r"^features must be finite; row 2"):
        statistics.update(broken)
    with pytest.raises(ValueError, match=r"incoming_state\['sum'\] must be \[3\] to merge .*; it is \[4\]"):
        statistics.merge_state(FeatureStatistics(4))
    with pytest.raises(ValueError, match="incoming_state must hold"):
        statistics.merge_state({"n": torch.zeros(())})
    with pytest.raises(ValueError, match=r"incoming_state must hold \['n', 'outer', 'sum'\]"):
        FeatureStatistics(3).merge_state({"n": torch.zeros(())})
    assert statistics.n == 0


def test_two_samples_have_a_covariance_and_one_has_none() -> None:
    mean, cov = statistics_of(torch.tensor([[0.0, 1.0], [2.0, 1.0]])).moments()
    assert mean.tolist() == [1.0, 1.0]
    assert cov.tolist() == [[2.0, 0.0], [0.0, 0.0]]
    with pytest.raises(ValueError, match="a covariance needs 2 samples or more; FeatureStatistics has 1"):
        statistics_of(torch.zeros(1, 2)).moments()
