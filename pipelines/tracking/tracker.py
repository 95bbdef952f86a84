"""The only module that writes to MLflow. Every call can be repeated: what is there already is found, not made again. So it
is, for some minutes, where a server or a database does not answer."""

import functools
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec, Protocol, TypeVar

from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelStatus, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from requests.exceptions import RequestException
from sqlalchemy.exc import InterfaceError, OperationalError

from ddpm_core.checkpoint import Checkpoint
from ddpm_core.errors import InputError
from ddpm_core.protocol import FINGERPRINT_TAG, KIND_TAG
from pipelines.runtime.layout import Storage
from pipelines.runtime.locations import Location
from pipelines.runtime.options import StorageOptions
from pipelines.tracking.retry import persist
from pipelines.tracking.sqlite_lease import claim
from pipelines.tracking.uri import check_answers, check_no_password, tracking_uri

Kind = Literal["train", "evaluate", "likelihood", "compression", "sweep"]
STEPS_TAG = "ddpm.steps"  # of a training, up to which it was last asked to go
STARTED_TAG = "ddpm.started"  # seconds, when a run was last begun or gone on with
BATCH = 100  # MLflow's limit for parameters a call; for metrics it is 1,000
PASSING = {"TEMPORARILY_UNAVAILABLE", "DEADLINE_EXCEEDED", "REQUEST_LIMIT_EXCEEDED", "RESOURCE_EXHAUSTED"}
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Tracked = TypeVar("Tracked", bound="Client")


def passes(error: Exception) -> bool:
    """Whether a call may succeed when it is made again: a server or database that is away, busy or locked."""
    if isinstance(error, MlflowException):
        # What MLflow's HTTP client makes of a refused connection, a timeout, a 429 or a 5xx; elsewhere it is a bug.
        away = error.error_code == "INTERNAL_ERROR" and "API request to" in str(error)
        return away or error.error_code in PASSING
    if isinstance(error, RequestException):
        return error.response is None or error.response.status_code >= 500 or error.response.status_code == 429
    return isinstance(
        error, OperationalError | InterfaceError
    )  # SQLAlchemy's own, where MLflow makes the first connection


class Client(Protocol):
    """What speaks to a tracking server."""

    @property
    def client(self) -> MlflowClient: ...


