"""MLflow to one HTML file: python jobs/report.py --experiment ddpm --output report.html"""

import sys
from dataclasses import dataclass
from pathlib import Path

from jobs.cli import parse, run, say
from pipelines.locations import absolute
from pipelines.tracking import default_uri
from reports.build import build_report


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Which records to report on, and where to write the file."""

    output: str
    """The HTML file to write."""
    experiment: str = "ddpm"
    """The MLflow experiment."""
    storage: str = "runs"
    """The folder with the SQLite file that is read where no tracking URI is given."""
    tracking_uri: str | None = None
    """MLflow's; by default MLFLOW_TRACKING_URI, or an SQLite file in the storage folder."""


def main() -> None:
    config = parse(ReportConfig, sys.argv[1:], description="Write a report on everything in an MLflow experiment.")
    storage = absolute(config.storage, option="--storage")
    uri = config.tracking_uri or default_uri(storage)
    path = build_report(uri, config.experiment, Path(absolute(config.output, option="--output")))
    say(f"report: {path}")


if __name__ == "__main__":
    run(main)
