"""The confidence interval of the Frechet distance: its derivative, its jackknife, its coverage."""

import gc
import weakref
from collections.abc import Sequence
from typing import overload

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from numpy.typing import NDArray
from support.gaussian_case import centred_statistics, normal, statistics_of
from torch import Tensor

from ddpm_core.metrics import InceptionScore, KernelDistance, PrecisionRecall, intervals
from ddpm_core.metrics.frechet import FeatureStatistics, FeatureSums, frechet_distance
from ddpm_core.metrics.intervals import (
    ChunkSums,
    frechet_interval,
    jackknife_error,
    kid_interval,
    leave_one_out_distances,
    proportion_interval,
    recall_interval,
    score_interval,
)
from ddpm_core.metrics.precision_recall import Manifolds, inside_manifolds, squared_radii


def reference_of(d: int) -> FeatureStatistics:
    """N(0, diag(exp(-4 i / d))): a spectrum that decays, as that of features does."""
    return centred_statistics(10_000, torch.diag(torch.exp(-4 * torch.arange(d, dtype=torch.float64) / d)))


def explicit_replicates(parts: list[Tensor], reference: FeatureStatistics) -> NDArray[np.float64]:
    """The distance without each part, from the samples that are left."""
    replicates = []
    for j in range(len(parts)):
        rest = torch.cat([part for i, part in enumerate(parts) if i != j])
        replicates.append(frechet_distance(rest.mean(0), torch.cov(rest.T), *reference.moments()))
    return np.array(replicates)


def test_replicates_are_right_to_second_order_in_the_share_left_out() -> None:
    d = 6
    reference, base, chunk = reference_of(d), normal(0, 500, d), normal(1, 20, d) * 1.5 + 0.5
    errors = []
    for copies in (1, 4):  # the same chunk, as a share of 1/26 and of about 1/100
        parts = [base.repeat(copies, 1)[i::4] for i in range(4)] + [chunk]
        _, replicates, _ = leave_one_out_distances([statistics_of(part) for part in parts], reference)
        errors.append(abs(replicates[-1].item() - explicit_replicates(parts, reference)[-1]))
    everything = torch.cat(parts)
    whole = frechet_distance(everything.mean(0), torch.cov(everything.T), *reference.moments())
    change = abs(replicates[-1].item() - whole)
    assert errors[1] < change / 100
    # Four times smaller a share: 16 times smaller an error of second order, 4 times one of first order.
    assert 11 < errors[0] / errors[1] < 22


@pytest.mark.parametrize(
    ("d", "n", "m", "tolerance"),
    [
        (8, 400, 20, 0.02),
        (8, 400, 50, 0.02),
        # Fewer samples than dimensions: leaving a chunk out also lowers the rank, which is no small change,
        # so the derivative is a coarser replacement. The width it gives is larger, on the safe side.
        (32, 24, 12, 0.25),
    ],
)
def test_jackknife_error_equals_the_explicit_one(d: int, n: int, m: int, tolerance: float) -> None:
    reference, features = reference_of(d), normal(2, n, d) * 1.2 + 0.2
    parts = list(torch.tensor_split(features, m))
    distance, replicates, counts = leave_one_out_distances([statistics_of(part) for part in parts], reference)
    assert counts.tolist() == [len(part) for part in parts]
    expected = frechet_distance(features.mean(0), torch.cov(features.T), *reference.moments())
    assert distance == pytest.approx(expected, rel=1e-6)
    explicit = explicit_replicates(parts, reference)
    ratio = np.std(replicates.numpy()) / np.std(explicit)
    assert 1 - tolerance < ratio < 1 + tolerance
    assert np.corrcoef(replicates.numpy(), explicit)[0, 1] > 0.95


def test_interval_of_equal_chunks_is_the_textbook_jackknife_with_t() -> None:
    reference = reference_of(5)
    chunks = [statistics_of(part) for part in normal(3, 10, 40, 5) * 1.3]
    distance, replicates, _ = leave_one_out_distances(chunks, reference)
    r = replicates.numpy()
    error = np.sqrt(9 / 10 * ((r - r.mean()) ** 2).sum())
    for level in (0.5, 0.95, 0.99):
        reach = scipy.stats.t.ppf((1 + level) / 2, 9) * error
        assert frechet_interval(chunks, reference, level) == pytest.approx(
            (distance - reach, distance + reach), rel=1e-9
        )


