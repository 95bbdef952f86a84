"""The first use of a storage: many at once, kills, and what lies there already."""

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.tracking._tracking_service import utils as mlflow_utils
from support.processes import IMPORTED

from ddpm_core.errors import InputError
from pipelines.storage.layout import Storage
from pipelines.tracking.database import ensure_database
from pipelines.tracking.queries import path_of_model
from pipelines.tracking.run import TrackedRun
from pipelines.tracking.tracker import Tracker

MAKE = """
import sys
from pathlib import Path
from pipelines.tracking.database import ensure_database
print("ready", flush=True)
sys.stdin.readline()
ensure_database(Path(sys.argv[1]))
print("made", flush=True)
"""


def maker(database: Path) -> subprocess.Popen[str]:
    """A process that makes the database when it gets a line."""
    command = [sys.executable, "-c", MAKE, str(database)]
    environment = {**os.environ, "PYTHONPATH": IMPORTED}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def start(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def test_several_first_users_of_a_storage_all_succeed(tmp_path: Path) -> None:
    processes = [maker(tmp_path / "mlflow.db") for _ in range(4)]
    for process in processes:
        start(process)
    assert [process.communicate(timeout=120)[0] for process in processes] == ["made\n"] * 4
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    assert client.get_experiment("0").artifact_location == (tmp_path / "mlartifacts" / "0").as_uri()


def test_a_kill_at_any_moment_leaves_a_database_or_none(tmp_path: Path) -> None:
    generator = random.Random(0)
    for number in range(4):
        database = tmp_path / str(number) / "mlflow.db"
        process = maker(database)
        start(process)
        time.sleep(generator.uniform(0.05, 1.0))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        Tracker(f"sqlite:///{database}", "church", database.parent / "mlartifacts" / "church")
        assert not list(database.parent.glob(".mlflow.db.tmp*"))


def test_what_a_killed_migration_left_is_recognised_and_said(tmp_path: Path) -> None:
    database = tmp_path / "mlflow.db"
    ensure_database(database)
    with sqlite3.connect(database) as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'bd07f7e963c5'")
    connection.close()
    with pytest.raises(
        InputError, match="was left half-made by a process that was killed, and holds no runs: delete it"
    ):
        ensure_database(database)
    with sqlite3.connect(database) as connection:
        connection.execute("INSERT INTO runs (run_uuid) VALUES ('a')")
    connection.close()
    with pytest.raises(
        InputError, match="is of another version of MLflow: make a copy of it, then run `mlflow db upgrade"
    ):
        ensure_database(database)


@pytest.mark.parametrize("content", [b"not a database at all" * 100, b"SQLite format 3\0" + bytes(4096)])
def test_another_file_in_its_place_is_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    database = tmp_path / "mlflow.db"
    database.write_bytes(content)
    with pytest.raises(InputError, match=r"^tracking database '.*' (is no SQLite database|was left half-made)"):
        ensure_database(database)
    assert database.read_bytes() == content


def test_a_storage_below_a_file_is_refused_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"^tracking database '.*' cannot be made \((File exists|Not a directory)\)"):
        ensure_database(tmp_path / "file" / "mlflow.db")


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage with a training's run in it."""
    path = tmp_path_factory.mktemp("made") / "storage"
    tracked(path, "church")
    return path


