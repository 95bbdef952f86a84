"""What a night holds of a training's results, while they change."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from support.measured_run import measured_run

from ddpm_core.checkpoint import checkpoint_name
from ddpm_core.commit import MANIFEST
from pipelines.evaluate.evaluation import read_facts
from pipelines.nightly.trainings import NightlyTraining
from pipelines.storage.layout import Storage
from pipelines.storage.locations import commit_json


def test_numbers_of_the_weights_before_are_not_those_of_today(tmp_path: Path) -> None:
    """A run was trained anew before the night, which measures its checkpoints one after the other."""
    subject: Any = measured_run(tmp_path, {1: 1.0, 2: 1.0})
    results = subject.results(subject.protocol("train", "selection"))
    facts: dict[int, Any] = {step: read_facts(results / checkpoint_name(step)) for step in (1, 2)}
    for step, of_step in facts.items():
        commit_json(results / checkpoint_name(step) / MANIFEST, {**of_step, "weights_sha256": "0" * 64})
    evaluator: Any = SimpleNamespace(subject=subject, records=SimpleNamespace(logged_steps=lambda: {1, 2}))
    record: Any = SimpleNamespace(name=subject.run.name)
    none: Any = None
    training = NightlyTraining(
        record=record,
        config=none,
        storage=Storage(tmp_path),
        tracker=none,
        pool=none,
        evaluator=evaluator,
    )
    assert [step for step, _ in training.unmeasured()] == [1, 2]
    assert training.current_evaluations() == []
    measured = {}
    for step, distance in ((2, 9.0), (1, 8.0)):
        values = {**facts[step]["values"], "fid": distance}
        commit_json(results / checkpoint_name(step) / MANIFEST, {**facts[step], "values": values})
        measured[step] = distance
        assert {each.step: each.distance for each in training.current_evaluations()} == measured
    assert training.unmeasured() == []