def patiently(
    method: Callable[Concatenate[Tracked, Arguments], Result],
) -> Callable[Concatenate[Tracked, Arguments], Result]:
    """A method, or a function of such an object, whose call is repeated where the tracking server is away for a while."""

    @functools.wraps(method)
    def patient(tracked: Tracked, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        what = f"tracking server {tracked.client.tracking_uri!r}"
        return persist(lambda: method(tracked, *args, **kwargs), passes, what)

    return patient


def code_version() -> str:
    try:
        return version("ddpm-ray")
    except PackageNotFoundError:  # run from an uploaded working directory
        return "not installed"


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

    @patiently
    def logged_steps(self, key: str) -> set[int]:
        """The steps at which `key` is there already."""
        return {metric.step for metric in self.client.get_metric_history(self.run_id, key)}

    def log_records(self, records: Iterable[Mapping[str, float]], timestamp: int | None = None) -> None:
        """Metrics by step: each record has `step` and any number of values, and is logged as a whole. timestamp: in ms,
        by default now; MLflow drops a metric that is there with the same one."""
        timestamp = now() if timestamp is None else timestamp
        metrics: list[Metric] = []
        for record in records:
            of_record = [
                Metric(key, float(value), timestamp, int(record["step"]))
                for key, value in record.items()
                if key != "step"
            ]
            if len(metrics) + len(of_record) > 10 * BATCH:
                self._log_metrics(metrics)
                metrics = []
            metrics += of_record
        if metrics:
            self._log_metrics(metrics)

    @patiently
    def _log_metrics(self, metrics: Sequence[Metric]) -> None:
        self.client.log_batch(self.run_id, metrics=metrics)

    def log_result(
        self,
        owner: "TrackedRun",
        name: str,
        checkpoint: Checkpoint,
        weights: Literal["ema", "raw"],
        values: Mapping[str, float],
        *,
        dataset: str,
        protocol: str,
    ) -> bool:
        """Metrics of a checkpoint of the run `name`: on this run at its step, and on its model, which the run `owner` has,
        with the data set. Whether anything was new: not there yet, or of a checkpoint that was made anew.

        protocol: the fingerprint, which stands for the data set's digest and ends its name. MLflow ranks models by the
        metrics of one name and digest; its table tells a model's metrics apart by the name alone.
        """
        timestamp, model_id = now(), owner.model_of(name, checkpoint, weights)
        return self._log_on_model(model_id, checkpoint.step, values, f"{dataset}-{protocol[:6]}", protocol, timestamp)

    @patiently
    def _log_on_model(
        self, model_id: str, step: int, values: Mapping[str, float], dataset: str, digest: str, timestamp: int
    ) -> bool:
        there = {
            metric.key: metric.value
            for metric in sorted(self.client.get_logged_model(model_id).metrics or [], key=lambda m: m.timestamp)
            if metric.dataset_digest == digest and metric.run_id == self.run_id
        }
        new = [key for key, value in values.items() if {self._last_at(step, key), there.get(key)} != {value}]
        for key in new:
            self.client.log_metric(
                self.run_id,
                key,
                values[key],
                timestamp=timestamp,
                step=step,
                model_id=model_id,
                dataset_name=dataset,
                dataset_digest=digest,
            )
        return bool(new)

    def _last_at(self, step: int, key: str) -> float | None:
        history = [metric for metric in self.client.get_metric_history(self.run_id, key) if metric.step == step]
        return max(history, key=lambda metric: metric.timestamp).value if history else None

    @patiently
    def log_json(self, name: str, value: Any) -> None:
        self.client.log_text(self.run_id, json.dumps(value, indent=1, sort_keys=True), name)

    @patiently
    def read_json(self, name: str) -> Any:
        """What log_json left under a name, None where there is nothing."""
        parent = str(Path(name).parent)
        files = self.client.list_artifacts(self.run_id, None if parent == "." else parent)
        if name not in {file.path for file in files}:
            return None
        with tempfile.TemporaryDirectory() as folder:
            return json.loads(Path(self.client.download_artifacts(self.run_id, name, folder)).read_text())

    @patiently
    def log_bytes(self, name: str, data: bytes) -> None:
        """A file in the run's artifacts under the path `name`."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / Path(name).name
            path.write_bytes(data)
            parent = str(Path(name).parent)
            self.client.log_artifact(self.run_id, str(path), None if parent == "." else parent)

    @patiently
    def set_tags(self, tags: Mapping[str, str]) -> None:
        self.client.log_batch(self.run_id, tags=[RunTag(key, value) for key, value in tags.items()])

    @patiently
    def checkpoint_model(
        self, name: str, step: int, path: object, sha256: str, weights: Literal["ema", "raw"] = "ema"
    ) -> str:
        """The id of the LoggedModel that stands for a checkpoint's weights, which stay where they are."""
        name = name if weights == "ema" else f"{name}-raw"
        found, place = self._models(name), {"ddpm.path": str(path), "ddpm.sha256": sha256}
        if not found:
            self.client.create_logged_model(
                self.experiment_id,
                name=name,
                source_run_id=self.run_id,
                model_type="ddpm",
                params={"step": str(step), "weights": weights},
                tags={**place, "mlflow.model.isExternal": "true"},
            )
            found = self._models(name)
        model, *others = found
        if not place.items() <= model.tags.items():  # made anew, or moved
            self.client.set_logged_model_tags(model.model_id, place)
        if model.status != LoggedModelStatus.READY:
            self.client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
        for other in others:  # made by another process in the same moment, or by a call whose answer was lost
            self.client.delete_logged_model(other.model_id)
        return str(model.model_id)

    def model_of(self, name: str, checkpoint: Checkpoint, weights: Literal["ema", "raw"] = "ema") -> str:
        """The id of the LoggedModel of a checkpoint of the run `name`."""
        sha256 = checkpoint.weights_sha256(weights)
        return self.checkpoint_model(
            f"{name}-step-{checkpoint.step}", checkpoint.step, checkpoint.path, sha256, weights
        )

    def _models(self, name: str) -> list[LoggedModel]:
        """The run's models of a name, the first one first."""
        found = self.client.search_logged_models(
            [self.experiment_id], filter_string=f"name = '{name}' AND source_run_id = '{self.run_id}'"
        )
        return sorted(found, key=lambda model: (model.creation_timestamp, model.model_id))

    @patiently
    def finish(self, status: Literal["FINISHED", "FAILED", "KILLED"] = "FINISHED") -> None:
        self.client.set_terminated(self.run_id, status)


class Tracker:
    """An MLflow experiment that is written to. The first one, in a driver, makes the database and the experiment:
    several processes that make an SQLite database at once break it. InputError for a URI with a password, a server that
    cannot be reached, or an SQLite database that another machine writes to."""

    def __init__(self, uri: str, experiment: str, artifacts: Location) -> None:
        """artifacts: the folder of the experiment's artifacts, where no server places them."""
        check_no_password(uri)
        if uri.startswith("file:") or "://" not in uri:
            raise InputError(
                f"tracking URI is {uri!r}, a folder: MLflow 3 keeps no runs in folders; give sqlite:////absolute/path.db or "
                "http://host:port"
            )
        if uri.startswith("http"):
            check_answers(uri)
        if uri.startswith("sqlite:///"):
            claim(Path(uri.removeprefix("sqlite:///")))
        self.uri = uri
        self.client = persist(lambda: MlflowClient(tracking_uri=uri), passes, f"tracking server {uri!r}")
        self.experiment_id = self._experiment(experiment, artifacts)

    @patiently
    def _experiment(self, name: str, artifacts: Location) -> str:
        """The id of the experiment of this name, found or made."""
        found = self.client.get_experiment_by_name(name)
        if found is None:
            # A server places artifacts itself; for a database on disk they go beside it, whatever the current folder.
            location = None if self.uri.startswith("http") else artifacts.as_uri()
            kind = {"mlflow.experimentKind": "custom_model_development"}  # the view the UI opens with
            try:
                return str(self.client.create_experiment(name, location, kind))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            found = self.client.get_experiment_by_name(name)  # another process was quicker
        return str(found.experiment_id)

    @patiently
    def find(self, kind: Kind, name: str) -> TrackedRun | None:
        """The run of this kind and name, if there is one."""
        found = self._runs(kind, name)
        return TrackedRun(self.client, self.experiment_id, found[0].info.run_id) if found else None

    def _runs(self, kind: Kind, name: str) -> list[Run]:
        """The runs of this kind and name, the one that counts first: one with parameters, the oldest."""
        found = self.client.search_runs(
            [self.experiment_id], f"tags.`{KIND_TAG}` = '{kind}' AND attributes.run_name = '{name}'"
        )
        return sorted(found, key=lambda run: (not run.data.params, run.info.start_time, run.info.run_id))

    @patiently
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
        found = self._runs(kind, name)
        if found:
            self.client.update_run(found[0].info.run_id, status="RUNNING")
            self.client.set_tag(found[0].info.run_id, STARTED_TAG, str(time.time()))
        else:
            identity = {
                KIND_TAG: kind,
                FINGERPRINT_TAG: fingerprint,
                STARTED_TAG: str(time.time()),
                "ddpm.code_version": code_version(),
            }
            if parent is not None:
                identity["mlflow.parentRunId"] = parent
            self.client.create_run(self.experiment_id, run_name=name, tags={**identity, **tags})
            found = self._runs(kind, name)
        run_id, known = found[0].info.run_id, found[0].data.params
        # All, or what a kill left out.
        entries = [Param(key, value) for key, value in params.items() if key not in known]
        for i in range(0, len(entries), BATCH):
            self.client.log_batch(run_id, params=entries[i : i + BATCH])
        for other in found[1:]:  # made by another process in the same moment, or by a call whose answer was lost
            if known and not other.data.params:
                self.client.delete_run(other.info.run_id)
        return TrackedRun(self.client, self.experiment_id, run_id)


def now() -> int:
    """In ms, as MLflow counts."""
    return int(time.time() * 1000)


def open_tracker(options: StorageOptions, storage: Storage[Any]) -> Tracker:
    """The experiment that the options name."""
    return Tracker(tracking_uri(options, storage), options.experiment, storage.artifacts(options.experiment))
