"""Verdicts on numbers: intervals of means, whether intervals overlap, how points stand, and only what the numbers bear."""

import math

import numpy as np
import pytest
import scipy.special
import scipy.stats

from ddpm_core.verdicts import (
    Interval,
    Measurement,
    Verdict,
    compare_with_best,
    conclude,
    difference_interval,
    intervals_overlap,
    known_interval,
    mean_interval,
    standings,
    verdict_beside,
)


def trials(*distances: float, point: str = "a", reach: float | None = None) -> list[Measurement]:
    """A point's trials, one a seed; `reach` is half the width of their intervals."""
    return [
        Measurement(point, distance, None if reach is None else (distance - reach, distance + reach))
        for distance in distances
    ]


def words(measurements: list[Measurement], choice: str | None = None) -> str:
    """The conclusion of some trials."""
    ranking = standings(measurements)
    return conclude(ranking, compare_with_best(ranking, measurements), "fd", choice)


@pytest.mark.parametrize(
    ("one", "other", "overlap"),
    [
        ((0.0, 1.0), (0.5, 2.0), True),
        ((0.0, 1.0), (1.0, 2.0), True),  # the ends touch
        ((0.0, 1.0), (1.1, 2.0), False),
        ((0.0, 3.0), (1.0, 2.0), True),  # one inside the other
        ((0.0, 1.0), None, None),
    ],
)
def test_intervals_overlap_that_share_a_value(
    one: Interval | None, other: Interval | None, overlap: bool | None
) -> None:
    assert intervals_overlap(one, other) is overlap
    assert intervals_overlap(other, one) is overlap


def test_a_verdict_is_not_given_without_both_intervals() -> None:
    best, near, far = (0.0, 1.0), (0.5, 2.0), (1.5, 2.0)
    assert [verdict_beside(best, other) for other in (near, far, None)] == [
        "not distinguishable",
        "higher",
        "no interval, cannot be told",
    ]
    assert verdict_beside(None, far) is Verdict.NO_INTERVAL


@pytest.mark.parametrize("end", [None, math.nan, math.inf])
def test_an_interval_without_both_ends_is_not_known(end: float | None) -> None:
    assert known_interval(0.0, end) is None
    assert known_interval(end, 1.0) is None
    assert known_interval(0.0, 1.0) == (0.0, 1.0)


def test_intervals_of_few_means_have_students_closed_forms() -> None:
    """At one degree of freedom the 97.5 % quantile is tan(0.475 pi), at two 0.95 / sqrt(2 * 0.975 * 0.025)."""
    one, two = math.tan(0.475 * math.pi), 0.95 / math.sqrt(2 * 0.975 * 0.025)
    # Two values a distance 2 h apart: a deviation of sqrt(2) h, of their mean h.
    assert mean_interval([3.0, 5.0]) == pytest.approx((4.0 - one, 4.0 + one), rel=1e-12)
    deviation = 1.0 / math.sqrt(3)  # of the mean of 1, 2, 3
    assert mean_interval([1.0, 2.0, 3.0]) == pytest.approx((2.0 - two * deviation, 2.0 + two * deviation), rel=1e-12)
    # Welch of equal variances and counts has 2 (n - 1) degrees of freedom.
    reach = two * math.sqrt(1.0 + 1.0)
    assert difference_interval([3.0, 5.0], [0.0, 2.0]) == pytest.approx((3.0 - reach, 3.0 + reach), rel=1e-12)


@pytest.mark.parametrize(("n", "m"), [(2, 2), (2, 5), (3, 3), (12, 4)])
def test_the_interval_of_a_difference_is_welchs(n: int, m: int) -> None:
    rng = np.random.default_rng(n + m)
    one, other = rng.normal(3.0, 0.5, n), rng.normal(2.0, 2.0, m)
    a, b = one.var(ddof=1) / n, other.var(ddof=1) / m
    dof = (a + b) ** 2 / (a**2 / (n - 1) + b**2 / (m - 1))
    reach = scipy.special.stdtrit(dof, 0.975) * np.sqrt(a + b)
    difference = one.mean() - other.mean()
    wanted = (difference - reach, difference + reach)
    assert difference_interval(one.tolist(), other.tolist()) == pytest.approx(wanted, rel=1e-12)


def test_equal_values_have_an_interval_without_width_and_no_warning() -> None:
    assert difference_interval([2.0, 2.0], [1.0, 1.0]) == (1.0, 1.0)
    assert mean_interval([2.0, 2.0, 2.0]) == (2.0, 2.0)


