#!/usr/bin/env python3
"""Evaluate what is new, every night: python jobs/nightly_eval.py --experiment ddpm --storage /shared/runs

The exit code is 0 if all is well and 3 if there is a new alarm. jobs/cluster/render.py makes schedules that start it.
"""

import sys

from jobs.cli import parse, run, say
from jobs.report import keep_in_mlflow, write_report
from pipelines import nightly
from pipelines.nightly.config import NightlyConfig
from pipelines.storage.layout import open_storage
from pipelines.tracking.uri import tracking_uri


def main() -> None:
    config = parse(NightlyConfig, sys.argv[1:], description="Evaluate the checkpoints that have no result yet.")
    result = nightly.nightly(config, say)
    if config.dry_run:
        return
    storage, code = open_storage(config.storage), 0
    report = storage.nights(config.experiment) / "report.html"
    try:
        write_report(tracking_uri(config, storage), config, report)
        keep_in_mlflow(report, config)
        say(f"nightly: report {report}")
    except Exception as error:  # an alarm must get out all the same
        say(f"nightly: the report could not be written ({type(error).__name__}: {error})")
        code = 1
    for line in result.describe():
        say(f"nightly: {line}")
    sys.exit(3 if nightly.deliver_alarms(config, result, report, say) else code)


if __name__ == "__main__":
    run(main)
