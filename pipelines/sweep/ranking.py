"""What the numbers of a sweep say: which points stop early, which is best, and how sure that is."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any, Literal

from ddpm_core.verdicts import Measurement, compare_with_best, conclude, known_interval, standings

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


def measurements(outcomes: Sequence[Outcome]) -> list[Measurement]:
    """The distances of the trials that have one; those that diverged have none."""
    return [
        Measurement(outcome.point, outcome.distance, known_interval(outcome.low, outcome.high))
        for outcome in outcomes
        if outcome.distance is not None
    ]


def halve(outcomes: Sequence[Outcome]) -> dict[str, str]:
    """Successive halving with doubt: of the worse half of the points, those to stop, each with the numbers that say so. A
    point stops only where even the low end of its samples' interval, averaged over its seeds, is above the high end of
    every point that is kept; diverged points stop."""
    ranked: list[tuple[float, float, float, str]] = []
    stopped = {}
    measured = measurements(outcomes)
    for point in dict.fromkeys(outcome.point for outcome in outcomes):
        trials = [trial for trial in measured if trial.point == point]
        if not trials:
            stopped[point] = "every seed of it diverged"
            continue
        intervals = [trial.interval or (-math.inf, math.inf) for trial in trials]
        mean = fmean(trial.distance for trial in trials)
        ranked.append((mean, fmean(low for low, _ in intervals), fmean(high for _, high in intervals), point))
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
    measured = measurements(outcomes)
    ranking = standings(measured)
    comparisons = compare_with_best(ranking, measured)
    return {
        "metric": metric,
        "standings": [asdict(standing) for standing in ranking],
        "comparisons": [asdict(comparison) for comparison in comparisons],
        "conclusion": conclude(ranking, comparisons, metric, choice),
    }
