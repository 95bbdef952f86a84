"""An MLflow run: its metrics, tags, files, and the models of its checkpoints. Every call can be made again: nothing is made
twice."""

import contextlib
import json
import logging
import platform
import re
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import mlflow
from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelStatus, Metric, RunTag
from mlflow.environment_variables import MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE

from ddpm_core.checkpoint import Checkpoint
from ddpm_core.configs import Weights
from ddpm_core.errors import one_line
from ddpm_core.protocol import fingerprint
from ddpm_core.records import NOTE_TAG, PATH_TAG, SHA256_TAG
from pipelines.tracking.client import retried

EXTERNAL_TAG = "mlflow.model.isExternal"  # MLflow's own: whether a model has no files
MACHINE_INTERVAL, MACHINE_SAMPLES = (
    10.0,
    3,
)  # seconds between looks at the machine, and how many are logged as their mean
MACHINE_PAUSE = 60.0  # seconds before MLflow's monitor is started again
METRICS_A_CALL = 1000  # MLflow's limit
NOT_IN_NAMES = re.compile(r"[/:.%\"']")  # of what MLflow calls a logged model

logger = logging.getLogger(__name__)


def now() -> int:
    """The time in ms, as MLflow counts it."""
    return int(time.time() * 1000)


def note_tags(text: str) -> dict[str, str]:
    """The tags that are MLflow's note on a run, in Markdown."""
    return {MLFLOW_RUN_NOTE: text, NOTE_TAG: fingerprint(text)}


