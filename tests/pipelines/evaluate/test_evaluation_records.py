"""What evaluations leave in MLflow, by which a person chooses a checkpoint there."""

from pathlib import Path
from typing import Any

import pytest
from support.measured_run import measured_run, record

from pipelines.tracking.tracker import Tracker


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of MLflow, made once: that takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('tracking')}/mlflow.db"


def tracker_of(database: str, folder: Path) -> Tracker:
    """An experiment of the test's own."""
    return Tracker(database, folder.name, folder)


def shown(tracker: Tracker, run_id: str) -> Any:
    return tracker.client.get_run(run_id).data


def test_a_trainings_run_has_its_best_its_newest_and_the_curve(database: str, tmp_path: Path) -> None:
    tracker = tracker_of(database, tmp_path)
    training = record(tracker, measured_run(tmp_path, {10: 9.0, 20: 4.0, 30: 5.0}))
    data = shown(tracker, training.run_id)
    assert {"best_fid": 4.0, "best_step": 20.0, "newest_fid": 5.0}.items() <= data.metrics.items()
    fingerprint = data.tags["ddpm.protocol"]
    history = tracker.client.get_metric_history(training.run_id, f"eval/fid_{fingerprint[:6]}")
    assert {point.step: point.value for point in history} == {10: 9.0, 20: 4.0, 30: 5.0}


def test_the_best_is_that_of_the_protocol_with_the_most_samples(database: str, tmp_path: Path) -> None:
    tracker = tracker_of(database, tmp_path)
    training = record(tracker, measured_run(tmp_path, {10: 9.0, 20: 4.0}))
    first = shown(tracker, training.run_id).tags["ddpm.protocol"]
    record(tracker, measured_run(tmp_path, {10: 1.0}, samples=500))
    assert shown(tracker, training.run_id).metrics["best_fid"] == 4.0
    record(tracker, measured_run(tmp_path, {10: 7.0}, samples=2000))
    data = shown(tracker, training.run_id)
    assert (data.metrics["best_fid"], data.metrics["best_step"], data.metrics["newest_fid"]) == (7.0, 10.0, 7.0)
    assert data.tags["ddpm.protocol"] != first
