"""Tracking: what is transient is waited for, nothing is made twice, no password is written down, one protocol is one ranking."""

import logging
import os
import re
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException, RestException
from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE
from support.http_server import HttpServer, http_server
from support.processes import IMPORTED
from support.states import new_state

from ddpm_core.checkpoint import Checkpoint, snapshot, write_checkpoint
from ddpm_core.errors import InputError
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.driver import evaluate
from pipelines.storage.layout import Storage
from pipelines.storage.lease import machine
from pipelines.storage.locations import holds_password, location
from pipelines.tracking import retry, sqlite_lease
from pipelines.tracking.client import is_transient, retried
from pipelines.tracking.queries import name_of_run, path_of_model
from pipelines.tracking.registry import Registry
from pipelines.tracking.retry import with_retries, without_retries
from pipelines.tracking.run import TrackedRun
from pipelines.tracking.tracker import Tracker
from pipelines.tracking.uri import UnreachableError, check_answers, check_uri


def tracker(folder: Path) -> Tracker:
    return Tracker(f"sqlite:///{folder}/mlflow.db", "tests", folder)


def new_run(folder: Path, name: str = "a", **params: str) -> TrackedRun:
    return tracker(folder).run("train", name, "f", params={"x": "1", **params}, tags={})


@pytest.mark.slow
def test_a_locked_database_is_waited_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """SQLite itself waits for 20 s; the lock is held until that was in vain."""
    run = new_run(tmp_path)
    other = sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with caplog.at_level(logging.WARNING, "pipelines.tracking.retry"):
        writing = threading.Thread(target=run.log_records, args=([{"step": 3, "loss": 0.5}],))
        writing.start()
        while not caplog.records and writing.is_alive():
            time.sleep(0.1)
        other.execute("COMMIT")
        other.close()
        writing.join()
    said = [record.message for record in caplog.records]
    assert "does not answer ((sqlite3.OperationalError) database is locked): trying again" in said[0]
    assert said[1:] == [f"tracking server 'sqlite:///{tmp_path}/mlflow.db' answers again"]
    (metric,) = run.client.get_metric_history(run.run_id, "loss")
    assert (metric.step, metric.value) == (3, 0.5)


def test_an_error_that_is_not_transient_is_raised_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = new_run(tmp_path)
    gone = TrackedRun(run.client, run.experiment_id, "0" * 32)
    with pytest.raises(InputError, match="refuses what was asked"):
        gone.set_tags({"a": "b"})
    with pytest.raises(InputError, match="refuses what was asked"):
        run.log_records([{"step": 0, "not a name!": 1.0}])
    assert not caplog.records


@dataclass
class FailingServer:
    """A server that is healthy, and whose every other answer has a status that a test may change."""

    server: HttpServer
    status: int = 503

    @property
    def calls(self) -> int:
        return sum(request.path != "/health" for request in self.server.requests)


@pytest.fixture
def failing_server() -> Iterator[FailingServer]:
    with http_server(lambda path: 200 if path == "/health" else failing.status) as server:
        failing = FailingServer(server)
        yield failing


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_server_that_stays_away_is_named_in_a_sentence(
    failing_server: FailingServer, status: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    uri, failing_server.status = failing_server.server.uri, status
    monkeypatch.setattr(retry, "PATIENCE", 0.5)
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.1)
    began = time.monotonic()
    with pytest.raises(InputError, match=rf"tracking server '{uri}' has not answered for 0 s .*: start it or repair"):
        Tracker(uri, "tests", tmp_path)
    assert 0.5 <= time.monotonic() - began < 5
    assert 3 <= failing_server.calls <= 5  # at 0, 0.1, 0.3 and 0.5 s: MLflow does not try by itself


def test_a_refusal_is_not_waited_for(failing_server: FailingServer, tmp_path: Path) -> None:
    failing_server.status = 403
    with pytest.raises(InputError, match="refuses what was asked"):
        Tracker(failing_server.server.uri, "tests", tmp_path)
    assert failing_server.calls == 1


@pytest.mark.parametrize("status", [200, 302, 401, 500])
def test_a_server_is_reached_if_it_answers_its_health_at_all(status: int) -> None:
    with http_server(lambda path: status) as server:
        check_answers(f"{server.uri}/")
        assert [request.path for request in server.requests] == ["/health"]


