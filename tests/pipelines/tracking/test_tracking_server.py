"""Tracking through a real server on PostgreSQL, while both are killed and started again: everything once, nothing lost."""

import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from support.mlflow_server import (
    STEPS,
    Postgres,
    Server,
    outages,
    tracking_server,
    wait_until,
    why_no_postgres,
    write_runs,
)
from support.processes import IMPORTED
from support.states import new_state
from support.training import NETWORK, OPTIM

from ddpm_core.checkpoint import snapshot, write_checkpoint
from pipelines.nightly import alarms
from pipelines.nightly.config import NightlyConfig
from pipelines.nightly.driver import nightly
from pipelines.shards.dataset import ShardedDataset
from pipelines.tracking import retry
from pipelines.tracking.queries import path_of_model
from pipelines.tracking.tracker import Tracker
from pipelines.train.config import config_for
from pipelines.train.driver import train
from pipelines.train.follower import Follower, unsent_entries, unsent_folder
from pipelines.train.stop import StopRequest

REASON = why_no_postgres()
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Postgres]]:
    with tracking_server(tmp_path_factory.mktemp("artifacts")) as both:
        yield both


WRITER = """
import sys
from support.mlflow_server import outages, write_runs
tracker = outages(sys.argv[1])
print("begun", flush=True)
write_runs(tracker, "process")
"""


@pytest.mark.slow
def test_what_is_written_while_the_servers_die_is_there_exactly_once(
    servers: tuple[Server, Postgres], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, postgres = servers
    monkeypatch.setattr(retry, "LONGEST_PAUSE", 1.0)
    write_runs(outages(server.uri), "first")
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, server.uri],
        env={**os.environ, "PYTHONPATH": IMPORTED},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"  # a server that is away at the start is a refusal
    done = threading.Event()

    def said(what: str) -> int:
        return sum(what in record.message for record in caplog.records)

    def has_failed(times: int) -> bool:
        return said("does not answer") >= times

    def is_over() -> bool:
        return said("does not answer") == said("answers again")

    with caplog.at_level(logging.WARNING, "pipelines.tracking.retry"), ThreadPoolExecutor(4) as writers:
        trackers = [outages(server.uri) for _ in range(4)]
        threads = [writers.submit(write_runs, each, f"thread-{i}", done) for i, each in enumerate(trackers)]
        try:
            for _ in range(2):
                for thing, stop in ((server, server.kill), (postgres, postgres.stop)):
                    seen = said("does not answer") + 1
                    stop()
                    wait_until(partial(has_failed, seen))
                    thing.start()
                    wait_until(is_over)
        finally:
            done.set()
        names = ["first-0", "process-0", *(name for thread in threads for name in thread.result())]
    process.communicate()
    assert process.returncode == 0

    client = MlflowClient(server.uri)
    experiment = client.get_experiment_by_name("outages").experiment_id
    runs = client.search_runs([experiment])
    assert Counter(run.info.run_name for run in runs) == Counter(names)
    models = Counter(model.name for model in all_models(client, experiment))
    assert models == Counter(f"{name}-step-{step}" for name in names for step in range(0, STEPS, 4))
    for run in runs:
        assert run.data.params == {"a": "1", "b": "2"}
        assert run.info.status == "FINISHED"
        for key in ("loss", "lr"):
            assert [metric.step for metric in client.get_metric_history(run.info.run_id, key)] == list(range(STEPS))


def all_models(client: MlflowClient, experiment: str) -> list[Any]:
    models, token = [], None
    while token != "":
        page = client.search_logged_models([experiment], page_token=token)
        models += list(page)
        token = page.token or ""
    return models


