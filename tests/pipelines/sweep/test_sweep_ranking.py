"""Stopping early and summing up, and the points of a space."""

import numpy as np
import pytest
import scipy.stats

from ddpm_core.errors import InputError
from pipelines.sweep.points import command_line, space_values
from pipelines.sweep.ranking import Outcome, halve, summary


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


def test_a_summary_holds_standings_comparisons_and_their_words() -> None:
    outcomes = [outcome("a", 1.0, 0.1), outcome("b", 2.0, 0.1), outcome("c", None)]
    facts = summary(outcomes, "fd", "b")
    assert facts == {
        "metric": "fd",
        "standings": [
            {"point": "a", "seeds": 1, "mean": 1.0, "std": None, "low": 0.9, "high": 1.1},
            {"point": "b", "seeds": 1, "mean": 2.0, "std": None, "low": 1.9, "high": 2.1},
        ],
        "comparisons": [
            {
                "point": "b",
                "difference": 1.0,
                "low": pytest.approx(1.0 - 0.1 * 2**0.5),
                "high": pytest.approx(1.0 + 0.1 * 2**0.5),
                "apart": True,
            }
        ],
        "conclusion": "By fd: a 1 is better than b 2 at 95 % confidence. b is 1 above a (95 % interval 0.859 to 1.14, of the "
        "samples' noise alone: each was trained with one seed). The paper chose b, which is 1 above here: that does not agree",
    }


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