@pytest.mark.parametrize(
    ("uri", "why"),
    [
        ("http://127.0.0.1:9", "Connection refused"),
        ("http://no.such.host.invalid:5000", "not known|name resolution"),
        ("http://[::bad", "not a valid host"),
    ],
)
def test_an_address_without_a_server_is_refused_after_one_try(uri: str, why: str) -> None:
    with pytest.raises(UnreachableError, match=rf"tracking server '{re.escape(uri)}' cannot be reached .*({why})"):
        check_answers(uri)


@pytest.mark.parametrize(
    ("uri", "why"),
    [
        *((uri, "where MLflow 3 keeps no records: give http") for uri in ("", " ", "runs", "file:///x", "://", "uc:x")),
        *((f"{scheme}://h/x", "where MLflow 3 keeps no records: give http") for scheme in ("ftp", "ws", "s3", "HTTP")),
        *(
            (uri, "names no file")
            for uri in ("sqlite://", "sqlite:///", "sqlite:///:memory:", "sqlite:///x/", "sqlite+a:///x")
        ),
        ("mssql+foo://h", "cannot be opened .*: correct it"),
        ("mysql://h", "cannot be opened .*: install the Python package 'MySQLdb'"),
        ("postgresql+pg8000://h/db", "cannot be opened .*: install the Python package 'pg8000'"),
        ("postgresql+psycopg2://127.0.0.1:1/db", "cannot be reached from here .*Connection refused"),
        ("postgresql+psycopg2://127.0.0.1:x/db", "cannot be (reached|opened)"),
        ("http://[::1", "cannot be reached from here"),
        ("http://h:99999", "cannot be reached from here"),
    ],
)
def test_an_address_of_no_tracking_server_is_refused_at_once(
    uri: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    began = time.monotonic()
    for open_it in (lambda: Tracker(uri, "tests", tmp_path), lambda: name_of_run(uri, "0" * 32)):
        with pytest.raises(InputError, match=why):
            open_it()
    assert time.monotonic() - began < 5
    assert not list(tmp_path.iterdir())


def test_a_relative_sqlite_uri_is_that_of_this_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert check_uri("sqlite:///runs/mlflow.db") == f"sqlite:///{tmp_path}/here/runs/mlflow.db"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert check_uri("sqlite:///~/mlflow.db") == f"sqlite:///{tmp_path}/mlflow.db"


def test_an_alias_leaves_the_default_tracking_uri_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = new_run(tmp_path)
    model_id = run.checkpoint_model("m", 1, "/nowhere", "0")
    for before in ("sqlite:////nowhere/else.db", None):
        if before is None:
            monkeypatch.delenv("MLFLOW_TRACKING_URI")
        else:
            monkeypatch.setenv("MLFLOW_TRACKING_URI", before)
        Registry(run.client, "names").set_alias("best", model_id, run.run_id, {"a": "b"})
        assert os.environ.get("MLFLOW_TRACKING_URI") == before
    assert Registry(run.client, "names").tags("best") == {"a": "b"}
    assert path_of_model(run.client.tracking_uri, "models:/names@best") == "/nowhere"
    assert path_of_model(run.client.tracking_uri, "models:/names/1") == "/nowhere"
    assert path_of_model(run.client.tracking_uri, "models:/names") is None


def test_calls_within_calls_do_not_multiply_the_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "PATIENCE", 0.4)
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.1)
    tries: list[float] = []

    def fail() -> None:
        tries.append(time.monotonic())
        raise ConnectionError("away")

    def inner() -> None:
        with_retries(fail, lambda error: True, "it")

    with pytest.raises(InputError, match="it has not answered"):
        with_retries(inner, lambda error: True, "it")
    assert len(tries) == 4  # at 0, 0.1, 0.3 and 0.4 s
    with without_retries(), pytest.raises(ConnectionError):
        inner()
    assert len(tries) == 5