@pytest.mark.parametrize("names", [("runs", "moved"), ("old runs", "new räume/runs"), ("a", "a/a"), ("a/a", "b")])
def test_a_moved_storage_is_found_where_it_is_and_nothing_is_made_where_it_was(
    storage: Path, tmp_path: Path, names: tuple[str, str]
) -> None:
    old, new = (tmp_path / name for name in names)
    shutil.copytree(storage, old)
    tracked(old, "church").log_json("config.json", {"a": 1})
    moved_away = tmp_path / "away"
    shutil.move(old, moved_away)
    new.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(moved_away, new)
    assert path_of_model(f"sqlite:///{new}/mlflow.db", "models:/none@x") is None  # reading brings them up to date too
    run = tracked(new, "church")
    assert run.read_json("config.json") == {"a": 1}
    run.log_json("more.json", 2)
    assert sorted(path.name for path in new.rglob("*.json")) == ["config.json", "more.json"]
    assert not (old / "mlartifacts").exists()
    model = run.client.get_logged_model(run.checkpoint_model("m", 1, new / "train/church/step-1", "0" * 64))
    assert Path(model.tags["ddpm.path"]) == new / "train/church/step-1"
    parameters = run.client.get_run(run.run_id).data.params
    assert parameters == {"storage": str(new), "shards": f"{new}/shards", "near": f"{storage}-near/x"}


def test_a_copy_says_where_it_lies_and_the_original_where_that_does(storage: Path, tmp_path: Path) -> None:
    original = tracked(storage, "church")
    shutil.copytree(storage, tmp_path / "two")
    copy = tracked(tmp_path / "two", "church")
    copy.log_json("of-copy.json", 1)
    assert copy.read_json("of-copy.json") == 1
    assert tracked(storage, "church").read_json("of-copy.json") is None
    assert original.client.get_run(original.run_id).data.params["storage"] == str(storage)


def test_a_second_way_to_one_storage_changes_nothing(storage: Path, tmp_path: Path) -> None:
    run = tracked(storage, "church")
    (tmp_path / "link").symlink_to(storage)
    ensure_database(tmp_path / "link" / "mlflow.db")
    assert run.client.get_run(run.run_id).data.params["storage"] == str(storage)


def test_a_moved_storage_that_cannot_be_written_to_is_said(storage: Path, tmp_path: Path) -> None:
    shutil.copytree(storage, tmp_path / "new")
    with sqlite3.connect(tmp_path / "new" / "mlflow.db") as connection:
        connection.execute(
            "CREATE TRIGGER full BEFORE UPDATE ON experiments BEGIN SELECT RAISE(ABORT, 'disk full'); END"
        )
    connection.close()
    with pytest.raises(InputError, match=r"was moved here from '.*/storage', .*disk full\): make it writable"):
        ensure_database(tmp_path / "new" / "mlflow.db")


def test_the_default_experiment_of_an_earlier_version_lies_in_the_storage_from_now_on(
    storage: Path, tmp_path: Path
) -> None:
    shutil.copytree(storage, tmp_path / "old")
    run = tracked(tmp_path / "old", "church")
    with sqlite3.connect(tmp_path / "old" / "mlflow.db") as connection:
        connection.execute("UPDATE experiments SET artifact_location = '/tmp/ray/x/0' WHERE experiment_id = 0")
    connection.close()
    shutil.move(tmp_path / "old", tmp_path / "new")
    database = tmp_path / "new" / "mlflow.db"
    ensure_database(database)
    client = MlflowClient(f"sqlite:///{database}")
    assert client.get_experiment("0").artifact_location == (tmp_path / "new" / "mlartifacts" / "0").as_uri()
    assert client.get_run(run.run_id).data.params["storage"] == str(tmp_path / "new")
    assert client.get_run(run.run_id).info.artifact_uri.startswith((tmp_path / "new" / "mlartifacts").as_uri())


def tracked(storage: Path, experiment: str) -> TrackedRun:
    """A training's run in a storage, with a model, found or made."""
    mlflow_utils._artifact_repos_cache.clear()  # as in another process: it knows runs by their ids alone
    artifacts = Storage(storage).artifacts(experiment)
    parameters = {"storage": str(storage), "shards": f"{storage}/shards", "near": f"{storage}-near/x"}
    tracker = Tracker(f"sqlite:///{storage}/mlflow.db", experiment, artifacts)
    run = tracker.run("train", "church-1", "1", params=parameters, tags={})
    run.checkpoint_model("m", 1, storage / "train/church/step-1", "0" * 64)
    return run
