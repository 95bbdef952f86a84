"""What MLflow knows of trainings and models, by what a person calls them. Nothing is written here."""

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from ddpm_core.records import (
    KIND_TAG,
    PARENT_TAG,
    PATH_TAG,
    PROTOCOL_TAG,
    SHARED_VIEW,
    STARTED_TAG,
    STEPS_TAG,
    TRAIN,
    ranking_link,
)
from pipelines.tracking.database import ensure_database
from pipelines.tracking.tracker import Tracker
from pipelines.tracking.uri import check_answers, check_uri, sqlite_file


def existing_client(uri: str) -> MlflowClient | None:
    """A client for looking things up, None if the database does not exist: MLflow would make it. Raises InputError for a URI
    with a password."""
    uri = check_uri(uri)
    check_answers(uri)
    database = sqlite_file(uri)
    if database is not None:
        if not database.is_file():
            return None
        ensure_database(database)  # which may have been moved
    return MlflowClient(tracking_uri=uri)


def name_of_run(uri: str, run_id: str) -> str | None:
    """The name of the run with this MLflow id, None if there is none."""
    client = existing_client(uri)
    try:
        return None if client is None else str(client.get_run(run_id).info.run_name)
    except MlflowException:
        return None


def path_of_model(uri: str, given: str) -> str | None:
    """Where the checkpoint of a LoggedModel lies, None if there is no such model. given: m-..., models:/NAME@alias or
    models:/NAME/version."""
    client = existing_client(uri)
    if client is None:
        return None
    try:
        model_id = registered_model(client, given.removeprefix("models:/")) if given.startswith("models:/") else given
        return client.get_logged_model(model_id).tags.get(PATH_TAG)
    except (MlflowException, TypeError):
        return None


def registered_model(client: MlflowClient, address: str) -> str:
    """The id of the LoggedModel at NAME@alias or NAME/version. Raises MlflowException or TypeError if there is none."""
    name, _, alias = address.partition("@")
    number = name.rsplit("/", 1)
    version = client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(*number)
    return str(version.source).removeprefix("models:/")


@dataclass(frozen=True)
class RankingView:
    """A table of checkpoints under one protocol in MLflow's UI. metric: that it is sorted by. protocol: in words. begun: when its
    newest checkpoint was measured, in ms."""

    experiment: str
    metric: str
    protocol: str
    begun: int
    link: str


def rankings(uri: str) -> list[RankingView] | None:
    """All such tables, the newest first; None if the database does not exist."""
    client = existing_client(uri)
    if client is None:
        return None
    views = []
    for experiment in client.search_experiments():
        for tag, view in experiment.tags.items():
            if tag.startswith(SHARED_VIEW):
                try:
                    metric = json.loads(view)["orderByKey"].removeprefix("metrics.").strip("`")
                except (ValueError, KeyError):  # a view that a person shared
                    continue
                number, protocol = experiment.experiment_id, tag.removeprefix(SHARED_VIEW)
                newest = client.search_runs([number], f"tags.`{PROTOCOL_TAG}` = '{protocol}'", max_results=1)
                if newest:
                    link = ranking_link(uri, number, protocol)
                    words = protocol_in_words(newest[0].data.params)
                    views.append(RankingView(experiment.name, metric, words, newest[0].info.start_time, link))
    return sorted(views, key=lambda view: -view.begun)


def protocol_in_words(params: Mapping[str, str]) -> str:
    """What tells the protocols of one experiment apart, by the parameters of a run."""
    eta = "" if params.get("eta", "0.0") == "0.0" else ", eta {eta}"
    length = "" if params.get("ema_length", "None") == "None" else " of length {ema_length}"
    kind = f"{{num_samples}} samples, {{sampler}} with {{sampler_steps}} steps{eta}, {{weights}} weights{length}"
    return f"{kind}, seed {{seed}} for {{purpose}}".format_map(defaultdict(lambda: "?", params))


@dataclass(frozen=True)
class Training:
    """What MLflow knows of a training. status: MLflow's, such as RUNNING. steps: how many it was asked for. storage: where
    it keeps its checkpoints. started: seconds, when it was last begun or gone on with."""

    name: str
    run_id: str
    status: str
    steps: int
    storage: str
    started: float


def trainings(tracker: Tracker) -> list[Training]:
    """All trainings of an experiment but the trials of sweeps, the newest first."""
    return [
        Training(
            run.info.run_name,
            run.info.run_id,
            run.info.status,
            int(run.data.tags.get(STEPS_TAG, run.data.params.get("steps", 0))),
            run.data.params.get("storage", ""),
            float(run.data.tags.get(STARTED_TAG, run.info.start_time / 1000.0)),
        )
        for run in tracker.search(f"tags.`{KIND_TAG}` = '{TRAIN}'")
        if PARENT_TAG not in run.data.tags
    ]
