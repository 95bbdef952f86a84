"""A real `mlflow server` on a real PostgreSQL, either of which can be killed and started again."""

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import requests

from pipelines.tracking.tracker import Tracker


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def wait_until(condition: Callable[[], Any], seconds: float = 120.0) -> None:
    """Wait until a condition holds, and fail if it does not in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def postgres_binary(name: str) -> str | None:
    """The path of a program of PostgreSQL's, None if it is not installed. Debian keeps them off $PATH."""
    versions = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return shutil.which(name) or (str(versions[-1]) if versions else None)


def why_no_postgres() -> str | None:
    """Why PostgreSQL cannot run here, None if it can."""
    missing = [name for name in ("initdb", "postgres") if postgres_binary(name) is None]
    if missing:
        return f"PostgreSQL is not installed: there is no {missing[0]}"
    try:
        import psycopg2  # noqa: F401
    except ImportError:
        return "psycopg2 is not installed"
    return None


class Postgres:
    """A database server in a folder of its own. It refuses to run as root, so root runs it as nobody."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="pg-"))
        self.user: str | None = None
        if os.geteuid() == 0:
            self.user = "nobody"
            os.chown(self.folder, pwd.getpwnam(self.user).pw_uid, -1)
        self.port = free_port()
        self.data = self.folder / "data"
        command = [postgres_binary("initdb"), "-D", self.data, "-U", "mlflow", "-A", "trust", "-E", "UTF8", "--no-sync"]
        subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL, user=self.user, cwd="/")
        self.start()

    @property
    def uri(self) -> str:
        return f"postgresql+psycopg2://mlflow@127.0.0.1:{self.port}/postgres"  # SQLAlchemy 2.1 prefers psycopg 3

    def start(self) -> None:
        place = ["-D", self.data, "-k", self.folder, "-h", "127.0.0.1", "-p", self.port, "-c", "fsync=off"]
        self.process = subprocess.Popen(
            list(map(str, [postgres_binary("postgres"), *place])),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            user=self.user,
            cwd="/",
        )
        wait_until(self.answers)

    def answers(self) -> bool:
        import psycopg2

        try:
            psycopg2.connect(host="127.0.0.1", port=self.port, user="mlflow", dbname="postgres").close()
        except psycopg2.OperationalError:
            return False
        return True

    def stop(self) -> None:
        """Stop it at once, with every connection broken."""
        self.process.send_signal(signal.SIGQUIT)
        self.process.wait()

    def remove(self) -> None:
        self.stop()
        shutil.rmtree(self.folder)


class Server:
    """An `mlflow server`, at the same address whenever it is started."""

    def __init__(self, backend: str, artifacts: Path) -> None:
        self.port = free_port()
        self.backend, self.artifacts = backend, artifacts
        self.start()

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        options = [
            "--backend-store-uri",
            self.backend,
            "--artifacts-destination",
            str(self.artifacts),
            "--workers",
            "1",
        ]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), *options],
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        wait_until(self.answers)

    def answers(self) -> bool:
        """Whether it answers from its database: a server that starts without one waits for it for minutes."""
        assert self.process.poll() is None, "the server ended by itself"
        try:
            return requests.get(f"{self.uri}/api/2.0/mlflow/experiments/get?experiment_id=0", timeout=5).ok
        except OSError:
            return False

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextlib.contextmanager
def tracking_server(artifacts: Path) -> Iterator[tuple[Server, Postgres]]:
    """A server and its database, both running."""
    postgres = Postgres()
    try:
        server = Server(postgres.uri, artifacts)
        try:
            yield server, postgres
        finally:
            server.kill()
    finally:
        postgres.remove()


STEPS = 12


def write_runs(tracker: Tracker, writer: str, until: threading.Event | None = None) -> list[str]:
    """Write runs with records, models and files, one after the other, at least one, until the event is set. Their names."""
    names: list[str] = []
    while not names or (until is not None and not until.is_set()):
        name = f"{writer}-{len(names)}"
        run = tracker.run("train", name, "f", params={"a": "1", "b": "2"}, tags={"ddpm.data": "none"})
        for step in range(STEPS):
            run.log_records([{"step": step, "loss": step / 7, "lr": 1e-4}])
            if step % 4 == 0:
                run.checkpoint_model(f"{name}-step-{step}", step, f"/nowhere/{step}", "0")
        run.log_json("config.json", {"name": name})
        run.finish()
        names.append(name)
    return names


def outages(uri: str) -> Tracker:
    """The experiment that such runs are written to."""
    return Tracker(uri, "outages", Path("/"))
