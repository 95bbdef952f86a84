"""Where MLflow's records are kept, as a person gives it."""

import os
from pathlib import Path
from typing import Any

import requests
from urllib3.exceptions import HTTPError

from ddpm_core.errors import InputError, one_line
from pipelines.runtime.layout import Storage
from pipelines.runtime.locations import holds_password
from pipelines.runtime.options import StorageOptions

HEALTH_TIMEOUT = 10.0  # seconds


class UnreachableError(InputError):
    """No tracking server answers at an address."""


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


def sqlite_file(uri: str) -> Path | None:
    """The file of an SQLite URI, absolute, None for another URI."""
    return Path(uri.removeprefix("sqlite:///")).absolute() if uri.startswith("sqlite:///") else None


def check_no_password(uri: str) -> None:
    """Raises InputError for a tracking URI with a password, which would be a parameter of every run."""
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


def check_answers(uri: str) -> None:
    """Raises UnreachableError if no server answers at an http URI, after one try: MLflow's own calls are made again for
    minutes. Any answer will do; whether it lets us in, MLflow will say."""
    try:
        requests.get(f"{uri.rstrip('/')}/health", timeout=HEALTH_TIMEOUT, allow_redirects=False)
    except (OSError, ValueError) as error:
        raise UnreachableError(
            f"tracking server {uri!r} cannot be reached from here ({one_line(first_cause(error))}): start it, or give the "
            "address that this machine knows it by"
        ) from error


def first_cause(error: BaseException) -> BaseException:
    """What requests and urllib3 wrap, such as the refused connection, else the error itself."""
    while isinstance(error, requests.RequestException | HTTPError) and error.__context__ is not None:
        error = error.__context__
    return error
