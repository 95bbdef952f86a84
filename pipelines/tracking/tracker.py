"""An MLflow experiment: its runs, found by what they are, or made."""

import shlex
import time
from collections.abc import Mapping, Sequence

from mlflow import MlflowClient
from mlflow.entities import LifecycleStage, Param, Run
from mlflow.exceptions import MlflowException

from ddpm_core.errors import InputError
from ddpm_core.records import FINGERPRINT_TAG, KIND_TAG, PARENT_TAG, STARTED_TAG, Kind
from pipelines.runtime.options import StorageOptions
from pipelines.storage.layout import Storage
from pipelines.storage.locations import Location
from pipelines.tracking.client import is_transient, retried
from pipelines.tracking.database import ensure_database
from pipelines.tracking.origin import DataInput, source_tags
from pipelines.tracking.retry import with_retries
from pipelines.tracking.run import TrackedRun
from pipelines.tracking.sqlite_lease import claim
from pipelines.tracking.uri import check_answers, check_uri, sqlite_file, tracking_uri

PARAMS_A_CALL = 100  # MLflow's limit


class Tracker:
    """An MLflow experiment that is written to; it, and an SQLite database, are made if they are not there."""

    def __init__(self, uri: str, experiment: str, artifacts: Location, *, make: bool = True) -> None:
        """artifacts: the folder of the experiment's artifacts, if no server places them. make: False to refuse an experiment that
        is not there.

        Raises InputError for a URI with a password, a server that cannot be reached, or an SQLite database that another
        machine writes to.
        """
        uri = check_uri(uri)
        check_answers(uri)
        database = sqlite_file(uri)
        if database is not None and not make and not database.exists():
            raise absent(experiment, uri)
        if database is not None:
            claim(database)  # before it is made: that is the right of one machine too
            ensure_database(database)
        self.uri = uri
        self.client = with_retries(lambda: MlflowClient(tracking_uri=uri), is_transient, f"tracking server {uri!r}")
        self.experiment_id = self._experiment(experiment, artifacts, make)

    @retried
    def _experiment(self, name: str, artifacts: Location, make: bool) -> str:
        """The id of the experiment of this name, found or made."""
        existing = self.client.get_experiment_by_name(name)
        if existing is not None and existing.lifecycle_stage == LifecycleStage.DELETED:
            raise InputError(
                f"experiment {name!r} was deleted in MLflow: give another --experiment, or restore it with `mlflow experiments "
                f"restore --experiment-id {existing.experiment_id}`"
            )
        if existing is None and not make:
            raise absent(name, self.uri)
        if existing is None:
            # A server places artifacts itself; those of a database on disk go beside it, whatever the current folder.
            location = None if self.uri.startswith("http") else artifacts.as_uri()
            kind = {"mlflow.experimentKind": "custom_model_development"}  # the view the UI opens with
            try:
                return str(self.client.create_experiment(name, location, kind))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            existing = self.client.get_experiment_by_name(name)  # another process was quicker
        return str(existing.experiment_id)

    @retried
    def search(self, condition: str) -> list[Run]:
        """All runs of the experiment that MLflow's filter finds, the newest first."""
        runs: list[Run] = []
        token: str | None = None
        while token != "":
            page = self.client.search_runs([self.experiment_id], condition, page_token=token)
            runs += page
            token = page.token or ""
        return runs

    @retried
    def find(self, kind: Kind, name: str) -> TrackedRun | None:
        """The run of this kind and name, if there is one."""
        runs = self._runs(kind, name)
        return TrackedRun(self.client, self.experiment_id, runs[0].info.run_id) if runs else None

    @retried
    def run(
        self,
        kind: Kind,
        name: str,
        fingerprint: str,
        *,
        params: Mapping[str, str],
        tags: Mapping[str, str],
        parent: str | None = None,
        data: DataInput | None = None,
    ) -> TrackedRun:
        """The run of this kind and name, whose fingerprint the name holds: found and set running again, or made. parent: the
        id of the run that it belongs to. data: what it reads."""
        runs = self._runs(kind, name)
        if runs:
            self.client.update_run(runs[0].info.run_id, status="RUNNING")
            self.client.set_tag(runs[0].info.run_id, STARTED_TAG, str(time.time()))
        else:
            self._create(kind, name, fingerprint, tags, parent)
            runs = self._runs(kind, name)
        first, *others = runs
        self._log_missing(first, params)
        if data is not None and not first.inputs.dataset_inputs:
            self.client.log_inputs(first.info.run_id, [data])
        if first.data.params:
            self._delete_empty(others)
        return TrackedRun(self.client, self.experiment_id, first.info.run_id)

    def _runs(self, kind: Kind, name: str) -> list[Run]:
        """The runs of this kind and name, the one that counts first: one with parameters, the oldest."""
        runs = self.search(f"tags.`{KIND_TAG}` = '{kind}' AND attributes.run_name = '{name}'")
        return sorted(runs, key=lambda run: (not run.data.params, run.info.start_time, run.info.run_id))

    def _create(self, kind: Kind, name: str, fingerprint: str, tags: Mapping[str, str], parent: str | None) -> None:
        identity = {
            KIND_TAG: kind,
            FINGERPRINT_TAG: fingerprint,
            STARTED_TAG: str(time.time()),
            **source_tags(),
        }
        if parent is not None:
            identity[PARENT_TAG] = parent
        self.client.create_run(self.experiment_id, run_name=name, tags={**identity, **tags})

    def _log_missing(self, run: Run, params: Mapping[str, str]) -> None:
        """Log the parameters that a run lacks: all, or those that a killed process did not come to."""
        missing = [Param(key, value) for key, value in params.items() if key not in run.data.params]
        for i in range(0, len(missing), PARAMS_A_CALL):
            self.client.log_batch(run.info.run_id, params=missing[i : i + PARAMS_A_CALL])

    def _delete_empty(self, runs: Sequence[Run]) -> None:
        """Delete runs without parameters: made by another process in the same moment, or by a call whose answer was lost."""
        for run in runs:
            if not run.data.params:
                self.client.delete_run(run.info.run_id)


def absent(experiment: str, uri: str) -> InputError:
    """What to say of an experiment that is not there."""
    return InputError(
        f"experiment {experiment!r} is not in {uri!r}: train with --experiment {shlex.quote(experiment)}, or give another "
        "--experiment or --tracking-uri"
    )


def open_tracker(options: StorageOptions, storage: Storage, *, make: bool = True) -> Tracker:
    """The experiment that the options name. make: False to refuse one that is not there."""
    return Tracker(tracking_uri(options, storage), options.experiment, storage.artifacts(options.experiment), make=make)
