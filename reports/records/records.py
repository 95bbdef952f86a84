"""MLflow -> the records of an experiment. Reads the schema that the pipelines write: kinds of runs, the
metrics of each, and their JSON artifacts. Training curves and pictures are read only when drawn
(`Store.history`, `.artifact`)."""

import json
from collections.abc import Callable, Collection, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any, TypeVar

from mlflow.entities import Run

from ddpm_core.errors import InputError
from ddpm_core.protocol import Protocol
from ddpm_core.records import (
    ALARM_TAG,
    CI_HIGH,
    CI_LOW,
    COMPRESSION,
    COMPRESSION_CURVE,
    CONTACT_SHEET_LAYOUT,
    DATA_CARD,
    EVALUATE,
    FINGERPRINT_TAG,
    KIND_TAG,
    LIKELIHOOD,
    LIKELIHOOD_PROTOCOL,
    PARENT_TAG,
    PROTOCOL,
    RUN_TAG,
    SAMPLES_LAYOUT,
    SCHEDULES,
    STD,
    SUMMARY,
    SWEEP,
    TRAIN,
    TRIALS,
    samples_path,
)
from reports.records import artifacts
from reports.records.entities import (
    Checkpoint,
    Compression,
    Evaluation,
    ExperimentRecord,
    Likelihood,
    Sweep,
    TrainingRun,
)
from reports.records.store import Series, Store, public_uri

MEASURING = (EVALUATE, LIKELIHOOD, COMPRESSION)
Entity = TypeVar("Entity")


def load_experiment(tracking_uri: str, experiment: str) -> ExperimentRecord:
    """The records of one experiment. Raises InputError for a store or an experiment that does not exist, and
    for an experiment in which nothing was trained or evaluated."""
    return read_experiment(Store(tracking_uri), experiment)


def read_experiment(store: Store, experiment: str, only: str | None = None) -> ExperimentRecord:
    """As `load_experiment`, from a store that is open. `only` is the name or MLflow id of one training run or sweep, to
    whose runs the records are kept; InputError where there is none of it."""
    experiment_id = store.experiment_id(experiment)
    found = store.runs(experiment_id)
    of_kind: dict[str, list[Run]] = {}
    for run in found:
        of_kind.setdefault(run.data.tags.get(KIND_TAG, ""), []).append(run)
    training, measuring = of_kind.get(TRAIN, []), [run for kind in MEASURING for run in of_kind.get(kind, [])]
    foreign: dict[str, list[Run]] = {}  # weights from elsewhere: measured, and trained by nobody here
    for run in measuring:
        if PARENT_TAG not in run.data.tags:
            foreign.setdefault(run.data.tags.get(RUN_TAG, run.info.run_name), []).append(run)
    if not training and not foreign:
        raise InputError(
            f"Experiment {experiment!r} in {public_uri(store.tracking_uri)} has no training run "
            f"(of its {len(found)} runs none has the tag {KIND_TAG} = {TRAIN}); "
            "train first, or name the experiment that did."
        )
    reader = _Reader(store)
    sweeps = [reader.sweep(run) for run in of_kind.get(SWEEP, [])]
    if only is not None:
        foreign = {name: runs for name, runs in foreign.items() if name == only}
        kept, sweeps = (set(), []) if foreign else _chosen(only, training, sweeps, experiment)
        training = [run for run in training if run.info.run_id in kept]
    children: dict[str, list[Run]] = {run.info.run_id: [] for run in training}
    for run in measuring:
        parent = run.data.tags.get(PARENT_TAG)
        if parent in children:
            children[parent].append(run)
        elif parent is not None and only is None:
            reader.remark(run, "is of no training run in this experiment and is left out")
    runs = [reader.training(run, children[run.info.run_id]) for run in training]
    runs += [reader.foreign(name, found_of) for name, found_of in foreign.items()]
    times = [time for run in found for time in (run.info.start_time, run.info.end_time) if time]
    return ExperimentRecord(
        name=experiment,
        experiment_id=experiment_id,
        tracking_uri=store.tracking_uri,
        runs=tuple(runs),
        sweeps=tuple(sweeps),
        remarks=tuple(reader.remarks),
        updated=datetime.fromtimestamp(max(times) / 1000, tz=UTC) if times else None,
        only=only,
    )