def test_jackknife_error_of_a_mean_is_the_scatter_of_its_chunks() -> None:
    # For a mean, chunk j's pseudo-value is its own mean, and its square has the weight 1 / (n / n_j - 1).
    values = normal(4, 60).numpy()
    parts = np.split(values, [3, 10, 12, 30, 41])
    without = [np.concatenate([p for i, p in enumerate(parts) if i != j]).mean() for j in range(6)]
    counts = np.array([float(len(part)) for part in parts])
    squares = [(part.mean() - values.mean()) ** 2 / (60 / len(part) - 1) for part in parts]
    got = jackknife_error(float(values.mean()), torch.tensor(without), torch.tensor(counts))
    assert got == pytest.approx(np.sqrt(np.mean(squares)), rel=1e-12)


@pytest.mark.parametrize(("hits", "n"), [(0, 64), (1, 1000), (7, 50), (50, 50), (0, 1)])
def test_the_ends_of_a_proportions_interval_solve_wilsons_equation(hits: int, n: int) -> None:
    """Those probabilities p from which hits / n is just 1.96 of p's own standard deviations away."""
    low, high = proportion_interval(hits, n)
    assert 0.0 <= low <= hits / n <= high <= 1.0
    assert (low == 0.0) == (hits == 0)
    assert (high == 1.0) == (hits == n)
    for end in {low, high} - {0.0, 1.0}:
        away = (hits / n - end) ** 2
        assert away == pytest.approx(1.959963984540054**2 * end * (1 - end) / n, rel=1e-10)


def coverage(scale: float, shift: float, d: int, n: int, cuts: list[int], trials: int) -> tuple[float, float]:
    """(share of 95 % intervals with the expected distance at n inside, rms width / right width)."""
    reference = reference_of(d)
    (_, cov) = reference.moments()
    deviations = cov.diagonal().sqrt()
    # The truth, by simulation: the expectation and deviation of the distance at n, batched, without our code.
    x = normal(10, 4000, n, d) * deviations * scale + shift
    mean = x.mean(1)
    centred = x - mean[:, None]
    sigma = centred.mT @ centred / (n - 1)
    roots = torch.linalg.eigvalsh(deviations[:, None] * sigma * deviations).clamp(min=0).sqrt().sum(1)
    traces = sigma.diagonal(dim1=1, dim2=2).sum(1) + cov.trace()
    distances = mean.square().sum(1) + traces - 2 * roots
    truth, deviation = distances.mean().item(), distances.std().item()

    held, widths = 0, []
    for trial in range(trials):
        features = normal(1000 + trial, n, d) * deviations * scale + shift
        chunks = [statistics_of(part) for part in torch.tensor_split(features, cuts)]
        low, high = frechet_interval(chunks, reference)
        held += low <= truth <= high
        widths.append(high - low)
    right = 2 * float(scipy.stats.t.ppf(0.975, len(cuts))) * deviation
    return held / trials, float(np.sqrt(np.mean(np.square(widths)))) / right


# Of 200 intervals that hold the truth with probability 0.95, the share held has a deviation of 0.015: three
# of them. The widths scatter by 1 / sqrt(2 (m - 1)), 16 % each for m = 20, so their mean by 1 %; a jackknife's
# variance is biased upwards (Efron & Stein 1981), hence the room above.
@pytest.mark.parametrize("cuts", [list(range(20, 400, 20)), [10, 20, 30, 40, 80, 120, 160, 200, 240, 280, 320, 360]])
def test_interval_covers_the_expected_distance_at_this_n(cuts: list[int]) -> None:
    held, width = coverage(scale=1.15, shift=0.2, d=8, n=400, cuts=cuts, trials=200)
    assert 0.905 < held < 0.995
    assert 0.94 < width < 1.15


def test_interval_is_wide_and_not_narrow_where_the_distributions_are_equal() -> None:
    held, width = coverage(scale=1.0, shift=0.0, d=8, n=400, cuts=list(range(20, 400, 20)), trials=150)
    assert held > 0.95
    # Low ends are cut at 0, so this is less than the ratio of errors, 1.5.
    assert 1.0 < width < 1.7


