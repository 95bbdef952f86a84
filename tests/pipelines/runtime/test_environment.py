"""The environment of a job: what the user chose stays, and MLflow finds the rest when it is imported."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.processes import ROOT

from pipelines.runtime.environment import VARIABLES, prepare


def output_of(code: str) -> str:
    """What a program prints, logs and warnings too, in a process without the variables that this one has set."""
    environment = {key: value for key, value in os.environ.items() if key not in VARIABLES}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.stdout.strip()


def test_what_the_user_has_chosen_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    database = logging.getLogger("mlflow.store.db.utils")
    monkeypatch.delenv("RAY_AIR_NEW_OUTPUT")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "7")
    monkeypatch.setattr(database, "level", logging.DEBUG)
    prepare()
    assert os.environ["RAY_AIR_NEW_OUTPUT"] == "0"
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "7"
    assert database.level == logging.DEBUG


def test_no_job_imports_mlflow_before_the_environment_is_prepared() -> None:
    jobs = ", ".join(f"jobs.{path.stem}" for path in (ROOT / "jobs").glob("*.py") if path.stem != "__init__")
    assert output_of(f"import sys, {jobs}; print('mlflow' in sys.modules)") == "False"


def test_preparing_imports_nothing_that_reads_the_environment() -> None:
    code = "import sys, pipelines.runtime.environment as e; e.prepare(); print({'mlflow', 'ray', 'torch'} & {*sys.modules})"
    assert output_of(code) == "set()"


def test_mlflow_says_nothing_about_a_new_database(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from pipelines.runtime.environment import prepare
prepare()
from pipelines.tracking.tracker import Tracker
Tracker("sqlite:///{tmp_path}/mlflow.db", "tests", Path("{tmp_path}"))
"""
    assert output_of(code) == ""
    assert (tmp_path / "mlflow.db").is_file()
