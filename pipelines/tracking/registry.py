"""MLflow's model registry: names that outlive runs, with aliases that point at the models of checkpoints."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import (
    INVALID_PARAMETER_VALUE,
    RESOURCE_ALREADY_EXISTS,
    RESOURCE_DOES_NOT_EXIST,
    ErrorCode,
)

from ddpm_core.records import ALIAS_TAG
from pipelines.tracking.client import retried

VERSIONS_TAG = "mlflow.modelVersions"
# What MLflow's stores answer if an alias or a model does not exist.
ABSENT = {ErrorCode.Name(code) for code in (RESOURCE_DOES_NOT_EXIST, INVALID_PARAMETER_VALUE)}


@dataclass(frozen=True)
class Registry:
    """The registered model `name`, made when first written to."""

    client: MlflowClient
    name: str

    @retried
    def tags(self, alias: str) -> dict[str, str]:
        """The tags of the version that an alias points at, none if there is no such alias."""
        version = self._pointed_at(alias)
        return {} if version is None else dict(version.tags)

    @retried
    def set_alias(
        self,
        alias: str,
        model_id: str,
        run_id: str,
        tags: Mapping[str, str],
        move: tuple[str, str] | None = None,
    ) -> None:
        """Have an alias point at a LoggedModel of a run; the tags go to its version. move: what the model is and why the alias
        moves to it, which its version says then, and the version that the alias leaves."""
        try:
            self.client.create_registered_model(self.name)
        except MlflowException as error:
            if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
                raise
        version = self._version(model_id, run_id)
        self._link(model_id, version)
        for key, value in tags.items():
            self.client.set_model_version_tag(self.name, version.version, key, value)
        if move is not None:  # before the alias moves: a kill between has the same move made again
            what, why = move
            left = self._pointed_at(alias)
            if left is not None and str(left.version) != str(version.version):
                self._describe(left, f"{alias} left this version for version {version.version}, {what}, since {why}")
            self._describe(version, f"{alias} points at this version, {what}, since {why}")
        self.client.set_registered_model_alias(self.name, alias, version.version)

    def _pointed_at(self, alias: str) -> Any:
        """The version that an alias points at, None if there is no such alias."""
        try:
            return self.client.get_model_version_by_alias(self.name, alias)
        except MlflowException as error:
            if error.error_code not in ABSENT:
                raise
            return None

    def _describe(self, version: Any, text: str) -> None:
        """Say something of a version by a tag, and by its description unless a person wrote that."""
        if (version.description or "") in ("", version.tags.get(ALIAS_TAG)):
            self.client.update_model_version(self.name, version.version, text)
        self.client.set_model_version_tag(self.name, version.version, ALIAS_TAG, text)

    def _version(self, model_id: str, run_id: str) -> Any:
        """The version that stands for a LoggedModel, made if there is none."""
        source = f"models:/{model_id}"  # the only link from a version to its model, and so what the UI looks for
        versions = self.client.search_model_versions(f"name = '{self.name}'")
        version = next((each for each in versions if each.source == source), None)
        if version is None:
            with default_tracking_uri(self.client.tracking_uri):
                version = self.client.create_model_version(
                    self.name, source, run_id, model_id=model_id, await_creation_for=0
                )
        return version

    def _link(self, model_id: str, version: Any) -> None:
        """Name a version on its LoggedModel, for the UI's table of models. A server does so itself, a database does not."""
        links = json.loads(self.client.get_logged_model(model_id).tags.get(VERSIONS_TAG, "[]"))
        link = {"name": self.name, "version": str(version.version)}
        if link not in links:
            self.client.set_logged_model_tags(model_id, {VERSIONS_TAG: json.dumps([*links, link])})


@contextlib.contextmanager
def default_tracking_uri(uri: str) -> Iterator[None]:
    """Have MLflow's global tracking URI be `uri`, if that is a database, for the one call that takes no other.

    The SQL store of MLflow 3.17 looks up the model of a source models:/ID with an MlflowClient() of its own, which knows the
    global URI alone (a TODO in its create_model_version() says so). A server does that in its own process.
    """
    if uri.startswith("http"):
        yield
        return
    before = os.environ.get("MLFLOW_TRACKING_URI")
    os.environ["MLFLOW_TRACKING_URI"] = uri
    try:
        yield
    finally:
        del os.environ["MLFLOW_TRACKING_URI"]
        if before is not None:
            os.environ["MLFLOW_TRACKING_URI"] = before
