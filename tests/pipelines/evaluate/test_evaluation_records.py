"""What evaluations leave in MLflow, by which a person chooses a checkpoint there."""

from pathlib import Path
from typing import Any

import pytest
from support.measured_run import measured_run, record

from pipelines.tracking.run import TrackedRun
from pipelines.tracking.tracker import Tracker
from pipelines.tracking.ui import log_report


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


def note_on(tracker: Tracker, run: TrackedRun) -> str:
    return str(shown(tracker, run.run_id).tags["mlflow.note.content"])


def test_a_trainings_note_has_the_answer_its_samples_and_links(database: str, tmp_path: Path) -> None:
    tracker = tracker_of(database, tmp_path)
    training = record(tracker, measured_run(tmp_path, {10: 9.0, 20: 4.0, 1000: 4.2}))
    answer, close, ranking, samples, protocol = note_on(tracker, training).split("\n\n")
    assert answer == "**Step 20 is the best of 3: fid 4 (95 % interval 3.5 to 4.5), is 9, kid 0.01.**"
    assert close == "Not to be told apart from it by their intervals: step 1,000."
    assert samples.startswith("![The first samples of step 20](get-artifact?path=samples%2Fstep-00000020.png&run_uuid=")
    fingerprint = shown(tracker, training.run_id).tags["ddpm.protocol"]
    assert protocol.startswith(f"Protocol {fingerprint}: 1,000 samples, ancestral")
    assert ranking.startswith(f"[All checkpoints by fid](#/experiments/{tracker.experiment_id}/runs?")
    (best,) = tracker.search("tags.`ddpm.standing` = 'best'")
    assert best.data.tags["mlflow.note.content"] == samples


def test_a_note_that_a_person_has_changed_stays(database: str, tmp_path: Path) -> None:
    tracker = tracker_of(database, tmp_path)
    training = record(tracker, measured_run(tmp_path, {10: 9.0}))
    tracker.client.set_tag(training.run_id, "mlflow.note.content", "Ours.")
    record(tracker, measured_run(tmp_path, {10: 9.0, 20: 4.0}))
    assert note_on(tracker, training) == "Ours."


def test_the_report_is_an_artifact_that_notes_link_to(database: str, tmp_path: Path) -> None:
    tracker = tracker_of(database, tmp_path)
    training = record(tracker, measured_run(tmp_path, {10: 9.0}))
    page = tmp_path / "page.html"
    for content in ("first", "second"):
        page.write_text(content)
        log_report(tracker, page)
    (run,) = tracker.search("tags.`ddpm.kind` = 'report'")
    place = f"#/experiments/{tracker.experiment_id}/runs/{run.info.run_id}/artifacts/report.html"
    link = f"[Report]({place}?workflowType=machine_learning)"
    assert note_on(tracker, training).count(link) == 1
    assert Path(tracker.client.download_artifacts(run.info.run_id, "report.html")).read_text() == "second"
    record(tracker, measured_run(tmp_path, {10: 9.0, 20: 4.0}))
    assert note_on(tracker, training).startswith("**Step 20 is the best of 2")
    assert note_on(tracker, training).count(link) == 1
