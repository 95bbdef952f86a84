"""The only module that writes to MLflow. Every call can be repeated: what is there already is found, not made again."""

import json
import logging
import os
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

from mlflow import MlflowClient
from mlflow.entities import LoggedModelStatus, Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from ddpm_core.checkpoint import Checkpoint
from ddpm_core.errors import InputError
from ddpm_core.protocol import FINGERPRINT_TAG, KIND_TAG
from pipelines.locations import Location

Kind = Literal["train", "evaluate", "likelihood", "compression", "sweep"]
STARTED_TAG = "ddpm.started"  # seconds, when a run was last begun or gone on with
BATCH = 100  # MLflow's limit for parameters a call; for metrics it is 1,000

for name in ("mlflow", "alembic"):
    logging.getLogger(name).setLevel(logging.WARNING)


def default_uri(storage: Location) -> str:
    """MLFLOW_TRACKING_URI, or an SQLite file in the storage folder. InputError where that is a URL."""
    given = os.environ.get("MLFLOW_TRACKING_URI")
    if given is None and not isinstance(storage, Path):
        raise InputError(
            f"--storage is {str(storage)!r}, where no SQLite database can lie: give --tracking-uri http://host:port, or set "
            "MLFLOW_TRACKING_URI"
        )
    return given or f"sqlite:///{storage}/mlflow.db"


def check_answers(uri: str) -> None:
    """InputError where no server answers at an http URI: at once, not after MLflow's minutes of trying again."""
    try:
        with urllib.request.urlopen(uri.rstrip("/") + "/health", timeout=10):
            return
    except urllib.error.HTTPError:
        return  # it answers; whether it lets us in, MLflow will say
    except (OSError, ValueError) as error:
        raise InputError(
            f"tracking server {uri!r} cannot be reached from here ({error}): start it, or give the address that this machine "
            "knows it by"
        ) from error


def name_of_run(uri: str, run_id: str) -> str | None:
    """The name of the run with this MLflow id, if there is one. Makes nothing."""
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        return None
    try:
        return str(MlflowClient(tracking_uri=uri).get_run(run_id).info.run_name)
    except MlflowException:
        return None


def path_of_model(uri: str, given: str) -> str | None:
    """Where the checkpoint of a LoggedModel lies, if there is one: m-..., models:/NAME@alias or models:/NAME/version.
    Makes nothing."""
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        return None
    client = MlflowClient(tracking_uri=uri)
    try:
        if given.startswith("models:/"):
            name, _, alias = given.removeprefix("models:/").partition("@")
            by_number, asked = client.get_model_version, name.rsplit("/", 1)
            version = client.get_model_version_by_alias(name, alias) if alias else by_number(*asked)
            given = str(version.source).removeprefix("models:/")
        return client.get_logged_model(given).tags.get("ddpm.path")
    except (MlflowException, TypeError):
        return None


def flatten(config: Any, prefix: str = "") -> dict[str, str]:
    """A nested configuration as MLflow parameters: {"unet.ch": "128", ...}."""
    plain = asdict(config) if is_dataclass(config) and not isinstance(config, type) else config
    flat: dict[str, str] = {}
    for key, value in plain.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return flat


@dataclass(frozen=True)
class TrackedRun:
    """An MLflow run that is written to."""

    client: MlflowClient
    experiment_id: str
    run_id: str

    def logged_steps(self, key: str) -> set[int]:
        """The steps at which `key` is there already."""
        return {metric.step for metric in self.client.get_metric_history(self.run_id, key)}

    def log_records(self, records: Iterable[Mapping[str, float]]) -> None:
        """Metrics by step: each record has `step` and any number of values."""
        now = int(time.time() * 1000)
        metrics = [
            Metric(key, float(value), now, int(record["step"]))
            for record in records
            for key, value in record.items()
            if key != "step"
        ]
        for i in range(0, len(metrics), 10 * BATCH):
            self.client.log_batch(self.run_id, metrics=metrics[i : i + 10 * BATCH])

    def log_result(
        self,
        owner: "TrackedRun",
        name: str,
        checkpoint: Checkpoint,
        weights: Literal["ema", "raw"],
        values: Mapping[str, float],
        *,
        dataset: str,
        dataset_sha256: str,
    ) -> bool:
        """Metrics of a checkpoint of the run `name`: on this run at its step, on its model, which the run `owner` has, and
        on the data set. Whether anything was new: not there yet, or of a checkpoint that was made anew."""
        step, sha256 = checkpoint.step, checkpoint.weights_sha256(weights)
        model_id = owner.checkpoint_model(f"{name}-step-{step}", step, checkpoint.path, sha256, weights)
        new = [key for key, value in values.items() if self._last_at(step, key) != value]
        for key, value in values.items():
            if key in new:
                self.client.log_metric(
                    self.run_id,
                    key,
                    value,
                    step=step,
                    model_id=model_id,
                    dataset_name=dataset,
                    dataset_digest=dataset_sha256[:36],
                )
        return bool(new)

    def _last_at(self, step: int, key: str) -> float | None:
        history = [metric for metric in self.client.get_metric_history(self.run_id, key) if metric.step == step]
        return max(history, key=lambda metric: metric.timestamp).value if history else None

    def log_json(self, name: str, value: Any) -> None:
        self.client.log_text(self.run_id, json.dumps(value, indent=1, sort_keys=True), name)

    def read_json(self, name: str) -> Any:
        """What log_json left under a name, None where there is nothing."""
        with tempfile.TemporaryDirectory() as folder:
            try:
                return json.loads(Path(self.client.download_artifacts(self.run_id, name, folder)).read_text())
            except (MlflowException, OSError):
                return None

    def log_bytes(self, name: str, data: bytes) -> None:
        """A file in the run's artifacts under the path `name`."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / Path(name).name
            path.write_bytes(data)
            parent = str(Path(name).parent)
            self.client.log_artifact(self.run_id, str(path), None if parent == "." else parent)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self.client.log_batch(self.run_id, tags=[RunTag(key, value) for key, value in tags.items()])

    def checkpoint_model(
        self, name: str, step: int, path: object, sha256: str, weights: Literal["ema", "raw"] = "ema"
    ) -> str:
        """The id of the LoggedModel that stands for a checkpoint's weights, which stay where they are."""
        name = name if weights == "ema" else f"{name}-raw"
        found = self.client.search_logged_models(
            [self.experiment_id], filter_string=f"name = '{name}' AND source_run_id = '{self.run_id}'"
        )
        if found:
            return str(found[0].model_id)
        model = self.client.create_logged_model(
            self.experiment_id,
            name=name,
            source_run_id=self.run_id,
            model_type="ddpm",
            params={"step": str(step), "weights": weights},
            tags={"ddpm.path": str(path), "ddpm.sha256": sha256, "mlflow.model.isExternal": "true"},
        )
        self.client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
        return str(model.model_id)

    def finish(self, status: Literal["FINISHED", "FAILED", "KILLED"] = "FINISHED") -> None:
        self.client.set_terminated(self.run_id, status)


