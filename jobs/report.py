#!/usr/bin/env python3
"""MLflow to one HTML file: python jobs/report.py --experiment ddpm --output report.html"""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import reports
from ddpm_core.errors import InputError, one_line
from ddpm_core.ranges import FilePath, Positive
from jobs.cli import parse, run, say
from pipelines.runtime.options import StorageOptions
from pipelines.storage.layout import Storage, by_prefix, open_storage
from pipelines.storage.locations import Location, check_writable, commit_bytes, location
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
    uri = tracking_uri(config, open_storage(config.storage))
    database = sqlite_file(uri)
    if database is not None and database.is_file():
        from pipelines.tracking.database import ensure_database  # here: --help need not wait for MLflow

        ensure_database(database)  # which may have been moved
    output = location(config.output, option="--output")
    run = config.run and whole_name(config.run, open_storage(config.storage))
    write_report(uri, config, output, run=run, watts=config.watts)
    if config.run is None:
        keep_in_mlflow(output, config)
    say(f"report: {output}")


def write_report(
    uri: str, config: StorageOptions, output: Location, *, run: str | None = None, watts: float | None = None
) -> None:
    """Write the report of an experiment and its summaries to a path or URL, each file whole or not at all. Raises InputError as
    `reports.build_report` does, and for a place that cannot be written to."""
    if not output.name:
        raise InputError(f"--output is {str(output)!r}, which names no file: give the name of an .html file in it")
    check_writable(output.parent, "--output")
    if isinstance(output, Path):
        reports.build_report(uri, config.experiment, output, run=run, watts=watts)
        return
    with tempfile.TemporaryDirectory(prefix="ddpm-") as folder:
        local = Path(folder) / output.name
        before = output.with_suffix(".json")
        if before.is_file():  # what a report says of what changed since
            local.with_suffix(".json").write_bytes(before.read_bytes())
        reports.build_report(uri, config.experiment, local, run=run, watts=watts)
        for suffix in (local.suffix, ".md", ".json"):
            commit_bytes(output.with_suffix(suffix), local.with_suffix(suffix).read_bytes())


def whole_name(given: str, storage: Storage) -> str:
    """The run or sweep of this storage whose name or fingerprint begins so; what is none stays as it is."""
    folders = [folder for place in (storage.trainings, storage.sweeps) if place.is_dir() for folder in place.iterdir()]
    return by_prefix(given, [folder.name for folder in folders], "run") or given


def keep_in_mlflow(report: Location, config: StorageOptions) -> None:
    """Put the report of a whole experiment into MLflow too, or say why that failed: it is written all the same."""
    try:
        from pipelines.tracking.tracker import open_tracker  # here: --help need not wait for MLflow
        from pipelines.tracking.ui import log_report

        log_report(open_tracker(config, open_storage(config.storage)), report)
    except Exception as error:
        say(f"report: not put into MLflow ({one_line(error)})")


if __name__ == "__main__":
    run(main)
