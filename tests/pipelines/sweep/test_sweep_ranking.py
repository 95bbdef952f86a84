"""Stopping early, ranking and concluding: only what the numbers bear."""

import numpy as np
import pytest
import scipy.stats

from ddpm_core.errors import InputError
from pipelines.sweep.points import command_line, space_values
from pipelines.sweep.ranking import Outcome, conclude, halve, standings, summary


def outcome(point: str, distance: float | None, reach: float | None = None, seed: int = 0) -> Outcome:
    bounds = (None, None) if distance is None or reach is None else (distance - reach, distance + reach)
    return Outcome(point, seed, "finished", 100, "", None, "fd", distance, *bounds)


def test_only_what_is_worse_beyond_doubt_stops() -> None:
    stopped = halve([outcome("a", 1.0, 0.2), outcome("b", 1.5, 0.2), outcome("c", 1.6, 0.2), outcome("d", 3.0, 0.2)])
    assert list(stopped) == ["d"]  # c is in the worse half too, but its interval meets b's
    assert stopped["d"] == "3 (2.8 to 3.2) is in the worse half and wholly above b's 1.7"


def test_a_point_without_an_interval_never_stops_and_stops_nobody() -> None:
    assert halve([outcome("a", 1.0, 0.1), outcome("b", 9.0)]) == {}
    assert halve([outcome("a", 1.0), outcome("b", 9.0, 0.1)]) == {}


def test_a_point_stops_by_the_mean_of_its_seeds_and_where_all_diverged() -> None:
    seeds = [outcome("a", 1.0, 0.1), outcome("a", 1.2, 0.1, 1), outcome("b", 1.0, 0.1), outcome("b", 5.0, 0.1, 1)]
    assert list(halve([*seeds, outcome("c", None)])) == ["c", "b"]


def test_one_point_alone_goes_on() -> None:
    assert halve([outcome("a", 1.0, 0.1)]) == {}


def test_the_difference_of_points_with_seeds_is_welchs() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(1.0, 0.1, 4), rng.normal(1.2, 0.3, 3)
    found = summary(
        [
            outcome(name, float(value), 0.01, i)
            for name, values in (("a", a), ("b", b))
            for i, value in enumerate(values)
        ],
        "fd",
    )
    first, second = sorted((a, b), key=np.mean)
    wanted = scipy.stats.ttest_ind(second, first, equal_var=False).confidence_interval(0.95)
    (comparison,) = found["comparisons"]
    assert (comparison["low"], comparison["high"]) == pytest.approx((wanted.low, wanted.high), rel=1e-8)
    assert comparison["apart"] == (wanted.low > 0)
    assert found["standings"][0]["std"] == pytest.approx(first.std(ddof=1), rel=1e-12)


def test_the_mean_is_ranked_never_the_best_of_the_seeds() -> None:
    lucky = [outcome("lucky", 0.1, 0.1), outcome("lucky", 5.0, 0.1, 1)]
    assert [s.point for s in standings([*lucky, outcome("even", 2.0, 0.1), outcome("even", 2.1, 0.1, 1)])] == [
        "even",
        "lucky",
    ]


def test_words_say_no_more_than_the_numbers() -> None:
    alone = summary([outcome("a", 1.0, 0.1)], "fd")
    assert alone["conclusion"] == "a has the lowest fd, 1 (1 seed); there is nothing to compare it with"
    level = summary([outcome("a", 1.0, 0.3), outcome("b", 1.2, 0.3)], "fd", "a")
    assert "b is 0.2 above (95 % interval -0.224 to 0.624); not to be told apart from it: b" in level["conclusion"]
    assert "one seed says nothing of the training's" in level["conclusion"]
    assert level["conclusion"].endswith("The paper chose a too, which this sweep supports without proving it")
    apart = summary([outcome("a", 1.0, 0.1), outcome("b", 2.0, 0.1)], "fd", "b")
    assert apart["conclusion"].endswith("The paper chose b, which is 1 above here: that does not agree")
    near = summary([outcome("a", 1.0, 0.3), outcome("b", 1.2, 0.3)], "fd", "b")
    assert near["conclusion"].endswith("does not tell apart from it: that is no disagreement")
    assert summary([outcome("a", 1.0), outcome("b", 2.0)], "fd", "c")["conclusion"].endswith("no result here")
    assert "all others are above it for certain" in apart["conclusion"]
    assert "nothing says" in summary([outcome("a", 1.0), outcome("b", 2.0)], "fd")["conclusion"]
    assert conclude([], [], "fd", None) == "no point has a result"


def test_a_space_is_every_combination_and_addressed_draws() -> None:
    values = space_values(["a.b=1,2", "c=x,y"], [], 8, 0)
    assert values == [{"a.b": a, "c": c} for a in "12" for c in "xy"]
    drawn = space_values(["c=x,y"], ["lr=loguniform:1e-5:1e-3", "n=integers:2:4"], 500, 0)
    assert len(drawn) == 1000
    assert drawn[:500] == [
        {**each, "c": "x"} for each in space_values([], ["lr=loguniform:1e-5:1e-3", "n=integers:2:4"], 500, 0)
    ]
    logs = np.log([float(each["lr"]) for each in drawn[:500]])
    assert scipy.stats.kstest(logs, scipy.stats.uniform(np.log(1e-5), np.log(100)).cdf).pvalue > 1e-3
    assert {each["n"] for each in drawn} == {"2", "3", "4"}
    assert space_values([], ["lr=uniform:0:1"], 2, 0) != space_values([], ["lr=uniform:0:1"], 2, 1)


def test_a_truth_value_is_typed_as_a_flag() -> None:
    words = command_line({"optim.adam_eps_hat": "true", "horizontal-flip": "False", "unet.ch": "64"})
    assert words == ["--optim.adam-eps-hat", "--no-horizontal-flip", "--unet.ch", "64"]


@pytest.mark.parametrize(
    ("grid", "draw", "message"),
    [
        ([], [], "are empty"),
        (["lr"], [], "'lr' names no option"),
        (["lr=1"], ["lr=uniform:0:1"], "in --grid and in --draw"),
        (["seed=1,2"], [], "give --seeds"),
        ([], ["lr=normal:0:1"], "is no distribution"),
        ([], ["lr=loguniform:0:1"], "is no distribution"),
        ([], ["lr=uniform:2:1"], "is no distribution"),
    ],
)
def test_a_space_that_cannot_be_is_refused(grid: list[str], draw: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        space_values(grid, draw, 3, 0)
