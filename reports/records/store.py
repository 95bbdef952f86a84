"""Read-only access to an MLflow tracking store: runs, metric histories, artifacts.

The only module of the reports that talks to MLflow; nothing here creates, changes or deletes a record.
"""

import math
import sqlite3
import sys
import tempfile
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit, urlunsplit
from urllib.request import url2pathname

from mlflow import MlflowClient
from mlflow.entities import Metric, Run
from mlflow.exceptions import MlflowException

from ddpm_core.errors import InputError, one_line
from ddpm_core.records import SHARED_VIEW, training_metric

RUNS_A_CALL = 1000


@dataclass(frozen=True, kw_only=True)
class Series:
    """A metric's history. `steps` ascend and are unique; `values` may hold NaN and infinities."""

    steps: tuple[int, ...] = ()
    values: tuple[float, ...] = ()

    def at(self, step: int) -> float | None:
        """The value at a step, None if nothing was logged there."""
        place = bisect_left(self.steps, step)
        return self.values[place] if self.steps[place : place + 1] == (step,) else None


class Store:
    """An existing MLflow tracking store, opened for reading.

    Raises InputError if there is no store at `tracking_uri` or MLflow cannot read it.
    """

    def __init__(self, tracking_uri: str) -> None:
        require_store(tracking_uri)
        self.tracking_uri = tracking_uri
        self._artifact_uris: dict[str, str] = {}
        self._histories: dict[tuple[str, str], Series] = {}
        try:
            self._client = MlflowClient(tracking_uri=tracking_uri)
            self._experiments: Sequence[Any] = self._client.search_experiments()
        except MlflowException as error:
            raise InputError(
                f"Tracking store {public_uri(tracking_uri)} cannot be read by this MLflow ({one_line(error)}); "
                "give the address that the training used."
            ) from error

    def experiment_id(self, name: str) -> str:
        """The id of the experiment of that name. Raises InputError, which names the others, if there is none."""
        for experiment in self._experiments:
            if experiment.name == name:
                return str(experiment.experiment_id)
        names = ", ".join(repr(experiment.name) for experiment in self._experiments) or "no experiment"
        raise InputError(
            f"Experiment {name!r} is not in the tracking store {public_uri(self.tracking_uri)}, "
            f"which holds {names}; name one of those."
        )

    def has_ranking(self, experiment_id: str, protocol: str) -> bool:
        """Whether MLflow's UI has a table of the checkpoints under a protocol; experiments of earlier versions have none."""
        of_id = (experiment for experiment in self._experiments if experiment.experiment_id == experiment_id)
        return any(SHARED_VIEW + protocol in experiment.tags for experiment in of_id)

    def runs(self, experiment_id: str) -> list[Run]:
        """Every run that was not deleted, the oldest first, with its latest metrics, params and tags."""
        runs: list[Run] = []
        token: str | None = None
        while token != "":
            page = self._client.search_runs(
                [experiment_id], max_results=RUNS_A_CALL, order_by=["attributes.start_time ASC"], page_token=token
            )
            runs.extend(page)
            token = page.token or ""
        self._artifact_uris.update({run.info.run_id: run.info.artifact_uri for run in runs})
        return runs

    def history(self, run_id: str, metric: str) -> Series:
        """A metric by step. A run that resumed repeats some steps: the value with the latest timestamp counts."""
        if (run_id, metric) not in self._histories:
            newest: dict[int, Metric] = {}
            for point in self._client.get_metric_history(run_id, metric):
                if point.step not in newest or point.timestamp >= newest[point.step].timestamp:
                    newest[point.step] = point
            steps = tuple(sorted(newest))
            values = tuple(_restored(newest[step].value) for step in steps)
            self._histories[run_id, metric] = Series(steps=steps, values=values)
        return self._histories[run_id, metric]

    def training_history(self, run_id: str, metric: str) -> Series:
        """A training's metric by step, as its records name it; one that an earlier version logged has no other name."""
        series = self.history(run_id, training_metric(metric))
        return series if series.steps else self.history(run_id, metric)

    def files_beside(self, run_id: str, path: str) -> list[str]:
        """The paths of the files in the folder of an artifact, itself among them; empty if there is no such folder."""
        folder = str(PurePosixPath(path).parent)
        local = _local_folder(self._artifact_uris[run_id])
        if local is None:
            items = self._client.list_artifacts(run_id, "" if folder == "." else folder)
            return sorted(item.path for item in items if not item.is_dir)
        if not (local / folder).is_dir():
            return []
        return sorted(file.relative_to(local).as_posix() for file in (local / folder).iterdir() if file.is_file())

    def artifact(self, run_id: str, path: str) -> bytes | None:
        """The content of one artifact, None if the run has no such file."""
        local = _local_folder(self._artifact_uris[run_id])
        if local is not None:
            return (local / path).read_bytes() if (local / path).is_file() else None
        if path not in self.files_beside(run_id, path):
            return None
        with tempfile.TemporaryDirectory() as folder:
            return Path(self._client.download_artifacts(run_id, path, folder)).read_bytes()


def require_store(tracking_uri: str) -> None:
    """Raises InputError if a file-based store does not exist: MLflow would create it."""
    parts = urlsplit(tracking_uri)
    if parts.scheme == "sqlite":
        _require_sqlite(tracking_uri, Path(parts.path[1:]))
    elif parts.scheme in ("", "file"):
        folder = Path(url2pathname(parts.path))
        if not folder.is_dir():
            raise InputError(
                f"Tracking store {tracking_uri!r} is not a folder; give the address that the training used, "
                "for example sqlite:///runs/mlflow.db."
            )


def public_uri(uri: str) -> str:
    """The address without a user name or password, fit for a page that is passed on."""
    parts = urlsplit(uri)
    if "@" not in parts.netloc:
        return uri
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _require_sqlite(uri: str, path: Path) -> None:
    if not path.is_file():
        raise InputError(
            f"Tracking store {uri} does not exist: there is no file {path}; "
            "train first, or give the address that the training used."
        )
    try:
        connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
        try:
            table = connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'experiments'").fetchone()
        finally:
            connection.close()
    except sqlite3.DatabaseError as error:
        raise InputError(
            f"Tracking store {uri} is not an SQLite database ({error}); give the MLflow database of the training."
        ) from error
    if table is None:
        raise InputError(
            f"Tracking store {uri} is an SQLite database without MLflow's tables; "
            "give the MLflow database of the training."
        )


def _local_folder(artifact_uri: str) -> Path | None:
    parts = urlsplit(artifact_uri)
    if parts.scheme == "file":
        return Path(url2pathname(parts.path))
    return None if parts.scheme else Path(artifact_uri)


def _restored(value: float) -> float:
    """Infinity as it was logged: MLflow's SQL stores hold it as the largest finite double."""
    return math.copysign(math.inf, value) if abs(value) >= sys.float_info.max else value
