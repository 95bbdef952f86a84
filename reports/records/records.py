"""MLflow -> the records of an experiment, by the names in ddpm_core/records.py.

Training curves and pictures are not among them: they are read when they are drawn (`Store.history`, `Store.artifact`).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Any, TypeVar

from mlflow.entities import Run

from ddpm_core import records as names
from ddpm_core.errors import InputError
from ddpm_core.protocol import Protocol
from reports.records import artifacts
from reports.records.entities import (
    CheckpointRecord,
    CompressionRecord,
    EvaluationRecord,
    ExperimentRecord,
    LikelihoodRecord,
    RunRecord,
    SweepRecord,
)
from reports.records.store import Series, Store, public_uri

Entity = TypeVar("Entity")


def run_link(record: ExperimentRecord, run_id: str) -> str:
    """A run's page in MLflow's UI, which `make ui` serves for a database on disk."""
    uri = public_uri(record.tracking_uri)
    base = uri.rstrip("/") if is_served(record) else names.LOCAL_UI
    return f"{base}/#/experiments/{record.experiment_id}/runs/{run_id}"


def is_served(record: ExperimentRecord) -> bool:
    """Whether a tracking server holds the records, which has a UI of its own."""
    return record.tracking_uri.startswith(("http://", "https://"))


def read_experiment(store: Store, experiment: str, only: str | None = None) -> ExperimentRecord:
    """The records of one experiment, limited to one training or sweep if `only` is its name or MLflow id. Raises InputError
    for an experiment that does not exist, in which nothing was trained or evaluated, or which has no such run."""
    experiment_id = store.experiment_id(experiment)
    runs = [run for run in store.runs(experiment_id) if run.data.tags.get(names.KIND_TAG) != names.REPORT]
    trainings, measurements = (
        _of_kinds(runs, names.TRAIN),
        _of_kinds(runs, names.EVALUATE, names.LIKELIHOOD, names.COMPRESSION),
    )
    foreign = _by_weights(measurements)
    if not trainings and not foreign:
        raise InputError(
            f"Experiment {experiment!r} in {public_uri(store.tracking_uri)} has no training run "
            f"(of its {len(runs)} runs none has the tag {names.KIND_TAG} = {names.TRAIN}); "
            "train first, or name the experiment that did."
        )
    reader = _Reader(store)
    sweeps = [reader.sweep(run) for run in _of_kinds(runs, names.SWEEP)]
    if only is not None:
        trainings, foreign, sweeps = _limited(only, trainings, foreign, sweeps, experiment)
    children: dict[str, list[Run]] = {run.info.run_id: [] for run in trainings}
    for run in measurements:
        parent = run.data.tags.get(names.PARENT_TAG)
        if parent in children:
            children[parent].append(run)
        elif parent is not None and only is None:
            reader.remark(run, "is of no training run in this experiment and is left out")
    return ExperimentRecord(
        name=experiment,
        experiment_id=experiment_id,
        tracking_uri=store.tracking_uri,
        runs=(
            *(reader.training(run, children[run.info.run_id]) for run in trainings),
            *(reader.foreign(name, measured) for name, measured in foreign.items()),
        ),
        sweeps=tuple(sweeps),
        remarks=tuple(reader.remarks),
        updated=_updated(runs),
        only=only,
    )


def _of_kinds(runs: Sequence[Run], *kinds: names.Kind) -> list[Run]:
    return [run for run in runs if run.data.tags.get(names.KIND_TAG) in kinds]


def _by_weights(measurements: Sequence[Run]) -> dict[str, list[Run]]:
    """The measurements of weights from elsewhere, which no training here made, by the weights' name."""
    foreign: dict[str, list[Run]] = {}
    for run in measurements:
        if names.PARENT_TAG not in run.data.tags:
            foreign.setdefault(run.data.tags.get(names.RUN_TAG, run.info.run_name), []).append(run)
    return foreign


