"""What MLflow and Ray read when they are imported or started, set before that: this module imports neither."""

import logging
import os

VARIABLES = {
    "MLFLOW_DISABLE_TELEMETRY": "true",  # it calls home, and leaves an id of the installation in the home folder
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",  # one for every small file; jobs print lines of their own
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # MLflow's 7 take minutes; pipelines.tracking.retry tries again instead
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",  # MLflow's 120 s are long for somebody who waits for the end of a training
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # two lines for every run that ends, each checkpoint's among them
    "MLFLOW_LOGGING_LEVEL": "WARNING",  # INFO announces every table that a new database gets
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # Ray Train's 2 s are how long a dead worker goes unseen
    "RAY_AIR_NEW_OUTPUT": "0",  # Ray Tune prints tables that no verbosity silences
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # ctrl-C would be kept from the command, which could not tell it from trials that ended
    "RAY_worker_maximum_startup_concurrency": "16",  # below it, Ray warns about every actor without a CPU of its own
}


def prepare() -> None:
    """Set what the user has not set. Called first in a process: the Ray and the commands that it starts inherit the variables,
    but workers of a Ray that was there before have that one's."""
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
    database = logging.getLogger("mlflow.store.db.utils")
    if database.level == logging.NOTSET:
        database.setLevel(logging.CRITICAL)  # a traceback for every lock and lost connection, which retry waits out
