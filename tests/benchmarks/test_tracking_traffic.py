"""MLflow's traffic: what the record of a checkpoint asks of a server, and 64 writers at once on one with PostgreSQL."""

import collections
import concurrent.futures
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from support.measured_run import FURTHER, measured_run, record
from support.mlflow_server import Server, tracking_server, why_no_postgres

from pipelines.evaluate.subject import Subject
from pipelines.tracking.run import TrackedRun
from pipelines.tracking.tracker import Tracker

REASON = why_no_postgres()
pytestmark = [pytest.mark.bench, pytest.mark.skipif(REASON is not None, reason=REASON or "")]

WRITERS, STEPS = 64, (10, 20)
# Calls a checkpoint of 14 metrics, and those of an evaluation of one, counted likewise on the version without runs of
# checkpoints (commit 9735455): the first time, and the same again.
BEFORE = {"new": (30, 38), "again": (16, 23)}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with tracking_server(tmp_path_factory.mktemp("artifacts")) as (running, _):
        yield running


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The requests that this process makes."""
    made: list[str] = []
    real = requests.Session.request

    def request(session: requests.Session, method: str, url: str, *args: Any, **kwargs: Any) -> Any:
        made.append(f"{method} {url.partition('/api/')[2]}")
        return real(session, method, url, *args, **kwargs)

    monkeypatch.setattr(requests.Session, "request", request)
    return made


def test_a_checkpoints_record_makes_at_most_twice_the_calls_of_before(
    server: Server, calls: list[str], tmp_path: Path
) -> None:
    """Of a checkpoint whose model is there, as the training left it, and of the same again."""
    tracker = Tracker(server.uri, "calls", tmp_path)
    counts: dict[str, list[int]] = {"new": [], "again": []}
    for number in (1, 4):
        distances = {10 * step: 9.0 - step for step in range(1, number + 1)}
        subject = measured_run(tmp_path / str(number), distances, name=f"tiny-{number}", further=FURTHER)
        training = tracker.run("train", subject.run.name, "f", params={"a": "1"}, tags={})
        for checkpoint in subject.checkpoints:
            training.model_of(subject.run.name, checkpoint)
        for which in counts:
            calls.clear()
            record(tracker, subject)
            counts[which].append(len(calls))
    for which, (one, many) in counts.items():
        now, before = ((many - one) / 3, one), BEFORE[which]
        print(
            f"{which}: {now[0]:.1f} calls a checkpoint, {before[0]} before; {one} of an evaluation of one, {before[1]} before"
        )
        assert now[0] <= 2 * before[0]
        assert now[1] <= 2 * before[1]


def write(uri: str, subject: Subject, folder: Path) -> TrackedRun:
    """Record an evaluation as a process of its own would."""
    return record(Tracker(uri, "writers", folder), subject)


def test_64_writers_at_once_lose_nothing(server: Server, tmp_path: Path) -> None:
    distances = [{step: 100.0 + writer + step / 1000 for step in STEPS} for writer in range(WRITERS)]
    subjects = [
        measured_run(tmp_path / str(writer), each, name=f"tiny-{writer}", further=FURTHER)
        for writer, each in enumerate(distances)
    ]
    started = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(WRITERS) as pool:
        writing = [pool.submit(write, server.uri, subject, tmp_path) for subject in subjects]
        runs = [each.result() for each in writing]
    print(f"{WRITERS} writers, {len(STEPS)} checkpoints each: {time.monotonic() - started:.0f} s")
    tracker = Tracker(server.uri, "writers", tmp_path)
    kinds = collections.Counter(run.data.tags["ddpm.kind"] for run in tracker.search(""))
    assert kinds == {"train": WRITERS, "evaluate": WRITERS, "checkpoint": WRITERS * len(STEPS)}
    checkpoints = tracker.search("tags.`ddpm.kind` = 'checkpoint'")
    found: dict[str, dict[int, float]] = collections.defaultdict(dict)
    for run in checkpoints:
        found[run.data.tags["ddpm.run"]][int(run.data.metrics["step"])] = run.data.metrics["fid"]
        assert len(run.data.metrics) == 14 + 2
        assert run.info.status == "FINISHED"
    assert found == {f"tiny-{writer}": each for writer, each in enumerate(distances)}
    for training, each in zip(runs, distances, strict=True):
        metrics = tracker.client.get_run(training.run_id).data.metrics
        assert (metrics["best_fid"], metrics["newest_fid"]) == (each[10], each[20])
    record(tracker, subjects[0])  # the next evaluation says how all stand, whichever of them was last at it before
    (best,) = tracker.search("tags.`ddpm.standing` = 'best'")
    assert (best.data.tags["ddpm.run"], best.data.metrics["step"]) == ("tiny-0", 10)
