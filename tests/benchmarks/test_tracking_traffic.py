"""MLflow's traffic: what an evaluation asks of a server, and 64 writers at once on a real one with PostgreSQL."""

import collections
import concurrent.futures
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow.utils import rest_utils
from support.measured_run import measured_run, record
from support.mlflow_server import Server, tracking_server, why_no_postgres

from pipelines.tracking.tracker import Tracker

REASON = why_no_postgres()
pytestmark = [pytest.mark.bench, pytest.mark.skipif(REASON is not None, reason=REASON or "")]

WRITERS, STEPS = 64, (10, 20, 30)
BEFORE = 0.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with tracking_server(tmp_path_factory.mktemp("artifacts")) as (running, _):
        yield running


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> collections.Counter[str]:
    """The requests that MLflow's clients in this process make, by path."""
    counted: collections.Counter[str] = collections.Counter()
    real = rest_utils.http_request

    def http_request(host: Any, endpoint: str, method: str, *args: Any, **kwargs: Any) -> Any:
        counted[f"{method} {endpoint}"] += 1
        return real(host, endpoint, method, *args, **kwargs)

    monkeypatch.setattr(rest_utils, "http_request", http_request)
    return counted