def test_the_difference_of_points_with_seeds_is_welchs() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(1.0, 0.1, 4), rng.normal(1.2, 0.3, 3)
    measurements = [*trials(*a.tolist(), reach=0.01), *trials(*b.tolist(), point="b", reach=0.01)]
    ranking = standings(measurements)
    (comparison,) = compare_with_best(ranking, measurements)
    first, second = sorted((a, b), key=np.mean)
    wanted = scipy.stats.ttest_ind(second, first, equal_var=False).confidence_interval(0.95)
    assert (comparison.low, comparison.high) == pytest.approx((wanted.low, wanted.high), rel=1e-8)
    assert comparison.apart == (wanted.low > 0)
    assert ranking[0].std == pytest.approx(first.std(ddof=1), rel=1e-12)


@pytest.mark.parametrize(("points", "seeds"), [(2, 5), (3, 5), (5, 2), (6, 1)])
def test_equal_points_are_told_apart_in_one_sweep_of_twenty_at_most(points: int, seeds: int) -> None:
    """Without the correction 3 points of 5 seeds and 5 of 2 are in one of ten, 6 of one seed in more than a third."""
    generator, sweeps, wrong = np.random.default_rng(0), 400, 0
    for _ in range(sweeps):
        measurements = []
        for point in range(points):
            distances = generator.normal(10.0, 1.0, seeds).tolist()
            measurements += trials(*distances, point=str(point), reach=1.96 if seeds == 1 else None)
        comparisons = compare_with_best(standings(measurements), measurements)
        wrong += any(comparison.apart for comparison in comparisons)
    assert scipy.stats.binomtest(wrong, sweeps, 0.05, alternative="greater").pvalue > 0.001


def test_the_mean_is_ranked_never_the_best_of_the_seeds() -> None:
    ranking = standings([*trials(0.1, 5.0, point="lucky", reach=0.1), *trials(2.0, 2.1, point="even", reach=0.1)])
    assert [standing.point for standing in ranking] == ["even", "lucky"]


def test_a_point_with_a_distance_that_is_not_finite_has_no_standing() -> None:
    ranking = standings([*trials(1.0, math.nan), *trials(2.0, point="b")])
    assert [standing.point for standing in ranking] == ["b"]


def test_words_say_no_more_than_the_numbers() -> None:
    assert words(trials(1.0, reach=0.1)) == "a, with fd 1, is the only one: there is nothing to compare it with"
    near = [*trials(1.0, reach=0.3), *trials(1.2, point="b", reach=0.3)]
    assert words(near) == (
        "By fd: a 1 and b 1.2, but their intervals overlap, so this sweep cannot say which is better. b is 0.2 above a "
        "(95 % interval -0.224 to 0.624, of the samples' noise alone: each was trained with one seed)"
    )
    far = [*near, *trials(1.3, point="c", reach=0.3), *trials(2.5, point="d", reach=0.3)]
    assert words(far).startswith(
        "By fd: a 1, b 1.2 and c 1.3, but their intervals overlap, so this sweep cannot say which is best; a 1 is better "
        "than d 2.5 at 95 % confidence. "
    )
    seeds = [*trials(1.0, 1.2), *trials(1.1, 1.5, 1.6, point="b")]
    assert words(seeds).startswith("By fd, mean over 2 to 3 seeds: a 1.1 +- 0.14 and b 1.4 +- 0.26, but")
    assert "one seed" not in words(seeds)
    apart = [*trials(1.0, reach=0.1), *trials(2.0, point="b", reach=0.1)]
    assert words(apart).startswith("By fd: a 1 is better than b 2 at 95 % confidence. b is 1 above a")
    unknown = [*trials(1.0), *trials(2.0, point="b")]
    assert words(unknown) == "By fd: a 1 and b 2, but no interval says whether that is more than noise"
    assert conclude([], [], "fd") == "no point has a result"


def test_the_papers_choice_is_confirmed_only_as_far_as_it_is_certain() -> None:
    near = [*trials(1.0, reach=0.3), *trials(1.2, point="b", reach=0.3)]
    apart = [*trials(1.0, reach=0.1), *trials(2.0, point="b", reach=0.1)]
    assert words(near, "a").endswith("The paper chose a too, which this sweep supports without proving it")
    assert words(apart, "a").endswith("The paper chose a too")
    assert words(apart, "b").endswith("The paper chose b, which is 1 above here: that does not agree")
    assert words(near, "b").endswith("The paper chose b: that is no contradiction")
    assert words(near, "c").endswith("The paper chose c, which has no result here")
