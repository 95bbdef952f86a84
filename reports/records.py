"""MLflow -> the records of an experiment. Reads the schema that the pipelines write: kinds of runs, the
metrics of each, and their JSON artifacts. Training curves and pictures are read only when drawn
(`Store.history`, `.artifact`)."""

import json
import re
from dataclasses import fields
from datetime import UTC, datetime
from typing import Any

from mlflow.entities import Run

from ddpm_core.errors import InputError
from ddpm_core.protocol import FINGERPRINT_TAG, KIND_TAG, Protocol
from reports.entities import (
    Checkpoint,
    DataCard,
    Evaluation,
    ExperimentRecord,
    GridLayout,
    Schedule,
    Sweep,
    TrainingRun,
    Trial,
)
from reports.store import Series, Store, public_uri

_SAMPLE_NAME = re.compile(r"samples/step-(\d+)\.png")


def load_experiment(tracking_uri: str, experiment: str) -> ExperimentRecord:
    """The records of one experiment. Raises InputError for a store or an experiment that does not exist, and
    for an experiment without a training run."""
    return read_experiment(Store(tracking_uri), experiment)


def read_experiment(store: Store, experiment: str) -> ExperimentRecord:
    """As `load_experiment`, from a store that is open."""
    experiment_id = store.experiment_id(experiment)
    found = store.runs(experiment_id)
    of_kind: dict[str, list[Run]] = {}
    for run in found:
        of_kind.setdefault(run.data.tags.get(KIND_TAG, ""), []).append(run)
    training = of_kind.get("train", [])
    if not training:
        raise InputError(
            f"Experiment {experiment!r} in {public_uri(store.tracking_uri)} has no training run "
            f"(of its {len(found)} runs none has the tag {KIND_TAG} = train); "
            "train first, or name the experiment that did."
        )
    reader = _Reader(store)
    evaluations: dict[str, list[Evaluation]] = {run.info.run_id: [] for run in training}
    for run in of_kind.get("evaluate", []):
        evaluation = reader.evaluation(run)
        parent = run.data.tags.get("mlflow.parentRunId", "")
        if parent not in evaluations:
            reader.remarks.append(
                f"Evaluation {run.info.run_name} is of no training run in this experiment and is left out."
            )
        elif evaluation is not None:
            evaluations[parent].append(evaluation)
    times = [time for run in found for time in (run.info.start_time, run.info.end_time) if time]
    return ExperimentRecord(
        name=experiment,
        experiment_id=experiment_id,
        tracking_uri=store.tracking_uri,
        runs=tuple(reader.training(run, tuple(evaluations[run.info.run_id])) for run in training),
        sweeps=tuple(reader.sweep(run) for run in of_kind.get("sweep", [])),
        remarks=tuple(reader.remarks),
        updated=datetime.fromtimestamp(max(times) / 1000, tz=UTC) if times else None,
    )