@dataclass(frozen=True)
class TrackedRun:
    """An MLflow run that is written to."""

    client: MlflowClient
    experiment_id: str
    run_id: str

    @retried
    def tags(self) -> dict[str, str]:
        """The tags of the run."""
        return dict(self.client.get_run(self.run_id).data.tags)

    @retried
    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of the run, in place of those of the same names."""
        self.client.log_batch(self.run_id, tags=[RunTag(key, value) for key, value in tags.items()])

    @retried
    def set_note(self, text: str) -> None:
        """Set MLflow's note on the run, in Markdown, unless a person has changed it."""
        tags = self.tags()
        note = tags.get(MLFLOW_RUN_NOTE, "")
        if note in ("", text) or fingerprint(note) == tags.get(NOTE_TAG):
            self.set_tags(note_tags(text))

    @retried
    def finish(self, status: Literal["FINISHED", "FAILED", "KILLED"] = "FINISHED") -> None:
        """End the run; Tracker.run() has it running again."""
        self.client.set_terminated(self.run_id, status)

    # Metrics.

    @contextlib.contextmanager
    def system_metrics(self) -> Iterator[None]:
        """Have MLflow log what this machine's CPUs, memory, disk, network and GPUs do while the block lasts, in a thread whose
        troubles are nobody else's. MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING=false, MLflow's own switch, turns it off."""
        ended = threading.Event()
        if not MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING.is_set() or MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING.get():
            threading.Thread(target=self._watch_machine, args=(ended,), name="system metrics", daemon=True).start()
        try:
            yield
        finally:
            ended.set()

    def _watch_machine(self, ended: threading.Event) -> None:
        """Run MLflow's monitor, and another one if it ends, as it does when the server is away."""
        while not ended.is_set():
            try:
                from mlflow.system_metrics import system_metrics_monitor  # here: it takes a second

                logging.getLogger(system_metrics_monitor.__name__).setLevel(logging.ERROR)
                monitor = system_metrics_monitor.SystemMetricsMonitor(
                    self.run_id,
                    sampling_interval=MACHINE_INTERVAL,
                    samples_before_logging=MACHINE_SAMPLES,
                    resume_logging=True,
                    tracking_uri=self.client.tracking_uri,
                )
                monitor._shutdown_event = ended
                monitor.monitor()
            except Exception as error:
                logger.debug("system metrics: %s", one_line(error))
            ended.wait(MACHINE_PAUSE)

    @retried
    def logged_steps(self, key: str) -> set[int]:
        """The steps at which the metric `key` has a value."""
        return {metric.step for metric in self.client.get_metric_history(self.run_id, key)}

    def log_records(self, records: Iterable[Mapping[str, float]], timestamp: int | None = None) -> None:
        """Log metrics by step: each record has `step` and any number of values, and is logged as a whole. timestamp: in ms,
        by default now; MLflow drops a value that it has with the same one."""
        timestamp = now() if timestamp is None else timestamp
        metrics: list[Metric] = []
        for record in records:
            values = [
                Metric(key, float(value), timestamp, int(record["step"]))
                for key, value in record.items()
                if key != "step"
            ]
            if len(metrics) + len(values) > METRICS_A_CALL:
                self._log_metrics(metrics)
                metrics = []
            metrics += values
        if metrics:
            self._log_metrics(metrics)

    @retried
    def log_values(self, values: Mapping[str, float], step: int) -> bool:
        """Log those values that the run does not show yet, at a step; whether there were any."""
        shown = self.client.get_run(self.run_id).data.metrics
        new = {key: value for key, value in values.items() if shown.get(key) != value}
        self.client.log_batch(self.run_id, metrics=[Metric(key, value, now(), step) for key, value in new.items()])
        return bool(new)

    @retried
    def _log_metrics(self, metrics: Sequence[Metric]) -> None:
        self.client.log_batch(self.run_id, metrics=metrics)

    def log_result(
        self,
        owner: "TrackedRun",
        name: str,
        checkpoint: Checkpoint,
        weights: Weights,
        values: Mapping[str, float],
        *,
        dataset: str,
        protocol: str,
    ) -> bool:
        """Log metrics of a checkpoint of the training `name`: on this run at its step, and on its model, which the run
        `owner` has, with the data set. Whether any was new: not there yet, or of a checkpoint that was made anew.

        protocol: the fingerprint, which stands for the data set's digest and ends its name. MLflow ranks models by the
        metrics of one name and digest; its table tells a model's metrics apart by the name alone.
        """
        timestamp, model_id = now(), owner.model_of(name, checkpoint, weights)
        return self._log_on_model(model_id, checkpoint.step, values, f"{dataset}-{protocol[:6]}", protocol, timestamp)

    @retried
    def _log_on_model(
        self, model_id: str, step: int, values: Mapping[str, float], dataset: str, digest: str, timestamp: int
    ) -> bool:
        by_time = sorted(self.client.get_logged_model(model_id).metrics or [], key=lambda metric: metric.timestamp)
        of_model = {
            metric.key: metric.value
            for metric in by_time
            if metric.dataset_digest == digest and metric.run_id == self.run_id
        }
        new = [key for key, value in values.items() if {self._last_at(step, key), of_model.get(key)} != {value}]
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
        """The value that a metric got last at a step."""
        history = [metric for metric in self.client.get_metric_history(self.run_id, key) if metric.step == step]
        return max(history, key=lambda metric: metric.timestamp).value if history else None

    # Files.

    @retried
    def log_json(self, name: str, value: Any) -> None:
        """Write a value under the path `name` of the run's artifacts."""
        self.client.log_text(self.run_id, json.dumps(value, indent=1, sort_keys=True), name)

    @retried
    def read_json(self, name: str) -> Any:
        """What log_json() wrote under a path, None if nothing."""
        parent = str(Path(name).parent)
        files = self.client.list_artifacts(self.run_id, None if parent == "." else parent)
        if name not in {file.path for file in files}:
            return None
        with tempfile.TemporaryDirectory() as folder:
            return json.loads(Path(self.client.download_artifacts(self.run_id, name, folder)).read_text())

    @retried
    def log_bytes(self, name: str, data: bytes) -> None:
        """Write a file under the path `name` of the run's artifacts."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / Path(name).name
            path.write_bytes(data)
            parent = str(Path(name).parent)
            self.client.log_artifact(self.run_id, str(path), None if parent == "." else parent)

    # Models.

    def model_of(self, name: str, checkpoint: Checkpoint, weights: Weights = "ema") -> str:
        """The id of the LoggedModel of a checkpoint of the training `name`, made if there is none."""
        averaged = "" if checkpoint.made_of is None else f"-ema-{checkpoint.made_of['length']:g}"
        return self.checkpoint_model(
            f"{name}-step-{checkpoint.step}{averaged}",
            checkpoint.step,
            checkpoint.path,
            checkpoint.weights_sha256(weights),
            weights,
            model_file(checkpoint, weights),
        )

    @retried
    def checkpoint_model(
        self, name: str, step: int, path: object, sha256: str, weights: Weights = "ema", file: str | None = None
    ) -> str:
        """The id of the LoggedModel that stands for a checkpoint's weights, which stay where they are. file: by which MLflow
        loads it; without one it cannot."""
        name = NOT_IN_NAMES.sub("-", name if weights == "ema" else f"{name}-raw")
        tags = {PATH_TAG: str(path), SHA256_TAG: sha256, EXTERNAL_TAG: str(file is None).lower()}
        models = self._models(name)
        if not models:
            self.client.create_logged_model(
                self.experiment_id,
                name=name,
                source_run_id=self.run_id,
                model_type="ddpm",
                params={"step": str(step), "weights": weights},
                tags=tags,
            )
            models = self._models(name)
        model, *others = models
        ready = model.status == LoggedModelStatus.READY
        current = tags.items() <= model.tags.items()  # else it was made anew, moved, or recorded by an earlier version
        if file is not None and not (ready and current):
            self._log_model_file(model.model_id, file)
        if not current:
            self.client.set_logged_model_tags(model.model_id, tags)
        if not ready:
            self.client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
        for other in others:  # made by another process in the same moment, or by a call whose answer was lost
            self.client.delete_logged_model(other.model_id)
        return str(model.model_id)

    def _log_model_file(self, model_id: str, content: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "MLmodel").write_text(content, encoding="utf-8")
            self.client.log_model_artifacts(model_id, folder)

    def _models(self, name: str) -> list[LoggedModel]:
        """The run's models of a name, the first one first."""
        models = self.client.search_logged_models(
            [self.experiment_id], filter_string=f"name = '{name}' AND source_run_id = '{self.run_id}'"
        )
        return sorted(models, key=lambda model: (model.creation_timestamp, model.model_id))