def test_interval_covers_with_fewer_samples_than_dimensions() -> None:
    held, width = coverage(scale=1.15, shift=0.2, d=32, n=24, cuts=list(range(2, 24, 2)), trials=150)
    assert held > 0.905
    assert 0.94 < width < 1.5


def test_interval_is_symmetric_and_cut_at_zero() -> None:
    reference = reference_of(4)
    chunks = [statistics_of(part) for part in normal(5, 8, 30, 4) * 1.4]
    distance, _, _ = leave_one_out_distances(chunks, reference)
    low, high = frechet_interval(chunks, reference)
    assert low < distance < high
    assert high - distance == pytest.approx(distance - low, rel=1e-9)
    assert frechet_interval(chunks, reference, level=0.999999)[0] == 0.0


def test_five_chunks_are_enough_even_if_one_is_a_single_sample() -> None:
    features = normal(6, 41, 3)
    chunks = [statistics_of(part) for part in torch.tensor_split(features, [10, 20, 30, 40])]
    distance, _, counts = leave_one_out_distances(chunks, reference_of(3))
    assert counts.tolist() == [10, 10, 10, 10, 1]
    low, high = frechet_interval(chunks, reference_of(3))
    assert low < distance < high


class Stored(Sequence[FeatureStatistics]):
    """Seeds in the place of files: a chunk is made when it is asked for."""

    def __len__(self) -> int:
        return 6

    @overload
    def __getitem__(self, index: int) -> FeatureStatistics: ...
    @overload
    def __getitem__(self, index: slice) -> "Stored": ...
    def __getitem__(self, index: int | slice) -> "FeatureStatistics | Stored":
        if isinstance(index, slice):
            raise TypeError("one at a time")
        if index >= 6:
            raise IndexError(index)
        return statistics_of(normal(index, 30, 4))