def _limited(
    only: str, trainings: list[Run], foreign: dict[str, list[Run]], sweeps: list[SweepRecord], experiment: str
) -> tuple[list[Run], dict[str, list[Run]], list[SweepRecord]]:
    """What `only` names: weights from elsewhere, a training, or a sweep with the trainings of its trials."""
    if only in foreign:
        return [], {only: foreign[only]}, []
    named = [run for run in trainings if only in (run.info.run_id, run.info.run_name)]
    if named:
        return named, {}, []
    sweeps = [sweep for sweep in sweeps if only in (sweep.run_id, sweep.name)]
    ids = {trial.run_id for sweep in sweeps for trial in sweep.trials if trial.run_id}
    if not ids:
        newest = ", ".join(repr(run.info.run_name) for run in trainings[-5:])
        raise InputError(
            f"Run {only!r} is no training run and no sweep with trials in experiment {experiment!r}, whose newest training "
            f"runs are {newest}; give the name or MLflow id of one, or leave it out."
        )
    return [run for run in trainings if run.info.run_id in ids], {}, sweeps


def _updated(runs: Sequence[Run]) -> datetime | None:
    """When the last of some runs started or ended."""
    times = [time for run in runs for time in (run.info.start_time, run.info.end_time) if time]
    return datetime.fromtimestamp(max(times) / 1000, tz=UTC) if times else None


def latest_values(metrics: Mapping[str, float]) -> dict[str, float]:
    """A training's metrics by the names of its records; of a run that an earlier version began, the later names count."""
    return {names.record_metric(name): metrics[name] for name in sorted(metrics, key=lambda name: "/" in name)}


