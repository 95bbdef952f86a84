"""Calls to MLflow, made again while its server or database is away."""

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from requests.exceptions import RequestException
from sqlalchemy.exc import InterfaceError, OperationalError

from ddpm_core.errors import InputError, one_line
from pipelines.tracking.retry import with_retries

TRANSIENT_CODES = {"TEMPORARILY_UNAVAILABLE", "DEADLINE_EXCEEDED", "REQUEST_LIMIT_EXCEEDED", "RESOURCE_EXHAUSTED"}
REFUSALS = {
    "INVALID_PARAMETER_VALUE",
    "INVALID_STATE",
    "BAD_REQUEST",
    "PERMISSION_DENIED",
    "UNAUTHENTICATED",
    "ENDPOINT_NOT_FOUND",
    "RESOURCE_DOES_NOT_EXIST",
    "RESOURCE_LIMIT_EXCEEDED",
}

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class HasClient(Protocol):
    """Whatever holds a client of MLflow."""

    @property
    def client(self) -> MlflowClient: ...


Holder = TypeVar("Holder", bound=HasClient)


def is_transient(error: Exception) -> bool:
    """Whether a call may succeed if it is made again: a server or database that is away, busy or locked, or where another
    process was quicker."""
    text = str(error)
    if "(sqlite3." in text:  # a full or read-only disk is waited for by nobody
        return "is locked" in text or "UNIQUE constraint failed" in text
    if isinstance(error, MlflowException):
        # What MLflow's HTTP client makes of a refused connection, a timeout, a 429 or a 5xx; elsewhere this code is a bug.
        failed_request = error.error_code == "INTERNAL_ERROR" and "API request to" in text
        # Two processes that insert the same row: of the second, the repeated call finds it there.
        collided = "duplicate key value" in text or "UNIQUE constraint failed" in text
        return failed_request or collided or error.error_code in TRANSIENT_CODES
    if isinstance(error, RequestException):
        return error.response is None or error.response.status_code >= 500 or error.response.status_code == 429
    # SQLAlchemy's own, when MLflow makes its first connection to a database.
    return isinstance(error, OperationalError | InterfaceError)


def retried(
    method: Callable[Concatenate[Holder, Arguments], Result],
) -> Callable[Concatenate[Holder, Arguments], Result]:
    """A method, or a function whose first argument holds a client, that is called again while the server is away. Whatever
    it does must be possible twice: an answer may have been lost. What the server refuses for good is an InputError."""

    @functools.wraps(method)
    def call(holder: Holder, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        what = f"tracking server {holder.client.tracking_uri!r}"
        try:
            return with_retries(lambda: method(holder, *args, **kwargs), is_transient, what)
        except (MlflowException, OperationalError) as error:
            if "(sqlite3." in str(error):
                remedy = "make room on its disk, or make it writable"
            elif isinstance(error, MlflowException) and error.error_code in REFUSALS:
                remedy = "correct the name or the access it speaks of"
            else:
                raise
            raise InputError(
                f"{what} refuses what was asked ({one_line(error)}): {remedy}, then give the same command again"
            ) from error

    return call