@pytest.mark.parametrize("kept", [0, 3, 6])
def test_chunks_may_be_loaded_one_at_a_time_and_kept_or_read_again(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    all_kept = frechet_interval(list(Stored()), reference_of(4))
    monkeypatch.setattr(intervals, "KEPT_BYTES", kept * 4 * 4 * 8 // 2)
    # Sums over a triangle and over a matrix round differently.
    assert frechet_interval(Stored(), reference_of(4)) == pytest.approx(all_kept, rel=1e-12)


def test_sums_of_chunks_are_freed_with_the_last_reference_to_them() -> None:
    """Without the garbage collector, which counts objects and not bytes."""
    gc.disable()
    try:
        parts = [weakref.ref(FeatureSums.of(normal(seed, 10, 3))) for seed in range(5)]
        assert [part() for part in parts] == [None] * 5
    finally:
        gc.enable()


def test_sums_read_before_give_the_same_interval() -> None:
    chunks = ChunkSums([FeatureSums.of(normal(seed, 30, 4)) for seed in range(6)])
    assert frechet_interval(chunks, reference_of(4)) == frechet_interval(Stored(), reference_of(4))
    everything = torch.cat([normal(seed, 30, 4) for seed in range(6)])
    for moment, expected in zip(chunks.total.moments(), (everything.mean(0), torch.cov(everything.T)), strict=True):
        torch.testing.assert_close(moment, expected, rtol=1e-12, atol=1e-14)


# 200 intervals: the share held has a deviation of 0.015, the ratio of variances one of 0.1. A pair of samples is in 1 of the
# subsets on average, as in an evaluation. Bounded features, as averages over an image's places nearly are.
@pytest.mark.parametrize(("n", "m", "subsets"), [(160, 80, 4), (160, 160, 1)])
@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_interval_of_kid_covers_its_mean_whether_or_not_the_sets_are_alike(
    n: int, m: int, subsets: int, shift: float
) -> None:
    real, values, errors, ends = normal(1, n, 16).erf(), [], [], []
    for trial in range(200):
        metric = KernelDistance(real, subsets=subsets, subset_size=m)
        metric.update(normal(2000 + trial, n, 16).erf() + shift, torch.arange(n))
        kid = metric.compute()
        values.append(kid.mean.item())
        errors.append(kid.error.item())
        ends.append(kid_interval(kid))
    assert 0.7 < np.mean(np.square(errors)) / np.var(values, ddof=1) < 1.3
    held = np.mean([end is not None and end[0] <= np.mean(values) <= end[1] for end in ends])
    assert 0.905 < held < 0.995


def test_kid_of_subsets_of_three_has_no_interval() -> None:
    metric = KernelDistance(normal(0, 3, 2), subsets=1, subset_size=3)
    metric.update(normal(1, 3, 2), torch.arange(3))
    assert kid_interval(metric.compute()) is None


def test_interval_of_the_score_covers_its_mean() -> None:
    scores = []
    for trial in range(300):
        metric = InceptionScore(400, 10, 5)
        metric.update(2 * normal(3000 + trial, 400, 5), torch.arange(400))
        scores.append([value.item() for value in metric.compute()])
    truth = np.mean([mean for mean, _ in scores])
    ends = [score_interval(mean, std, 10) for mean, std in scores]
    assert 0.91 < np.mean([end is not None and end[0] <= truth <= end[1] for end in ends]) < 0.99
    assert score_interval(2.0, 0.0, 1) is None


def test_wilsons_interval_of_precision_covers_the_share_of_all_samples_inside_the_manifold() -> None:
    real = normal(1, 200, 4)
    radii = squared_radii(real, 3)
    many = 1.3 * normal(2, 20_000, 4)
    truth = inside_manifolds(many, real, torch.zeros(len(many), dtype=torch.float64), radii)[0].double().mean().item()
    held = 0
    for trial in range(300):
        inside, _ = inside_manifolds(
            1.3 * normal(4000 + trial, 150, 4), real, torch.zeros(150, dtype=torch.float64), radii
        )
        low, high = proportion_interval(int(inside.sum()), 150)
        held += low <= truth <= high
    assert 0.91 < held / 300 < 0.99


# 200 evaluations: the standard deviation of recall is known to 5 %, the share held to 0.015, three of each; a standard error of
# 8 divisions scatters by a fifth, for which normal intervals hold 0.02 less.
@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (0.8, 0.3)])
def test_interval_of_recall_covers_its_mean_whether_or_not_the_sets_are_alike(scale: float, shift: float) -> None:
    real, results = normal(1, 150, 8), []
    for trial in range(200):
        metric = PrecisionRecall(real)
        metric.update(scale * normal(5000 + trial, 150, 8) + shift, torch.arange(150))
        results.append(metric.compute())
    values = np.array([result.recall.item() for result in results])
    errors = [result.recall_error.item() for result in results]
    assert 0.85 < np.sqrt(np.mean(np.square(errors))) / values.std(ddof=1) < 1.15
    ends = [recall_interval(result) for result in results]
    assert 0.885 < np.mean([end is not None and end[0] <= values.mean() <= end[1] for end in ends]) < 0.995


def test_interval_of_recall_ends_inside_0_and_1_and_an_error_of_0_is_none() -> None:
    half = torch.tensor(0.5, dtype=torch.float64)
    assert recall_interval(Manifolds(half, 2 * half, half)) == pytest.approx((1 - 0.97998, 1.0), abs=1e-5)
    assert recall_interval(Manifolds(half, 0 * half, half)) == pytest.approx((0.0, 0.97998), abs=1e-5)
    assert recall_interval(Manifolds(half, 2 * half, 0 * half)) is None
    assert recall_interval(Manifolds(half, half, half * torch.nan)) is None


def test_arguments_that_are_wrong_are_named() -> None:
    reference = reference_of(3)
    chunks = [statistics_of(normal(seed, 10, 3)) for seed in range(5)]
    with pytest.raises(ValueError, match=r"^level must be inside"):
        frechet_interval(chunks, reference, level=95.0)
    with pytest.raises(ValueError, match=r"^chunks must be 5 or more for an interval; they are 4"):
        frechet_interval(chunks[:4], reference)
    with pytest.raises(ValueError, match=r"^chunks must be 1 or more; they are 0"):
        ChunkSums([])
    with pytest.raises(ValueError, match=r"^chunks must not be empty"):
        frechet_interval([*chunks, FeatureStatistics(3)], reference)
