"""How checkpoints stand to the best of them, by the metrics of their runs."""

import math

from hypothesis import given
from hypothesis import strategies as st

from pipelines.tracking.ui import standings_of


def run(distance: float, width: float | None = None, step: int = 1) -> dict[str, float]:
    ends = {} if width is None else {"fid_ci_low": distance - width, "fid_ci_high": distance + width}
    return {"fid": distance, "step": float(step), **ends}


def test_the_lowest_is_best_and_overlapping_intervals_are_not_told_apart() -> None:
    metrics = {"a": run(5.0, 1.0), "b": run(6.5, 1.0), "c": run(7.5, 1.0), "d": run(5.5)}
    assert standings_of(metrics, "fid") == {
        "a": "best", "b": "not distinguishable", "c": "higher", "d": "no interval, cannot be told"
    }  # fmt: skip


def test_of_two_equal_ones_the_earlier_step_is_best() -> None:
    assert standings_of({"a": run(5.0, 1.0, step=20), "b": run(5.0, 1.0, step=10)}, "fid")["b"] == "best"


def test_what_has_no_finite_distance_has_no_standing() -> None:
    assert standings_of({"a": run(math.inf), "b": run(math.nan), "c": {"step": 3.0}}, "fid") == {}
    assert standings_of({"a": run(math.inf), "b": run(3.0)}, "fid") == {"b": "best"}


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 10)), min_size=1, max_size=20))
def test_there_is_one_best_and_nothing_lies_below_it(pairs: list[tuple[float, float]]) -> None:
    metrics = {str(i): run(distance, width, i) for i, (distance, width) in enumerate(pairs)}
    standings = standings_of(metrics, "fid")
    (best,) = [key for key, standing in standings.items() if standing == "best"]
    assert metrics[best]["fid"] == min(distance for distance, _ in pairs)
    for key, standing in standings.items():
        if standing == "higher":
            assert metrics[key]["fid_ci_low"] > metrics[best]["fid_ci_high"]