@pytest.mark.slow
def test_a_training_goes_on_and_stops_when_asked_while_the_server_is_away(
    servers: tuple[Server, Postgres], tmp_path: Path
) -> None:
    server, _ = servers
    run = Tracker(server.uri, "training", tmp_path).run("train", tmp_path.name, "f", params={"a": "1"}, tags={})
    checkpoint = write_checkpoint(tmp_path, snapshot(new_state(4)), {})
    outbox, stop = queue.Queue[Any](), queue.Queue[Any]()
    lines: list[str] = []
    unsent = unsent_entries(run, tmp_path, lines.append)
    unsent.start()
    settings = config_for("tiny", shards="/nowhere", steps=40)
    values = {"grad_norm": 1.0, "lr": 1e-4, "images_per_second": 10.0}
    with StopRequest() as request, Follower("r", settings, outbox, stop, request, unsent, set(), lines.append):
        outbox.put({"kind": "start", "step": 0, "workers": 1, "peak": None, "micro_batch": None})
        server.kill()
        for step in range(1, 41):
            outbox.put({"kind": "record", "record": {"step": step, "loss": 1 / step, **values}})
        outbox.put({"kind": "samples", "step": 20, "png": b"picture"})
        outbox.put({"kind": "saved", "step": 2})  # deleted again by now
        outbox.put({"kind": "saved", "step": 4})
        signal.raise_signal(signal.SIGTERM)
        assert stop.get(timeout=10) == "stop"
        wait_until(lambda: len(unsent) == 43)
    began = time.monotonic()
    assert unsent.close(1.0) == 43
    assert time.monotonic() - began < 10
    assert sum("does not answer" in line for line in lines) == 1

    server.start()
    unsent_entries(run, tmp_path, lines.append)  # the same command again
    assert not unsent_folder(tmp_path).exists()
    history = run.client.get_metric_history(run.run_id, "train/loss")
    assert sorted((metric.step, metric.value) for metric in history) == [(step, 1 / step) for step in range(1, 41)]
    (model,) = run.client.search_logged_models([run.experiment_id])
    assert model.tags["ddpm.path"] == str(checkpoint.path)
    picture = run.client.download_artifacts(run.run_id, "training/samples-00000020.png", str(tmp_path))
    assert Path(picture).read_bytes() == b"picture"


@pytest.mark.slow
def test_what_waits_is_sent_as_soon_as_the_server_is_back(servers: tuple[Server, Postgres], tmp_path: Path) -> None:
    server, _ = servers
    run = Tracker(server.uri, "training", tmp_path).run("train", tmp_path.name, "f", params={"a": "1"}, tags={})
    lines: list[str] = []
    unsent = unsent_entries(run, tmp_path, lines.append)
    unsent.start()
    server.kill()
    unsent.put({"call": "records", "records": [{"step": 1, "loss": 0.5}], "timestamp": 1})
    wait_until(lambda: lines)
    server.start()
    wait_until(lambda: not unsent)
    assert unsent.close(60.0) == 0
    assert [line.split("(")[0] for line in lines] == [
        "tracking: MLflow does not answer ",
        "tracking: MLflow answers again",
    ]
    assert run.logged_steps("train/loss") == {1}


@pytest.mark.slow
def test_a_training_ends_without_its_server_and_a_night_finds_its_entries(
    servers: tuple[Server, Postgres], digits: ShardedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, _ = servers
    monkeypatch.setattr("pipelines.train.session.LAST_WAIT", 2.0)
    monkeypatch.setattr(alarms, "LEAST_SPREAD", 0.0)  # samples after four steps look wrong, and rightly so
    monkeypatch.setattr(alarms, "MOST_SATURATION", 1.0)
    settings = config_for(
        "tiny",
        shards=str(digits.path),
        storage=str(tmp_path),
        unet=NETWORK,
        optim=OPTIM,
        steps=4,
        checkpoint_every=2,
        log_every=1,
        tracking_uri=server.uri,
        experiment="whole",
    )
    lines: list[str] = []

    def listen(line: str) -> None:
        lines.append(line)
        if " from step 0 on " in line:
            server.kill()

    result = train(settings, listen)
    assert [checkpoint.step for checkpoint in result.checkpoints] == [2, 4]
    (line,) = (line for line in lines if "entries for MLflow wait" in line)
    assert "give the same command again" in line
    server.start()
    train(settings, lines.append)
    client = MlflowClient(server.uri)
    run = client.get_run(result.run_id)
    assert run.info.status == "FINISHED"
    assert sorted(metric.step for metric in client.get_metric_history(result.run_id, "train/loss")) == [1, 2, 3, 4]
    assert len(all_models(client, run.info.experiment_id)) == 2

    tonight = NightlyConfig(
        storage=str(tmp_path),
        tracking_uri=server.uri,
        experiment="whole",
        extractor="pixels",
        samples=60,
        chunk_size=10,
        batch_size=10,
        sampler_steps=3,
    )
    night = nightly(tonight, lines.append)
    assert len(night.evaluated) == 2
    (champion,) = night.champions
    address = f"models:/{champion.model}@{champion.alias}"
    assert path_of_model(server.uri, address) == str(champion.checkpoint.path)
    version = client.get_model_version_by_alias(champion.model, champion.alias)
    assert version.tags["ddpm.protocol"] == champion.evaluation.protocol.fingerprint
    assert version.run_id == result.run_id
    assert nightly(tonight, lines.append).evaluated == []
