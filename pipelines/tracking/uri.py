"""Where MLflow's records are kept, as a person gives it."""

import os
import urllib.error
import urllib.request
from pathlib import Path

from ddpm_core.errors import InputError
from pipelines.runtime.locations import Location, holds_password


def default_uri(storage: Location) -> str:
    """MLFLOW_TRACKING_URI, or an SQLite file in the storage folder. InputError where that is a URL."""
    given = os.environ.get("MLFLOW_TRACKING_URI")
    if given is None and not isinstance(storage, Path):
        raise InputError(
            f"--storage is {str(storage)!r}, where no SQLite database can lie: give --tracking-uri http://host:port, or set "
            "MLFLOW_TRACKING_URI"
        )
    return given or f"sqlite:///{storage}/mlflow.db"


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
