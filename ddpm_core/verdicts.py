"""What measured numbers say of each other: whether intervals overlap, how a sweep's points stand, and both in words.

Plain floats and no torch: the pipelines decide by these verdicts, and the reports state them. An interval is a 95 % one.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import NormalDist, fmean, stdev

import numpy as np

Interval = tuple[float, float]  # (low, high)


def known_interval(low: float | None, high: float | None) -> Interval | None:
    """Both ends of an interval, None unless they are finite numbers."""
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        return None
    return low, high


def intervals_overlap(one: Interval | None, other: Interval | None) -> bool | None:
    """Whether two intervals share a value, be it an end; None if one of them is not known."""
    if one is None or other is None:
        return None
    return one[0] <= other[1] and other[0] <= one[1]


class Verdict(StrEnum):
    """How a checkpoint stands to the best one that was measured under the same protocol."""

    BEST = "best"
    INDISTINGUISHABLE = "not distinguishable"
    HIGHER = "higher"
    NO_INTERVAL = "no interval, cannot be told"
    NOT_FINITE = "not a finite number"


def verdict_beside(best: Interval | None, other: Interval | None) -> Verdict:
    """The verdict on a checkpoint with a finite distance, by its interval and that of the best one, which is another."""
    overlap = intervals_overlap(best, other)
    if overlap is None:
        return Verdict.NO_INTERVAL
    return Verdict.INDISTINGUISHABLE if overlap else Verdict.HIGHER


def difference_half_width(one: Interval, other: Interval) -> float:
    """Half the width of the interval of the difference of two values with independent errors."""
    # Their variances add up: h = sqrt(h_1^2 + h_2^2).
    return math.hypot(*((high - low) / 2.0 for low, high in (one, other)))


def mean_interval(values: Sequence[float]) -> Interval:
    """Student's interval for the mean of a normal law of which two or more independent values were seen."""
    mean, square = mean_and_error(values)
    reach = student_quantile(0.95, len(values) - 1.0) * math.sqrt(square)
    return mean - reach, mean + reach


def difference_interval(one: Sequence[float], other: Sequence[float], confidence: float = 0.95) -> Interval:
    """Welch's interval for the mean of `one` less that of `other`, two or more independent values each, whose variances may
    differ; Satterthwaite's degrees of freedom."""
    (first, a), (second, b) = mean_and_error(one), mean_and_error(other)
    difference = first - second
    if a + b == 0.0:  # which says nothing of the degrees of freedom
        return difference, difference
    # dof = (a + b)^2 / (a^2 / (n - 1) + b^2 / (m - 1)), here by shares, whose squares are not 0
    share = a / (a + b)
    dof = 1.0 / (share**2 / (len(one) - 1) + (1.0 - share) ** 2 / (len(other) - 1))
    reach = student_quantile(confidence, dof) * math.sqrt(a + b)
    return difference - reach, difference + reach


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """(mean, its squared standard error s^2 / n) of two or more values."""
    with np.errstate(invalid="ignore"):  # of values that are not finite, which have no interval
        return float(np.mean(values)), float(np.var(values, ddof=1)) / len(values)


def student_quantile(confidence: float, dof: float) -> float:
    """What |t| stays below with probability `confidence`, of Student's law."""
    from scipy.special import (
        stdtrit,
    )  # here: a report without several seeds does not need it; scipy.stats takes thrice as long

    return float(stdtrit(dof, (1.0 + confidence) / 2.0))


@dataclass(frozen=True)
class Measurement:
    """The distance of one trial, that is, of a point with one seed, and the interval of its samples' noise."""

    point: str
    distance: float
    interval: Interval | None = None


@dataclass(frozen=True)
class Standing:
    """A point over its seeds: the mean distance, their standard deviation (None of one seed), and an interval of the mean.
    Of two seeds or more that is Student's and covers training and sampling; of one, the sampling alone, None if unknown."""

    point: str
    seeds: int
    mean: float
    std: float | None
    low: float | None
    high: float | None

    @property
    def interval(self) -> Interval | None:
        return known_interval(self.low, self.high)

    @property
    def spread(self) -> str:
        """+- the standard deviation over seeds; empty for one seed."""
        return "" if self.std is None else f" +- {self.std:.2g}"


@dataclass(frozen=True)
class Comparison:
    """How far a point is above the best one: the difference of their means with its interval, and whether 0 lies below
    that; None if there is no interval."""

    point: str
    difference: float
    low: float | None
    high: float | None
    apart: bool | None


def distances_by_point(measurements: Iterable[Measurement]) -> dict[str, list[float]]:
    """Each point's distances, points in the order of their first measurements."""
    distances: dict[str, list[float]] = {}
    for measurement in measurements:
        distances.setdefault(measurement.point, []).append(measurement.distance)
    return distances


