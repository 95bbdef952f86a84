"""What is new, evaluated every night: python jobs/nightly_eval.py --experiment ddpm --storage /shared/runs

Ends with 0 where all is well and 3 where there is a new alarm.
"""

import sys

from jobs.cli import parse, run, say
from pipelines.locations import absolute
from pipelines.nightly import delivered, nightly, notes_of
from pipelines.nightly_config import NightlyConfig
from pipelines.tracking import default_uri
from reports.build import build_report


def main() -> None:
    config = parse(NightlyConfig, sys.argv[1:], description="Evaluate the checkpoints that have no result yet.")
    result = nightly(config, say)
    if config.dry_run:
        return
    report = notes_of(config).folder / "report.html"
    try:
        uri = config.tracking_uri or default_uri(absolute(config.storage, option="--storage"))
        say(f"nightly: report {build_report(uri, config.experiment, report)}")
    finally:
        alarmed = delivered(config, result, report, say)
        for line in result.describe():
            say(f"nightly: {line}")
    if alarmed:
        sys.exit(3)


if __name__ == "__main__":
    run(main)
