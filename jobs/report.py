"""MLflow to one HTML file: python jobs/report.py --experiment ddpm --output report.html"""

import sys
from dataclasses import dataclass
from pathlib import Path

from ddpm_core.errors import InputError
from jobs.cli import parse, run, say
from pipelines.runtime.locations import absolute
from pipelines.tracking.tracker import default_uri
from reports.build import build_report


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Which records to report on, and where to write the file."""

    output: str
    """The HTML file to write; summaries go beside it, as .json for programs and as .md for a chat or pull request."""
    experiment: str = "ddpm"
    """The MLflow experiment."""
    run: str | None = None
    """A training run or a sweep, by its name or MLflow run id, to keep the report to; by default the whole experiment."""
    watts: float | None = None
    """What one device draws, to tell the energy by."""
    storage: str = "runs"
    """The folder with the SQLite file that is read where no tracking URI is given."""
    tracking_uri: str | None = None
    """MLflow's; by default MLFLOW_TRACKING_URI, or an SQLite file in the storage folder."""

    def __post_init__(self) -> None:
        if self.watts is not None and not 0 < self.watts < float("inf"):
            raise InputError(f"--watts is {self.watts:g}: give what a device draws, for example 700")


def main() -> None:
    config = parse(ReportConfig, sys.argv[1:], description="Write a report on everything in an MLflow experiment.")
    storage = absolute(config.storage, option="--storage")
    uri = config.tracking_uri or default_uri(storage)
    output = Path(absolute(config.output, option="--output"))
    path = build_report(uri, config.experiment, output, run=config.run, watts=config.watts)
    say(f"report: {path}")


if __name__ == "__main__":
    run(main)
