"""Where MLflow's records are kept, as a person gives it."""

import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from ddpm_core.errors import InputError
from pipelines.runtime.layout import Storage
from pipelines.runtime.locations import holds_password
from pipelines.runtime.options import StorageOptions


def tracking_uri(options: StorageOptions, storage: Storage[Any]) -> str:
    """The URI that the options give, else MLFLOW_TRACKING_URI, else an SQLite file in the storage. Raises InputError if that
    is a URL."""
    given = options.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    if given is None and not isinstance(storage.root, Path):
        raise InputError(
            f"--storage is {str(storage.root)!r}, where no SQLite database can lie: give --tracking-uri http://host:port, or "
            "set MLFLOW_TRACKING_URI"
        )
    return given or f"sqlite:///{storage.database}"


def check_no_password(uri: str) -> None:
    """InputError for a tracking URI with a password, which would be a parameter of every run."""
    if holds_password(uri):
        instead = (
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            if uri.startswith("http")
            else "PGPASSWORD or ~/.pgpass"
        )
        raise InputError(
            "the tracking URI holds a password, which would be written into records and logs: leave it out, and give it in "
            f"{instead}"
        )


class UnreachableError(InputError):
    """No tracking server answers at an address."""


def check_answers(uri: str) -> None:
    """UnreachableError where no server answers at an http URI: at once, not after MLflow's minutes of trying again."""
    try:
        with urllib.request.urlopen(uri.rstrip("/") + "/health", timeout=10):
            return
    except urllib.error.HTTPError:
        return  # it answers; whether it lets us in, MLflow will say
    except (OSError, ValueError) as error:
        raise UnreachableError(
            f"tracking server {uri!r} cannot be reached from here ({error}): start it, or give the address that this machine "
            "knows it by"
        ) from error
