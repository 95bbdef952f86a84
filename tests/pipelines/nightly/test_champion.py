"""What the registry says of an alias: where it points, which version it left, and why."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from support.measured_run import measured_run, record

from pipelines.evaluate.driver import Evaluator
from pipelines.evaluate.evaluation import read_evaluation
from pipelines.evaluate.records import Records
from pipelines.nightly.champion import Candidate, Champion, update_alias
from pipelines.runtime.fan_out import Pool
from pipelines.storage.layout import Storage
from pipelines.tracking.tracker import Tracker


def night(tracker: Tracker, storage: Path, distances: Mapping[int, float]) -> Champion:
    """What a night concludes from these numbers."""
    subject = measured_run(storage, distances)
    record(tracker, subject)
    records = Records(subject, lambda: tracker)
    evaluator = Evaluator(subject, records, Pool(None, 1.0, print))  # it starts when it is first used
    folder = subject.results(subject.protocol("train", "selection"))
    evaluations = [read_evaluation(folder / checkpoint.path.name) for checkpoint in subject.checkpoints]
    candidates = [Candidate(evaluator, evaluation) for evaluation in evaluations]
    champion = update_alias(tracker, "church", Storage(storage), candidates, print)
    assert champion is not None
    return champion


def test_the_version_that_an_alias_left_says_for_which_and_why(tmp_path: Path) -> None:
    tracker = Tracker(f"sqlite:///{tmp_path}/mlflow.db", "church", tmp_path / "mlartifacts" / "church")
    client = tracker.client

    def described(champion: Champion, version: str) -> Any:
        found = client.get_model_version(champion.model, version)
        assert found.description == found.tags["ddpm.alias"]
        return found.description

    first = night(tracker, tmp_path, {10: 9.0})
    why = (
        "step 10 of tiny-measured, since it has the lowest distance of the first that were measured under this protocol"
    )
    assert described(first, "1") == f"best-fid points at this version, {why}"
    second = night(tracker, tmp_path, {10: 9.0, 20: 4.0})
    numbers = "4 (95 % interval 3.5 to 4.5) against 9 (95 % interval 8.5 to 9.5)"
    why = f"step 20 of tiny-measured, since its interval lies below: {numbers}"
    assert described(second, "1") == f"best-fid left this version for version 2, {why}"
    assert described(second, "2") == f"best-fid points at this version, {why}"

    client.update_model_version(second.model, "2", "Ours.")  # a person's words stay
    third = night(tracker, tmp_path, {10: 9.0, 20: 4.0, 30: 2.0})
    assert client.get_model_version(third.model, "2").description == "Ours."
    assert client.get_model_version(third.model, "2").tags["ddpm.alias"].startswith("best-fid left this version")
    assert str(client.get_model_version_by_alias(third.model, "best-fid").version) == "3"