def standings(measurements: Sequence[Measurement]) -> list[Standing]:
    """Of the points all of whose distances are finite, the lowest mean first."""
    intervals = {measurement.point: measurement.interval for measurement in measurements}
    ranking = []
    for point, distances in distances_by_point(measurements).items():
        if not all(map(math.isfinite, distances)):
            continue
        several = len(distances) > 1
        low, high = mean_interval(distances) if several else intervals[point] or (None, None)
        std = stdev(distances) if several else None
        ranking.append(Standing(point, len(distances), fmean(distances), std, low, high))
    return sorted(ranking, key=lambda standing: (standing.mean, standing.point))


def pairs_of(ranking: Sequence[Standing]) -> int:
    """How many pairs of points there are, at least 1."""
    return max(1, math.comb(len(ranking), 2))


def compare_with_best(ranking: Sequence[Standing], measurements: Sequence[Measurement]) -> list[Comparison]:
    """Every other standing beside the first. With two seeds or more each, the interval is Welch's over the seeds; else that
    of the samples' noise, as independent.

    The first is the first by the same numbers, so that any pair of points may come to be compared: by Bonferroni, in 95 % of
    sweeps no point is told apart from another that is equal to it, however many there are.
    """
    distances, errors = distances_by_point(measurements), 0.05 / pairs_of(ranking)
    comparisons = []
    for other in ranking[1:]:
        best = ranking[0]
        difference = other.mean - best.mean
        low = high = None
        if best.seeds > 1 and other.seeds > 1:
            low, high = difference_interval(distances[other.point], distances[best.point], 1.0 - errors)
        elif best.interval is not None and other.interval is not None:
            normal = NormalDist()
            widening = normal.inv_cdf(1.0 - errors / 2.0) / normal.inv_cdf(1.0 - 0.05 / 2.0)
            reach = difference_half_width(best.interval, other.interval) * widening
            low, high = difference - reach, difference + reach
        apart = None if low is None else low > 0.0
        comparisons.append(Comparison(other.point, difference, low, high, apart))
    return comparisons


def conclude(
    ranking: Sequence[Standing], comparisons: Sequence[Comparison], metric: str, choice: str | None = None
) -> str:
    """Which point is best as far as the numbers say, by how much, and whether that agrees with the paper. choice: the point
    that the paper chose."""
    if not ranking:
        return "no point has a result"
    best = ranking[0]
    values = {standing.point: f"{standing.point} {standing.mean:.4g}{standing.spread}" for standing in ranking}
    if not comparisons:
        return f"{best.point}, with {metric} {best.mean:.4g}{best.spread}, is the only one: there is nothing to compare it with"
    level = [comparison for comparison in comparisons if comparison.apart is False]
    unknown = [comparison for comparison in comparisons if comparison.apart is None]
    worse = [comparison for comparison in comparisons if comparison.apart]
    parts = []
    if level:
        named = [values[best.point], *(values[comparison.point] for comparison in level)]
        others = [standing for standing in ranking if standing.point in {comparison.point for comparison in level}]
        overlap = all(intervals_overlap(best.interval, other.interval) for other in others)
        why = "their intervals overlap" if overlap else "the interval of their difference holds 0"
        which = "which is better" if len(level) == 1 else "which is best"
        parts.append(f"{listed(named)}, but {why}, so this sweep cannot say {which}")
    if unknown:
        named = [values[best.point], *(values[comparison.point] for comparison in unknown)]
        parts.append(f"{listed(named)}, but no interval says whether that is more than noise")
    if worse:
        named = [values[comparison.point] for comparison in worse]
        parts.append(f"{values[best.point]} is better than {listed(named)} at 95 % confidence")
    fewest, most = (end(standing.seeds for standing in ranking) for end in (min, max))
    seeds = "" if most == 1 else f", mean over {most if fewest == most else f'{fewest} to {most}'} seeds"
    text = f"By {metric}{seeds}: {'; '.join(parts)}"
    second = comparisons[0]
    if second.low is not None:
        noise = ", of the samples' noise alone: each was trained with one seed" if most == 1 else ""
        pairs = pairs_of(ranking)
        corrected = "" if pairs == 1 else f", corrected for the {pairs} pairs of {len(ranking)} points"
        interval = f"95 % interval {second.low:.3g} to {second.high:.3g}{corrected}{noise}"
        text += f". {second.point} is {second.difference:.3g} above {best.point} ({interval})"
    return f"{text}. {agreement(best, comparisons, choice)}" if choice else text


def listed(words: Sequence[str]) -> str:
    """Words as in a sentence: 'a, b and c'."""
    return " and ".join(part for part in (", ".join(words[:-1]), *words[-1:]) if part)


def agreement(best: Standing, comparisons: Sequence[Comparison], choice: str) -> str:
    """What the outcome means for the paper's choice."""
    if best.point == choice:
        certain = all(comparison.apart for comparison in comparisons)
        return f"The paper chose {choice} too" + ("" if certain else ", which this sweep supports without proving it")
    chosen = next((comparison for comparison in comparisons if comparison.point == choice), None)
    if chosen is None:
        return f"The paper chose {choice}, which has no result here"
    if chosen.apart:
        return f"The paper chose {choice}, which is {chosen.difference:.3g} above here: that does not agree"
    return f"The paper chose {choice}: that is no contradiction"