@dataclass(frozen=True)
class Training:
    """What MLflow knows of a training run. storage: where it was told to keep its checkpoints. started: seconds, when it
    was begun or gone on with."""

    name: str
    run_id: str
    status: str
    steps: int
    storage: str
    started: float


class Tracker:
    """An MLflow experiment that is written to. The first one, in a driver, makes the database and the experiment:
    several processes that make an SQLite database at once break it."""

    def __init__(self, uri: str, experiment: str, storage: Location) -> None:
        if uri.startswith("file:") or "://" not in uri:
            raise InputError(
                f"tracking URI is {uri!r}, a folder: MLflow 3 keeps no runs in folders; give sqlite:////absolute/path.db or "
                "http://host:port"
            )
        if uri.startswith("http"):
            check_answers(uri)
        if uri.startswith("sqlite:///"):
            Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        self.uri = uri
        self.client = MlflowClient(tracking_uri=uri)
        found = self.client.get_experiment_by_name(experiment)
        if found is not None:
            self.experiment_id = found.experiment_id
        else:
            # A server places artifacts itself; for a database on disk they go beside it, whatever the current folder.
            location = None if uri.startswith("http") else (storage / "mlartifacts" / experiment).as_uri()
            kind = {"mlflow.experimentKind": "custom_model_development"}  # the view the UI opens with
            self.experiment_id = self.client.create_experiment(experiment, location, kind)

    def find(self, kind: Kind, name: str) -> TrackedRun | None:
        """The run of this kind and name, if there is one."""
        found = self.client.search_runs(
            [self.experiment_id], f"tags.`{KIND_TAG}` = '{kind}' AND attributes.run_name = '{name}'", max_results=1
        )
        return TrackedRun(self.client, self.experiment_id, found[0].info.run_id) if found else None

    def trainings(self) -> list[Training]:
        """All training runs but the trials of sweeps, the newest first."""
        found: list[Any] = []
        token = None
        while True:
            page = self.client.search_runs([self.experiment_id], f"tags.`{KIND_TAG}` = 'train'", page_token=token)
            found += [run for run in page if "mlflow.parentRunId" not in run.data.tags]
            token = page.token
            if not token:
                break
        return [
            Training(
                run.info.run_name,
                run.info.run_id,
                run.info.status,
                int(run.data.params.get("steps", 0)),
                run.data.params.get("storage", ""),
                float(run.data.tags.get(STARTED_TAG, run.info.start_time / 1000.0)),
            )
            for run in found
        ]

    def run(
        self,
        kind: Kind,
        name: str,
        fingerprint: str,
        *,
        params: Mapping[str, str],
        tags: Mapping[str, str],
        parent: str | None = None,
    ) -> TrackedRun:
        """The run of this kind and name, whose fingerprint the name holds: found and set running again, or made."""
        found = self.find(kind, name)
        if found is not None:
            self.client.update_run(found.run_id, status="RUNNING")
            self.client.set_tag(found.run_id, STARTED_TAG, str(time.time()))
            return found
        identity = {KIND_TAG: kind, FINGERPRINT_TAG: fingerprint, STARTED_TAG: str(time.time())}
        if parent is not None:
            identity["mlflow.parentRunId"] = parent
        run_id = self.client.create_run(self.experiment_id, run_name=name, tags={**identity, **tags}).info.run_id
        entries = [Param(key, value) for key, value in params.items()]
        for i in range(0, len(entries), BATCH):
            self.client.log_batch(run_id, params=entries[i : i + BATCH])
        return TrackedRun(self.client, self.experiment_id, run_id)