class _Reader:
    """Reads runs one by one and remembers what it could not use."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.remarks: list[str] = []

    def training(self, run: Run, evaluations: tuple[Evaluation, ...]) -> TrainingRun:
        return TrainingRun(
            run_id=run.info.run_id,
            name=run.info.run_name,
            status=run.info.status,
            params=dict(run.data.params),
            tags={key: value for key, value in run.data.tags.items() if key.startswith("ddpm.")},
            latest=dict(run.data.metrics),
            card=self._card(run),
            sheet=self._layout(run, "data/contact_sheet.json"),
            evaluations=evaluations,
        )

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
                low=history[f"{protocol.distance}_ci_low"].at(step),
                high=history[f"{protocol.distance}_ci_high"].at(step),
                score=history[protocol.score].at(step),
                score_std=history[f"{protocol.score}_std"].at(step),
            )
            for step, value in zip(distance.steps, distance.values, strict=True)
        )
        paths = self._store.artifact_paths(run.info.run_id, "samples")
        return Evaluation(
            run_id=run.info.run_id,
            status=run.info.status,
            protocol=protocol,
            checkpoints=checkpoints,
            layout=self._layout(run, "samples/grid.json"),
            samples={int(match[1]): path for path in paths if (match := _SAMPLE_NAME.fullmatch(path))},
        )

    def sweep(self, run: Run) -> Sweep:
        trials = self._json(run, "trials.json")
        schedules = self._json(run, "schedules.json")
        try:
            return Sweep(
                run_id=run.info.run_id,
                name=run.info.run_name,
                status=run.info.status,
                trials=tuple(_trial(trial) for trial in trials or ()),
                schedules={str(label): _schedule(curve) for label, curve in (schedules or {}).items()},
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            self._remark(run, f"has a trials.json or schedules.json that this version cannot read ({error!r})")
            return Sweep(run_id=run.info.run_id, name=run.info.run_name, status=run.info.status)

    def _protocol(self, run: Run) -> Protocol | None:
        values = self._json(run, "protocol.json")
        if values is None:
            self._remark(run, "has no protocol.json, so its numbers cannot be ranked and are left out")
            return None
        try:
            protocol = Protocol(**values)
            mark = protocol.fingerprint
            protocol.describe()
        except (TypeError, ValueError):
            self._remark(run, "has a protocol.json that this version cannot read; its numbers are left out")
            return None
        if mark != run.data.tags.get(FINGERPRINT_TAG, mark):
            self._remark(run, "has a protocol.json that does not match its fingerprint; its numbers are left out")
            return None
        return protocol

    def _histories(self, run: Run, protocol: Protocol) -> dict[str, Series]:
        distance, score = protocol.distance, protocol.score
        names = (distance, f"{distance}_ci_low", f"{distance}_ci_high", score, f"{score}_std")
        logged = run.data.metrics
        return {name: self._store.history(run.info.run_id, name) if name in logged else Series() for name in names}

    def _card(self, run: Run) -> DataCard | None:
        card = self._json(run, "data/card.json")
        if card is None:
            return None
        try:
            known: dict[str, Any] = {"name": "unnamed"}
            known |= {field.name: card[field.name] for field in fields(DataCard) if card.get(field.name) is not None}
            known |= {name: tuple(known[name]) for name in ("shape", "mean", "std") if name in known}
        except (AttributeError, TypeError):
            self._remark(run, "has a data/card.json that this version cannot read")
            return None
        return DataCard(**known)

    def _layout(self, run: Run, path: str) -> GridLayout | None:
        layout = self._json(run, path)
        if layout is None:
            return None
        try:
            return GridLayout(
                tile=(int(layout["tile"][0]), int(layout["tile"][1])),
                columns=int(layout["columns"]),
                count=int(layout["count"]),
                indices=str(layout.get("indices", "")),
                seed=int(layout.get("seed", 0)),
            )
        except (AttributeError, KeyError, TypeError, ValueError, IndexError):
            self._remark(run, f"has a {path} that this version cannot read")
            return None

    def _json(self, run: Run, path: str) -> Any:
        """A JSON artifact, None if it is missing or broken (which is remarked on)."""
        content = self._store.artifact(run.info.run_id, path)
        if content is None:
            return None
        try:
            return json.loads(content)
        except ValueError:
            self._remark(run, f"has an artifact {path} that is not JSON")
            return None

    def _remark(self, run: Run, what: str) -> None:
        self.remarks.append(f"Run {run.info.run_name} {what}.")


def _trial(trial: dict[str, Any]) -> Trial:
    return Trial(
        label=str(trial["label"]),
        values=dict(trial.get("values") or {}),
        run_id=trial.get("run_id"),
        evaluation_run_id=trial.get("evaluation_run_id"),
        steps=trial.get("steps"),
        status=str(trial["status"]),
        prior_bpd=trial.get("prior_bpd"),
    )


def _schedule(curve: dict[str, Any]) -> Schedule:
    def numbers(name: str) -> tuple[float, ...]:
        # JSON has no infinity: a log-SNR at alpha-bar 0 or 1 may be null.
        return tuple(float("nan") if value is None else float(value) for value in curve[name])

    return Schedule(t=numbers("t"), alphas_cumprod=numbers("alphas_cumprod"), log_snr=numbers("log_snr"))
