#!/usr/bin/env python3
"""MLflow to one HTML file: python jobs/report.py --experiment ddpm --output report.html"""

import sys
from dataclasses import dataclass
from pathlib import Path

import reports
from ddpm_core.errors import one_line
from ddpm_core.ranges import FilePath, Positive
from jobs.cli import parse, run, say
from pipelines.runtime.layout import LocalStorage, by_prefix, local_storage
from pipelines.runtime.locations import absolute
from pipelines.runtime.options import StorageOptions
from pipelines.tracking.uri import sqlite_file, tracking_uri


@dataclass(frozen=True, kw_only=True)
class ReportConfig(StorageOptions):
    """Which records to report on, and where to write the file."""

    output: FilePath
    """The HTML file to write; summaries go beside it, as .json for programs and as .md for a chat or pull request."""
    run: FilePath | None = None
    """A training run or a sweep, by its name or MLflow run id, to keep the report to; by default the whole experiment."""
    watts: Positive[float] | None = None
    """What one device draws, to tell the energy by."""


def main() -> None:
    config = parse(ReportConfig, sys.argv[1:], description="Write a report on everything in an MLflow experiment.")
    uri = tracking_uri(config, local_storage(config.storage))
    database = sqlite_file(uri)
    if database is not None and database.is_file():
        from pipelines.tracking.database import ensure_database  # here: --help need not wait for MLflow

        ensure_database(database)  # which may have been moved
    output = Path(absolute(config.output, option="--output"))
    run = config.run and whole_name(config.run, local_storage(config.storage))
    path = reports.build_report(uri, config.experiment, output, run=run, watts=config.watts)
    if config.run is None:
        keep_in_mlflow(path, config)
    say(f"report: {path}")


def whole_name(given: str, storage: LocalStorage) -> str:
    """The run or sweep of this storage whose name or fingerprint begins so; what is none stays as it is."""
    folders = [folder for place in (storage.trainings, storage.sweeps) if place.is_dir() for folder in place.iterdir()]
    return by_prefix(given, [folder.name for folder in folders], "run") or given


def keep_in_mlflow(report: Path, config: StorageOptions) -> None:
    """Put the report of a whole experiment into MLflow too, or say why that failed: it is written all the same."""
    try:
        from pipelines.tracking.tracker import open_tracker  # here: --help need not wait for MLflow
        from pipelines.tracking.ui import log_report

        log_report(open_tracker(config, local_storage(config.storage)), report)
    except Exception as error:
        say(f"report: not put into MLflow ({one_line(error)})")


if __name__ == "__main__":
    run(main)
