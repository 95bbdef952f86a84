"""Registered models: names that outlive runs, with an alias on the checkpoint that is best and on the newest."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import (
    INVALID_PARAMETER_VALUE,
    RESOURCE_ALREADY_EXISTS,
    RESOURCE_DOES_NOT_EXIST,
    ErrorCode,
)

from pipelines.tracking.tracker import patiently

VERSIONS_TAG = "mlflow.modelVersions"
# What MLflow's stores say of an alias or a model that is not there.
ABSENT = {ErrorCode.Name(code) for code in (RESOURCE_DOES_NOT_EXIST, INVALID_PARAMETER_VALUE)}


@contextlib.contextmanager
def default_tracking_uri(uri: str) -> Iterator[None]:
    """MLflow's own default, by which its SQL store looks up the model of a new version, whichever client asks it."""
    before = os.environ.get("MLFLOW_TRACKING_URI")
    os.environ["MLFLOW_TRACKING_URI"] = uri
    try:
        yield
    finally:
        del os.environ["MLFLOW_TRACKING_URI"]
        if before is not None:
            os.environ["MLFLOW_TRACKING_URI"] = before


@dataclass(frozen=True)
class Registry:
    """The registered model `name`, made when first written to."""

    client: MlflowClient
    name: str

    @patiently
    def tags(self, alias: str) -> dict[str, str]:
        """Of the version that an alias points at, none where there is no such alias."""
        try:
            return dict(self.client.get_model_version_by_alias(self.name, alias).tags)
        except MlflowException as error:
            if error.error_code not in ABSENT:
                raise
            return {}

    @patiently
    def point(self, alias: str, model_id: str, run_id: str, tags: Mapping[str, str]) -> None:
        """Have an alias point at a LoggedModel of a run; tags go to its version."""
        try:
            self.client.create_registered_model(self.name)
        except MlflowException as error:
            if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
                raise
        source = f"models:/{model_id}"
        versions = self.client.search_model_versions(f"name = '{self.name}'")
        version = next((found for found in versions if found.source == source), None)
        if version is None:
            with default_tracking_uri(self.client.tracking_uri):
                version = self.client.create_model_version(
                    self.name, source, run_id, model_id=model_id, await_creation_for=0
                )
        known = json.loads(self.client.get_logged_model(model_id).tags.get(VERSIONS_TAG, "[]"))
        mine = {"name": self.name, "version": str(version.version)}
        if mine not in known:  # by which the UI's table of models shows it; a server sets it, SQLite's store does not
            self.client.set_logged_model_tags(model_id, {VERSIONS_TAG: json.dumps([*known, mine])})
        for key, value in tags.items():
            self.client.set_model_version_tag(self.name, version.version, key, value)
        self.client.set_registered_model_alias(self.name, alias, version.version)