class _Reader:
    """Reads runs one by one and remembers what it could not use."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.remarks: list[str] = []

    def remark(self, run: Run, text: str) -> None:
        self.remarks.append(f"Run {run.info.run_name} {text}.")

    def training(self, run: Run, children: Sequence[Run]) -> RunRecord:
        record = RunRecord(
            run_id=run.info.run_id,
            name=run.info.run_name,
            status=run.info.status,
            params=dict(run.data.params),
            tags=dict(run.data.tags),
            latest=latest_values(run.data.metrics),
            card=self._parsed(run, names.DATA_CARD, artifacts.data_card),
            sheet=self._parsed(run, names.CONTACT_SHEET_LAYOUT, artifacts.grid_layout),
        )
        return self._with_measurements(record, children)

    def foreign(self, name: str, children: Sequence[Run]) -> RunRecord:
        newest = children[-1].info
        record = RunRecord(
            run_id=newest.run_id, name=name, status=newest.status, params={}, tags={}, latest={}, foreign=True
        )
        return self._with_measurements(record, children)

    def _with_measurements(self, record: RunRecord, children: Sequence[Run]) -> RunRecord:
        def each(kind: names.Kind, read: Callable[[Run], Entity | None]) -> tuple[Entity, ...]:
            entities = (read(child) for child in _of_kinds(children, kind))
            return tuple(entity for entity in entities if entity is not None)

        return replace(
            record,
            evaluations=each(names.EVALUATE, self.evaluation),
            likelihoods=each(names.LIKELIHOOD, self.likelihood),
            compressions=each(names.COMPRESSION, self.compression),
        )

    def evaluation(self, run: Run) -> EvaluationRecord | None:
        protocol = self._protocol(run)
        if protocol is None:
            return None
        distance, score = protocol.distance, protocol.score
        low, high, score_low, score_high = (
            self._history(run, metric + end) for metric in (distance, score) for end in (names.CI_LOW, names.CI_HIGH)
        )
        std = self._history(run, score + names.STD)
        distances, scores = self._history(run, distance), self._history(run, score)
        files = set(self._store.files_beside(run.info.run_id, names.SAMPLES_LAYOUT))
        return EvaluationRecord(
            run_id=run.info.run_id,
            status=run.info.status,
            protocol=protocol,
            started=run.info.start_time or 0,
            checkpoints=tuple(
                CheckpointRecord(
                    step=step,
                    distance=value,
                    low=low.at(step),
                    high=high.at(step),
                    score=scores.at(step),
                    score_std=std.at(step),
                    score_low=score_low.at(step),
                    score_high=score_high.at(step),
                )
                for step, value in zip(distances.steps, distances.values, strict=True)
            ),
            layout=self._parsed(run, names.SAMPLES_LAYOUT, artifacts.grid_layout),
            samples={step: path for step in distances.steps if (path := names.samples_path(step)) in files},
            metrics=frozenset(run.data.metrics),
            alarm=run.data.tags.get(names.ALARM_TAG, "").strip(),
        )

    def likelihood(self, run: Run) -> LikelihoodRecord | None:
        protocol = self._json(run, names.LIKELIHOOD_PROTOCOL)
        if protocol is None:
            self.remark(run, f"has no readable {names.LIKELIHOOD_PROTOCOL} and is left out")
            return None
        files = self._store.files_beside(run.info.run_id, names.LIKELIHOOD_PROTOCOL)
        contents = [self._json(run, path) for path in files if path != names.LIKELIHOOD_PROTOCOL]
        results = [content for content in contents if content is not None]
        fingerprint = run.data.tags.get(names.FINGERPRINT_TAG, "")
        try:
            return artifacts.likelihood(run.info.run_id, fingerprint, protocol, results)
        except artifacts.UNREADABLE:
            self.remark(run, "has likelihood artifacts that this version cannot read and is left out")
            return None

    def compression(self, run: Run) -> CompressionRecord | None:
        fingerprint = run.data.tags.get(names.FINGERPRINT_TAG, "")
        return self._parsed(run, names.COMPRESSION_CURVE, partial(artifacts.compression, fingerprint))

    def sweep(self, run: Run) -> SweepRecord:
        return SweepRecord(
            run_id=run.info.run_id,
            name=run.info.run_name,
            trials=self._parsed(run, names.TRIALS, artifacts.trials) or (),
            schedules=self._parsed(run, names.SCHEDULES, artifacts.schedules) or {},
            conclusion=self._parsed(run, names.SUMMARY, lambda summary: str(summary["conclusion"])) or "",
        )

    def _protocol(self, run: Run) -> Protocol | None:
        """The protocol of an evaluation, None if its numbers cannot be ranked."""
        values = self._json(run, names.PROTOCOL)
        if values is None:
            self.remark(run, f"has no {names.PROTOCOL}, so its numbers cannot be ranked and are left out")
            return None
        try:
            protocol = Protocol(**values)
            fingerprint = protocol.fingerprint
            protocol.describe()
        except (TypeError, ValueError):
            self.remark(run, f"has a {names.PROTOCOL} that this version cannot read; its numbers are left out")
            return None
        if fingerprint != run.data.tags.get(names.FINGERPRINT_TAG, fingerprint):
            self.remark(run, f"has a {names.PROTOCOL} that does not match its fingerprint; its numbers are left out")
            return None
        return protocol

    def _history(self, run: Run, metric: str) -> Series:
        """A metric by step, empty if it was not logged: the store is not asked then."""
        return self._store.history(run.info.run_id, metric) if metric in run.data.metrics else Series()

    def _parsed(self, run: Run, path: str, parse: Callable[[Any], Entity]) -> Entity | None:
        """A JSON artifact as an entity, None if it is missing or, with a remark, if it cannot be read."""
        content = self._json(run, path)
        if content is None:
            return None
        try:
            return parse(content)
        except artifacts.UNREADABLE:
            self.remark(run, f"has a {path} that this version cannot read")
            return None

    def _json(self, run: Run, path: str) -> Any:
        """A JSON artifact, None if it is missing or, with a remark, if it is broken."""
        content = self._store.artifact(run.info.run_id, path)
        if content is None:
            return None
        try:
            return json.loads(content)
        except ValueError:
            self.remark(run, f"has an artifact {path} that is not JSON")
            return None
