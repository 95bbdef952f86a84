"""How checkpoints stand to the best of them, by the metrics of their runs."""

import math
import time
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from ddpm_core.records import CHECKPOINT, PROTOCOL_TAG, SHARED_VIEW
from pipelines.tracking.queries import rankings
from pipelines.tracking.tracker import Tracker
from pipelines.tracking.ui import share_ranking, standings_of


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


def test_every_ranking_is_listed_with_what_tells_it_from_the_others(tmp_path: Path) -> None:
    tracker = Tracker(f"sqlite:///{tmp_path}/mlflow.db", "church", tmp_path / "artifacts")
    for protocol, samples, length in (("aaaaaaaaaaaa", "500", "0.1"), ("bbbbbbbbbbbb", "50000", "None")):
        params = {"num_samples": samples, "sampler": "ddim", "sampler_steps": "50", "weights": "ema", "seed": "0"}
        params |= {"eta": "0.0", "ema_length": length}
        tags = {PROTOCOL_TAG: protocol}
        tracker.run(CHECKPOINT, f"step 1 ({protocol})", protocol, params={**params, "purpose": "selection"}, tags=tags)
        share_ranking(tracker, protocol, "fid", ["is"])
        time.sleep(0.01)  # MLflow counts in ms
    tracker.client.set_experiment_tag(tracker.experiment_id, f"{SHARED_VIEW}mine", "{}")  # a person's
    views = rankings(tracker.uri)
    assert views is not None
    assert [(view.experiment, view.metric, view.protocol) for view in views] == [
        ("church", "fid", "50000 samples, ddim with 50 steps, ema weights, seed 0 for selection"),
        ("church", "fid", "500 samples, ddim with 50 steps, ema weights of length 0.1, seed 0 for selection"),
    ]
    assert views[0].link.endswith("bbbbbbbbbbbb")
    assert rankings(f"sqlite:///{tmp_path}/none.db") is None
