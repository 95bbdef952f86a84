"""What MLflow knows of trainings and models, by what a person calls them. Nothing is written here."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from ddpm_core.protocol import KIND_TAG
from pipelines.tracking.tracker import STARTED_TAG, STEPS_TAG, Tracker, patiently
from pipelines.tracking.uri import check_no_password


def name_of_run(uri: str, run_id: str) -> str | None:
    """The name of the run with this MLflow id, if there is one. Makes nothing."""
    check_no_password(uri)
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        return None
    try:
        return str(MlflowClient(tracking_uri=uri).get_run(run_id).info.run_name)
    except MlflowException:
        return None


def path_of_model(uri: str, given: str) -> str | None:
    """Where the checkpoint of a LoggedModel lies, if there is one: m-..., models:/NAME@alias or models:/NAME/version.
    Makes nothing."""
    check_no_password(uri)
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


@patiently
def trainings(tracker: Tracker) -> list[Training]:
    """All training runs of an experiment but the trials of sweeps, the newest first."""
    found: list[Any] = []
    token = None
    while True:
        page = tracker.client.search_runs([tracker.experiment_id], f"tags.`{KIND_TAG}` = 'train'", page_token=token)
        found += [run for run in page if "mlflow.parentRunId" not in run.data.tags]
        token = page.token
        if not token:
            break
    return [
        Training(
            run.info.run_name,
            run.info.run_id,
            run.info.status,
            int(run.data.tags.get(STEPS_TAG, run.data.params.get("steps", 0))),
            run.data.params.get("storage", ""),
            float(run.data.tags.get(STARTED_TAG, run.info.start_time / 1000.0)),
        )
        for run in found
    ]