def _chosen(only: str, training: list[Run], sweeps: list[Sweep], experiment: str) -> tuple[set[str], list[Sweep]]:
    """The ids of the training runs that `only` names, itself or as a sweep of them, and the sweeps to show."""
    kept = {run.info.run_id for run in training if only in (run.info.run_id, run.info.run_name)}
    if kept:
        return kept, []
    named = [sweep for sweep in sweeps if only in (sweep.run_id, sweep.name)]
    kept = {trial.run_id for sweep in named for trial in sweep.trials if trial.run_id}
    if not kept:
        there = ", ".join(repr(run.info.run_name) for run in training[-5:])
        raise InputError(
            f"Run {only!r} is no training run and no sweep with trials in experiment {experiment!r}, whose newest training "
            f"runs are {there}; give the name or MLflow id of one, or leave it out."
        )
    return kept, named


class _Reader:
    """Reads runs one by one and remembers what it could not use."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.remarks: list[str] = []

    def training(self, run: Run, children: Sequence[Run]) -> TrainingRun:
        return TrainingRun(
            run_id=run.info.run_id,
            name=run.info.run_name,
            status=run.info.status,
            params=dict(run.data.params),
            tags=dict(run.data.tags),
            latest=dict(run.data.metrics),
            card=self._parsed(run, DATA_CARD, artifacts.data_card),
            sheet=self._parsed(run, CONTACT_SHEET_LAYOUT, artifacts.grid_layout),
            evaluations=self._evaluations(children),
            likelihoods=self._likelihoods(children),
            compressions=self._compressions(children),
        )

    def foreign(self, name: str, children: Sequence[Run]) -> TrainingRun:
        return TrainingRun(
            run_id=children[-1].info.run_id,
            name=name,
            status=children[-1].info.status,
            params={},
            tags={},
            latest={},
            evaluations=self._evaluations(children),
            likelihoods=self._likelihoods(children),
            compressions=self._compressions(children),
            foreign=True,
        )

    def _evaluations(self, children: Sequence[Run]) -> tuple[Evaluation, ...]:
        found = (self.evaluation(child) for child in children if child.data.tags[KIND_TAG] == EVALUATE)
        return tuple(evaluation for evaluation in found if evaluation is not None)

    def _likelihoods(self, children: Sequence[Run]) -> tuple[Likelihood, ...]:
        found = (self.likelihood(child) for child in children if child.data.tags[KIND_TAG] == LIKELIHOOD)
        return tuple(measured for measured in found if measured is not None)

    def evaluation(self, run: Run) -> Evaluation | None:
        protocol = self._protocol(run)
        if protocol is None:
            return None
        history = self._histories(run, protocol)
        distance = history[protocol.distance]
        checkpoints = tuple(
            Checkpoint(
                step=step,
                distance=value,
                low=history[protocol.distance + CI_LOW].at(step),
                high=history[protocol.distance + CI_HIGH].at(step),
                score=history[protocol.score].at(step),
                score_std=history[protocol.score + STD].at(step),
            )
            for step, value in zip(distance.steps, distance.values, strict=True)
        )
        paths = self._store.artifact_paths(run.info.run_id, "samples")
        return Evaluation(
            run_id=run.info.run_id,
            status=run.info.status,
            protocol=protocol,
            checkpoints=checkpoints,
            layout=self._parsed(run, SAMPLES_LAYOUT, artifacts.grid_layout),
            samples={step: path for step in distance.steps if (path := samples_path(step)) in paths},
            metrics=frozenset(run.data.metrics),
            alarm=run.data.tags.get(ALARM_TAG, "").strip(),
        )

    def _compressions(self, children: Sequence[Run]) -> tuple[Compression, ...]:
        found = [
            self._parsed(child, COMPRESSION_CURVE, partial(artifacts.compression, child.data.tags[FINGERPRINT_TAG]))
            for child in children
            if child.data.tags[KIND_TAG] == COMPRESSION
        ]
        return tuple(each for each in found if each is not None)

    def likelihood(self, run: Run) -> Likelihood | None:
        protocol = self._json(run, LIKELIHOOD_PROTOCOL)
        if protocol is None:
            self.remark(run, f"has no readable {LIKELIHOOD_PROTOCOL} and is left out")
            return None
        paths = self._store.artifact_paths(run.info.run_id, "likelihood")
        found = (self._json(run, path) for path in paths if path != LIKELIHOOD_PROTOCOL)
        results = [result for result in found if result is not None]
        mark = run.data.tags.get(FINGERPRINT_TAG, "")
        try:
            return artifacts.likelihood(run.info.run_id, mark, protocol, results)
        except artifacts.UNREADABLE:
            self.remark(run, "has likelihood artifacts that this version cannot read and is left out")
            return None

    def sweep(self, run: Run) -> Sweep:
        def each(rows: Collection[Any]) -> tuple[Any, ...]:
            return tuple(artifacts.trial(row) for row in rows)

        trials = self._parsed(run, TRIALS, each)
        schedules = self._parsed(
            run, SCHEDULES, lambda curves: {str(k): artifacts.schedule(curve) for k, curve in curves.items()}
        )
        return Sweep(
            run_id=run.info.run_id,
            name=run.info.run_name,
            status=run.info.status,
            conclusion=self._parsed(run, SUMMARY, lambda facts: str(facts["conclusion"])) or "",
            trials=trials or (),
            schedules=schedules or {},
        )

    def _protocol(self, run: Run) -> Protocol | None:
        values = self._json(run, PROTOCOL)
        if values is None:
            self.remark(run, f"has no {PROTOCOL}, so its numbers cannot be ranked and are left out")
            return None
        try:
            protocol = Protocol(**values)
            mark = protocol.fingerprint
            protocol.describe()
        except (TypeError, ValueError):
            self.remark(run, f"has a {PROTOCOL} that this version cannot read; its numbers are left out")
            return None
        if mark != run.data.tags.get(FINGERPRINT_TAG, mark):
            self.remark(run, f"has a {PROTOCOL} that does not match its fingerprint; its numbers are left out")
            return None
        return protocol

    def _histories(self, run: Run, protocol: Protocol) -> dict[str, Series]:
        distance, score = protocol.distance, protocol.score
        names = (distance, distance + CI_LOW, distance + CI_HIGH, score, score + STD)
        logged = run.data.metrics
        return {name: self._store.history(run.info.run_id, name) if name in logged else Series() for name in names}

    def _parsed(self, run: Run, path: str, parse: Callable[[Any], Entity]) -> Entity | None:
        """A JSON artifact as an entity, None if it is missing or cannot be read (which is remarked on)."""
        content = self._json(run, path)
        if content is None:
            return None
        try:
            return parse(content)
        except artifacts.UNREADABLE:
            self.remark(run, f"has a {path} that this version cannot read")
            return None

    def _json(self, run: Run, path: str) -> Any:
        """A JSON artifact, None if it is missing or broken (which is remarked on)."""
        content = self._store.artifact(run.info.run_id, path)
        if content is None:
            return None
        try:
            return json.loads(content)
        except ValueError:
            self.remark(run, f"has an artifact {path} that is not JSON")
            return None

    def remark(self, run: Run, what: str) -> None:
        self.remarks.append(f"Run {run.info.run_name} {what}.")
