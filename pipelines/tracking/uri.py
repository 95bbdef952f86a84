"""Where MLflow's records are kept, as a person gives it."""

import os
from pathlib import Path

import requests
from urllib3.exceptions import HTTPError

from ddpm_core.errors import InputError, one_line
from pipelines.runtime.options import StorageOptions
from pipelines.storage.layout import Storage
from pipelines.storage.locations import absolute, holds_password

SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql")
ANSWER_TIMEOUT = 10  # seconds


class UnreachableError(InputError):
    """No tracking server answers at an address."""


def tracking_uri(options: StorageOptions, storage: Storage) -> str:
    """The URI that the options give, else MLFLOW_TRACKING_URI, else an SQLite file in the storage. Raises InputError if that
    is a URL."""
    given = options.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    if given is None and not isinstance(storage.root, Path):
        raise InputError(
            f"--storage is {str(storage.root)!r}, where no SQLite database can lie: give --tracking-uri http://host:port, or "
            "set MLFLOW_TRACKING_URI"
        )
    return f"sqlite:///{storage.database}" if given is None else check_uri(given)


def check_uri(uri: str) -> str:
    """A tracking URI as it was given, an SQLite file's with an absolute path. Raises InputError for what MLflow keeps no records
    in, or a URI with a password."""
    check_no_password(uri)
    scheme = uri.partition("://")[0].partition("+")[0]
    if "://" not in uri or scheme not in SCHEMES:
        raise InputError(
            f"tracking URI is {uri!r}, where MLflow 3 keeps no records: give http://host:port, sqlite:////absolute/path.db or "
            "postgresql://host/name"
        )
    if scheme != "sqlite":
        return uri
    path = uri.removeprefix("sqlite:///")
    if path == uri or path in ("", ":memory:") or path.endswith("/"):
        raise InputError(f"tracking URI is {uri!r}, which names no file: give sqlite:////absolute/path.db")
    return f"sqlite:///{absolute(path, option='--tracking-uri')}"


def sqlite_file(uri: str) -> Path | None:
    """The file of an SQLite URI, None for another URI."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


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
    """Raises UnreachableError if no server answers at a URI, after one try: MLflow's own calls are made again for minutes. Any
    answer of an http server will do; whether it lets us in, MLflow will say. InputError if the driver of a database is missing.
    """
    if uri.startswith("sqlite:"):
        return
    import sqlalchemy  # here: --help need not wait for it

    try:
        if uri.startswith("http"):
            requests.get(f"{uri.rstrip('/')}/health", timeout=ANSWER_TIMEOUT, allow_redirects=False)
        else:
            limit = {} if uri.startswith("mssql") else {"connect_timeout": ANSWER_TIMEOUT}
            sqlalchemy.create_engine(uri, connect_args=limit).connect().close()
    except (ImportError, sqlalchemy.exc.ArgumentError) as error:  # NoSuchModuleError is one
        driver = getattr(error, "name", None)
        remedy = f"install the Python package {driver!r}" if driver else "correct it"
        raise InputError(f"tracking URI is {uri!r}, which cannot be opened ({one_line(error)}): {remedy}") from error
    except (OSError, ValueError, sqlalchemy.exc.SQLAlchemyError) as error:
        raise UnreachableError(
            f"tracking server {uri!r} cannot be reached from here ({one_line(first_cause(error))}): start it, or give the "
            "address that this machine knows it by"
        ) from error


def first_cause(error: BaseException) -> BaseException:
    """What requests and urllib3 wrap, such as the refused connection, else the error itself."""
    while isinstance(error, requests.RequestException | HTTPError) and error.__context__ is not None:
        error = error.__context__
    return error
