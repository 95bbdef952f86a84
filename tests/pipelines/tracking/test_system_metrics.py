"""MLflow's system metrics of a training's machine: there, gone on with, and in nobody's way."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from support.mlflow_server import wait_until

from pipelines.tracking import run as runs
from pipelines.tracking.run import TrackedRun
from pipelines.tracking.tracker import Tracker

CPU = "system/cpu_utilization_percentage"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrackedRun:
    monkeypatch.setattr(runs, "MACHINE_INTERVAL", 0.05)
    monkeypatch.setattr(runs, "MACHINE_PAUSE", 0.05)
    return Tracker(f"sqlite:///{tmp_path}/mlflow.db", "e", tmp_path).run("train", "r", "f", params={"a": "1"}, tags={})


def watchers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "system metrics"]


def test_the_use_of_cpu_and_memory_is_logged_while_it_lasts_and_gone_on_with(run: TrackedRun) -> None:
    for points in (2, 4):
        with run.system_metrics():
            wait_until(lambda: len(run.logged_steps(CPU)) >= points)  # noqa: B023
        wait_until(lambda: not watchers())
        steps = run.logged_steps(CPU)
        assert steps == set(range(len(steps)))
    names = run.client.get_run(run.run_id).data.metrics
    assert {CPU, "system/system_memory_usage_percentage", "system/disk_usage_percentage"} <= set(names)


def test_a_store_that_fails_or_hangs_holds_nobody_up(run: TrackedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    real, asked, release = MlflowClient.get_run, threading.Event(), threading.Event()

    def get_run(client: Any, run_id: str) -> Any:
        if threading.current_thread().name == "system metrics":
            asked.set()
            release.wait()
            raise ConnectionError("away")
        return real(client, run_id)

    monkeypatch.setattr(MlflowClient, "get_run", get_run)
    with run.system_metrics():
        wait_until(asked.is_set)
        began = time.monotonic()
    assert time.monotonic() - began < 1
    release.set()
    wait_until(lambda: not watchers())
    asked.clear()
    with run.system_metrics():  # it fails at once, and is tried again
        wait_until(asked.is_set)
        asked.clear()
        monkeypatch.setattr(MlflowClient, "get_run", real)
        wait_until(lambda: run.logged_steps(CPU))


def test_mlflows_own_switch_turns_them_off(run: TrackedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")
    with run.system_metrics():
        assert not watchers()