def model_file(checkpoint: Checkpoint, weights: Weights) -> str:
    """The file MLmodel of a checkpoint: MLflow's description of a model (YAML, of which JSON is a part) that
    pipelines/checkpoints/pyfunc.py loads, with its signature, and where the weights lie in their storage."""
    unet, diffusion = checkpoint.config.get("unet", {}), checkpoint.config.get("diffusion", {})
    size, channels = unet.get("image_size", -1), unet.get("in_channels", -1)
    run = checkpoint.path.parent
    image = {"type": "tensor", "tensor-spec": {"dtype": "uint8", "shape": [-1, size, size, channels]}}
    params = {"seed": 0, "steps": diffusion.get("num_timesteps", 1000)}
    description = {
        "flavors": {
            "python_function": {
                "loader_module": "pipelines.checkpoints.pyfunc",
                "python_version": platform.python_version(),
                "config": {
                    "storage": str(run.parent.parent),
                    "checkpoint": f"{run.parent.name}/{run.name}/{checkpoint.path.name}",
                    "weights": weights,
                    "sha256": checkpoint.weights_sha256(weights),
                },
            }
        },
        "mlflow_version": mlflow.__version__,
        "signature": {
            "inputs": json.dumps([{"type": "long", "required": True}]),
            "outputs": json.dumps([image]),
            "params": json.dumps(
                [{"name": name, "type": "long", "default": value, "shape": None} for name, value in params.items()]
            ),
        },
    }
    return json.dumps(description, indent=1)
