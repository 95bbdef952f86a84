"""What the numbers of a sweep say: which points stop early, which is best, and how sure that is."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any, Literal

from ddpm_core.metrics.intervals import difference_interval, mean_interval

Status = Literal["finished", "diverged", "stopped"]


@dataclass(frozen=True)
class Outcome:
    """A trial, that is, a point with one seed, at a number of steps. distance, low, high: with the interval of its samples'
    noise; None where it diverged. reason: why it did not finish, or was stopped."""

    point: str
    seed: int
    status: Status
    steps: int
    run_id: str
    evaluation_run_id: str | None = None
    metric: str | None = None
    distance: float | None = None
    low: float | None = None
    high: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class Standing:
    """A point over its seeds: the mean distance, their standard deviation (None of one seed), and a 95 % interval of the
    mean. Of two seeds or more it is Student's and covers training and sampling; of one, the sampling alone; None where
    there is nothing to make it of."""

    point: str
    seeds: int
    mean: float
    std: float | None
    low: float | None
    high: float | None


def measured(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    """Each point's trials that have a distance, none where all diverged; points in the order of their first trials."""
    found: dict[str, list[Outcome]] = {outcome.point: [] for outcome in outcomes}
    for outcome in outcomes:
        if outcome.distance is not None:
            found[outcome.point].append(outcome)
    return found


def distances(trials: Sequence[Outcome]) -> list[float]:
    """Those that are there."""
    return [trial.distance for trial in trials if trial.distance is not None]


def standings(outcomes: Sequence[Outcome]) -> list[Standing]:
    """Of all points that have a finite distance, the lowest mean first."""
    found = []
    for point, done in measured(outcomes).items():
        values = distances(done)
        if not values or not all(map(math.isfinite, values)):
            continue
        if len(values) > 1:
            low, high = mean_interval(values)
            found.append(Standing(point, len(values), fmean(values), stdev(values), low, high))
        else:
            found.append(Standing(point, 1, values[0], None, done[0].low, done[0].high))
    return sorted(found, key=lambda standing: (standing.mean, standing.point))


def halve(outcomes: Sequence[Outcome]) -> dict[str, str]:
    """Successive halving with doubt: of the worse half of the points, those to stop, each with the numbers that say so. A
    point stops only where even the low end of its samples' interval, averaged over its seeds, is above the high end of
    every point that is kept; diverged points stop."""
    ranked: list[tuple[float, float, float, str]] = []
    stopped = {}
    for point, done in measured(outcomes).items():
        if not done:
            stopped[point] = "every seed of it diverged"
            continue
        lows = [-math.inf if outcome.low is None else outcome.low for outcome in done]
        highs = [math.inf if outcome.high is None else outcome.high for outcome in done]
        ranked.append((fmean(distances(done)), fmean(lows), fmean(highs), point))
    ranked.sort()
    kept = ranked[: math.ceil(len(ranked) / 2)]
    bar, name = max(((high, point) for _, _, high, point in kept), default=(math.inf, ""))
    for mean, low, high, point in ranked[len(kept) :]:
        if low > bar:
            stopped[point] = (
                f"{mean:.4g} ({low:.4g} to {high:.4g}) is in the worse half and wholly above {name}'s {bar:.4g}"
            )
    return stopped


def summary(outcomes: Sequence[Outcome], metric: str, choice: str | None = None) -> dict[str, Any]:
    """Standings, the winner's difference to each other point with its 95 % interval, and both in words. choice: the point
    that the paper chose."""
    ranking = standings(outcomes)
    comparisons = [compared(ranking[0], other, outcomes) for other in ranking[1:]]
    return {
        "metric": metric,
        "standings": [asdict(standing) for standing in ranking],
        "comparisons": comparisons,
        "conclusion": conclude(ranking, comparisons, metric, choice),
    }


def compared(best: Standing, other: Standing, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """How far `other` is above the best: difference, low, high, and whether 0 lies outside. None where there is no interval.

    With two seeds or more each, Welch's interval over the seeds; else that of the samples' noise, as independent."""
    difference = other.mean - best.mean
    low = high = None
    if best.seeds > 1 and other.seeds > 1:
        of_point = measured(outcomes)
        low, high = difference_interval(distances(of_point[other.point]), distances(of_point[best.point]))
    elif None not in (best.low, best.high, other.low, other.high):
        reach = math.hypot(*(float((s.high or 0.0) - (s.low or 0.0)) / 2.0 for s in (best, other)))
        low, high = difference - reach, difference + reach
    apart = None if low is None else low > 0.0
    return {"point": other.point, "difference": difference, "low": low, "high": high, "apart": apart}


def conclude(
    ranking: Sequence[Standing], comparisons: Sequence[Mapping[str, Any]], metric: str, choice: str | None
) -> str:
    """Which point wins, by how much, with what certainty, and whether that agrees with the paper."""
    if not ranking:
        return "no point has a result"
    best = ranking[0]
    of = "1 seed" if best.seeds == 1 else f"{best.seeds} seeds"
    text = f"{best.point} has the lowest {metric}, {best.mean:.4g}{spread(best)} ({of})"
    if not comparisons:
        return f"{text}; there is nothing to compare it with"
    first = comparisons[0]
    text += f"; {first['point']} is {first['difference']:.3g} above"
    if first["low"] is None:
        text += ", and nothing says whether that is more than noise"
    else:
        text += f" (95 % interval {first['low']:.3g} to {first['high']:.3g})"
        level = [each["point"] for each in comparisons if each["apart"] is False]
        text += (
            f"; not to be told apart from it: {', '.join(level)}" if level else "; all others are above it for certain"
        )
        if best.seeds == 1:
            text += ", as far as the samples' noise goes: one seed says nothing of the training's"
    return f"{text}. {agreement(best, comparisons, choice)}" if choice else text


def agreement(best: Standing, comparisons: Sequence[Mapping[str, Any]], choice: str) -> str:
    """What the outcome means for the paper's choice."""
    if best.point == choice:
        sure = all(each["apart"] for each in comparisons)
        return f"The paper chose {choice} too" + ("" if sure else ", which this sweep supports without proving it")
    theirs = next((each for each in comparisons if each["point"] == choice), None)
    if theirs is None:
        return f"The paper chose {choice}, which has no result here"
    if theirs["apart"]:
        return f"The paper chose {choice}, which is {theirs['difference']:.3g} above here: that does not agree"
    return f"The paper chose {choice}, which this sweep does not tell apart from it: that is no disagreement"


def spread(standing: Standing) -> str:
    """+- the standard deviation over seeds, where there is one."""
    return "" if standing.std is None else f" +- {standing.std:.2g}"