def test_a_run_whose_making_was_broken_off_is_completed(tmp_path: Path) -> None:
    """Killed between the run and its parameters; or the answer was lost, and the run came into being twice."""
    made = tracker(tmp_path)
    tags = {"ddpm.kind": "train"}
    for _ in range(2):
        made.client.create_run(made.experiment_id, run_name="a", tags=tags)
    first = new_run(tmp_path)
    assert first.client.get_run(first.run_id).data.params == {"x": "1"}
    assert new_run(tmp_path, y="2").run_id == first.run_id
    assert first.client.get_run(first.run_id).data.params == {"x": "1", "y": "2"}
    (run,) = made.client.search_runs([made.experiment_id])
    assert run.info.run_id == first.run_id


def test_a_model_that_came_into_being_twice_is_one_again(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    for _ in range(2):
        run.client.create_logged_model(run.experiment_id, name="m", source_run_id=run.run_id)
    model_id = run.checkpoint_model("m", 1, "/nowhere", "0")
    (model,) = run.client.search_logged_models([run.experiment_id])
    assert (model.model_id, model.status.name) == (model_id, "READY")


def test_records_are_logged_once_and_never_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = new_run(tmp_path)
    batches: list[list[str]] = []
    real = run.client.log_batch

    def log_batch(run_id: str, metrics: list[object]) -> None:
        batches.append([metric.key for metric in metrics])  # type: ignore[attr-defined]
        real(run_id, metrics=metrics)

    monkeypatch.setattr(run.client, "log_batch", log_batch)
    records = [{"step": step, **{f"m{i}": float(i) for i in range(7)}} for step in range(300)]
    for _ in range(2):  # the answer to the first was lost
        run.log_records(iter(records), timestamp=17)
    assert [len(batch) % 7 for batch in batches] == [0] * 6
    for i in range(7):
        assert len(run.client.get_metric_history(run.run_id, f"m{i}")) == 300


def two_checkpoints(folder: Path) -> list[Checkpoint]:
    return [write_checkpoint(folder, snapshot(new_state(step)), {"w": step}) for step in (1, 2)]


def test_models_are_ranked_under_one_protocol(tmp_path: Path) -> None:
    """Under the first protocol step 1 is better, under the second step 2, by numbers below all of the first's."""
    owner = new_run(tmp_path)
    values = {"111-one": (0.5, 0.9), "222-two": (0.2, 0.1)}
    for protocol, distances in values.items():
        run = tracker(tmp_path).run("evaluate", protocol, protocol, params={"x": "1"}, tags={})
        assert "ddpm.code_version" in run.client.get_run(run.run_id).data.tags
        for checkpoint, distance in zip(two_checkpoints(tmp_path / "run"), distances, strict=True):
            facts = {"fd_pixels": distance}
            for new in (True, False):
                assert run.log_result(owner, "a", checkpoint, "ema", facts, dataset="digits", protocol=protocol) is new
    for protocol, best in (("111-one", "1"), ("222-two", "2")):
        where = {"dataset_name": f"digits-{protocol[:6]}", "dataset_digest": protocol}
        ranked = owner.client.search_logged_models(
            [owner.experiment_id],
            datasets=[where],
            order_by=[{"field_name": "metrics.fd_pixels", **where, "ascending": True}],
        )
        assert len(ranked) == 2
        assert ranked[0].params["step"] == best


def test_a_result_that_only_the_run_has_is_given_to_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = new_run(tmp_path)
    checkpoint = two_checkpoints(tmp_path / "run")[0]
    owner.log_records([{"step": 1, "fd_pixels": 0.5}])  # as a kill between the two leaves it
    assert owner.log_result(owner, "a", checkpoint, "ema", {"fd_pixels": 0.5}, dataset="d", protocol="p")
    (model,) = owner.client.search_logged_models([owner.experiment_id])
    assert [metric.value for metric in model.metrics] == [0.5]


@pytest.mark.parametrize(
    ("uri", "instead"),
    [
        ("http://alice:hunter2@tracking:5000", "MLFLOW_TRACKING_PASSWORD"),
        ("https://:hunter2@tracking", "MLFLOW_TRACKING_PASSWORD"),
        ("postgresql://alice:hunter2@database/mlflow", "PGPASSWORD or ~/.pgpass"),
        ("postgresql+psycopg2://alice:p/hunter2@database/mlflow", "PGPASSWORD or ~/.pgpass"),
        ("postgresql://database/mlflow?user=alice&password=hunter2", "PGPASSWORD or ~/.pgpass"),
    ],
)
def test_a_tracking_uri_with_a_password_is_refused_unrepeated(uri: str, instead: str, tmp_path: Path) -> None:
    config = EvaluateConfig(run="a", storage=str(tmp_path), tracking_uri=uri)
    for call in (lambda: Tracker(uri, "e", tmp_path), lambda: name_of_run(uri, "a"), lambda: evaluate(config)):
        with pytest.raises(InputError, match=instead) as raised:
            call()
        assert "hunter2" not in str(raised.value)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("url", ["sftp://alice:hunter2@host/runs", "https://host/shards?X-Amz-Signature=hunter2"])
def test_a_storage_url_with_a_password_is_refused_unrepeated(url: str) -> None:
    with pytest.raises(InputError, match="--storage is a URL that holds a password") as raised:
        location(url, option="--storage")
    assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize("uri", ["http://host:5000/a@b", "postgresql://alice@host:5432/db", "memory://a/b?x=1"])
def test_a_uri_without_a_password_is_not_taken_for_one_with(uri: str) -> None:
    assert not holds_password(uri)


ELSEWHERE = """
import sys
from pathlib import Path
from pipelines.tracking import sqlite_lease
sqlite_lease.machine = lambda: "elsewhere"
sqlite_lease.claim(Path(sys.argv[1]))
print("writing", flush=True)
sys.stdin.read()
"""


def writer_elsewhere(database: Path) -> subprocess.Popen[str]:
    """A process that writes to the database from what it says is another machine, until its standard input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", ELSEWHERE, str(database)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    return process


def test_sqlite_is_written_to_from_one_machine(tmp_path: Path) -> None:
    database = tmp_path / "mlflow.db"
    elsewhere = writer_elsewhere(database)
    with pytest.raises(InputError, match=r"by the machine 'elsewhere' too.*start an `mlflow server` and set MLFLOW_TR"):
        tracker(tmp_path)
    assert not database.exists()
    elsewhere.communicate()  # it ends, and leaves nothing
    assert not any(tmp_path.iterdir())
    run = new_run(tmp_path)
    new_run(tmp_path)
    with pytest.raises(subprocess.CalledProcessError) as raised:
        subprocess.run([sys.executable, "-c", ELSEWHERE, database], check=True, stderr=subprocess.PIPE, text=True)
    assert machine() in raised.value.stderr
    run.finish()


def test_a_database_below_a_file_is_refused_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"^--tracking-uri is '.*', which is no path here \(Not a directory\)"):
        tracker(tmp_path / "file")


def test_the_claim_of_a_machine_that_is_gone_expires(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    database = tmp_path / "mlflow.db"
    killed = writer_elsewhere(database)
    killed.kill()
    killed.communicate()
    (left,) = (tmp_path / "mlflow.db.writers").iterdir()
    with pytest.raises(InputError, match="if 'elsewhere' no longer runs, wait 3 minutes"):
        sqlite_lease.claim(database)
    old = left.stat().st_mtime - sqlite_lease.EXPIRES_AFTER - 1
    os.utime(left, (old, old))
    sqlite_lease.claim(database)
    assert not left.exists()


def test_a_writer_renews_its_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_lease, "RENEWED_EVERY", 0.05)
    monkeypatch.setattr(sqlite_lease, "_renewing", -1)  # a thread of this test's own
    sqlite_lease.claim(tmp_path / "mlflow.db")
    (claim,) = (tmp_path / "mlflow.db.writers").iterdir()
    os.utime(claim, (0, 0))
    end = time.monotonic() + 30
    while claim.stat().st_mtime == 0:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_errors_of_an_absent_or_busy_server_are_transient() -> None:
    calls: list[Callable[[], Exception]] = [
        lambda: RestException({"error_code": "TEMPORARILY_UNAVAILABLE"}),
        lambda: MlflowException("API request to http://host failed with exception ..."),
        lambda: RestException({"error_code": "REQUEST_LIMIT_EXCEEDED"}),
    ]
    assert all(is_transient(call()) for call in calls)
    for code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "PERMISSION_DENIED", "UNAUTHENTICATED"):
        assert not is_transient(RestException({"error_code": code}))
    assert not is_transient(MlflowException("a bug"))
    assert not is_transient(OSError(28, "no space"))


SQLITE_ERRORS = {
    "(sqlite3.OperationalError) database is locked": True,
    "(sqlite3.IntegrityError) UNIQUE constraint failed: latest_metrics.key, latest_metrics.run_uuid": True,
    "(sqlite3.OperationalError) database or disk is full": False,
    "(sqlite3.OperationalError) attempt to write a readonly database": False,
    "(sqlite3.OperationalError) unable to open database file": False,
    "(sqlite3.OperationalError) disk I/O error": False,
    "(sqlite3.DatabaseError) database disk image is malformed": False,
}


@pytest.mark.parametrize("text", SQLITE_ERRORS)
def test_of_sqlites_errors_only_locks_and_collisions_are_tried_again(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.01)
    calls = 0

    @retried
    def call(holder: TrackedRun) -> str:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise MlflowException(text, TEMPORARILY_UNAVAILABLE)
        return "answer"

    run = TrackedRun(MlflowClient(f"sqlite:///{tmp_path}/none.db"), "0", "0" * 32)
    if SQLITE_ERRORS[text]:
        assert call(run) == "answer"
    else:
        with pytest.raises(InputError, match=rf"none.db' refuses what was asked \({re.escape(text)}\): make room"):
            call(run)
        assert calls == 1


WRITE = """
import sys
from pathlib import Path
from pipelines.runtime.environment import prepare
prepare()
from pipelines.tracking.tracker import Tracker
run = Tracker(f"sqlite:///{sys.argv[1]}/mlflow.db", "tests", Path(sys.argv[1])).run("train", "a", "f", params={}, tags={})
print("ready", flush=True)
sys.stdin.readline()
for step in range(20):
    run.log_records([{"step": step, f"metric_{step % 4}": float(sys.argv[2])}])
"""


@pytest.mark.slow
def test_nothing_that_sixteen_processes_write_at_once_is_lost(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITE, str(tmp_path), str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": IMPORTED},
        )
        for number in range(16)
    ]
    assert [writer.stdout.readline() for writer in writers if writer.stdout] == ["ready\n"] * 16
    for writer in writers:
        assert writer.stdin
        writer.stdin.write("\n")
        writer.stdin.flush()
    assert [writer.wait(300) for writer in writers] == [0] * 16
    points = [
        (metric.step, metric.value)
        for number in range(4)
        for metric in run.client.get_metric_history(run.run_id, f"metric_{number}")
    ]
    assert sorted(points) == [(step, float(number)) for step in range(20) for number in range(16)]


def test_a_deleted_experiment_is_named_with_what_brings_it_back(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    run.client.delete_experiment(run.experiment_id)
    uri, name = run.client.tracking_uri, run.client.get_experiment(run.experiment_id).name
    with pytest.raises(
        InputError, match=f"experiment '{name}' was deleted in MLflow: .*--experiment-id {run.experiment_id}"
    ):
        Tracker(uri, name, tmp_path)


@pytest.mark.parametrize(
    "name", ["a/b", "../x", "/elsewhere/x", ".", "..", "x\ny", "'q' {y}", "a%2Fb", "é" * 250, "b" * 500]
)
def test_any_name_of_an_experiment_is_one_folder_of_the_storage(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, name: str
) -> None:
    database = tmp_path_factory.getbasetemp() / "any-name" / "mlflow.db"  # one for all names: it takes seconds to make
    storage = Storage(tmp_path)
    tracker = Tracker(f"sqlite:///{database}", name, storage.artifacts(name))
    tracker.run("train", "x", "1", params={"a": "1"}, tags={}).log_json("config.json", 1)
    (made,) = (tmp_path / "mlartifacts").iterdir()
    assert [path.name for path in made.rglob("*.json")] == ["config.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["mlartifacts"]
    assert storage.nights(name).parent == tmp_path / "nightly"
    assert storage.artifacts(name) != storage.artifacts(f"{name}x")


@pytest.mark.parametrize("name", ["church's", "v1.5", 'a"b', "a:b/c%d"])
def test_a_checkpoint_of_any_name_has_one_model(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    run = new_run(tmp_path_factory.getbasetemp() / "any-name")
    first = run.checkpoint_model(f"{name}-step-1", 1, "/x", "0" * 64)
    assert run.checkpoint_model(f"{name}-step-1", 1, "/x", "0" * 64) == first
