"""Where a run comes from: the command and the code that made it, and the data that it read."""

import functools
import json
import shlex
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, TypeAlias

from mlflow.entities import Dataset, DatasetInput, InputTag
from mlflow.utils.mlflow_tags import (
    MLFLOW_DATASET_CONTEXT,
    MLFLOW_GIT_BRANCH,
    MLFLOW_GIT_COMMIT,
    MLFLOW_GIT_DIRTY,
    MLFLOW_SOURCE_NAME,
    MLFLOW_SOURCE_TYPE,
)

from ddpm_core.records import CODE_VERSION_TAG

ROOT = Path(__file__).resolve().parents[2]
LONGEST_COMMAND = 2000  # characters; MLflow takes 8,000 in a tag
GIT_PATIENCE = 10.0  # seconds
DIGEST = 12  # characters; MLflow takes 36, and its table shows them

DataInput: TypeAlias = DatasetInput


def code_version() -> str:
    """This project's version."""
    try:
        return version("ddpm-ray")
    except PackageNotFoundError:  # run from an uploaded working directory
        return "not installed"


def source_tags() -> dict[str, str]:
    """What MLflow shows as a run's source and version. The type is JOB, since of others its table cuts the name."""
    return {
        CODE_VERSION_TAG: code_version(),
        MLFLOW_SOURCE_TYPE: "JOB",
        MLFLOW_SOURCE_NAME: command(),
        **git_tags(),
    }


def command() -> str:
    """This process's command as a person at the project's root would type it. It holds no secret: those belong in the
    environment, and Ray lists the commands of its jobs too."""
    program, *arguments = sys.argv
    path = Path(program).resolve()
    program = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
    words = [*(["python"] if path.suffix == ".py" else []), program, *arguments]
    return shlex.join(words)[:LONGEST_COMMAND]


@functools.cache
def git_tags() -> dict[str, str]:
    """The commit and branch of the checkout that this code lies in, and whether it was changed since; none elsewhere."""

    def git(*arguments: str) -> str:
        words = ["git", "-C", str(ROOT), *arguments]
        done = subprocess.run(words, capture_output=True, text=True, timeout=GIT_PATIENCE, check=True)
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != ROOT:  # installed inside of another project
            return {}
        return {
            MLFLOW_GIT_COMMIT: git("rev-parse", "HEAD"),
            MLFLOW_GIT_BRANCH: git("rev-parse", "--abbrev-ref", "HEAD"),
            MLFLOW_GIT_DIRTY: str(bool(git("status", "--porcelain", "--untracked-files=no"))).lower(),
        }
    except (OSError, subprocess.SubprocessError):
        return {}


def data_input(
    name: str,
    sha256: str,
    card: Mapping[str, Any],
    folder: object,
    context: Literal["training", "evaluation"],
) -> DataInput:
    """A data set as the input of a run. card: its facts. folder: where it lies."""
    shape = " x ".join(map(str, card.get("shape") or ()))
    dataset = Dataset(
        name=name,
        digest=sha256[:DIGEST],
        source_type="local" if isinstance(folder, Path) else str(folder).partition(":")[0],  # the scheme, such as s3
        source=json.dumps({"uri": str(folder)}),
        schema=json.dumps({"mlflow_colspec": [{"name": "image", "type": f"uint8 {shape}", "required": True}]}),
        profile=json.dumps(card),
    )
    return DataInput(dataset, [InputTag(MLFLOW_DATASET_CONTEXT, context)])
