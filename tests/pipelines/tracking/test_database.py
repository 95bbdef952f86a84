"""The first use of a storage: many at once, kills, and what lies there already."""

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient
from support.processes import IMPORTED

from ddpm_core.errors import InputError
from pipelines.tracking.database import ensure_database
from pipelines.tracking.tracker import Tracker

MAKE = """
import sys
from pathlib import Path
from pipelines.tracking.database import ensure_database
print("ready", flush=True)
sys.stdin.readline()
ensure_database(Path(sys.argv[1]), Path(sys.argv[2]))
print("made", flush=True)
"""


def maker(database: Path) -> subprocess.Popen[str]:
    """A process that makes the database when it gets a line."""
    command = [sys.executable, "-c", MAKE, str(database), str(database.parent / "mlartifacts")]
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
    ensure_database(database, tmp_path)
    with sqlite3.connect(database) as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'bd07f7e963c5'")
    connection.close()
    with pytest.raises(
        InputError, match="was left half-made by a process that was killed, and holds no runs: delete it"
    ):
        ensure_database(database, tmp_path)
    with sqlite3.connect(database) as connection:
        connection.execute("INSERT INTO runs (run_uuid) VALUES ('a')")
    connection.close()
    with pytest.raises(
        InputError, match="is of another version of MLflow: make a copy of it, then run `mlflow db upgrade"
    ):
        ensure_database(database, tmp_path)


@pytest.mark.parametrize("content", [b"not a database at all" * 100, b"SQLite format 3\0" + bytes(4096)])
def test_another_file_in_its_place_is_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    database = tmp_path / "mlflow.db"
    database.write_bytes(content)
    with pytest.raises(InputError, match=r"^tracking database '.*' (is no SQLite database|was left half-made)"):
        ensure_database(database, tmp_path)
    assert database.read_bytes() == content


def test_a_storage_below_a_file_is_refused_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"^tracking database '.*' cannot be made \((File exists|Not a directory)\)"):
        ensure_database(tmp_path / "file" / "mlflow.db", tmp_path)
