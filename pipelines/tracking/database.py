"""MLflow's SQLite database: made whole or not at all, whoever is killed and however many come at once.

MLflow makes its tables by some hundred migrations in the file itself. A kill among them leaves a file that it never opens
again, and of two processes that make it at once one dies. Here it is made under another name, under a lock, and renamed.

MLflow keeps absolute places: of artifacts, and our tags those of checkpoints. When the folder of a database was moved or copied
with all that is in it, the places in that folder are brought up to date before MLflow opens it.
"""

import os
import secrets
import shlex
import sqlite3
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from filelock import FileLock
from mlflow.exceptions import MlflowException
from mlflow.store.db.utils import _get_latest_schema_revision
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from sqlalchemy.exc import SQLAlchemyError

from ddpm_core.errors import InputError, one_line
from pipelines.storage.layout import Storage

# (table, column) of every place that MLflow or this project writes.
PLACES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("params", "value"),
    ("tags", "value"),
    ("datasets", "dataset_source"),
    ("logged_models", "artifact_location"),
    ("logged_model_tags", "tag_value"),
    ("model_versions", "storage_location"),
    ("model_version_tags", "value"),
)
WAIT = 300.0  # seconds for another process that makes the database


def ensure_database(path: Path) -> None:
    """Make the database if it is not there, and have it say where things lie now if its folder was moved.

    Raises InputError if something else lies there, or what a killed process of an earlier version left.
    """
    if not is_there(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{path}.lock", timeout=WAIT):
                if not is_there(path):
                    make(path)
        except (OSError, SQLAlchemyError, MlflowException) as error:
            reason = getattr(error, "strerror", None) or one_line(error)
            raise InputError(
                f"tracking database {str(path)!r} cannot be made ({reason}): make room, or give a --storage "
                "that can be written to"
            ) from error
    check_whole(path)
    follow_move(path)


def is_there(path: Path) -> bool:
    """Whether something is there; an empty file is what SQLite makes when it only opens one."""
    return path.exists() and (not path.is_file() or path.stat().st_size > 0)


def default_artifacts(path: Path) -> Path:
    """MLflow's artifacts of its experiment 0, which it makes with the database: this says where the database lies."""
    return artifacts_in(path.parent, "0")


def artifacts_in(folder: Path, experiment: str) -> Path:
    """Where MLflow's artifacts of an experiment lie in a storage on this disk."""
    return Path(str(Storage(folder).artifacts(experiment)))


def make(path: Path) -> None:
    """Make the database, under the lock."""
    for left in path.parent.glob(f".{path.name}.tmp*"):  # of a killed process, with SQLite's journal
        left.unlink()
    temporary = path.with_name(f".{path.name}.tmp-{secrets.token_hex(4)}")  # MLflow keeps an open file by its name
    store = SqlAlchemyStore(f"sqlite:///{temporary}", default_artifacts(path).parent.as_uri())
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
            f"{shlex.quote(f'sqlite:///{path}')}`"
        )
    raise InputError(
        f"tracking database {str(path)!r} was left half-made by a process that was killed, and holds no runs: delete it, and "
        "run the same command again"
    )


def follow_move(path: Path) -> None:
    """Bring the places in a database up to date if its folder was moved or copied. Raises InputError if it cannot be written
    to."""
    folder = path.parent
    with sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True) as connection:
        before = recorded_folder(connection, path)
    connection.close()
    if before == folder:
        return
    if before is not None and same_file(before / path.name, path):
        return  # reached another way: a second mount, a link
    try:
        with FileLock(f"{path}.lock", timeout=WAIT):
            connection = sqlite3.connect(path, timeout=WAIT, isolation_level=None)
            try:
                connection.execute("BEGIN IMMEDIATE")
                before = recorded_folder(connection, path)  # another process may have been quicker
                if before is not None and before != folder:
                    move_places(connection, before, folder)
                connection.execute(
                    "UPDATE experiments SET artifact_location = ? WHERE experiment_id = 0",
                    [default_artifacts(path).as_uri()],
                )
                connection.execute("COMMIT")
            finally:
                connection.close()
    except (OSError, sqlite3.Error) as error:
        if before is None:  # of an earlier version, on a disk that can only be read: nothing has moved
            return
        raise InputError(
            f"tracking database {str(path)!r} was moved here from {str(before)!r}, and the places in it cannot be brought up to "
            f"date ({error}): make it writable, or move it back"
        ) from error


def recorded_folder(connection: sqlite3.Connection, path: Path) -> Path | None:
    """The folder of a database when its places were last brought up to date, None if it does not say."""
    places = connection.execute("SELECT experiment_id, name, artifact_location FROM experiments").fetchall()
    folders = {}
    for number, name, place in places:
        artifacts = artifacts_in(path.parent, "0" if number == 0 else name)
        end = f"/{artifacts.relative_to(path.parent).as_posix()}"
        located = url2pathname(urlsplit(place or "").path)
        if located.endswith(end):
            folders[number] = Path(located.removesuffix(end))
    if 0 in folders:
        return folders[0]
    # Of an earlier version, whose experiment 0 lies anywhere.
    others = set(folders.values())
    if path.parent in others:
        return None
    left = [folder for folder in others if not (folder / path.name).exists()]
    return left[0] if len(left) == 1 else None


def same_file(one: Path, other: Path) -> bool:
    """Whether two paths lead to one file."""
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


def move_places(connection: sqlite3.Connection, before: Path, now: Path) -> None:
    """Replace a folder at the start of every place, as a path, a file URI, or a path in JSON."""
    for table, column in PLACES:
        for old, new in ((str(before), str(now)), (before.as_uri(), now.as_uri())):
            connection.execute(
                f"UPDATE {table} SET {column} = ? || substr({column}, length(?) + 1) "
                f"WHERE {column} = ? OR substr({column}, 1, length(?) + 1) = ? || '/'",
                [new, old, old, old, old],
            )
            if table == "datasets":
                connection.execute(f"UPDATE {table} SET {column} = replace({column}, ?, ?)", [f'"{old}/', f'"{new}/'])
