"""MLflow's SQLite database: made whole or not at all, whoever is killed and however many come at once.

MLflow makes its tables by some hundred migrations in the file itself. A kill among them leaves a file that it never opens
again, and of two processes that make it at once one dies. Here it is made under another name, under a lock, and renamed.
"""

import os
import sqlite3
from pathlib import Path

from filelock import FileLock
from mlflow.store.db.utils import _get_latest_schema_revision
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

from ddpm_core.errors import InputError

WAIT = 300.0  # seconds for another process that makes the database


def ensure_database(path: Path, artifacts: Path) -> None:
    """Make the database if it is not there. artifacts: the folder of experiments that name none of their own.

    Raises InputError if something else lies there, or what a killed process of an earlier version left.
    """
    if not is_there(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{path}.lock", timeout=WAIT):
                if not is_there(path):
                    make(path, artifacts)
        except OSError as error:
            raise InputError(
                f"tracking database {str(path)!r} cannot be made ({error.strerror or error}): make room, or give a --storage "
                "that can be written to"
            ) from error
    check_whole(path)


def is_there(path: Path) -> bool:
    """Whether something is there; an empty file is what SQLite makes when it only opens one."""
    return path.exists() and (not path.is_file() or path.stat().st_size > 0)


def make(path: Path, artifacts: Path) -> None:
    """Make the database, under the lock."""
    temporary = path.with_name(f".{path.name}.tmp")
    for left in path.parent.glob(f"{temporary.name}*"):  # of a killed process, with SQLite's journal
        left.unlink()
    store = SqlAlchemyStore(f"sqlite:///{temporary}", artifacts.as_uri())
    store.engine.dispose()
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.rename(path)


def check_whole(path: Path) -> None:
    """Raises InputError if a file is no database of this MLflow."""
    try:
        connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
        try:
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            revisions = [row[0] for row in connection.execute("SELECT version_num FROM alembic_version")]
            runs = connection.execute("SELECT count(*) FROM runs").fetchone()[0] if "runs" in tables else 0
        finally:
            connection.close()
    except sqlite3.DatabaseError as error:
        if "no such table" not in str(error):
            raise InputError(
                f"tracking database {str(path)!r} is no SQLite database that can be read ({error}): move it away, or give "
                "another --tracking-uri"
            ) from error
        revisions, runs = [], 0
    if revisions == [_get_latest_schema_revision()]:
        return
    if runs:
        raise InputError(
            f"tracking database {str(path)!r} is of another version of MLflow: make a copy of it, then run `mlflow db upgrade "
            f"sqlite:///{path}`"
        )
    raise InputError(
        f"tracking database {str(path)!r} was left half-made by a process that was killed, and holds no runs: delete it, and "
        "run the same command again"
    )
